"""The configs that come with the package: configs/ of a checkout, or its copy in a wheel."""

import sys
from pathlib import Path

from refine_jax.config.recipes import MEANINGS

_PACKAGE = Path(__file__).parents[1]


def directory() -> Path | None:
  """The directory of base.py and its like; None where the package has none."""
  # setup.py puts them into the package of a wheel.
  for place in (_PACKAGE / "bundled" / "configs", _PACKAGE.parent / "configs"):
    if (place / "base.py").is_file():
      return place
  return None


def names() -> list[str]:
  """What `--config` takes without a file of the user's: "base", "tiny", .."""
  place = directory()
  return sorted(p.stem for p in place.glob("*.py") if p.stem != "recipes") if place else []


def find(name: str) -> tuple[Path, str] | None:
  """The file of a config that comes with the package, and the recipe that its name implies.

  Args:
    name: "tiny", "configs/tiny.py", or a recipe, which is one of base.py.
  """
  place = directory()
  stem = name.removeprefix("configs/").removesuffix(".py")
  if place is None or name not in (stem, f"configs/{stem}.py"):
    return None
  if stem in names():
    return place / f"{stem}.py", ""
  return (place / "base.py", stem) if name in MEANINGS else None


def make_importable(file: Path) -> None:
  """Lets a config file say `from configs import base`, and import its neighbours in configs/.

  `configs` is a namespace package: a folder of that name next to the user's files and the one here
  are one package.
  """
  own = [file.absolute().parent.parent] if file.absolute().parent.name == "configs" else []
  place = directory()
  for folder in own + ([place.parent] if place else []):
    if str(folder) not in sys.path:
      sys.path.append(str(folder))
