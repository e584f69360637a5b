"""A report in the terminal, drawn with rich."""

from __future__ import annotations

from typing import Any

from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ..recipes.kit.checks import abridged
from .outcome import Check, Outcome, Side
from .shares import of_all, on_prompt
from .words import attention_summary, computed_by, count, number, percent, role_words, summary

BARS = " ▁▂▃▄▅▆▇█"


def renderable(report: Outcome) -> Any:
    parts: list[Any] = [Text(report.title, style="bold")]
    for recipe in report.recipes:
        chosen = ", ".join(f"{name}={abridged(recipe['parameters'][name])!r}" for name in recipe["chosen"])
        line = Text(f"{recipe['name']}({chosen})", style="cyan")
        parts.append(line.append(f"  {recipe['does']}  arXiv {recipe['arxiv']}", style="dim"))
    if report.intro:
        parts.append(Text(report.intro))
    parts.append(_outputs(report))
    parts.append(Text(summary(report), style="bold"))
    parts += [_check(check) for check in report.checks]
    parts += _attention(report)
    parts.append(_cost(report))
    parts += [Text(f"note: {note}", style="yellow") for note in report.notes]
    if report.kind == "text" and report.kl:
        parts.append(Text("KL per token  ").append(_sparkline(report.kl)).append(f"  max {number(max(report.kl))} nats"))
    return Group(*parts)


def brief(report: Outcome) -> Any:
    """A report in a few lines: title, recipe, both outputs, what was checked, what it cost."""
    parts: list[Any] = [Text(), Text(report.title, style="bold")]
    does = " ".join(f"{recipe['name']}: {recipe['does']}" for recipe in report.recipes)
    parts.append(Text(report.intro or does, style="dim"))
    parts += [_outputs(report), Text(summary(report)), *(_check(check) for check in report.checks)]
    if moved := attention_summary(report):
        parts.append(Text(moved))
    parts.append(_cost(report))
    parts += [Text(f"note: {note}", style="yellow") for note in report.notes]
    return Group(*parts)


def _check(check: Check) -> Text:
    text = Text(f"checked: {check.what}? ")
    for label, value in (("before", check.before), ("after", check.after)):
        text.append(f" {label} ", style="dim").append("yes" if value else "no", style="green" if value else "red")
    return text


def _outputs(report: Outcome) -> Any:
    grid = Table.grid(expand=True, padding=(0, 1))
    grid.add_column(ratio=1)
    grid.add_column(ratio=1)
    panels = []
    for label, side in (("before", report.before), ("after", report.after)):
        panels.append(Panel(_output(report, side), title=label, title_align="left"))
    grid.add_row(*panels)
    return grid


def _output(report: Outcome, side: Side) -> Text:
    if report.kind == "prediction":
        return Text("\n".join(f"{percent(p):>8}  {label.strip()}" for label, p in side.predictions))
    if report.kind == "image":
        sizes = ", ".join(f"{p.width} x {p.height}" for p in side.pictures)
        return Text(f"{len(side.pictures)} picture(s): {sizes}\n(shown on the HTML page)")
    place = report.first_difference
    if place is None:
        return Text(side.text or "")
    text = Text("".join(side.tokens[:place]), style="dim")
    text.append("".join(side.tokens[place : place + 1]) or "(ends here)", style="bold reverse")
    return text.append("".join(side.tokens[place + 1 :]), style="not dim")


def _attention(report: Outcome) -> list[Any]:
    """What moved, in a sentence and as shares by kind of token."""
    found: list[Any] = [Text(moved)] if (moved := attention_summary(report)) else []
    prompt, whole = ([of(side.mass) for side in (report.before, report.after)] for of in (on_prompt, of_all))
    if max(map(len, prompt)) > 1:
        found.append(_shares("of the prompt after its first token", *prompt))
    if any(whole):
        found.append(_shares("of all attention", *whole))
    return found


def _shares(title: str, before: dict[str, float], after: dict[str, float]) -> Table:
    table = Table(title, "before", "after", "", box=None, pad_edge=False, header_style="dim")
    for name in sorted({**before, **after}, key=lambda n: -max(before.get(n, 0), after.get(n, 0))):
        a, b = before.get(name, 0.0), after.get(name, 0.0)
        if max(a, b) >= 0.0005:
            table.add_row(role_words(name), percent(a), percent(b), Text("█" * round(20 * b), style="cyan"))
    return table


def _cost(report: Outcome) -> Text:
    def one(side: Side) -> str:
        cost = side.cost
        read = f" over {count(cost.tokens)} tokens" if cost.tokens else ""
        return f"{count(cost.passes)} forward pass{'es' if cost.passes != 1 else ''}{read}"

    line = f"before {one(report.before)}; after {one(report.after)}; edits applied {report.applied:,} times"
    if report.ways:
        line += f"; computed by: {computed_by(report)}"
    return Text(line, style="dim")


def _sparkline(values: list[float], width: int = 60) -> str:
    """Each value as one block character, scaled to the largest; long lists show the largest of each group."""
    group = max(1, -(-len(values) // width))
    cut = [max(values[i : i + group]) for i in range(0, len(values), group)]
    top = max(cut) or 1.0
    return "".join(BARS[round((len(BARS) - 1) * v / top)] for v in cut)
