"""An evaluation as tables, drawn with rich: one per suite, a row per variant under each metric, with the change against the plain model."""

from __future__ import annotations

from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from .cells import Cell, Measured
from .metrics.intervals import Interval


def renderable(result: Measured) -> Any:
    names = list(dict.fromkeys(id(cell.suite) for cell in result.cells))
    parts: list[Any] = [Text(f"{result.model['name']}, seed {result.seed}", style="bold")]
    level = f"{100 * result.level:.0f} %"
    for key in names:
        cells = [cell for cell in result.cells if id(cell.suite) == key]
        parts += [Text(), _heading(cells[0]), _table(cells, level)]
    words = (
        f"{level}: intervals over {result.resamples} resamples of scenes or texts. Changes are against the plain model on the same items, "
        "in colour where the interval leaves out 0. Times: one run each, an indication only."
    )
    parts += [Text(), Text(words, style="dim")]
    parts += [Text(f"note: {note}", style="yellow") for note in result.notes]
    return Group(*parts)


def _heading(cell: Cell) -> Text:
    given = ", ".join(f"{name}={value}" for name, value in cell.suite.as_dict().items() if name not in ("name", "version"))
    size = (
        f"{len(cell.records)} items, {cell.groups} drawn as one" if cell.groups != len(cell.records) else f"{cell.groups} items"
    )
    text = Text(cell.suite.name, style="bold").append(f"  {cell.suite.does}", style="not bold")
    return text.append(f"  {size}" + (f"; {given}" if given else ""), style="not bold dim")


def _table(cells: list[Cell], level: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    changed = any(cell.changes is not None for cell in cells)
    # labels are folded, never cut: the parameters that tell two variants apart stand at their ends
    table.add_column("", overflow="fold")
    for column in ("value", level, *(("change", level) if changed else ())):
        table.add_column(column, no_wrap=True, justify="right" if column in ("value", "change") else "left")
    for name in cells[0].shown:
        lower = name in cells[0].suite.lower
        table.add_row(Text(name + " (less is better)" * lower))
        for cell in cells:
            one, change = cell.metrics[name], None if cell.changes is None else cell.changes[name]
            row = [Text(f"  {cell.recipe}", style="cyan"), Text(_number(one, one.value)), Text(_between(one))]
            if change is not None:
                better = (change.value < 0) == lower
                certain = (change.low > 0 or change.high < 0) and name not in cell.suite.neutral
                style = ("green" if better else "red") if certain else "dim"
                row += [Text(_number(change, change.value, "+"), style=style), Text(_between(change, "+"), style=style)]
            table.add_row(*row)
    timed = [cell for cell in cells if cell.time_ratio is not None]
    if timed:
        table.add_row(Text("time", style="dim"))
    for cell in timed:
        table.add_row(Text(f"  {cell.recipe}", style="cyan"), Text(f"{cell.time_ratio:.2f}x", style="dim"))
    return table


def _between(one: Interval, sign: str = "") -> str:
    return f"[{_number(one, one.low, sign)}, {_number(one, one.high, sign)}]"


def _number(one: Interval, value: float, sign: str = "") -> str:
    """A number of an interval, all three of them with the same digits."""
    digits = ".3f" if max(abs(one.value), abs(one.low), abs(one.high)) < 100 else ".1f"
    return f"{value:{sign}{digits}}"
