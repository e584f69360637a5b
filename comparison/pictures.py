"""Attention drawn over a picture, and over the tokens of a text: PIL images, needing nothing but Pillow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..interventions import ReattendError
from .looks import Cell, Looks
from .words import WHOLE, percent, points

# Colour of a weight from none to the largest, and of weight that was lost or gained.
HEAT = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))
LOST, GAINED = (37, 99, 190), (226, 100, 28)
INK, SOFT, PAPER = (28, 33, 40), (102, 112, 128), (255, 255, 255)
# Of these two, so much in a cell of the strip: letters on it have to be read.
FULL_COLOUR = 0.6
SIDE = 240
# Pillow's own font has Latin letters only, and not these signs for blanks.
PLAIN = str.maketrans({"⏎": "\\n", "␣": "_"})


def level(weights: Tensor, largest: float) -> Tensor:
    """How strongly to colour a weight, 0 to 1: the square root of its part of the largest, so that small weights are seen too."""
    return (weights.clamp_min(0) / max(largest, 1e-30)).clamp(0, 1).sqrt()


def heat_picture(picture: Image.Image, heat: Tensor) -> Image.Image:
    """A greyed picture with levels [rows, cols] in 0..1 laid over it, one square per image token."""
    stops = torch.tensor(HEAT, dtype=torch.float32)
    place = heat.float().clamp(0, 1) * (len(HEAT) - 1)
    low = place.floor().long().clamp_max(len(HEAT) - 2)
    part = (place - low)[..., None]
    colours = stops[low] * (1 - part) + stops[low + 1] * part
    return _laid_over(picture, colours, 0.35 + 0.45 * heat.float())


def moved_picture(picture: Image.Image, moved: Tensor) -> Image.Image:
    """The same with levels in -1..1: blue where attention was lost, orange where it was gained."""
    gained = (moved > 0)[..., None]
    colours = torch.where(gained, torch.tensor(GAINED), torch.tensor(LOST)).float()
    return _laid_over(picture, colours, 0.85 * moved.float().abs())


def _laid_over(picture: Image.Image, colours: Tensor, opacity: Tensor) -> Image.Image:
    base = picture.convert("L").point([60 + v * 3 // 5 for v in range(256)]).convert("RGB")
    size, nearest = base.size, Image.Resampling.NEAREST
    rgb = Image.fromarray(colours.round().to(torch.uint8).numpy()).resize(size, nearest)
    mask = Image.fromarray((opacity.clamp(0, 1) * 255).round().to(torch.uint8).numpy()).resize(size, nearest)
    return Image.composite(rgb, base, mask)


def shown_part(picture: Image.Image, cropped: bool) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) in pixels of what the model sees of a picture: all of it, or the centre square."""
    width, height = picture.size
    if not cropped:
        return 0, 0, width, height
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def seen_part(picture: Image.Image, cropped: bool) -> Image.Image:
    """What the model sees of a picture, at a size that squares of image tokens can be told apart at."""
    part = picture.convert("RGB").crop(shown_part(picture, cropped))
    factor = SIDE / max(part.size)
    return part.resize((max(1, round(part.width * factor)), max(1, round(part.height * factor))))


def panels(looks: Looks, picture: Image.Image, grid: Tensor, count: int = 3) -> list[dict[str, Any]]:
    """Per group of layers: label, the pictures before, after and moved, the image's share before and after, a square's largest.

    Shares are those of the attention on the prompt after its first token. Before and after have one scale: their colours can be compared.
    """
    base = seen_part(picture, looks.cropped)
    found = []
    for group in looks.groups(count):
        before, after = (w[grid] for w in looks.shares(group.layers))
        top = float(torch.stack([before, after]).max())
        moved = after - before
        most = float(moved.abs().max())
        found.append(
            {
                "label": group.label,
                "before": heat_picture(base, level(before, top)),
                "after": heat_picture(base, level(after, top)),
                "moved": moved_picture(base, moved.sign() * level(moved.abs(), most)),
                "mass": (float(before.sum()), float(after.sum())),
                "largest": top,
                "most_moved": most,
            }
        )
    return found


def sheet(looks: Looks, picture: Image.Image, grid: Tensor, count: int = 3) -> Image.Image:
    """All panels as one picture with captions: a row per group of layers; before, after, moved."""
    rows = panels(looks, picture, grid, count)
    width, height = rows[0]["before"].size
    left, gap, head, line = 110, 14, 34, 40
    canvas = Image.new("RGB", (left + 3 * (width + gap), head + len(rows) * (height + line) + 24), PAPER)
    draw, font, small = ImageDraw.Draw(canvas), _font(15), _font(12)
    draw.text((10, canvas.height - 24), f"Shares {WHOLE}; moved: blue lost, orange gained.", SOFT, small)
    for column, title in enumerate(("before", "after", "moved")):
        draw.text((left + column * (width + gap), 9), title, INK, font)
    for number, row in enumerate(rows):
        top = head + number * (height + line)
        draw.text((10, top + 2), row["label"].replace(" ", "\n", 1), INK, small)
        draw.text((10, top + 44), f"brightest\nsquare:\n{percent(row['largest'])}", SOFT, small)
        before, after = row["mass"]
        captions = (
            f"{percent(before)} on the image",
            f"{percent(after)} on the image",
            f"{points(after - before)} points in all",
        )
        for column, name in enumerate(("before", "after", "moved")):
            at = left + column * (width + gap)
            canvas.paste(row[name], (at, top))
            draw.text((at, top + height + 4), captions[column], SOFT, small)
    return canvas


def strip(cells: Sequence[Cell], width: int = 980) -> Image.Image:
    """The tokens of a prompt as cells: blue lost attention, orange gained it; below each the change in percentage points."""
    if not cells:
        raise ReattendError("there is no token to draw")
    font, small = _font(14), _font(11)
    names = [shown(cell).translate(PLAIN) for cell in cells]
    most = max(abs(c.after - c.before) for c in cells)
    high, space, margin = 40, 4, 12
    placed, x, y = [], margin, margin + 26
    for cell, name in zip(cells, names, strict=True):
        size = max(font.getlength(name), small.getlength(points(cell.after - cell.before))) + 10
        if x + size > width - margin and x > margin:
            x, y = margin, y + high + space
        placed.append((cell, name, x, y, size))
        x += size + space
    title = f"Share {WHOLE}: blue lost, orange gained, in percentage points."
    used = max(*(x + size for *_, x, _, size in placed), margin + small.getlength(title))
    canvas = Image.new("RGB", (round(used + margin), round(y + high + margin)), PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((margin, margin - 4), title, SOFT, small)
    for cell, name, x, y, size in placed:
        moved = cell.after - cell.before
        strength = float(level(torch.tensor(abs(moved)), most)) if most else 0.0
        colour = GAINED if moved > 0 else LOST
        fill = tuple(round(255 + (c - 255) * FULL_COLOUR * strength) for c in colour)
        draw.rounded_rectangle((x, y, x + size, y + high), 5, fill=fill, outline=(221, 226, 232))
        draw.text((x + 5, y + 4), name, INK, font)
        draw.text((x + 5, y + 24), points(moved), INK, small)
    return canvas


def shown(cell: Cell) -> str:
    """A cell's text, with blanks made visible and runs counted."""
    if cell.tokens > 1 or cell.text == "image":
        return f"{cell.text} ({cell.tokens} tokens)"
    return cell.text.replace("\n", "⏎").strip(" ") or "␣"


def _font(size: int) -> Any:
    return ImageFont.load_default(size)
