"""What is aimed at on a card like an H100 or H200, beside what was measured: the last table of benchmarks/gpu.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

NOT_MEASURED = "not measured"


class Target(NamedTuple):
    """key: of the figure; most: what it should not exceed."""

    what: str
    key: str
    most: float


CALLS = [
    *(
        Target(f"one call, prefill at {title}: {edit}", f"call, prefill, {n}, {edit}", most)
        for edit in ("transfer of 3 columns", "gain of 3 columns")
        for n, title, most in ((4096, "4k", 1.15), (16384, "16k", 1.05))
    ),
    *(
        Target(f"one call, one row on {title}: key bias", f"call, one row, {n}, key bias", 1.20)
        for n, title in ((1024, "1k"), (4096, "4k"), (16384, "16k"))
    ),
    *(
        Target(f"one call, {phase} at 4k: pass-through", f"call, {phase}, 4096, pass-through", 1.05)
        for phase in ("prefill", "one row")
    ),
    Target("end to end, prefill at 4k: 2 layers edited", "model, prefill 4k, emphasise, 2 layers", 1.02),
    Target("end to end, decode at 4k: 2 layers edited", "model, decode 4k, emphasise, 2 layers", 1.05),
]


def every(figures: dict[str, float]) -> Iterator[Target]:
    yield from CALLS
    for key, most in figures.items():
        if key.startswith("aim, "):
            figure = key.removeprefix("aim, ")
            kind, column, label = figure.split(", ", 2)
            where = "end to end" if kind == "model" else "end to end, compiled"
            yield Target(f"{where}, {column}: {label}", figure, most)


def targets(figures: dict[str, float], dry: bool = False) -> str:
    """Markdown. figures: of all sections; among them aims, as "aim, " and the name of the figure. dry: nothing was measured."""
    lines = ["## Targets", "", "| | at most | measured | |", "|---|---|---|---|"]
    for what, name in (("edits right", "edits"), ("recipes right", "recipes")):
        right, tried = figures.get(what), figures.get(f"{name} tried")
        known = right is not None and bool(tried)
        shown = f"{right:.0f} of {tried:.0f}" if known else NOT_MEASURED
        lines.append(f"| {name} that are right | all | {shown} | {verdict(right == tried) if known else ''} |")
    for what, key, most in every(figures):
        value = None if dry else figures.get(key)
        measured = NOT_MEASURED if value is None else f"{value:.2f}"
        lines.append(f"| {what} | {most:.2f} | {measured} | {'' if value is None else verdict(value <= most)} |")
    return "\n".join(lines)


def verdict(met: bool) -> str:
    return "met" if met else "**missed**"
