"""What recipes share that are told where things go: boxes and masks by the words they belong to, and the places of a picture that these hold.

A box is (left, top, right, bottom) in shares of the picture's width and height. A mask has one value for each pixel or place, not 0 where
it holds; it is kept as rows of "0" and "1", so that a recipe stays plain data. A picture is a mask where it is neither black nor
transparent: brighter than a tenth of its brightest pixel, as lossy files are not quite black beside edges (the authors of Attentive Eraser
cut blurred masks there too).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Annotated, Any, NamedTuple, TypeVar

import torch
from pydantic import PlainValidator
from torch import Tensor

from ...interventions import Call, ReattendError
from .checks import is_mask, read_picture, shown

T = TypeVar("T")
Box = tuple[float, float, float, float]
Mask = tuple[str, ...]
BOX = "a box must be [left, top, right, bottom] in shares of the picture's sides, 0 <= left < right <= 1 and 0 <= top < bottom <= 1"
MASK = "a mask must be [height, width], not 0 where it holds"


def read_region(value: Any) -> Box | Mask:
    """A box of four numbers, or a mask: a picture, an array, a tensor, rows of numbers, or rows of "0" and "1".

    Raises ValueError for a box outside the picture or without area, a mask of another form and one that holds nothing.
    """
    value = _listed(value)
    return read_box(value) if _four(value) else read_mask(value, f"{BOX}, or {MASK}")


def read_box(value: Any) -> Box:
    """A box of four numbers. Raises ValueError for one outside the picture or without area, and for anything else."""
    value = _listed(value)
    if not _four(value):
        raise ValueError(f"{BOX}, not {shown(value)}")
    left, top, right, bottom = map(float, value)
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise ValueError(f"{BOX} (divide pixels by these), not {list(value)}")
    return left, top, right, bottom


def read_mask(value: Any, wanted: str = MASK) -> Mask:
    """A mask in any of its forms. Raises ValueError for anything else, and for one that holds nothing; wanted: what would be right."""
    if isinstance(value, (list, tuple)) and value and all(isinstance(row, str) for row in value):
        rows = tuple(value)
        if not is_mask(rows):
            raise ValueError(f'{MASK}: rows of "0" and "1" must be of one length')
    else:
        rows = tuple("".join("1" if inside else "0" for inside in row) for row in _held(value, wanted).tolist())
    if not any("1" in row for row in rows):
        raise ValueError("the mask is empty: it is 0 everywhere")
    return rows


def _listed(value: Any) -> Any:
    """A vector as a list of its numbers, which may be a box."""
    return value.tolist() if getattr(value, "ndim", 0) == 1 else value


def _four(value: Any) -> bool:
    numbers = isinstance(value, (list, tuple)) and len(value) == 4
    return numbers and all(isinstance(number, Real) and not isinstance(number, bool) for number in value)


def _held(value: Any, wanted: str) -> Tensor:
    """Bool [height, width]: where a mask holds."""
    try:
        if hasattr(value, "convert"):  # a PIL image
            found = _bright(value)
        else:
            found = value.detach().cpu() if isinstance(value, Tensor) else torch.as_tensor(value)
            found = found.to_dense() if found.layout != torch.strided else found
        usable = found.dim() == 2 and found.numel() and bool((found == found).all())
    except Exception as error:  # readers of pictures and of arrays raise nearly everything
        reason = f" ({' '.join(str(error).split()):.100})" if hasattr(value, "convert") else ""
        raise ValueError(f"{wanted}, not {shown(value)}{reason}") from None
    if not usable:
        raise ValueError(f"{wanted}, not {shown(value)}")
    return found != 0


def _bright(image: Any) -> Tensor:
    """Bool [height, width]: where a picture (PIL) is neither black nor transparent."""
    if image.mode == "F" or image.mode.startswith("I"):  # more than 8 bits
        light = torch.frombuffer(bytearray(image.convert("F").tobytes()), dtype=torch.float32).view(image.height, image.width)
    else:
        clear = image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info
        pixels = torch.frombuffer(bytearray(image.convert("RGBA" if clear else "RGB").tobytes()), dtype=torch.uint8)
        pixels = pixels.view(image.height, image.width, -1).float()
        light = pixels[..., :3].amax(dim=2) * (pixels[..., 3] if clear else 1)
    return light > light.max() / 10


def read_regions(value: Any) -> dict[str, Box | Mask] | list[dict[str, Box | Mask]] | None:
    """{words: region} of every prompt, or a list of these, one for each; None stays. Raises ValueError for anything else."""
    if isinstance(value, (list, tuple)):
        return [_of_prompt(one) for one in value]
    return None if value is None else _of_prompt(value)


def _of_prompt(value: Any) -> dict[str, Box | Mask]:
    if not isinstance(value, Mapping) or not all(isinstance(words, str) and words.strip() for words in value):
        raise ValueError("must be {text: box or mask}, none of the texts empty, or a list of these, one for each prompt")
    found = {}
    for words, region in value.items():
        try:
            is_file = isinstance(region, (str, os.PathLike))
            found[words] = read_region(read_picture(region, f"mask of {words!r}", None) if is_file else region)
        except ValueError as error:
            raise ValueError(f"{words!r}: {error}") from None
    return found


# by words of the prompt: one mapping for every prompt, or one for each
Regions = Annotated[dict[str, Any] | list[dict[str, Any]] | None, PlainValidator(read_regions)]


def per_prompt(given: Mapping[str, T] | Sequence[Mapping[str, T]] | None) -> list[Mapping[str, T]]:
    """The mappings of a parameter that takes one for all prompts, or a list of one for each."""
    return [] if given is None else [given] if isinstance(given, Mapping) else list(given)


def of_picture(given: Sequence[T], number: int, pictures: int, whose: str = "regions") -> T:
    """What belongs to a picture: prompts come as often as there are pictures of each. whose: what messages call it.

    Raises ReattendError where there are more of them, or another number.
    """
    times, rest = divmod(pictures, len(given))
    if rest:
        raise ReattendError(
            f"{whose} for {len(given)} prompts, and {pictures} pictures: give them for every prompt, or once for all"
        )
    return given[number // times]


def alike(sides: tuple[int, int], places: tuple[int, int]) -> bool:
    """Whether a picture or mask (height, width) has the proportions of a raster of places, but for less than one of these.

    An odd side is halved upwards, so that inner layers see other proportions by less than a place.
    """
    (down, across), (height, width) = sides, places
    return abs(down * width - across * height) < min(down, across)


def places_in(region: Box | Mask, height: int, width: int, whose: str) -> Tensor:
    """Bool [height, width]: the places of a raster that a region holds. Corners are rounded to places; a mask is read at their centres.

    Raises ReattendError where these are none, and for a mask of other proportions. whose: what messages call the region.
    """
    if isinstance(region[0], str):
        mask = torch.tensor([[mark == "1" for mark in str(row)] for row in region])
        down, across = mask.shape
        if not alike((down, across), (height, width)):
            raise ReattendError(
                f"{whose}: a mask of {across} x {down} has other proportions than the picture, which is {width} x {height} places: make it the "
                "picture's size"
            )
        found = torch.nn.functional.interpolate(mask[None, None].float(), size=(height, width), mode="nearest-exact")[0, 0] > 0
    else:
        left, top, right, bottom = region
        found = torch.zeros(height, width, dtype=torch.bool)
        found[round(top * height) : round(bottom * height), round(left * width) : round(right * width)] = True  # type: ignore[operator]
    if not bool(found.any()):
        raise ReattendError(
            f"{whose}: it holds none of the {width} x {height} places of the attention that is changed: make it larger"
        )
    return found


class PicturesOf(NamedTuple):
    """Of a call. numbers: of the picture that each row is of; conditional: the row of each picture's conditional half in the denoiser's batch,
    None where this call has the unconditional half alone; count: of pictures."""

    numbers: list[int]
    conditional: list[int | None]
    count: int


def pictures_of(call: Call) -> PicturesOf:
    """Whose picture a row is. Rows of both halves of guidance, and those that guides have copied from them, have their picture's number; so
    have its frames, where a call holds them as rows.

    Raises ReattendError for a denoiser that attends for each sample alone (Mochi), which tells of one row.
    """
    clock = call.clock
    rows = len(next(iter(clock.branches.values()), torch.zeros(call.batch)))
    source = list(range(rows)) if clock.source is None else clock.source.tolist()
    if max(source) >= rows:
        where = "this denoiser" if call.site is None else call.site.name
        raise ReattendError(
            f"{where} attends for each sample alone, so pictures with masks of their own cannot be told apart: give one"
        )
    number, first = [0] * rows, []
    for half in ("conditional", "unconditional"):
        marked = clock.branches.get(half)
        own = [] if marked is None else [row for row in marked.nonzero()[:, 0].tolist() if source[row] == row]
        for place, row in enumerate(own):
            number[row] = place
        first = first or ([*own] if half == "conditional" else [None] * len(own))
    numbers = [number[source[row]] for row in range(rows) for _ in range(call.batch // rows)]
    return PicturesOf(numbers, first, len(first) or 1)
