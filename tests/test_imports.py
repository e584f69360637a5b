"""Imports only point down: no two files of a package import each other, and no package imports one of a higher floor.

Imports inside functions and those for type checkers alone count too.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# lowest first; packages of one floor do not import each other
FLOORS = (
    ("interventions",),
    ("hooks",),
    ("recipes",),
    ("zoo",),
    ("comparison",),
    ("analysis", "evaluation"),
    ("command_line",),
)
# scripts that make the models of the zoo and measure them for their cards; nothing imports them
SCRIPTS = "zoo.train"
FLOOR = {package: number for number, packages in enumerate(FLOORS) for package in packages}


def modules(package: str) -> dict[str, Path]:
    """{dotted name: file} of a package; a package's own name stands for its __init__."""
    files = (ROOT / package).rglob("*.py")
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def imports(name: str, file: Path) -> set[str]:
    """Dotted names that a module imports relatively, as `package.module` or `package.module.name`."""
    home = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*home[: len(home) - node.level + 1], *([node.module] if node.module else [])]
            found |= {".".join([*base, alias.name]) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "reattend":
            found |= {".".join([*(node.module or "").split(".")[1:], alias.name]) for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[2] for alias in node.names if alias.name.startswith("reattend.")}
    return found


def graph(files: dict[str, Path]) -> dict[str, set[str]]:
    """{module: modules among these that it imports}."""

    def target(name: str) -> str | None:
        return name if name in files else name.rpartition(".")[0] if name.rpartition(".")[0] in files else None

    found = {name: {target(each) for each in imports(name, file)} for name, file in files.items()}
    return {name: {each for each in targets if each is not None and each != name} for name, targets in found.items()}


def circles(edges: dict[str, set[str]]) -> list[str]:
    """Modules that import each other, over however many steps."""
    left = dict(edges)
    while True:
        # whoever imports nothing that is left, or is imported by nothing that is left, is in no circle
        imported = set().union(*left.values()) if left else set()
        free = {name for name, targets in left.items() if not targets & left.keys() or name not in imported}
        if not free:
            return sorted(left)
        left = {name: targets - free for name, targets in left.items() if name not in free}


@pytest.mark.parametrize("package", FLOOR)
def test_no_files_of_a_package_import_each_other(package: str) -> None:
    found = circles(graph(modules(package)))
    assert not found, f"files of {package} import each other in a circle: {', '.join(found)}"


@pytest.mark.parametrize("package", FLOOR)
def test_imports_point_down(package: str) -> None:
    for name, file in modules(package).items():
        if name.startswith(SCRIPTS):
            continue
        for target in imports(name, file):
            assert not target.startswith(SCRIPTS), f"{name} imports a script: {target}"
            other = target.split(".")[0]
            upward = other != package and FLOOR.get(other, -1) >= FLOOR[package]
            assert not upward, f"{name} imports {target}, which lies on a higher floor"


def test_what_these_tests_look_for_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .b import B\n")
    (tmp_path / "b.py").write_text("def f():\n    from . import c\n")
    (tmp_path / "c.py").write_text("from .a import A\n")
    (tmp_path / "d.py").write_text("from .a import A\n")
    files = {f"x.{name}": tmp_path / f"{name}.py" for name in "abcd"}
    assert circles(graph(files)) == ["x.a", "x.b", "x.c"]
    (tmp_path / "c.py").write_text("import torch\n")
    assert circles(graph(files)) == []
