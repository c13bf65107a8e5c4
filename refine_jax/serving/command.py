"""Serves a model to any client of OpenAI's protocol.

    python -m refine_jax.serve --model=DIR [--port=8000]

Then http://127.0.0.1:8000/ is a page to chat on, and clients take http://127.0.0.1:8000/v1 as their
base URL. docs/server.md has the endpoints, the limits, and what is not supported. Needs the
packages: pip install -e '.[serve]'.
"""

import argparse
import contextlib
import importlib.util
import logging
import os
import signal
import socket
import sys
import time
from pathlib import Path

import jax

from refine_jax.cli import entry_point, whole_number
from refine_jax.decoding import loading
from refine_jax.decoding.engine import Engine
from refine_jax.decoding.options import DRAFTS, MODES, Options
from refine_jax.decoding.requests import requests
from refine_jax.errors import UserError
from refine_jax.files import local_path
from refine_jax.hf import export as hf_export
from refine_jax.serving.served import Limits, Served
from refine_jax.text.tokenizer import prefix_ids

KEY_VARIABLE = "REFINE_JAX_API_KEY"
# With the pieces of prompts behind them, these fill caches of 1,024 and 4,096 places.
_SLOTS, _CONTEXT = {"cpu": 4}, {"cpu": 896}
_SLOTS_ELSEWHERE, _CONTEXT_ELSEWHERE = 32, 3968
_LAST_PORT = 65535
_LOOPBACK = ("127.", "::1", "localhost")
_PACKAGES = ("starlette", "uvicorn", "prometheus_client")
_log = logging.getLogger(__name__)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
  """The arguments."""
  parser = argparse.ArgumentParser(
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument

  def number(name, default, what, least=1):
    shown = what if default is None else f"{what} ({default})"
    add(f"--{name}", type=whole_number(f"--{name}", least), default=default, help=shown)

  add("--model", required=True, help="Hugging Face directory, hub name or workdir")
  number("step", None, "of a workdir; default: its newest checkpoint", 0)
  add("--dtype", help=f"{', '.join(hf_export.DTYPES)}; default: as stored")
  add("--chat_template", default="", help="a Jinja template, for a model that has none")
  add("--name", help="of the model, for clients; default: the last part of --model")
  add("--host", default="127.0.0.1", help="address to listen at (127.0.0.1: this machine only)")
  number("port", 8000, "0: a free one", 0)
  add("--api_key_file", help=f"a file with the key that clients send; or {KEY_VARIABLE}")
  group = parser.add_argument_group("limits")
  add = group.add_argument
  number("slots", None, "answers that decode at a time (32; 4 on a CPU; fewer if memory is short)")
  number("context", None, "tokens of a prompt and its answer (3968; 896 on a CPU)", 2)
  number("max_tokens", None, "most tokens of an answer (the context)")
  number("queue", 256, "answers that wait for a slot, before clients are sent away with 429", 0)
  number("body_bytes", Limits.body_bytes, "of a request")
  number("seconds", 600, "of a request, waiting included")
  number("grace", 30, "seconds that answers have for their end after SIGTERM", 0)
  number("trace_tokens", 1024, "most tokens of an answer whose passes are shown; 0: none is", 0)
  group = parser.add_argument_group("decoding", "the same for all requests")
  add = group.add_argument
  add("--mode", default="exact", help=f"{', '.join(MODES)} (exact)")
  number("block_size", None, "tokens that a pass can commit (chosen; as trained, or 8)")
  add("--draft", help=f"{', '.join(DRAFTS)} (auto; with --block_size by training)")
  number("refine_iter", 2, "passes a block, mode fixed")
  add("--tau", type=float, default=0.9, help="probability, mode threshold (0.9)")
  return parser.parse_args(argv)


def options_of(arguments: argparse.Namespace) -> Options:
  """The options of decoding that all requests share.

  Raises:
    UserError: one that cannot be.
  """
  names = ("mode", "block_size", "draft", "refine_iter", "tau", "chat_template")
  return Options(**{name: getattr(arguments, name) for name in names})


def read_key(path: str | None) -> str:
  """The API key of the file or of the environment; "" where there is neither.

  Raises:
    UserError: the file cannot be read, or has no key in one line of ASCII.
  """
  if not path:
    return os.environ.get(KEY_VARIABLE, "").strip()
  file = local_path(path, "--api_key_file")
  try:
    key = file.read_text(encoding="ascii").strip()
  except (OSError, ValueError) as error:
    why = error.strerror if isinstance(error, OSError) else "it is not ASCII"
    raise UserError(f"{file} (--api_key_file) cannot be read: {why}.") from error
  if not key or len(key.split()) > 1:
    raise UserError(f"{file} (--api_key_file) must hold one key, on one line.")
  return key


def bind(host: str, port: int) -> socket.socket:
  """A socket at the address, which does not listen yet.

  Raises:
    UserError: it cannot be had.
  """
  if port > _LAST_PORT:  # which the system would take modulo 65,536
    raise UserError(f"--port={port} must be at most {_LAST_PORT}.")
  try:
    family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with contextlib.ExitStack() as stack:
      place = stack.enter_context(socket.socket(family, kind))
      place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
      place.bind(address)
      stack.pop_all()
  except OSError as error:
    why = error.strerror or error
    raise UserError(f"Cannot listen at --host={host} --port={port}: {why}.") from error
  return place


def make_engine(model: loading.Model, arguments: argparse.Namespace, options: Options) -> Engine:
  """The engine, with as many slots as were asked for, or as memory has room for.

  Raises:
    UserError: there is no room for it.
  """
  backend = jax.default_backend()
  slots = arguments.slots or _SLOTS.get(backend, _SLOTS_ELSEWHERE)
  context = arguments.context or _CONTEXT.get(backend, _CONTEXT_ELSEWHERE)
  while True:
    engine = Engine(model, slots, context, options, eos_ids=len(model.eos_token_ids))
    try:
      (longest,) = requests(model, [[0] * (engine.context - 1)], options)
      engine.check(longest)
      return engine
    except UserError:
      if arguments.slots or slots == 1:
        raise
      slots //= 2


def served_of(
  model: loading.Model, arguments: argparse.Namespace, options: Options, context: int, key: str = ""
) -> Served:
  """What is served, of what the command says."""
  names = ("queue", "body_bytes", "seconds", "grace", "trace_tokens")
  limits = Limits(
    context=context,
    max_tokens=min(arguments.max_tokens or context, context),
    **{name: getattr(arguments, name) for name in names},
  )
  return Served(
    name=arguments.name or _name(arguments.model),
    model=model,
    options=options,
    limits=limits,
    prefix=prefix_ids(model.require_tokenizer()),
    created=int(time.time()),
    api_key=key,
    local=not key and arguments.host.startswith(_LOOPBACK),
  )


def _name(model: str) -> str:
  """The last part of a path, or a hub name."""
  return (Path(model).resolve().name if Path(model).exists() else model) or "model"


@entry_point
def main() -> int:
  arguments = parse()
  options, key = options_of(arguments), read_key(arguments.api_key_file)
  if arguments.dtype not in (None, *hf_export.DTYPES):
    raise UserError(f"--dtype={arguments.dtype} must be one of {', '.join(hf_export.DTYPES)}.")
  missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
  if missing:
    raise UserError(f"{', '.join(missing)} is not installed; pip install -e '.[serve]'")
  from refine_jax.serving import server

  logging.basicConfig(
    level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr
  )
  logging.getLogger("uvicorn").setLevel(logging.WARNING)
  # Until the server has its own: before it answers anybody, nothing is to be finished.
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
  with bind(arguments.host, arguments.port) as place:
    if not key and not arguments.host.startswith(_LOOPBACK):
      _log.warning("Anybody who reaches %s may ask; --api_key_file sets a key.", arguments.host)
    model = loading.load(arguments.model, dtype=arguments.dtype, step=arguments.step)
    if model.require_tokenizer().chat_template and arguments.chat_template:
      raise UserError(
        f"{arguments.model} has a chat template, which its training used; leave --chat_template"
        " out."
      )
    engine = make_engine(model, arguments, options)
    return server.run(served_of(model, arguments, options, engine.context, key), engine, place)
