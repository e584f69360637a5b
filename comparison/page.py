"""What the HTML page shows of a report, computed here so that the template only places it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from ..interventions import ReattendError
from ..recipes.kit.checks import abridged
from .forms import png
from .looks import Cell
from .outcome import Outcome, Side
from .shares import marked, of_all, on_prompt
from .words import attention_summary, computed_by, count, duration, number, percent, points, role_words, size, summary, tiles

# A prompt longer than this is folded away; tokens beyond this many are counted, not shown.
LONG_PROMPT = 600
MOST_TOKENS = 400
# Of a longer prompt, these are shown of its start; what lies between them and the end is one cell.
FIRST_TOKENS = 60
# KL of a step at which the colour is full: two distributions that share almost nothing are some nats apart.
FULL_KL = 2.0


def views(reports: Sequence[Outcome]) -> list[dict[str, Any]]:
    return [view(report, place) for place, report in enumerate(reports)]


def view(report: Outcome, place: int) -> dict[str, Any]:
    """Plain values for the template."""
    shares = [on_prompt(side.mass) for side in (report.before, report.after)]
    whole = [of_all(side.mass) for side in (report.before, report.after)]
    return {
        "id": f"report-{place + 1}",
        "report": report,
        "summary": summary(report),
        "attention": attention_summary(report),
        "tiles": tiles(report),
        "recipes": [{**r, "shown": _parameters(r)} for r in report.recipes],
        "settings": {k: _short(v) for k, v in report.request.get("settings", {}).items() if v is not None},
        "prompt_long": len(report.request.get("prompt") or "") > LONG_PROMPT,
        "sides": [_side(report, report.before, "before", "Before"), _side(report, report.after, "after", "After")],
        "strip": _strip(report),
        # one kind of token alone has all of it, whatever happens
        "roles": _rows(*shares) if max(map(len, shares)) > 1 else [],
        "whole": _rows(*whole),
        "layers": _layers(report),
        "pictures": _pictures(report),
        "overlays": _overlays(report),
        "moved": _moved(report),
        "inputs": [png(p) for p in report.inputs],
        "cost": _cost(report),
        "memory": report.before.cost.memory_kind == "accelerator",
        "computed_by": computed_by(report),
        "stats": [(label, sum(sites.values()), len(sites)) for label, sites in report.stats.items()],
    }


def _side(report: Outcome, side: Side, key: str, label: str) -> dict[str, Any]:
    place = report.first_difference
    tokens = side.tokens[:MOST_TOKENS]
    if report.kind != "text":
        shared, marked, rest = [], "", []
    elif place is None:
        shared, marked, rest = tokens, "", []
    else:
        shared, marked, rest = tokens[:place], "".join(tokens[place : place + 1]), tokens[place + 1 :]
    ended = report.kind == "text" and place is not None and place >= len(side.tokens)
    return {
        "key": key,
        "label": label,
        "shared": "".join(shared),
        "marked": marked or ("(ends here)" if ended else ""),
        "rest": "".join(rest),
        "more": max(0, len(side.tokens) - MOST_TOKENS),
        "predictions": [{"label": name, "share": p, "text": percent(p)} for name, p in side.predictions],
    }


def _strip(report: Outcome) -> list[dict[str, Any]]:
    """One cell per token of the shared prefix, the first difference last: its KL and how strongly to colour it."""
    if report.kind != "text":
        return []
    cells = []
    for place, value in enumerate(report.kl[:MOST_TOKENS]):
        differs = place == report.first_difference
        before = report.before.tokens[place] if place < len(report.before.tokens) else "(end)"
        after = report.after.tokens[place] if place < len(report.after.tokens) else "(end)"
        level = math.sqrt(min(1.0, value / FULL_KL))
        cells.append(
            {
                "token": _visible(before),
                "other": _visible(after) if differs else "",
                "kl": number(value),
                "level": round(100 * level),
                "differs": differs,
            }
        )
    return cells


def _visible(token: str) -> str:
    return token.replace("\n", "⏎").strip(" ") or "␣"


def _rows(before: dict[str, float], after: dict[str, float]) -> list[dict[str, Any]]:
    """Shares before and after by kind of token: marked passages first, then the heaviest; what nobody looks at is left out."""
    first = marked({**before, **after})
    rows = []
    for name in {**before, **after}:
        a, b = before.get(name, 0.0), after.get(name, 0.0)
        if max(a, b) >= 0.0005:
            rows.append({"name": role_words(name), "role": name, "before": a, "after": b, "text": (percent(a), percent(b))})
    return sorted(rows, key=lambda row: (row["role"] not in first, -max(row["before"], row["after"])))


def _layers(report: Outcome) -> dict[str, Any]:
    """The shares that matter per layer: as two polylines in a 300 x 80 box, and as rows of a table."""
    sides = [report.before.mass_by_layer, report.after.mass_by_layer]
    layers = sorted(set(sides[0]) & set(sides[1]))
    if len(layers) < 3:
        return {}
    of = on_prompt if on_prompt(report.before.mass) else of_all
    shares = [{layer: of(data[layer]) for layer in layers} for data in sides]
    rows = _rows(*(of(side.mass) for side in (report.before, report.after)))[:6]
    if len(rows) < 2:  # of one kind of token there is nothing to tell but its part of the whole
        shares = [{layer: of_all(data[layer]) for layer in layers} for data in sides]
        rows = _rows(*(of_all(side.mass) for side in (report.before, report.after)))[:6]
    charts = []
    for row in rows:
        series = [[data[layer].get(row["role"], 0.0) for layer in layers] for data in shares]
        top = max(max(s) for s in series) or 1.0

        def line(values: list[float], top: float = top) -> str:
            step = 300 / (len(values) - 1)
            return " ".join(f"{i * step:.1f},{78 - 76 * v / top:.1f}" for i, v in enumerate(values))

        lines = {"before": line(series[0]), "after": line(series[1])}
        values = [(percent(a), percent(b)) for a, b in zip(*series, strict=True)]
        charts.append({"name": row["name"], "top": percent(top), **lines, "values": values})
    return {"charts": charts, "numbers": layers}


def _overlays(report: Outcome) -> list[dict[str, Any]]:
    """Per picture of the prompt and group of layers: the attention on it, before, after and moved."""
    looks = report.looks
    if looks is None or not looks.layers or not any(looks.image) or not report.inputs:
        return []
    from .pictures import panels

    found = []
    for place, picture in enumerate(report.inputs):
        try:
            grid = looks.grid(place, len(report.inputs))
        except ReattendError:  # tokens that form no grid have no places in the picture
            return []
        for panel in panels(looks, picture, grid):
            before, after = panel["mass"]
            found.append(
                {
                    "label": panel["label"],
                    "pictures": [png(panel[name]) for name in ("before", "after", "moved")],
                    "texts": [f"{percent(before)} on the image", f"{percent(after)} on the image", points(after - before)],
                    "largest": percent(panel["largest"]),
                }
            )
    return found


def _moved(report: Outcome) -> list[dict[str, Any]]:
    """The prompt's tokens after the first, with the attention that they lost or gained; of a long prompt the start and the end."""
    looks = report.looks
    if looks is None or not looks.layers:
        return []
    from .pictures import shown

    cells = looks.shared_cells()
    if len(cells) > MOST_TOKENS:
        middle = cells[FIRST_TOKENS : FIRST_TOKENS + len(cells) - MOST_TOKENS]
        summed = Cell("…", sum(c.tokens for c in middle), sum(c.before for c in middle), sum(c.after for c in middle))
        cells = [*cells[:FIRST_TOKENS], summed, *cells[FIRST_TOKENS + len(middle) :]]
    most = max((abs(c.after - c.before) for c in cells), default=0.0)
    return [
        {
            "token": shown(cell),
            "before": percent(cell.before),
            "after": percent(cell.after),
            "moved": points(cell.after - cell.before),
            "way": "gained" if cell.after > cell.before else "lost",
            "level": round(100 * math.sqrt(abs(cell.after - cell.before) / most)) if most else 0,
        }
        for cell in cells
    ]


def _pictures(report: Outcome) -> list[dict[str, str]]:
    rows = zip_longest(report.before.pictures, report.after.pictures, report.difference)
    return [{"before": png(a), "after": png(b), "difference": png(d) if d is not None else ""} for a, b, d in rows]


def _cost(report: Outcome) -> list[dict[str, str]]:
    rows = []
    for label, side in (("Before", report.before), ("After", report.after)):
        cost = side.cost
        rows.append(
            {
                "label": label,
                "passes": count(cost.passes),
                "tokens": count(cost.tokens),
                "samples": count(cost.samples),
                "steps": count(cost.steps),
                "edits": count(report.applied if side is report.after else 0),
                "memory": size(cost.memory),
                "seconds": duration(cost.seconds),
            }
        )
    return rows


def _parameters(recipe: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"name": name, "value": _short(value), "chosen": name in recipe["chosen"], "null": value is None}
        for name, value in recipe["parameters"].items()
    ]


def _short(value: Any) -> str:
    value = abridged(value)
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 160 else text[:150] + " …"


FILTERS = {"number": number, "percent": percent}
