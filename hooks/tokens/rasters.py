"""Which raster the latents of a denoiser's pass form: frames, rows and columns of tokens, read from what the model was called with.

Latents come as images or videos, cut into patches by the model, or packed into tokens by the pipeline: then their places stand in `img_ids`
(Flux), `img_shapes` (Qwen-Image) or `num_frames`, `height`, `width` (LTX). A packed sequence may hold further images that the one being
made is to look at (editing pipelines). What is read here is tried against the number of tokens of each call (`denoisers`).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..sites.families import Family

# denoisers whose latents are one row of tokens over time
SOUND = re.compile(r"Audio|1DModel")


@dataclass(frozen=True)
class Raster:
    """One image or video of the latents, in tokens. whole: its height and width before a UNet has halved them, where it has."""

    frames: int
    height: int
    width: int
    role: str = "image"
    whole: tuple[int, int] | None = None

    @property
    def count(self) -> int:
        return self.frames * self.height * self.width


@dataclass(frozen=True)
class Piece:
    """Some tokens of a sequence that follow each other: their role, how many, and the raster that they form, if any."""

    role: str
    count: int
    raster: Raster | None = None


@dataclass(frozen=True)
class Latents:
    """What a pass tells about its latents.

    count: their tokens, None where not known. rasters: the images they form, in the order of the tokens; () where that is not known, and
    `reason` says why. levels: a UNet, whose inner layers see the raster halved some times. mixed: several images, and which of them is the
    one being made is not known.
    """

    count: int | None = None
    rasters: tuple[Raster, ...] = ()
    levels: bool = False
    mixed: bool = False
    reason: str = ""

    def sizes(self) -> Iterator[Raster]:
        """The one image or video at the sizes in which the layers see it, the largest first."""
        if len(self.rasters) != 1:
            return
        frames, height, width = (own := self.rasters[0]).frames, own.height, own.width
        yield own
        while self.levels and height * width > 1:
            height, width = (height + 1) // 2, (width + 1) // 2
            yield Raster(frames, height, width, whole=(own.height, own.width))

    @property
    def pieces(self) -> list[Piece]:
        """The tokens of the latents in their order."""
        if self.rasters:
            return [Piece(raster.role, raster.count, raster) for raster in self.rasters]
        return [Piece("image", self.count or 0)]

    @property
    def told(self) -> str:
        """What the latents make, for messages."""
        if not self.rasters:
            return f"the {self.count} tokens of its latents" if self.count else f"known latents ({self.reason})"
        said = " and ".join(f"{r.frames} x {r.height} x {r.width}" for r in self.rasters)
        return f"its latents of {said} (frames x rows x columns{', or these halved' if self.levels else ''})"


def read_latents(denoiser: nn.Module, family: Family, hidden: Any, given: Mapping[str, Any], known: dict[Any, Any]) -> Latents:
    """hidden: the latents of the pass, as `family.axes` or the number of dimensions says. known: a run's own store, for ids read once."""
    levels = any(hasattr(denoiser, name) for name in ("down_blocks", "down_block_types"))
    if isinstance(hidden, (list, tuple)) and hidden and isinstance(hidden[0], Tensor):
        shapes = {tuple(one.shape) for one in hidden}
        if len(shapes) > 1:
            return Latents(reason=f"its samples have different sizes: {sorted(shapes)}")
        hidden = hidden[0][None]
    if isinstance(hidden, Tensor) and SOUND.search(type(denoiser).__name__):
        return Latents(reason=f"the latents of {type(denoiser).__name__} are sound")
    if not isinstance(hidden, Tensor) or hidden.dim() not in (3, 4, 5):
        return Latents(reason=f"{type(denoiser).__name__} was called without latents [batch, ...] of 3 to 5 dimensions")
    axes = family.axes if len(family.axes) == hidden.dim() else {3: "bnc", 4: "bchw", 5: "bcfhw"}[hidden.dim()]
    sizes = dict(zip(axes, hidden.shape, strict=True))
    if "n" in sizes:
        return _packed(denoiser, family, sizes["n"], given, known)
    if "h" not in sizes:
        return Latents(reason=f"the latents of {type(denoiser).__name__} are no images")
    frames, rows, cols = (1, 1, 1) if levels else patch_of(denoiser, given)
    raster = Raster(sizes.get("f", 1) // frames, sizes["h"] // rows, sizes["w"] // cols)
    if not raster.count:
        return Latents(reason=f"latents of {tuple(hidden.shape)} are smaller than a patch of {frames} x {rows} x {cols}")
    return Latents(raster.count, (raster,), levels)


def patch_of(denoiser: nn.Module, given: Mapping[str, Any]) -> tuple[int, int, int]:
    """(frames, rows, cols) of latents in one token: from the call, the configuration, or what the forward takes without either."""
    config, taken = getattr(denoiser, "config", None), inspect.signature(type(denoiser).forward).parameters

    def find(*names: str) -> Any:
        said = [given.get(name) for name in names] + [getattr(config, name, None) for name in names]
        said += [taken[name].default for name in names if name in taken]
        return next((value for value in said if value), 1)

    size = find("patch_size")
    if isinstance(size, (list, tuple)):
        return (1, *size)[-3:] if len(size) > 1 else (1, size[0], size[0])  # type: ignore[return-value]
    return int(find("patch_size_t", "temporal_patch_size", "f_patch_size")), int(size), int(size)


def _packed(denoiser: nn.Module, family: Family, count: int, given: Mapping[str, Any], known: dict[Any, Any]) -> Latents:
    """Latents that come as `count` tokens."""
    shapes, ids = given.get("img_shapes"), given.get("img_ids")
    sizes = [given.get(name) for name in ("num_frames", "height", "width")]
    if isinstance(shapes, (list, tuple)) and shapes:
        found = _from_shapes(shapes, bool(getattr(getattr(denoiser, "config", None), "use_layer3d_rope", False)))
    elif isinstance(ids, Tensor):
        found = _from_ids(ids, family.made, known)
    elif all(isinstance(size, int) for size in sizes):
        found = Latents(rasters=(Raster(*sizes),))  # type: ignore[arg-type]
    else:
        return Latents(count, reason=f"{type(denoiser).__name__} was not told the height and width of its {count} tokens")
    total = sum(raster.count for raster in found.rasters)
    if found.rasters and total != count:
        said = " + ".join(f"{r.frames} x {r.height} x {r.width}" for r in found.rasters)
        return Latents(count, reason=f"its latents are {count} tokens, and the sizes that it was given make {said} = {total}")
    return Latents(count, found.rasters, mixed=found.mixed, reason=found.reason)


def _from_shapes(shapes: Any, layered: bool) -> Latents:
    """Qwen-Image: (frames, height, width) of each image, per sample or once. layered: the last image is the one that is looked at, all
    others are made; else the first is made."""
    own = list(shapes[0]) if isinstance(shapes[0][0], (list, tuple)) else [shapes[0]]
    if any(sample != shapes[0] for sample in shapes):
        return Latents(reason=f"its samples have different sizes: {shapes}")
    last = len(own) - 1
    roles = ["image" if number == 0 or (layered and number < last) else "reference" for number in range(len(own))]
    sizes = [(int(frames), int(height), int(width)) for frames, height, width in own]
    return Latents(rasters=tuple(Raster(*size, role) for size, role in zip(sizes, roles, strict=True)))


def _from_ids(ids: Tensor, made: int, known: dict[Any, Any]) -> Latents:
    """Flux and its kin: ids [N, k] or [B, N, k], each (number, row, column, ...). made: the number of the image that is made, where the
    ids hold several."""
    store = known.setdefault("ids", [])
    for read, found in store:
        if read is ids:
            return found
    found = _read_ids(ids.detach().cpu(), made)
    store[:] = [*store[-3:], (ids, found)]
    return found


def _read_ids(ids: Tensor, made: int) -> Latents:
    if ids.dim() == 3:
        if not torch.equal(ids, ids[:1].expand_as(ids)):
            return Latents(reason="the img_ids of its samples differ")
        ids = ids[0]
    if ids.dim() != 2 or ids.shape[1] < 3:
        return Latents(reason=f"img_ids of {tuple(ids.shape)} are not understood")
    places = [tuple(row) for row in ids[:, :3].tolist()]
    images: list[tuple[float, Raster]] = []
    start = 0
    while start < len(places):
        height, width = _raster_from(places, start)
        images.append((places[start][0], Raster(1, height, width)))
        start += height * width
    if len(images) > 1 and any(raster.count == 1 for _, raster in images):
        return Latents(reason="the img_ids are no rasters, row by row")
    if len(images) == 1:
        return Latents(rasters=(images[0][1],))
    if [number for number, _ in images].count(made) != 1:
        return Latents(mixed=True, reason=f"its img_ids hold {len(images)} images, and which of them is made is not known")
    return Latents(
        rasters=tuple(
            Raster(1, raster.height, raster.width, "image" if number == made else "reference") for number, raster in images
        )
    )


def _raster_from(places: list[tuple[float, ...]], start: int) -> tuple[int, int]:
    """(height, width) of the raster that begins at a token: rows of one length, columns and rows counted up by one."""
    number, top, left = places[start]

    def is_there(row: int, col: int, width: int) -> bool:
        at = start + row * width + col
        return at < len(places) and places[at] == (number, top + row, left + col)

    width = 1
    while is_there(0, width, 0):
        width += 1
    height = 1
    while all(is_there(height, col, width) for col in range(width)):
        height += 1
    return height, width
