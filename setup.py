"""The repository root is the package: `reattend` maps to this folder, its rooms to the folders inside."""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

ROOT = Path(__file__).resolve().parent
LINKS = ROOT / ".editable"

ROOMS = ["interventions", "hooks", "recipes", "zoo", "comparison", "analysis", "evaluation", "command_line"]
# a folder with an `__init__.py` is a package; there is no list of them to keep
PACKAGES = sorted(
    ".".join(file.parent.relative_to(ROOT).parts) for room in ROOMS for file in (ROOT / room).rglob("__init__.py")
)


class BuildPy(build_py):
    """The root folder is a package and also holds this file, which is no part of it."""

    def find_package_modules(self, package: str, package_dir: str) -> list:
        return [item for item in super().find_package_modules(package, package_dir) if item[1] != "setup"]


class Editable(editable_wheel):
    """`pip install -e .`: a folder of links, `.editable/reattend`, goes on the path.

    Setuptools' own way for a package that is its root folder is an import hook: type checkers and editors, which run no code, find
    nothing, and `import reattend.tests` succeeds. Links to the rooms show what a wheel holds, and a new file in a room at once.
    """

    def finalize_options(self) -> None:
        if linked():
            self.distribution.package_dir = {"": LINKS.name}
        super().finalize_options()


def linked() -> bool:
    """Makes the links anew; False where the system allows none (Windows without developer mode): the import hook is used there."""
    shutil.rmtree(LINKS, ignore_errors=True)
    package = LINKS / "reattend"
    package.mkdir(parents=True)
    files = [file.name for file in ROOT.glob("*.py") if file.name != "setup.py"]
    try:
        for name in ["py.typed", *files, *ROOMS]:
            (package / name).symlink_to(Path("..", "..", name), target_is_directory=(ROOT / name).is_dir())
    except OSError:
        shutil.rmtree(LINKS)
        return False
    return True


setup(
    cmdclass={"build_py": BuildPy, "editable_wheel": Editable},
    packages=["reattend", *(f"reattend.{name}" for name in PACKAGES)],
    package_dir={"reattend": ".", **{f"reattend.{name}": name.replace(".", "/") for name in PACKAGES}},
)
