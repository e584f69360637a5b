"""Several variants in the terminal, drawn with rich, in 80 columns."""

from __future__ import annotations

import math
from typing import Any

from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from .sweep_outcome import Column, Measure, SweepOutcome, summary
from .sweep_page import said, verdict
from .words import percent

BAR = 10


def renderable(sweep: SweepOutcome) -> Any:
    parts: list[Any] = [Text(sweep.title, style="bold")]
    if sweep.kind == "image":
        sizes = ", ".join(f"{p.width} x {p.height}" for p in sweep.untouched.pictures)
        parts.append(Text(f"{sizes} pixels for each variant; html(path) and png(path) show them", style="dim"))
    else:
        parts += [_panel("untouched", sweep, None), *(_panel(column.label, sweep, column) for column in sweep.columns)]
    parts += [_table(sweep), Text(summary(sweep), style="bold")]
    parts += [Text(f"{measure.short}: {measure.explains}.", style="dim") for measure in sweep.measures]
    parts += [Text(f"note: {note}", style="yellow") for note in sweep.notes]
    parts += [Text(f"note: {column.label}: {note}", style="yellow") for column in sweep.columns for note in column.notes]
    return Group(*parts)


def _panel(label: str, sweep: SweepOutcome, column: Column | None) -> Panel:
    under = None if column is None else f"{verdict(column)}, {column.applied:,} edits applied"
    return Panel(
        _output(sweep, column),
        title=Text(label),
        title_align="left",
        subtitle=None if under is None else Text(under, style="dim"),
        subtitle_align="left",
    )


def _output(sweep: SweepOutcome, column: Column | None) -> Text:
    side = sweep.untouched if column is None else column.side
    if sweep.kind == "prediction":
        return Text("\n".join(f"{percent(p):>8}  {label.strip()}" for label, p in side.predictions))
    place = None if column is None else column.first_difference
    if place is None:
        return Text(side.text or "")
    text = Text("".join(side.tokens[:place]), style="dim")
    text.append("".join(side.tokens[place : place + 1]) or "(ends here)", style="bold reverse")
    return text.append("".join(side.tokens[place + 1 :]), style="not dim")


def _table(sweep: SweepOutcome) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("variant", ratio=1, overflow="fold")
    if sweep.kind == "image":
        table.add_column("output")
        table.add_column("edits", justify="right")
    for measure in sweep.measures:
        table.add_column(measure.short, justify="right")
    if sweep.measures:
        table.add_column("", no_wrap=True, width=BAR)
    shown = ["", ""] if sweep.kind == "image" else []
    table.add_row("untouched", *shown, *(said(measure.untouched, measure.form) for measure in sweep.measures))
    for column in sweep.columns:
        values = [said(column.effect.get(measure.key), measure.form) for measure in sweep.measures]
        shown = ["same" if column.same else "differs", f"{column.applied:,}"] if sweep.kind == "image" else []
        table.add_row(column.label, *shown, *values, *([_bar(sweep, sweep.measures[0], column)] if values else []))
    return table


def _bar(sweep: SweepOutcome, measure: Measure, column: Column) -> Text:
    """The first measure as a bar, the largest one full."""
    sizes = [abs(value) for c in sweep.columns if (value := c.effect.get(measure.key)) is not None and math.isfinite(value)]
    value = column.effect.get(measure.key)
    if value is None or not math.isfinite(value) or not max(sizes, default=0):
        return Text("")
    return Text("█" * round(BAR * abs(value) / max(sizes)), style="cyan")
