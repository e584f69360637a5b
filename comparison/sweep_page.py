"""The HTML page of several variants: what the template places."""

from __future__ import annotations

from typing import Any

from .forms import from_template, png
from .outcome import Side
from .sweep_chart import chart_of, drawing
from .sweep_outcome import Column, SweepOutcome, summary
from .words import number, percent, short

TEMPLATE = "sweep.html"
LONG_PROMPT = 600
# of an output longer than this, the rest is counted
MOST_TOKENS = 400


def render(sweep: SweepOutcome, *, page: bool = True) -> str:
    """A whole page, or a fragment for a notebook cell. Every text in it is escaped; there are no scripts."""
    return from_template(TEMPLATE, v=view(sweep), page=page)


def view(sweep: SweepOutcome) -> dict[str, Any]:
    """Plain values for the template."""
    chart = chart_of(sweep)
    drawn = [d for measure in sweep.measures if (d := drawing(chart, measure)) is not None] if chart is not None else []
    settings = {k: short(value) for k, value in sweep.request.get("settings", {}).items() if value is not None}
    prompt = sweep.request.get("prompt") or ""
    places = [column.first_difference for column in sweep.columns if column.first_difference is not None]
    return {
        "sweep": sweep,
        "summary": summary(sweep),
        "recipes": _recipes(sweep),
        "chart": chart,
        "drawings": drawn,
        "prompt": prompt,
        "prompt_long": len(prompt) > LONG_PROMPT,
        "settings": settings,
        "inputs": [png(picture) for picture in sweep.inputs],
        "columns": [
            _card("untouched", sweep.untouched, None, min(places, default=None)),
            *(_card(column.label, column.side, column, column.first_difference) for column in sweep.columns),
        ],
        "table": _table(sweep),
    }


def _card(label: str, side: Side, column: Column | None, place: int | None) -> dict[str, Any]:
    tokens = side.tokens[:MOST_TOKENS]
    cut = len(tokens) if place is None or column is None else place
    ended = column is not None and place is not None and place >= len(side.tokens)
    name = " + ".join(recipe["name"] for recipe in column.recipes) if column is not None else "untouched"
    return {
        "name": name,
        "label": label,
        "plain": column is None,
        "chips": [] if column is None else [(key, "default" if v is None else short(v)) for key, v in column.differing.items()],
        "shared": "".join(tokens[:cut]),
        "marked": "".join(tokens[cut : cut + 1]) or ("(ends here)" if ended else ""),
        "rest": "".join(tokens[cut + 1 :]),
        "more": max(0, len(side.tokens) - MOST_TOKENS),
        "predictions": [{"label": text, "share": p, "text": percent(p)} for text, p in side.predictions],
        "pictures": [png(picture) for picture in side.pictures],
        "verdict": "" if column is None else verdict(column),
        "same": column is not None and column.same,
        "applied": "" if column is None else f"{column.applied:,} edits applied",
        "notes": [] if column is None else column.notes,
    }


def verdict(column: Column) -> str:
    """Whether the output is the untouched one."""
    if column.same:
        return "same as untouched"
    if column.side.text is None:
        return "differs"
    return f"differs from token {1 + (column.first_difference or 0)} on"


def _recipes(sweep: SweepOutcome) -> list[dict[str, Any]]:
    """Every recipe once, with the parameters that were set for all of its variants alike."""
    found: dict[str, dict[str, Any]] = {}
    for column in sweep.columns:
        for recipe in column.recipes:
            mine = found.setdefault(recipe["name"], {**recipe, "same": {n: recipe["parameters"][n] for n in recipe["chosen"]}})
            mine["same"] = {n: v for n, v in mine["same"].items() if recipe["parameters"].get(n) == v}
    for recipe in found.values():
        recipe["shown"] = [(name, short(value)) for name, value in recipe["same"].items()]
    return list(found.values())


def _table(sweep: SweepOutcome) -> dict[str, Any]:
    """Rows of what was measured: the untouched run, then every variant."""
    rows = [("untouched", "", "", [said(measure.untouched, measure.form) for measure in sweep.measures])]
    for column in sweep.columns:
        values = []
        for measure in sweep.measures:
            text = said(column.effect.get(measure.key), measure.form)
            plain = column.effect.get(f"{measure.key}_untouched")
            values.append(text if plain is None else f"{text} (untouched {said(plain, measure.form)})")
        rows.append((column.label, "same" if column.same else "differs", f"{column.applied:,}", values))
    return {"heads": [measure.short for measure in sweep.measures], "rows": rows}


def said(value: float | None, form: str) -> str:
    """A measured value in words."""
    if value is None:
        return "–"
    return percent(value) if form == "percent" else number(value)
