"""A thing cut out of one picture and put into another one: the pictures of it, and which places of a raster are the thing's in each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...interventions import ReattendError
from .layout import Box, Mask

CENTRE = (0.5, 0.5)
# of a place of the latents that the thing covers
LEAST_SHARE = 0.5
# less than this of a place is nothing
HAIR = 1e-3


@dataclass(frozen=True)
class Placed:
    """Where a thing is in its own picture and in the one it goes into, which have one size.

    source, target: its centres (down, across), and size (height, width), in shares of the picture; inside: bool [h, w], the thing in its own
    picture. Whole places are counted as the official code of PrimeComposer counts them: cut off, not rounded.
    """

    source: tuple[float, float]
    target: tuple[float, float]
    size: tuple[float, float]
    inside: Tensor

    def boxes(self, sides: tuple[int, int]) -> list[tuple[int, int, int]]:
        """(first place in the source, first place in the target, how many places) down, and across."""
        found = []
        for side, source, target, size in zip(sides, self.source, self.target, self.size, strict=True):
            first, last = (int(side * (source + sign * size / 2)) for sign in (-1, 1))
            half = (last - first) - (last - first) // 2
            there = first if source == target else int(target * side) - half
            found.append((first, there, last - first))
        return found

    def box(self, height: int, width: int) -> Tensor:
        """Bool [height, width]: the places of the box that the thing goes into."""
        (_, top, down), (_, left, across) = self.boxes((height, width))
        found = torch.zeros(height, width, dtype=torch.bool)
        found[max(top, 0) : top + down, max(left, 0) : left + across] = True
        return found

    def places(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """(long [m], long [m]): the thing's places on a raster of its own picture, and those of the target that they go to, row by row."""
        (top, to_top, down), (left, to_left, across) = self.boxes((height, width))
        rows, columns = torch.arange(height), torch.arange(width)
        seen = self.inside[rows * self.inside.shape[0] // height][:, columns * self.inside.shape[1] // width]
        y, x = seen.nonzero().unbind(dim=1)
        there_y, there_x = y - top + to_top, x - left + to_left
        fits = (y >= top) & (y < top + down) & (x >= left) & (x < left + across)
        # what the counting of whole places puts outside the picture is left out
        fits &= (there_y >= 0) & (there_y < height) & (there_x >= 0) & (there_x < width)
        return (y * width + x)[fits], (there_y * width + there_x)[fits]


def extent(mask: Mask, sides: tuple[int, int]) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of what a mask holds, in pixels of a picture of these sides (width, height).

    Raises ReattendError for a mask of other proportions.
    """
    width, height = sides
    down, across = len(mask), len(mask[0])
    if abs(down * width - across * height) >= max(width, height):
        raise ReattendError(f"mask of {across} x {down} has other proportions than the reference picture of {width} x {height}")
    marked = [(number, row) for number, row in enumerate(mask) if "1" in row]
    top, bottom = marked[0][0], marked[-1][0] + 1
    left, right = min(row.index("1") for _, row in marked), max(row.rindex("1") for _, row in marked) + 1
    return left * width // across, top * height // down, -(-right * width // across), -(-bottom * height // down)


def pasted(background: Any, reference: Any, mask: Mask, box: Box, centred: bool) -> tuple[Any, Any, Placed]:
    """(the background with the thing pasted in, a picture of the thing as large as there, where it is in both): PIL pictures of one size.

    box: where it goes, which it fills as far as its proportions allow, from the middle. centred: its own picture has it in the middle,
    else where it goes. The mask has their pixels; see `reduced`.
    """
    from PIL import Image

    width, height = background.size
    left, top, right, bottom = extent(mask, reference.size)
    wide, high = (box[2] - box[0]) * width, (box[3] - box[1]) * height
    ratio = min(wide / (right - left), high / (bottom - top))
    sides = max(round(reference.width * ratio), 1), max(round(reference.height * ratio), 1)
    scaled = reference.resize(sides, Image.Resampling.BICUBIC)
    marks = bytes(255 * (mark == "1") for row in mask for mark in row)
    cut = Image.frombytes("L", (len(mask[0]), len(mask)), marks).resize(sides, Image.Resampling.BILINEAR)
    cut = cut.point([255 * (level >= 128) for level in range(256)])
    size = (bottom - top) * ratio / height, (right - left) * ratio / width
    target = (box[1] + box[3]) / 2, (box[0] + box[2]) / 2
    source = CENTRE if centred else target

    def corner(centre: tuple[float, float]) -> tuple[int, int]:
        """Where the scaled reference starts, for the thing to have this centre."""
        down, across = centre
        return round((across - size[1] / 2) * width - left * ratio), round((down - size[0] / 2) * height - top * ratio)

    composite = background.copy()
    composite.paste(scaled, corner(target), cut)
    # what lies around the reference picture has its mean colour
    own = Image.new("RGB", background.size, reference.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0)))
    own.paste(scaled, corner(source))
    shape = Image.new("L", background.size, 0)
    shape.paste(cut, corner(source))
    held = torch.frombuffer(bytearray(shape.tobytes()), dtype=torch.uint8).view(height, width) > 0
    return composite, own, Placed(source, target, size, held)


def reduced(placed: Placed, height: int, width: int) -> Placed:
    """The same with the mask on the raster of the latents: the places that the thing covers by half, or of a thinner one all that it touches.

    Raises ReattendError where it touches none of them.
    """
    share = torch.nn.functional.adaptive_avg_pool2d(placed.inside[None].float(), (height, width))[0]
    for least in (LEAST_SHARE, HAIR):
        found = Placed(placed.source, placed.target, placed.size, share >= least)
        if found.places(height, width)[0].numel():
            return found
    raise ReattendError(
        f"box: in it the thing covers none of the {width} x {height} places of the latents: make the box larger"
    )
