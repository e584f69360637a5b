"""The repository root is the package: `reattend` maps to this folder, its rooms to the folders inside."""

from setuptools import setup
from setuptools.command.build_py import build_py

PACKAGES = [
    "interventions",
    "interventions.edits",
    "hooks",
    "recipes",
    "recipes.profiling",
    "comparison",
    "analysis",
    "zoo",
    "zoo.worlds",
    "zoo.train",
    "evaluation",
    "evaluation.material",
    "evaluation.metrics",
    "evaluation.suites",
    "command_line",
]


class BuildPy(build_py):
    """The root folder is a package and also holds this file, which is no part of it."""

    def find_package_modules(self, package: str, package_dir: str) -> list:
        return [item for item in super().find_package_modules(package, package_dir) if item[1] != "setup"]


setup(
    cmdclass={"build_py": BuildPy},
    packages=["reattend", *(f"reattend.{name}" for name in PACKAGES)],
    package_dir={"reattend": ".", **{f"reattend.{name}": name.replace(".", "/") for name in PACKAGES}},
)
