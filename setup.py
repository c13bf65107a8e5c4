"""What setup.cfg cannot say: a wheel holds configs/ where refine_jax/config/bundled.py looks."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
  """Copies configs/*.py into the package; an editable install reads them where they are."""

  def run(self) -> None:
    super().run()
    if self.editable_mode:
      return
    place = Path(self.build_lib) / "refine_jax" / "bundled" / "configs"
    self.mkpath(str(place))
    for path in sorted(Path(__file__).parent.glob("configs/*.py")):
      self.copy_file(str(path), str(place / path.name))


setup(cmdclass={"build_py": BuildWithConfigs})
