"""Writes recipes/kit/named.pyi: `apply`, `use` and `recipe` with a signature for each recipe, for editors and type checkers.

    python benchmarks/stubs.py      # after a recipe came or its parameters changed; tests/recipes/test_named.py says when

A recipe is named by a text, so without this file an editor can show neither the names nor the parameters that belong to one.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

FILE = Path(__file__).resolve().parents[1] / "recipes" / "kit" / "named.pyi"
HEAD = """# Written by `python benchmarks/stubs.py`: what the recipes' fields say, for editors and type checkers. Nothing here runs.

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict, Unpack, overload

from ...hooks import Session
"""
# the last signature of each takes what a text that is known at runtime only, several recipes, files and objects need
FUNCTIONS = {
    "apply": ("", "model: Any, ", "isolated: bool = False, tokenizer: Any = None, ", "Session"),
    "recipe": ("", "", "", ""),
    "use": ("    ", "self, ", "isolated: bool = False, tokenizer: Any = None, ", "Session"),
}


def written(annotation: Any) -> str:
    """A field's type as text; Any for what is no plain data (a profile, a callable)."""
    if annotation in (None, type(None)):
        return "None"
    if annotation in (bool, int, float, str):
        return annotation.__name__
    origin, given = get_origin(annotation), get_args(annotation)
    if hasattr(annotation, "__metadata__"):  # Annotated
        return written(given[0])
    if origin is Literal:
        return f"Literal[{', '.join(_quoted(v) for v in given)}]"
    if origin in (Union, types.UnionType):
        parts = list(dict.fromkeys(written(a) for a in given))
        return "Any" if "Any" in parts else " | ".join(parts)
    if origin in (tuple, list, Sequence):
        # fields hold tuples, and take lists
        inside = [written(a) for a in given if a is not Ellipsis]
        pair = origin is tuple and Ellipsis not in given
        return f"tuple[{', '.join(inside)}] | Sequence[Any]" if pair else f"Sequence[{inside[0] if inside else 'Any'}]"
    if origin in (dict, Mapping):
        return f"Mapping[{', '.join(written(a) for a in given)}]"
    return "Any"


def _quoted(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


def stub() -> str:
    from reattend.recipes.kit.registry import registry

    known = registry()
    lines = [HEAD.rstrip("\n")]
    homes = {cls.__module__.rsplit(".", 1)[1]: cls.__name__ for cls in known.values()}
    lines += [f"from ..{home} import {name}" for home, name in sorted(homes.items())]
    lines += ["from .apply import Choice", "from .base import Recipe"]
    for cls in known.values():
        lines += ["", f"class {cls.__name__}Parameters(TypedDict, total=False):", f'    """{cls.info.does}"""', ""]
        for name, field in cls.model_fields.items():
            told = textwrap.wrap(field.description or "", 116)
            pairs = " | Mapping[int, Sequence[int]]" if told and "{layer: [" in told[0] else ""
            lines += [f"    {name}: {written(field.annotation)}{pairs}"]
            lines += ['    """' + "\n    ".join(told).replace('"', "'") + '"""'] if told else []
    for function, (indent, first, options, result) in FUNCTIONS.items():
        lines += ["", "class Uses:"] if indent else [""]
        for slug, cls in known.items():
            lines += [f"{indent}@overload", f"{indent}def {function}("]
            lines += [f'{indent}    {first}name: Literal["{slug}"], /, {"*, " if options else ""}{options}']
            lines += [
                f"{indent}    **parameters: Unpack[{cls.__name__}Parameters],",
                f"{indent}) -> {result or cls.__name__}: ...",
            ]
        anything = "name: str, /, " if function == "recipe" else "*recipes: Choice, "
        lines += [
            f"{indent}@overload",
            f"{indent}def {function}({first}{anything}{options}**parameters: Any) -> {result or 'Recipe'}: ...",
        ]
    return "\n".join(lines) + "\n"


def formatted(text: str) -> str:
    command = [sys.executable, "-m", "ruff", "format", "--stdin-filename", str(FILE), "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    FILE.write_text(formatted(stub()), encoding="utf-8")
