"""Reads a clear picture of the world back: which coloured shapes it shows, and where. The judge of the image generators.

Tested on the renderer's own pictures. It sees flat colours on the world's dark background; noise and hiding patches are not for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from .drawing import BACKGROUND, mask
from .shapes import COLOURS, SHAPES, Thing

FRAME = 24
# a pixel belongs to a thing if it is this much on the way from the background to a full colour
PRESENCE = 0.45
# things smaller than this share of the picture are specks
LEAST = 0.006


@dataclass(frozen=True)
class Seen:
    """A thing found in a picture. box: (left, top, right, bottom) in pixels, mask: bool [height, width], fit: 0..1, how well the shape fits."""

    shape: str
    colour: str
    box: tuple[int, int, int, int]
    mask: np.ndarray
    fit: float

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


def read(image: Image.Image) -> list[Seen]:
    """The things of a picture, largest first."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    away = pixels - np.asarray(BACKGROUND, dtype=np.float32)
    names = list(COLOURS)
    full = np.asarray([COLOURS[n] for n in names], dtype=np.float32) - np.asarray(BACKGROUND, dtype=np.float32)
    length = np.linalg.norm(full, axis=1)
    # direction tells the colour also where an edge is half background
    likeness = (away @ full.T) / (np.linalg.norm(away, axis=-1, keepdims=True) * length + 1e-6)
    nearest = likeness.argmax(-1)
    there = np.linalg.norm(away, axis=-1) > PRESENCE * length[nearest]
    found: list[Seen] = []
    for piece in components(there):
        if piece.sum() < LEAST * piece.size:
            continue
        counts = np.bincount(nearest[piece], minlength=len(names))
        parts = [piece & (nearest == i) for i in np.flatnonzero(counts > 0.3 * counts.sum())]
        # two things that touch: each colour for itself
        for part in parts if len(parts) > 1 else [piece]:
            if part.sum() >= LEAST * piece.size:
                found.append(_named(part, names[int(np.bincount(nearest[part], minlength=len(names)).argmax())]))
    return sorted(found, key=lambda s: -int(s.mask.sum()))


def components(there: np.ndarray) -> list[np.ndarray]:
    """Connected pieces (with corners) of a bool [height, width] map, as maps."""
    labels = np.where(there, np.arange(1, there.size + 1).reshape(there.shape), 0)
    while True:
        wide = np.pad(labels, 1)
        height, width = labels.shape
        around = np.stack([wide[i : i + height, j : j + width] for i in range(3) for j in range(3)]).max(0)
        spread = np.where(there, around, 0)
        if np.array_equal(spread, labels):
            return [labels == label for label in np.unique(labels) if label]
        labels = spread


def _named(piece: np.ndarray, colour: str) -> Seen:
    box = _box(piece)
    framed = _framed(piece, box)
    tall = (box[3] - box[1]) / (box[2] - box[0])
    fits = {}
    for shape, (template, aspect) in templates().items():
        overlap = (framed & template).sum() / max((framed | template).sum(), 1)
        fits[shape] = float(overlap) - 0.5 * abs(np.log(tall / aspect))
    best = max(fits, key=lambda s: fits[s])
    return Seen(best, colour, box, piece, fits[best])


@cache
def templates() -> dict[str, tuple[np.ndarray, float]]:
    """Each shape in a square frame, and its height over its width."""
    made = {}
    for shape in SHAPES:
        whole = mask(Thing(shape, "white", 0.5, 0.5, 0.4), 64)
        box = _box(whole)
        made[shape] = (_framed(whole, box), (box[3] - box[1]) / (box[2] - box[0]))
    return made


def _box(piece: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(piece.any(1)), np.flatnonzero(piece.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _framed(piece: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
    cut = piece[box[1] : box[3], box[0] : box[2]].astype(np.uint8) * 255
    return np.asarray(Image.fromarray(cut).resize((FRAME, FRAME), Image.Resampling.BILINEAR)) > 127


def judge(asked: Sequence[Thing], seen: Sequence[Seen]) -> dict[str, float]:
    """What a picture got right of what was asked for (colour and shape, not place).

    binding: share of things with the right colour on the right shape. shapes, colours: shares found in any colour / on any shape.
    whole: 1 if every thing is there. count: 1 if there are as many things as asked for. extra: things that nobody asked for.
    """
    names = [s.name for s in seen]
    right = sum(t.name in names for t in asked)
    return {
        "binding": right / len(asked),
        "shapes": sum(any(s.shape == t.shape for s in seen) for t in asked) / len(asked),
        "colours": sum(any(s.colour == t.colour for s in seen) for t in asked) / len(asked),
        "whole": float(right == len(asked)),
        "count": float(len(seen) == len(asked)),
        "extra": float(sum(name not in {t.name for t in asked} for name in names)),
    }
