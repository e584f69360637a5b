"""Writes docs/edits.md: every edit with its formula, its arguments and what it costs, from the code and the recorded ratios.

python benchmarks/edits_page.py     # after an edit came, its arguments changed, or benchmarks/edits.py recorded new ratios
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import textwrap
from pathlib import Path

from reattend import interventions
from reattend.interventions import Edit

ROOT = Path(__file__).resolve().parents[1]
PAGE, COSTS = ROOT / "docs" / "edits.md", ROOT / "docs" / "edits.json"
LEVELS = {
    "projection": "on the output of a key projection, before positions and cache: once per token",
    "operands": "on q, k, v and their mask, before scores",
    "scores": "on S = scale * Q K^T + mask, hidden pairs at -inf",
    "weights": "on A = softmax(S)",
    "output": "on O = A V, per head, before the output projection",
}
HEAD = """# Edits

Written by `python benchmarks/edits_page.py` from the code. An intervention is a function from a call to edits, which
`reattend.edit(model, function)` puts to work. Every edit can name `heads` (query heads of the whole model, default all) and `rows`
(bool [queries] or [batch, queries], default all); what it does not name keeps its bits. Tensors broadcast over leading axes: a column set
may be [keys], [batch, keys] or [batch, heads, keys]. Edits act level by level in the order of this page, and inside a level in the order
given.

"""


def edits() -> list[type[Edit]]:
    """All edits that the package exports, those of a level together."""
    found = [getattr(interventions, name) for name in interventions.__all__]
    # the base classes of the levels are called SomethingEdit
    named = [c for c in found if isinstance(c, type) and issubclass(c, Edit) and not c.__name__.endswith("Edit")]
    return sorted(named, key=lambda c: (list(LEVELS).index(c.level), c.__name__))


def told(cls: type) -> str:
    return inspect.cleandoc(cls.__doc__ or "")


def arguments(cls: type[Edit]) -> list[str]:
    lines = []
    for field in dataclasses.fields(cls):
        if field.name in ("heads", "rows") or not field.init or not field.repr:
            continue
        default = field.default
        value = "" if default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING else f" = {default!r}"
        kind = str(field.type).replace(" | ", " or ")
        lines.append(f"- `{field.name}`: {kind}{value}")
    return lines


def costs(name: str) -> list[str]:
    """What was measured of this edit: lines of (where, way, ratio to plain attention)."""
    known = json.loads(COSTS.read_text(encoding="utf-8")) if COSTS.exists() else {}
    return [f"| {where} | {entry['way']} | {entry['ratio']} |" for where, entry in known.get(name, {}).items()]


def page() -> str:
    lines = [HEAD.rstrip("\n"), ""]
    level = ""
    for cls in edits():
        if cls.level != level:
            level = cls.level
            lines += [f"## {level.capitalize()}: {LEVELS[level]}", ""]
        lines += [f"### {cls.__name__}", "", *textwrap.dedent(told(cls)).splitlines(), "", *arguments(cls), ""]
        table = costs(cls.__name__)
        if table:
            lines += ["| measured | way | times plain attention |", "|---|---|---|", *table, ""]
    return "\n".join(lines).rstrip("\n") + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
