"""Clients of a server in a process of their own, which benchmarks/server.py starts."""

import argparse
import asyncio
import json
import random
import statistics
import time

if not __package__:  # Python has put benchmarks/ on its path, not the folder around it
  raise SystemExit("error: run it from the repository's root as python -m benchmarks.streams")


def prompts(count: int, length: int, vocabulary: int) -> list[list[int]]:
  """Random token ids, the same in every process."""
  draw = random.Random(0)
  return [[draw.randrange(vocabulary) for _ in range(length)] for _ in range(count)]


def main():
  """Prints medians as JSON: the streams' rate, and the time to a lone stream's first piece."""
  parser = argparse.ArgumentParser(description=__doc__)
  for name in ("port", "vocabulary", "streams", "new", "prompt", "repeats"):
    parser.add_argument(f"--{name}", type=int, required=True)
  print(json.dumps(asyncio.run(_measured(parser.parse_args()))))


async def _measured(arguments) -> dict:
  wanted = prompts(arguments.streams, arguments.prompt, arguments.vocabulary)
  first, between, rates = [], [], []
  for _ in range(4 * arguments.repeats):
    await asyncio.sleep(0.05)
    start = time.perf_counter()
    first.append((await _stream(arguments, wanted[0]))[0] - start)
  for _ in range(arguments.repeats):
    start = time.perf_counter()
    streams = await asyncio.gather(*(_stream(arguments, prompt) for prompt in wanted))
    rates.append(arguments.streams * arguments.new / (time.perf_counter() - start))
    between += [b - a for times in streams for a, b in zip(times, times[1:], strict=False)]
  return {
    "tokens_per_second": statistics.median(rates),
    "first_token_ms": statistics.median(first) * 1e3,
    "between_pieces_ms": statistics.median(between) * 1e3,
    "between_pieces_99_ms": statistics.quantiles(between, n=100)[-1] * 1e3,
  }


async def _stream(arguments, prompt: list[int]) -> list[float]:
  """When each piece of an answer came."""
  body = json.dumps(
    {"prompt": prompt, "max_tokens": arguments.new, "temperature": 0, "stream": True}
  ).encode()
  head = (
    "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
  )
  reader, writer = await asyncio.open_connection("127.0.0.1", arguments.port)
  writer.write(head.encode() + body)
  times, done = [], False
  async for line in reader:
    if line.startswith(b"data: {"):
      times.append(time.perf_counter())
    done |= line.startswith(b"data: [DONE]")
  writer.close()
  assert done, "a stream broke off"
  return times


if __name__ == "__main__":
  main()
