"""The (rows, cols) grid that an image's tokens form, from whatever the same forward pass was given.

`generate` of transformers 5.23 runs the vision encoder beforehand and hands over its features instead of the pixels and their sizes, so for
each family there is a second source (the positions of multimodal RoPE, newline features, break tokens). A grid that cannot be told for
sure is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...interventions import TokenGrid

UNPADDED = {"llava_next", "llava_next_video", "llava_onevision"}
# Features and pixels come per sample here, all tiles of it together.
TILED = {"idefics3", "smolvlm"}

# One image: how many placeholders it has, and its grids as indices into them.
Layout = tuple[int, list[Tensor]]


def find_grids(model: Any, config: Any, family: str, mask: Tensor, ids: Tensor, given: dict[str, Any]) -> list[TokenGrid]:
    """Grids of all images, from the surest source that accounts for every image token; bool mask and ids [B, T]."""
    for layouts in _candidates(model, config, family, mask, ids, given):
        grids = place(mask, layouts)
        if grids is not None:
            return grids
    return []


def place(mask: Tensor, layouts: list[Layout] | None) -> list[TokenGrid] | None:
    """Layouts laid onto the image tokens in reading order; None unless they cover them exactly and no image crosses a row.

    Fewer layouts than images are taken to be the last ones: in a conversation a pass brings only its own images.
    """
    places = mask.nonzero()
    if not layouts:
        return None
    start = len(places) - sum(count for count, _ in layouts)
    if start < 0 or (start > 0 and (mask.shape[0] > 1 or int(places[start, 1] - places[start - 1, 1]) == 1)):
        return None  # not all of them, or the rest of an image that a chunk has cut in two
    result = []
    for count, pieces in layouts:
        own = places[start : start + count]
        start += count
        if count == 0 or bool((own[:, 0] != own[0, 0]).any()):
            return None
        result += [TokenGrid.of_image(int(own[0, 0]), own[:, 1][piece]) for piece in pieces]
    return result


def _candidates(
    model: Any, config: Any, family: str, mask: Tensor, ids: Tensor, given: dict[str, Any]
) -> Iterator[list[Layout] | None]:
    vision = getattr(config, "vision_config", None)
    features = _features(given)
    counts = None if features is None else [len(f) for f in features]
    thw = given.get("image_grid_thw")
    if isinstance(thw, Tensor) or hasattr(vision, "spatial_merge_size") and hasattr(vision, "temporal_patch_size"):
        if isinstance(thw, Tensor):
            yield _from_thw(thw, getattr(vision, "spatial_merge_size", 2))
        yield _from_positions(given.get("position_ids"), mask, counts)
        yield _from_positions(given.get("position_ids"), mask, None)
        if isinstance(thw, Tensor) or counts is not None:
            return  # images of any shape: a square number of tokens would say nothing
    if family in UNPADDED:
        yield _from_sizes(config, given)
        if features is not None:
            yield _from_newlines(model, config, features)
        return
    if family == "fuyu" or getattr(vision, "model_type", "") == "pixtral":
        yield _from_breaks(mask, ids, closed=family != "fuyu")
        return
    if family not in TILED:
        counts = _even_counts(mask, given.get("pixel_values")) if counts is None else counts
        yield None if counts is None else [_square(count) for count in counts]
    fixed = _tokens_per_tile(config)
    if fixed:
        yield _chopped(mask, fixed)
    yield [_square(length) for _, _, length in runs(mask)]


def _raster(rows: int, cols: int, start: int = 0, stride: int | None = None) -> Tensor:
    """[rows, cols] long: indices of a grid stored row by row from `start`, `stride` tokens per row."""
    stride = cols if stride is None else stride
    return start + torch.arange(rows)[:, None] * stride + torch.arange(cols)


def _square(count: int) -> Layout:
    side = math.isqrt(count)
    return count, [_raster(side, side)] if side * side == count else []


def runs(mask: Tensor) -> list[tuple[int, int, int]]:
    """(row, start, length) of every unbroken run of True in a bool [B, T], in reading order."""
    edges = torch.nn.functional.pad(mask.long(), (1, 1)).diff(dim=1)
    starts, stops = (edges == 1).nonzero(), (edges == -1).nonzero()
    return [(int(r), int(a), int(b - a)) for (r, a), b in zip(starts, stops[:, 1], strict=True)]


def _even_counts(mask: Tensor, pixels: Any) -> list[int] | None:
    """Pictures or tiles [N, C, H, W] of one size share the image tokens evenly."""
    if not isinstance(pixels, Tensor) or pixels.dim() != 4 or not len(pixels):
        return None
    count = int(mask.sum()) // len(pixels)
    if not count or math.isqrt(count) ** 2 != count or any(length % count for _, _, length in runs(mask)):
        return None
    return [count] * len(pixels)


def _chopped(mask: Tensor, count: int) -> list[Layout] | None:
    """Every run holds whole tiles of `count` tokens each."""
    pieces = []
    for _, _, length in runs(mask):
        if length % count:
            return None
        pieces += [_square(count)] * (length // count)
    return pieces


def _features(given: dict[str, Any]) -> list[Tensor] | None:
    """Per image the features [n, D] that `generate` computed beforehand."""
    outputs = given.get("mm_encoder_outputs")
    image = outputs.get("image") if isinstance(outputs, dict) else None
    pooled: Any = getattr(image, "pooler_output", None)
    if isinstance(pooled, Tensor):
        return list(pooled) if pooled.dim() == 3 else None
    if isinstance(pooled, (list, tuple)) and all(isinstance(p, Tensor) and p.dim() == 2 for p in pooled):
        return list(pooled)
    return None


def _tokens_per_tile(config: Any) -> int | None:
    """Tokens of one image or tile where the config fixes them: the patch grid of the vision tower, shrunk as the family does."""
    vision = getattr(config, "vision_config", None)
    fixed = getattr(config, "mm_tokens_per_image", None)
    if isinstance(fixed, int):
        return fixed
    size, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    size = size[0] if isinstance(size, (list, tuple)) else size
    patch = patch[0] if isinstance(patch, (list, tuple)) else patch
    if not isinstance(size, int) or not isinstance(patch, int):
        return None
    side = size // patch
    if isinstance(getattr(config, "scale_factor", None), int):  # idefics3, smolvlm
        side //= config.scale_factor
    ratio = getattr(config, "downsample_ratio", None) or getattr(vision, "pixel_shuffle_ratio", None)  # internvl, llama4
    if isinstance(ratio, float):
        side = int(side * ratio)
    return side * side or None


def _from_thw(thw: Tensor, merge: int) -> list[Layout]:
    """Qwen-VL and GLM: (frames, height, width) of each image in patches, merge x merge of them per token."""
    layouts = []
    for frames, height, width in thw.tolist():
        rows, cols = height // merge, width // merge
        layouts.append((frames * rows * cols, [_raster(rows, cols, f * rows * cols) for f in range(frames)]))
    return layouts


def _from_positions(positions: Any, mask: Tensor, counts: list[int] | None) -> list[Layout] | None:
    """The same from multimodal RoPE: position_ids [3 or 4, B, T], whose last two planes are the row and column of each image token."""
    if not isinstance(positions, Tensor) or positions.dim() != 3 or positions.shape[1] != mask.shape[0]:
        return None
    mask = mask[:, -positions.shape[2] :]  # a later turn brings the positions of its own tokens
    places = mask.nonzero()
    plane = positions[-2:, places[:, 0], places[:, 1]].cpu()
    layouts, start = [], 0
    for count in counts if counts is not None else [length for _, _, length in runs(mask)]:
        row, col = plane[:, start : start + count]
        start += count
        if row.numel() != count or not count:
            return None
        row, col = row - row.min(), col - col.min()
        rows, cols = int(row.max()) + 1, int(col.max()) + 1
        if rows * cols != count or not torch.equal(row * cols + col, torch.arange(count)):
            return None
        layouts.append((count, [_raster(rows, cols)]))
    return layouts


def _from_sizes(config: Any, given: dict[str, Any]) -> list[Layout] | None:
    """LLaVA-NeXT and OneVision: a base grid, then the unpadded high-resolution grid with a newline feature after each row."""
    sizes = given.get("image_sizes")
    if sizes is None:
        return None
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

    size, side = config.vision_config.image_size, config.vision_config.image_size // config.vision_config.patch_size
    limit = str(given.get("vision_aspect_ratio") or getattr(config, "vision_aspect_ratio", "")).removeprefix("anyres_max_")
    several = given.get("batch_num_images")
    alone = [True] * len(sizes) if several is None else [int(n) == 1 for n in several for _ in range(int(n))]
    layouts = []
    for image, single in zip(sizes, alone, strict=True):
        base = side * side
        if not single:
            layouts.append((base + 1, [_raster(side, side)]))
            continue
        tiles_high, tiles_wide = get_anyres_image_grid_shape(image, config.image_grid_pinpoints, size)
        rows, cols = unpad_image(torch.empty(1, side * tiles_high, side * tiles_wide), image).shape[1:]
        if config.model_type == "llava_onevision" and limit.isdigit():
            ratio = math.sqrt(rows * cols / (int(limit) * side**2))
            rows, cols = (int(rows // ratio), int(cols // ratio)) if ratio > 1.1 else (rows, cols)
        layouts.append((base + rows * (cols + 1), [_raster(side, side), _raster(rows, cols, base, cols + 1)]))
    return layouts


def _from_newlines(model: Any, config: Any, features: list[Tensor]) -> list[Layout] | None:
    """The same when only features are at hand: the newline is one learned vector, so its copies mark the ends of rows exactly."""
    newline = next((p for name, p in model.named_parameters() if name.endswith("image_newline")), None)
    if newline is None:
        return None
    side = config.vision_config.image_size // config.vision_config.patch_size
    base, layouts = side * side, []
    for image in features:
        ends = (image == newline.to(image)).all(dim=1).nonzero()[:, 0].tolist()
        layout: list[Tensor] = [_raster(side, side)]
        cols = ends[0] - base if ends else 0
        if cols > 0:
            layout.append(_raster(len(ends), cols, base, cols + 1))
        if not ends or ends != list(range(base + cols, len(image), cols + 1)):
            return None
        layouts.append((len(image), layout))
    return layouts


def _from_breaks(mask: Tensor, ids: Tensor, closed: bool) -> list[Layout] | None:
    """Pixtral and Fuyu: another token ends each row. closed: the last row of an image ends with a token of its own (Pixtral)."""
    found: list[list[int]] = []
    pieces = runs(mask)
    after = [int(ids[r, a + n]) if a + n < ids.shape[1] else -1 for r, a, n in pieces]
    # the token after the very last row can only be the one that closes an image
    closing = {after[i] for i, (r, _, _) in enumerate(pieces) if i + 1 == len(pieces) or pieces[i + 1][0] != r}
    open_image = False
    for i, (row, start, length) in enumerate(pieces):
        before = pieces[i - 1] if i else None
        adjacent = before is not None and before[0] == row and before[1] + before[2] + 1 == start
        if open_image and adjacent:
            found[-1].append(length)
        else:
            found.append([length])
        open_image = not closed or after[i] not in closing
    if any(len(set(lengths)) != 1 for lengths in found):
        return None
    return [(sum(lengths), [_raster(len(lengths), lengths[0])]) for lengths in found]
