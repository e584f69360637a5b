"""Measured effect against strength: which variants are one recipe at several values of one number, and where to draw them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .sweep_outcome import Column, Measure, SweepOutcome
from .words import number, percent, short

# of the box that a chart is drawn in
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 460, 230, 58, 18, 16, 42
# from this ratio of the largest to the smallest value on, the axis is logarithmic
LOGARITHMIC = 8
# labels of values nearer than this to the one before are left out
SPACE = 30


@dataclass
class Line:
    """Variants that differ in the parameter alone, by its value. label: what else tells this line from others."""

    label: str
    points: list[tuple[float, Column]]


@dataclass
class Chart:
    """recipe, parameter: what stands on the axis. lines: at least one, each of two points or more. others: variants on no line."""

    recipe: str
    parameter: str
    lines: list[Line] = field(default_factory=list)
    others: list[Column] = field(default_factory=list)


def chart_of(sweep: SweepOutcome) -> Chart | None:
    """The chart that holds the most variants; None where no two of them differ in one number alone."""
    best: Chart | None = None
    for recipe, nth, parameter in _numbers(sweep.columns):
        groups: dict[str, list[tuple[float, Column]]] = {}
        for column in sweep.columns:
            value, rest = _value(column, recipe, nth, parameter)
            if value is not None:
                groups.setdefault(rest, []).append((value, column))
        lines = [sorted(points, key=lambda point: point[0]) for points in groups.values() if len(points) > 1]
        drawn = [id(column) for points in lines for _, column in points]
        if lines and (best is None or len(drawn) > sum(len(line.points) for line in best.lines)):
            named = [Line(_rest_label(points[0][1], parameter), points) for points in lines]
            best = Chart(recipe, parameter, named, [c for c in sweep.columns if id(c) not in drawn])
    return best


def _numbers(columns: Sequence[Column]) -> list[tuple[str, int, str]]:
    """(recipe, which of this name in the variant, parameter) of every parameter that is a number somewhere."""
    found: dict[tuple[str, int, str], None] = {}
    for column in columns:
        for place, fact in enumerate(column.recipes):
            nth = sum(other["name"] == fact["name"] for other in column.recipes[:place])
            found.update({(fact["name"], nth, name): None for name, v in fact["parameters"].items() if _is_number(v)})
    return list(found)


def _value(column: Column, recipe: str, nth: int, parameter: str) -> tuple[float | None, str]:
    """(the parameter's value or None, all other parameters as one text)."""
    rest, value, met = [], None, 0
    for fact in column.recipes:
        parameters = dict(fact["parameters"])
        if fact["name"] == recipe:
            if met == nth and _is_number(parameters.get(parameter)):
                value = float(parameters.pop(parameter))
            met += 1
        rest.append((fact["name"], parameters))
    return value, json.dumps(rest, sort_keys=True, default=str)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _rest_label(column: Column, parameter: str) -> str:
    rest = [
        f"{name}={short(value)}"
        for name, value in column.differing.items()
        if name.split(".")[-1] != parameter and value is not None
    ]
    return " + ".join(r["name"] for r in column.recipes) + (f"({', '.join(rest)})" if rest else "")


def drawing(chart: Chart, measure: Measure) -> dict[str, Any] | None:
    """One measure against the parameter, as places in a box of WIDTH x HEIGHT; None where fewer than two points have a value."""
    values = [
        [(x, y) for x, column in line.points if (y := column.effect.get(measure.key)) is not None and math.isfinite(y)]
        for line in chart.lines
    ]
    flat = [point for points in values for point in points]
    if len(flat) < 2:
        return None
    low_x, high_x = min(x for x, _ in flat), max(x for x, _ in flat)
    heights = [y for _, y in flat] + ([measure.untouched] if measure.untouched is not None else [])
    low, high = min(0.0, *heights), max(0.0, *heights)
    high = high if high > low else low + 1.0
    log = low_x > 0 and high_x / low_x >= LOGARITHMIC

    def across(x: float) -> float:
        a, b, at = (math.log(v) for v in (low_x, high_x, x)) if log else (low_x, high_x, x)
        return LEFT + (WIDTH - LEFT - RIGHT) * ((at - a) / (b - a) if b > a else 0.5)

    def up(y: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (y - low) / (high - low)

    words = percent if measure.form == "percent" else number
    ticks: list[dict[str, Any]] = []
    for x in sorted({x for x, _ in flat}):
        if not ticks or across(x) - ticks[-1]["x"] >= SPACE:
            ticks.append({"x": round(across(x), 1), "text": number(x)})
    levels = [{"y": round(up(y), 1), "text": words(y)} for y in _levels(low, high)]
    lines = []
    for place, (line, points) in enumerate(zip(chart.lines, values, strict=True)):
        dots = [
            {"x": round(across(x), 1), "y": round(up(y), 1), "text": f"{chart.parameter} {number(x)}: {words(y)}"}
            for x, y in points
        ]
        path = " ".join(f"{dot['x']},{dot['y']}" for dot in dots)
        lines.append({"label": line.label, "number": place % 4 + 1, "dots": dots, "path": path})
    plain = None if measure.untouched is None else {"y": round(up(measure.untouched), 1), "text": words(measure.untouched)}
    said = "; ".join(dot["text"] for line in lines for dot in line["dots"])
    return {
        "measure": measure, "ticks": ticks, "levels": levels, "lines": lines, "untouched": plain, "said": said, "log": log,
        "box": {"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": WIDTH - RIGHT, "top": TOP, "bottom": HEIGHT - BOTTOM},
    }  # fmt: skip


def _levels(low: float, high: float) -> list[float]:
    """About four round values between low and high."""
    raw = (high - low) / 4
    size = 10 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= raw)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [count * step for count in range(first, last + 1)]
