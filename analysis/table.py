"""An analysis in the terminal, drawn with rich."""

from __future__ import annotations

from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from ..comparison.words import number, percent
from .findings import Findings

SHADES = " ░▒▓█"
# Rows of a list that are shown; the rest is counted.
MOST = 6


def renderable(found: Findings) -> Any:
    facts = found.model
    heads = "/".join(str(h) for h in facts["heads"])
    title = f"{facts['name'] or facts['class']}: {facts['layers']} layers of the {found.stack} with {heads} heads"
    under = f", under {' + '.join(found.recipes)}" if found.recipes else ""
    lengths = sorted({len(s) for s in found.samples})
    span = f"{lengths[0]}" if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]}"
    parts: list[Any] = [Text(title, style="bold"), Text(f"{len(found.samples)} text(s) of {span} tokens{under}", style="dim")]
    parts.append(_findings(found))
    parts.append(_layers(found))
    parts += _lists(found)
    parts += [Text(f"note: {note}", style="yellow") for note in found.notes]
    return Group(*parts)


def _findings(found: Findings) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="cyan", no_wrap=True)
    rates = found.sink_rates()
    early = rates[1 : max(1, rates.numel() - found.skip_last)]
    table.add_row(
        "sink rate", f"{found.sink_rate():.1f} %: heads that give the first token over {found.epsilon:g} of their weight"
    )
    if early.numel():
        table.add_row("elsewhere", f"{float(early.max()):.1f} % at position {1 + int(early.argmax())}, the next highest")
    dims = found.sink_dims()
    words = ", ".join(map(str, dims)) if dims else "none"
    table.add_row("sink dimensions", f"{words}: hidden dimensions over 20 times the rms at the first token")
    massive = found.massive()
    if massive:
        top = massive[0]
        where = (
            f"layer {top.layer}, token {top.position} ({_visible(found.samples[0].tokens[top.position])}), dimension {top.dim}"
        )
        table.add_row("massive", f"{number(abs(top.value))} entering {where}")
    else:
        table.add_row("massive", f"none over {found.settings.absolute:g} and {found.settings.ratio:g} times the median")
    similarity = found.similarity()
    if similarity is not None:
        table.add_row("similarity", f"{number(similarity)}: mean squared cosine of the tokens with the first one (0 to 1)")
    return table


def _layers(found: Findings) -> Table:
    table = Table(
        "layer", "on the first token", "mean", "largest |x|", "median", "|x| first", "|k| first", "|v| first",
        box=None, pad_edge=False, header_style="dim",
    )  # fmt: skip
    for column in table.columns[2:]:
        column.justify = "right"
    first, largest, norms = found.first_token(), found.largest(), found.norms()

    def beside(name: str, row: int) -> str:
        values = norms[name][row]
        rest = values[1:].median() if values.numel() > 1 else values[0]
        return f"{float(values[0] / rest.clamp_min(1e-12)):.2f}x"

    for row, layer in enumerate(found.layers):
        weights = first[layer]
        shades = "".join(SHADES[min(4, int(5 * float(w)))] for w in weights)
        table.add_row(
            str(layer), Text(shades, style="cyan"), percent(float(weights.mean())), number(float(largest[row, 0])),
            number(float(largest[row, -1])), beside("hidden", row), beside("key", row), beside("value", row),
        )  # fmt: skip
    table.caption = "on the first token: weight, a character per head; x: its norms beside the median of the others"
    return table


def _lists(found: Findings) -> list[Any]:
    """What stands out in the first text beside its first token."""
    text = found.samples[0]
    lists = {
        "sinks after the first token": [(k, f"in {percent(share)} of the heads") for k, _, share in found.sinks(0) if k],
        "massive activations after the first token": [
            (m.position, f"{number(m.value)} in dimension {m.dim} entering layer {m.layer}")
            for m in found.massive(0)
            if m.position
        ],
        "intermediate sinks, as the first token in state and value": [
            (k, f"in {n} layers, cosine {cosine:.2f}") for k, _, n, cosine in found.intermediate_sinks(0)
        ],
    }
    if text.near:
        rhythm = found.rhythm(0)
        far = sorted(rhythm.anchors, key=lambda k: -float(rhythm.fai[k]))
        lists["anchors that later text looks back at (FAI)"] = [(k, f"{float(rhythm.fai[k]):.3f}") for k in far]
    parts: list[Any] = []
    for title, rows in lists.items():
        if rows:
            more = f"  … {len(rows) - MOST} more" if len(rows) > MOST else ""
            shown = "; ".join(f"{k} {_visible(text.tokens[k])!r} {words}" for k, words in rows[:MOST])
            parts.append(Text(f"{title}: ", style="dim").append(shown, style="not dim").append(more))
    return parts


def _visible(token: str) -> str:
    return token.replace("\n", "⏎").strip(" ") or "␣"
