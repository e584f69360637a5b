"""What happens inside a vision encoder, told per image token of the decoder's prompt.

Encoders run before the decoder, inside the model's pass or, under `generate`, before it. What is read inside a pass belongs to that
pass and goes with it, also where it fails. What is read outside of one is kept for this thread until the prompt with the image tokens
follows; of several runs (a preview, a call that failed) the last ones that fit the prompt are taken. Patches become tokens as each
family does it: one to one, merged in blocks, tiles put together and cropped, windows out of order.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from ...interventions import Call, ReattendError, Site, TokenGrid
from ..doors.capture import Capture
from ..passes import OUTSIDE
from ..sites.table import SiteTable
from .image_grids import UNPADDED

# Runs of an encoder that are kept for a prompt to come.
MOST_RUNS = 64
# name of a reading -> one value per patch of every unit (an image or tile) of a call: [B, patches]
Reading = Callable[[Call, "int | None"], Tensor]


def encoder_sites(table: SiteTable) -> SiteTable:
    """The self-attention layers of a model's vision encoder."""
    return table.stack("vision").kind("self")


def class_query(config: Any, patches: int) -> int | None:
    """The row of an encoder's class token among `patches` rows: 0, or -1 where it comes last; None without one."""
    vision = config.vision_config
    size, patch = (_first(getattr(vision, name, None)) for name in ("image_size", "patch_size"))
    if not size or not patch or patches != (size // patch) ** 2 + 1:
        return None
    return -1 if vision.model_type.startswith("llama4") else 0


class PatchReader:
    """Reads encoder layers: `steps` goes into a plan, `per_image` tells the values of the image tokens when the prompt is read.

    readings: {name: (site, function)}; the function gets the call and the row of its class token.
    """

    def __init__(self, table: SiteTable, readings: Mapping[str, tuple[Site, Reading]]) -> None:
        self.config, self.readings, self.table = table.config, dict(readings), table
        self.local = threading.local()

    @property
    def steps(self) -> list[Capture]:
        names = {site.name for site, _ in self.readings.values()}
        return [Capture(self.table.where(lambda s: s.name in names), self._read)]

    def _read(self, call: Call, edits: Sequence[Any]) -> None:
        assert call.site is not None
        if call.tokens is not None and "merged" in call.tokens:
            raise ReattendError(
                f"{call.site.name} attends over tokens that another recipe has merged, and what is read there is no place of an image: "
                "use one of the two"
            )
        runs = self._outside() if call.clock is OUTSIDE else self._of_pass(call)
        query = class_query(self.config, call.num_keys)
        for name, (site, function) in self.readings.items():
            if site.name == call.site.name:
                values = function(call, query)
                if query is not None:  # the class token is no place of the image
                    values = values[:, 1:] if query == 0 else values[:, :-1]
                if not runs or name in runs[-1]:
                    runs.append({})
                runs[-1][name] = values.float()
        del runs[:-MOST_RUNS]

    def _outside(self) -> list[dict[str, Tensor]]:
        """Runs of the encoder in this thread that belong to no pass: {reading: [units, patches]} each."""
        if not hasattr(self.local, "runs"):
            self.local.runs = []
        return self.local.runs

    @staticmethod
    def _of_pass(call: Call) -> list[dict[str, Tensor]]:
        """Runs of the encoder inside the pass of a call, of whichever site."""
        if call.memory.get("encoder", (None,))[0] is not call.clock:
            call.memory["encoder"] = (call.clock, [])
        return call.memory["encoder"][1]

    def per_image(self, call: Call, known: list[TokenGrid]) -> list[tuple[TokenGrid, dict[str, Tensor]]] | None:
        """(grid, {reading: [rows, cols]}) of the images that are not `known` yet; None while not all of their tokens are in the prompt.

        Raises ReattendError where image tokens are there and the encoder has not run under this session.
        """
        tokens = call.tokens
        assert tokens is not None
        old = {(g.row, int(g.image[0, 0])) for g in known}
        new = [g for g in tokens.grids if (g.row, int(g.image[0, 0])) not in old]
        if not new:
            return []
        inside = self._of_pass(call)
        runs = [run for run in inside or self._outside() if len(run) == len(self.readings)]
        if not runs:
            raise ReattendError(
                "the image tokens of this prompt come from an image that the vision encoder has read before the session began, with an "
                "earlier piece of the prompt, or elsewhere: pass pixel_values to the model inside the session, and the whole prompt at "
                "once (prefill_chunk_size=None)"
            )
        new.sort(key=lambda g: (g.row, int(g.index.min())))
        for count in [len(runs)] if inside else range(1, len(runs) + 1):
            found = self._fitted(runs[-count:], tokens.batch, new)
            if found is not None:
                self._outside().clear()
                return found
        return None

    def _fitted(
        self, runs: list[dict[str, Tensor]], batch: int, new: list[TokenGrid]
    ) -> list[tuple[TokenGrid, dict[str, Tensor]]] | None:
        """These runs laid out on the grids; None where they do not fit."""
        # beams and several answers repeat the prompts, not the images
        for times in range(1, batch + 1):
            if batch % times:
                continue
            own = [g for g in new if g.row % times == 0]
            values = {name: lay_out(self.config, [run[name] for run in runs], own) for name in self.readings}
            if len(own) * times == len(new) and all(v is not None for v in values.values()):
                found = {(g.row, int(g.image[0, 0])): {k: v[i] for k, v in values.items() if v} for i, g in enumerate(own)}
                return [(g, found[g.row - g.row % times, int(g.image[0, 0])]) for g in new]
        return None


def lay_out(config: Any, parts: list[Tensor], grids: Sequence[TokenGrid]) -> list[Tensor] | None:
    """Values of patches, call by call [units, patches], summed to image tokens: one [rows, cols] per grid; None where they do not fit."""
    vision = config.vision_config
    if hasattr(vision, "temporal_patch_size"):
        return _in_blocks(vision, torch.cat([p.flatten() for p in parts]), grids)
    if getattr(vision, "model_type", "") == "pixtral":
        return _in_rows(getattr(config, "spatial_merge_size", 1), torch.cat([p.flatten() for p in parts]), grids)
    units = [unit for p in parts for unit in p]
    if any(math.isqrt(u.numel()) ** 2 != u.numel() for u in units):
        return None
    maps = [u.view(math.isqrt(u.numel()), -1) for u in units]
    if config.model_type in UNPADDED:
        return _from_tiles(config, maps, grids)
    return [pooled(m, (g.height, g.width)) for m, g in zip(maps, grids)] if len(maps) == len(grids) else None


def pooled(values: Tensor, shape: tuple[int, int]) -> Tensor:
    """A map [height, width] summed in blocks to a smaller shape."""
    if tuple(values.shape) == shape:
        return values
    return adaptive_avg_pool2d(values[None], shape)[0] * (values.numel() / (shape[0] * shape[1]))


def _in_blocks(vision: Any, flat: Tensor, grids: Sequence[TokenGrid]) -> list[Tensor] | None:
    """Qwen-VL and GLM: merge x merge patches of a token follow each other; where layers have windows, tokens come window by window."""
    merge = getattr(vision, "spatial_merge_size", 2)
    sizes = [g.index.numel() for g in grids]
    if flat.numel() != sum(sizes) * merge**2:
        return None
    found = []
    windows = getattr(vision, "fullatt_block_indexes", None) is not None
    for grid, part in zip(grids, flat.view(-1, merge**2).sum(dim=1).split(sizes), strict=True):
        if windows:
            order = _window_order(grid.height, grid.width, vision.window_size // merge // vision.patch_size)
            part = part[order.argsort().to(part.device)]
        found.append(part.view(grid.image.shape))
    return found


def _window_order(rows: int, cols: int, width: int) -> Tensor:
    """Tokens of a grid as windowed layers hold them: window after window, the last ones cut off at the border."""
    index = torch.arange(rows * cols).view(rows, cols)
    return torch.cat(
        [index[r : r + width, c : c + width].flatten() for r in range(0, rows, width) for c in range(0, cols, width)]
    )


def _in_rows(merge: int, flat: Tensor, grids: Sequence[TokenGrid]) -> list[Tensor] | None:
    """Pixtral and Mistral 3: all images in one sequence, each row by row."""
    sizes = [g.index.numel() * merge**2 for g in grids]
    if flat.numel() != sum(sizes):
        return None
    parts = zip(flat.split(sizes), (g.image.shape for g in grids), strict=True)
    return [pooled(part.view(rows * merge, cols * merge), (rows, cols)) for part, (rows, cols) in parts]


def _from_tiles(config: Any, maps: list[Tensor], grids: Sequence[TokenGrid]) -> list[Tensor] | None:
    """LLaVA-NeXT and OneVision: each image as one map, and, where a finer grid follows, its tiles, put together and cropped."""
    if not grids:
        return None if maps else []
    if not maps:
        return None
    side, (first, *others) = maps[0].shape[0], grids
    if first.image.shape != (side, side):
        return None
    fine = others[0] if others and others[0].row == first.row else None
    if fine is None or int(fine.index.min()) != int(first.index.max()) + 1:
        rest = _from_tiles(config, maps[1:], others)
        return None if rest is None else [maps[0], *rest]
    for high, wide in _tilings(config, fine.height, fine.width, side):
        tiles = maps[1 : 1 + high * wide]
        rest = _from_tiles(config, maps[1 + high * wide :], others[1:]) if len(tiles) == high * wide else None
        if rest is not None:
            rows = [torch.cat(tiles[r * wide : (r + 1) * wide], dim=1) for r in range(high)]
            return [maps[0], _cropped(torch.cat(rows, dim=0), (fine.height, fine.width)), *rest]
    return None


def _tilings(config: Any, rows: int, cols: int, side: int) -> list[tuple[int, int]]:
    """Numbers of tiles (high, wide) that may have become a grid of rows x cols, the surest first."""
    size = config.vision_config.image_size
    known = sorted({(h // size, w // size) for h, w in config.image_grid_pinpoints}, key=lambda t: t[0] * t[1])
    exact = [(h, w) for h, w in known if (h * side == rows and w * side >= cols) or (w * side == cols and h * side >= rows)]
    return exact + [(h, w) for h, w in known if (h, w) not in exact and h * side >= rows and w * side >= cols]


def _cropped(values: Tensor, shape: tuple[int, int]) -> Tensor:
    """The middle of a map in the proportions of `shape`, shrunk to it where it is larger: the padding around an image is cut off."""
    height, width = values.shape
    rows, cols = shape
    if rows != height and cols != width:
        tall, broad = min(height, round(width * rows / cols)), min(width, round(height * cols / rows))
    else:
        tall, broad = shape
    top, left = (height - tall) // 2, (width - broad) // 2
    return pooled(values[top : top + tall, left : left + broad], shape)


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, (list, tuple)) and value else value
