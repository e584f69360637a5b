"""Writes docs/doors.md: every door with what it gives, costs and refuses, its steps, and ten lines of use, from the code and its tests.

python benchmarks/doors_page.py     # after a door came, or its words, its steps' arguments or its use changed
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from reattend.hooks import Step

ROOT = Path(__file__).resolve().parents[1]
PAGE, DOORS, USES = ROOT / "docs" / "doors.md", ROOT / "hooks" / "doors", ROOT / "tests" / "hooks" / "doors"
FACTS = ("Gives", "Costs", "Refuses")
HEAD = """# Doors

Written by `python benchmarks/doors_page.py` from the code. A door is what a method may ask of a model: edits of attention are one, the others
let it read, run further passes, or change what runs. A method puts steps of these classes into its plan and touches no module itself;
`reattend.hooks.attach(model, [Plan("name", [step, ...])])` does the same by hand. Steps act in the order of their plan, but readers see a call
with all of its edits. Every example below is run by a test; the tiny models it draws on are in `tests/` and `examples/` of a clone
(`PYTHONPATH=tests:examples python yours.py`). How to add a door: [CONTRIBUTING](../CONTRIBUTING.md).

"""


def doors() -> list[str]:
    """Names of all doors: one file each."""
    return sorted(file.stem for file in DOORS.glob("*.py") if file.stem != "__init__")


def module(name: str) -> ModuleType:
    return importlib.import_module(f"reattend.hooks.doors.{name}")


def facts(name: str) -> dict[str, str]:
    """{"Gives": ..., "Costs": ..., "Refuses": ...}: the paragraphs of a door's docstring that begin with these words."""
    paragraphs = [" ".join(part.split()) for part in inspect.cleandoc(module(name).__doc__ or "").split("\n\n")]
    return {word: part.partition(": ")[2] for part in paragraphs for word in FACTS if part.startswith(f"{word}: ")}


def steps(name: str) -> list[type[Step]]:
    """The steps that a door's file defines."""
    found = [c for c in vars(module(name)).values() if isinstance(c, type) and issubclass(c, Step)]
    return [c for c in found if c.__module__ == module(name).__name__]


def use(name: str) -> Callable[[], None]:
    """A door's ten lines of use."""
    file = USES / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"door_{name}", file)
    assert spec is not None and spec.loader is not None, f"a door needs {file.relative_to(ROOT)} with a function use()"
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found.use


def shown(name: str) -> str:
    """What a reader can paste: the imports of the file and the body of `use`."""
    source = (USES / f"{name}.py").read_text(encoding="utf-8")
    tree, lines = ast.parse(source), source.splitlines()
    imports = [
        ast.get_source_segment(source, node)
        for node in tree.body
        if isinstance(node, (ast.Import, ast.ImportFrom)) and getattr(node, "module", "") != "__future__"
    ]
    body = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "use").body
    body = body[1:] if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant) else body
    code = textwrap.dedent("\n".join(lines[body[0].lineno - 1 : body[-1].end_lineno]))
    return "\n".join([*(str(line) for line in imports), "", code])


def page() -> str:
    lines = [HEAD.rstrip("\n"), ""]
    for name in doors():
        first = " ".join(inspect.cleandoc(module(name).__doc__ or "").split("\n\n")[0].split())
        lines += [f"## {name}", "", first, "", *(f"- **{word}**: {text}" for word, text in facts(name).items()), ""]
        for cls in steps(name):
            lines += [f"### {cls.__name__}", "", *textwrap.dedent(inspect.cleandoc(cls.__doc__ or "")).splitlines(), ""]
        lines += ["```python", shown(name), "```", ""]
    return "\n".join(lines).rstrip("\n") + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
