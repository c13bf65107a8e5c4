"""Uploads a release to the Hugging Face hub."""

import re
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors as hub_errors

from refine_jax.errors import UserError
from refine_jax.quoting import reason

# Of the library for HTTP, which is another one from release to release: what cannot be reached.
_HTTP_ERROR: type[Exception] = hub_errors.HfHubHTTPError.__bases__[0]


def check_name(name: str, option: str) -> str:
  """The name, if it is one of the hub's with its owner.

  Raises:
    UserError: it is not owner/name.
  """
  try:
    huggingface_hub.utils.validate_repo_id(name)
    good = re.fullmatch(r"[^/]+/[^/]+", name)
  except hub_errors.HFValidationError:
    good = None
  if good is None:
    raise UserError(f"{option}={name} must be owner/name, of letters, digits, '-', '_' and '.'.")
  return name


def push(
  directory: Path,
  name: str,
  *,
  private: bool = False,
  message: str = "",
  api: huggingface_hub.HfApi | None = None,
) -> str:
  """Uploads a directory that is whole, in one commit; the repository is made where there is none.

  Args:
    name: owner/name on the hub.
    private: of a repository that is made.
    message: of the commit.
    api: default: the hub that HF_ENDPOINT names, with the token of the login or of HF_TOKEN.

  Returns:
    the address.

  Raises:
    UserError: the hub cannot be reached, or refuses.
  """
  api = api or huggingface_hub.HfApi()
  try:
    address = api.create_repo(name, private=private, exist_ok=True)
    api.upload_folder(repo_id=name, folder_path=directory, commit_message=message or None)
  except hub_errors.OfflineModeIsEnabled as error:
    raise _failed(directory, name, "HF_HUB_OFFLINE is set; unset it") from error
  except (_HTTP_ERROR, OSError, ValueError) as error:
    what, response = reason(error), getattr(error, "response", None)
    if response is not None and response.status_code in (401, 403):
      hint = "log in with `hf auth login`, or set HF_TOKEN to a token that may write there"
      what = f"{response.status_code}; {hint}"
    raise _failed(directory, name, what) from error
  return str(address)


def _failed(directory: Path, name: str, what: str) -> UserError:
  return UserError(
    f"{directory} is whole, and could not be uploaded to {name} ({what}); then run"
    f" `hf upload {name} {directory}`."
  )
