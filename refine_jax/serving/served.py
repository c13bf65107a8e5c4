"""What is served: a model under a name, how its rows are decoded, and the limits."""

import dataclasses

from refine_jax.decoding.loading import Model
from refine_jax.decoding.options import Options


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
  """What the server takes.

  Attributes:
    context: tokens of a prompt and its answer.
    max_tokens: of an answer.
    rows: answers that one request asks for: prompts times n.
    queue: answers that wait for a slot; beyond, a request is told to come again.
    body_bytes: of a request.
    body_seconds: in which the body has come.
    seconds: from the body to the end of the answer, waiting included.
    grace: seconds that answers have for their end when the server is told to end.
    trace_tokens: of an answer whose passes are shown; 0: none is.
  """

  context: int
  max_tokens: int
  rows: int = 128
  queue: int = 256
  body_bytes: int = 4 << 20
  body_seconds: float = 30.0
  seconds: float = 600.0
  grace: float = 30.0
  trace_tokens: int = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Served:
  """Attributes:
  name: of the model, for clients.
  model: as loaded; it has a tokenizer.
  options: whose mode, draft and block size the engine has; a request sets the rest.
  limits: as above.
  prefix: what a text without a chat template begins with (BOS), as ids.
  created: when the server was started, in seconds since 1970.
  api_key: what clients must send; "" where anybody may ask.
  local: whether only names of this machine are answered to. A page from elsewhere whose name was
    made to lead here (DNS rebinding) could ask in its reader's browser otherwise.
  """

  name: str
  model: Model
  options: Options
  limits: Limits
  prefix: list[int]
  created: int
  api_key: str = ""
  local: bool = False

  @property
  def chats(self) -> bool:
    """Whether there is a chat template."""
    return bool(self.model.require_tokenizer().chat_template or self.options.chat_template)
