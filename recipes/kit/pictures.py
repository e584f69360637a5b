"""Pictures and masks that recipes for editing are told of: kept as plain data, and read as places of any raster of the picture."""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator
from torch import Tensor

from ...interventions import ReattendError
from .checks import INLINE, as_path, read_picture, shown
from .layout import Box, Mask, alike, read_mask

PICTURE = "a picture must be the path of a file, or a PIL picture"
# further than this from its edge a box does not hold a place: rounding
HAIR = 1e-6


def read_one(value: Any) -> str:
    """The path of a picture's file, or a PIL picture as a text that holds it. Raises ValueError for anything else."""
    if hasattr(value, "convert") and hasattr(value, "save"):
        held = io.BytesIO()
        try:
            value.convert("RGB").save(held, "PNG")
        except Exception as error:  # of a file that is read only now: Pillow's readers raise nearly everything
            raise ValueError(f"the picture cannot be read: {' '.join(str(error).split()):.200}") from None
        return INLINE + base64.b64encode(held.getvalue()).decode()
    if isinstance(value, (str, os.PathLike)):
        if str(value).startswith(INLINE):
            return str(value)
        try:
            return str(as_path(value, "it"))
        except ReattendError as error:
            raise ValueError(f"{PICTURE}: {error}") from None
    raise ValueError(f"{PICTURE}, got {shown(value)}")


def _pictures(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        if not value:
            raise ValueError("must name at least one picture")
        return [read_one(one) for one in value]
    return read_one(value)


# one for all pictures of a batch, or a list of one for each prompt
Pictures = Annotated[Any, BeforeValidator(_pictures)]


def opened(given: str, what: str) -> Any:
    """The PIL picture of what `read_one` gave. Raises ReattendError, which names `what`, where it cannot be read."""
    if not given.startswith(INLINE):
        return read_picture(given, what)
    from PIL import Image

    try:
        return Image.open(io.BytesIO(base64.b64decode(given.removeprefix(INLINE), validate=True))).convert("RGB")
    except Exception as error:  # as for files
        raise ReattendError(f"{what}: the picture in the recipe cannot be read: {' '.join(str(error).split()):.200}") from None


def listed(given: Any) -> list[Any]:
    """What is given once for all, or once for each prompt, as a list."""
    return given if isinstance(given, list) else [given]


# -- masks -----------------------------------------------------------------------------------------------------------------


def read_masks(value: Any) -> Any:
    """A mask, or a list of one for each prompt: the path of a picture, a PIL picture, an array, or rows of "0" and "1".

    Raises ValueError for anything else.
    """
    return [_mask(one) for one in value] if _several(value) else _mask(value)


def _several(value: Any) -> bool:
    first = value[0] if isinstance(value, (list, tuple)) and value else None
    if isinstance(first, str):
        return bool(set(first) - {"0", "1"})
    nested = isinstance(first, (list, tuple)) and bool(first) and isinstance(first[0], (str, list, tuple))
    return nested or hasattr(first, "convert") or getattr(first, "ndim", 0) == 2


def _mask(value: Any) -> str | Mask:
    if isinstance(value, (str, os.PathLike)):
        return read_one(value)
    return read_mask(value, "a mask must be a picture, its path, or [height, width]; boxes go by a name of their own")


Masks = Annotated[Any, BeforeValidator(read_masks)]


def mask_of(given: str | Mask, what: str) -> Mask:
    """The mask itself: a file is read. Raises ReattendError, which names `what`, for a file that is none or holds nothing."""
    if not isinstance(given, str):
        return given
    whose = f"picture for {what}"
    picture = opened(given, whose) if given.startswith(INLINE) else read_picture(given, whose, None)
    try:
        return read_mask(picture)
    except ValueError as error:
        raise ReattendError(f"{what}: {error}") from None


def touched(region: Mask | Sequence[Box], height: int, width: int, grow: float, whose: str) -> Tensor:
    """Bool [height, width]: the places of a raster that a mask or boxes touch, however little.

    grow: by how much each is made larger to every side, as a share of the picture's shorter side. whose: what messages call it. Raises
    ReattendError for a mask of other proportions than the raster's.
    """
    found = torch.zeros(height, width, dtype=torch.bool)
    if not isinstance(region[0], str):
        reach = grow * min(height, width)
        boxes: Sequence[Box] = region  # type: ignore[assignment]
        for left, top, right, bottom in boxes:
            rows = (top * height - reach + HAIR, bottom * height + reach - HAIR)
            columns = (left * width - reach + HAIR, right * width + reach - HAIR)
            (first, last), (begin, end) = ((max(math.floor(low), 0), math.ceil(high)) for low, high in (rows, columns))
            found[first:last, begin:end] = True
        return found
    mask = _grown(tuple(region), grow)  # type: ignore[arg-type]
    down, across = mask.shape[-2:]
    if not alike((down, across), (height, width)):
        raise ReattendError(
            f"{whose} of {across} x {down} has other proportions than the picture, which is {width} x {height} places: make it the "
            "picture's size"
        )
    return torch.nn.functional.adaptive_max_pool2d(mask, (height, width))[0] > 0


def _grown(rows: Mask, grow: float) -> Tensor:
    """[1, height, width]: a mask, made larger."""
    marks = torch.frombuffer(bytearray("".join(rows).encode()), dtype=torch.uint8) == ord("1")
    mask = marks.view(1, len(rows), -1).float()
    reach = round(grow * min(mask.shape[-2:]))
    return torch.nn.functional.max_pool2d(mask, 2 * reach + 1, stride=1, padding=reach) if reach else mask
