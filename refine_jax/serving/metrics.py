"""Numbers for Prometheus."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_PREFIX = "refine_jax_"
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_TOKENS_A_PASS = (1, 1.5, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32)


class Metrics:
  """The counters of one server.

  Attributes:
    http: requests by endpoint and status.
    seconds: of requests, by endpoint.
    cancelled: rows that ended before their answer did: a client left, or its time was over.
    first_token, between_pieces: seconds of streams.
  """

  def __init__(self) -> None:
    self._registry = CollectorRegistry()

    def counter(name, what, *labels):
      return Counter(_PREFIX + name, what, labels, registry=self._registry)

    def histogram(name, what, buckets, *labels):
      return Histogram(_PREFIX + name, what, labels, buckets=buckets, registry=self._registry)

    self.http = counter("requests", "Requests answered", "endpoint", "status")
    self.seconds = histogram("request_seconds", "Time of a request", _SECONDS, "endpoint")
    self.cancelled = counter("rows_cancelled", "Rows that ended before their answer")
    self.first_token = histogram("first_token_seconds", "Streams: to the first token", _SECONDS)
    self.between_pieces = histogram("between_pieces_seconds", "Streams: between pieces", _SECONDS)
    self._prompt_tokens = counter("prompt_tokens", "Tokens of the prompts of ended answers")
    self._tokens = counter("tokens", "Tokens of ended answers")
    self._passes = counter("passes", "Passes of ended answers")
    per_pass = "Tokens a pass of ended answers"
    self._tokens_a_pass = histogram("tokens_a_pass", per_pass, _TOKENS_A_PASS)

  def watch(self, open_rows: Callable[[], int], rows: Callable[[], int], slots: int) -> None:
    """Makes gauges of what the scheduler counts."""
    gauges = {
      "open_rows": ("Answers that were asked for and not handed out", open_rows),
      "slots": ("Rows that decode at a time", lambda: slots),
      "slots_busy": ("Slots in use", lambda: min(rows(), slots)),
      "queue": ("Rows that wait for a slot", lambda: max(rows() - slots, 0)),
    }
    for name, (what, function) in gauges.items():
      Gauge(_PREFIX + name, what, registry=self._registry).set_function(function)

  def ended(self, prompt: int, tokens: int, passes: int) -> None:
    """Counts an answer: tokens of its prompt, its own, and its passes."""
    self._prompt_tokens.inc(prompt)
    self._tokens.inc(tokens)
    self._passes.inc(passes)
    if passes:
      self._tokens_a_pass.observe(tokens / passes)

  def text(self) -> bytes:
    """All of them, in Prometheus' format."""
    return generate_latest(self._registry)
