"""The repository root is the package: `reattend` maps to this folder, its rooms to the folders inside."""

from setuptools import setup

PACKAGES = [
    "interventions",
    "interventions.edits",
    "hooks",
    "recipes",
    "comparison",
]

setup(
    packages=["reattend", *(f"reattend.{name}" for name in PACKAGES)],
    package_dir={"reattend": ".", **{f"reattend.{name}": name.replace(".", "/") for name in PACKAGES}},
)
