"""The one exception for what a user can cause and mend."""


class UserError(Exception):
  """A mistake in the input: its message says what is wrong, where, and what to do.

  The command-line entry points print the message as one line and exit with status 1;
  anything else keeps its traceback, because it is a fault of ours.
  """

  def __init__(self, message: str):
    super().__init__(" ".join(message.split()))
