"""The pictures of a comparison, or of several variants, as one: a grid with their names, for a PNG file."""

from __future__ import annotations

from typing import Any

from PIL import Image, ImageDraw

from ..interventions import ReattendError
from .outcome import Outcome
from .pictures import INK, PAPER, SOFT, _font
from .sweep_outcome import SweepOutcome
from .words import percent, short

SMALLEST, LARGEST = 160, 384
MOST_ACROSS = 6
GAP, MARGIN, LINE, BELOW = 12, 14, 17, 24

# (names, the first of which is set off; pictures; words below)
Tile = tuple[list[str], list[Any], str]


def pair(report: Outcome) -> Image.Image:
    """The untouched picture and the changed one of a comparison side by side; where a run gave several, they stand below each other."""
    check_pictures(report.kind)
    chosen = [(recipe["name"], recipe["parameters"], recipe["chosen"]) for recipe in report.recipes]
    said = [f"{key} = {short(values[key])}" for _, values, keys in chosen for key in keys]
    change = report.metrics.get("mean_absolute_difference")
    tiles = [
        (["untouched"], report.before.pictures, ""),
        (
            [" + ".join(name for name, _, _ in chosen), *said],
            report.after.pictures,
            _under(report.metrics["identical"], change),
        ),
    ]
    return _drawn(tiles, report.title)


def check_pictures(kind: str) -> None:
    if kind != "image":
        raise ReattendError(f"only pictures make a grid, and these variants gave {kind}s: html(path) shows them")


def grid(sweep: SweepOutcome) -> Image.Image:
    """The untouched picture first, then every variant's, at most six side by side; where a run gave several, they stand below each other."""
    check_pictures(sweep.kind)
    sides: list[Tile] = [(["untouched"], sweep.untouched.pictures, "")]
    for column in sweep.columns:
        name = " + ".join(recipe["name"] for recipe in column.recipes)
        said = [f"{key} = {'default' if value is None else value}" for key, value in column.differing.items()]
        sides.append(([name, *said], column.side.pictures, _under(column.same, column.effect.get("pixels"))))
    return _drawn(sides, sweep.title)


def _under(same: bool, change: float | None) -> str:
    return "the same picture" if same else "" if change is None else f"pixels change by {percent(change)}"


def _drawn(sides: list[Tile], headline: str) -> Image.Image:
    width, height = _size(sides[0][1][0].size)
    font, small = _font(14), _font(12)
    wrapped = [[piece for line in names for piece in _wrap(line, width, font)] for names, _, _ in sides]
    runs = max(len(pictures) for _, pictures, _ in sides)
    across = -(-len(sides) // -(-len(sides) // MOST_ACROSS))  # rows of about the same length
    blocks = [range(start, min(start + across, len(sides))) for start in range(0, len(sides), across)]
    heads = [max(len(wrapped[place]) for place in block) * LINE + 4 for block in blocks]
    title = _wrap(headline, across * (width + GAP) - GAP, font)
    top = MARGIN + len(title) * LINE + GAP
    total = top + sum(head + runs * (height + GAP) + BELOW for head in heads) + MARGIN - GAP
    canvas = Image.new("RGB", (2 * MARGIN + across * (width + GAP) - GAP, total), PAPER)
    draw = ImageDraw.Draw(canvas)
    for row, line in enumerate(title):
        draw.text((MARGIN, MARGIN + row * LINE), line, INK, font)
    for block, head in zip(blocks, heads, strict=True):
        for column, place in enumerate(block):
            left = MARGIN + column * (width + GAP)
            for row, line in enumerate(wrapped[place]):
                draw.text((left, top + row * LINE), line, INK if row == 0 else SOFT, font)
            for run, picture in enumerate(sides[place][1]):
                shown = picture.convert("RGB").resize((width, height), _filter(picture.width, width))
                canvas.paste(shown, (left, top + head + run * (height + GAP)))
            draw.text((left, top + head + runs * (height + GAP) - GAP + 3), sides[place][2], SOFT, small)
        top += head + runs * (height + GAP) + BELOW
    return canvas


def _size(size: tuple[int, int]) -> tuple[int, int]:
    """Small pictures grow by a whole factor, large ones shrink."""
    side = max(size)
    factor = -(-SMALLEST // side) if side < SMALLEST else min(1.0, LARGEST / side)
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def _filter(held: int, wanted: int) -> Any:
    """Grown pictures show their pixels; shrunk ones are averaged."""
    return Image.Resampling.NEAREST if wanted >= held else Image.Resampling.LANCZOS


def _wrap(text: str, width: int, font: Any) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
