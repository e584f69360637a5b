"""An evaluation as tables, drawn with rich: one per suite, a row per variant, the change against the plain model below each value."""

from __future__ import annotations

from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from .metrics.intervals import Interval
from .results import Cell, Evaluation


def renderable(result: Evaluation) -> Any:
    names = list(dict.fromkeys(id(cell.suite) for cell in result.cells))
    parts: list[Any] = [Text(f"{result.model['name']}, seed {result.seed}", style="bold")]
    for key in names:
        cells = [cell for cell in result.cells if id(cell.suite) == key]
        parts += [Text(), _heading(cells[0]), _table(cells)]
    level = f"{100 * result.level:.0f} %"
    parts += [
        Text(),
        Text(
            f"In brackets: {level} intervals over {result.resamples} resamples of scenes or texts; below each value the change against "
            "the plain model on the same items, in colour where its interval leaves out 0. Time: one run each, an indication only.",
            style="dim",
        ),
    ]
    parts += [Text(f"note: {note}", style="yellow") for note in result.notes]
    return Group(*parts)


def _heading(cell: Cell) -> Text:
    given = ", ".join(f"{name}={value}" for name, value in cell.suite.as_dict().items() if name not in ("name", "version"))
    size = (
        f"{len(cell.records)} items, {cell.groups} drawn as one" if cell.groups != len(cell.records) else f"{cell.groups} items"
    )
    text = Text(cell.suite.name, style="bold").append(f"  {cell.suite.does}", style="not bold")
    return text.append(f"  {size}" + (f"; {given}" if given else ""), style="not bold dim")


def _table(cells: list[Cell]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("recipe", style="cyan")
    shown, timed = cells[0].shown, any(cell.time_ratio is not None for cell in cells)
    for name in shown:
        lower = " (less is better)" if name in cells[0].suite.lower else ""
        table.add_column(name + lower)
    if timed:
        table.add_column("time")
    for cell in cells:
        row = [Text(cell.recipe), *(_value(cell, name) for name in shown)]
        if timed:
            row.append(Text("" if cell.time_ratio is None else f"{cell.time_ratio:.2f}x", style="dim"))
        table.add_row(*row)
    return table


def _value(cell: Cell, name: str) -> Text:
    text = Text(_numbers(cell.metrics[name]))
    change = None if cell.changes is None else cell.changes[name]
    if change is not None:
        better = (change.value < 0) == (name in cell.suite.lower)
        certain = change.low > 0 or change.high < 0
        text.append("\n" + _numbers(change, sign="+"), style=("green" if better else "red") if certain else "dim")
    return text


def _numbers(one: Interval, sign: str = "") -> str:
    digits = ".3f" if max(abs(one.value), abs(one.low), abs(one.high)) < 100 else ".1f"
    return f"{one.value:{sign}{digits}} [{one.low:{sign}{digits}}, {one.high:{sign}{digits}}]"
