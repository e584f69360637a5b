"""Pictures: likeness (PSNR, SSIM), also of the background alone, overlap of boxes and masks, and whether an object was removed.

Pictures are PIL pictures, arrays or tensors of the same size; masks are bool arrays [h, w]; boxes are (left, top, right, bottom).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ...comparison.images import picture_metrics, psnr, ssim, ssim_map, to_tensor
from ...interventions import ReattendError

__all__ = [
    "background",
    "box_iou",
    "change_inside",
    "covered",
    "mask_iou",
    "picture_metrics",
    "psnr",
    "removed",
    "ssim",
    "to_tensor",
]

Box = Sequence[float]


def box_iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes; 0 if both are empty."""
    shared = _area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    union = _area(a) + _area(b) - shared
    return shared / union if union else 0.0


def mask_iou(a: Any, b: Any) -> float:
    """Intersection over union of two masks [h, w]; 0 if both are empty."""
    one, other = np.asarray(a, dtype=bool), np.asarray(b, dtype=bool)
    union = int((one | other).sum())
    return int((one & other).sum()) / union if union else 0.0


def covered(box: Box, mask: Any) -> float:
    """Share of a box's pixels that a mask [h, w] covers; 0 for an empty box. Boxes are in pixels."""
    held = np.asarray(mask, dtype=bool)
    left, top, right, bottom = (round(edge) for edge in box)
    part = held[max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)]
    area = max(right - left, 0) * max(bottom - top, 0)
    return float(part.sum()) / area if area else 0.0


def removed(name: str, found: Iterable[tuple[str, Box]], mask: Any, least: float = 0.5) -> bool:
    """Whether an object is gone from a mask: no object of this name that a matcher found lies in it by a share of at least `least`.

    found: (name, box in pixels) of what was found in the picture after the removal.
    """
    return not any(other == name and covered(box, mask) >= least for other, box in found)


def background(before: Any, after: Any, mask: Any) -> dict[str, float]:
    """How little the outside of a mask has changed: psnr in dB (infinite if not at all), ssim, mean_absolute_difference, pixels.

    ssim is the mean over the windows that touch no masked pixel; not a number where there is none. Pictures of values in [0, 1].
    """
    x, y, inside = _pair(before, after, mask)
    outside = ~inside
    pixels = int(outside.sum())
    if not pixels:
        raise ReattendError("mask: it covers the whole picture, so there is no background to compare")
    error = (x - y)[:, outside]
    squared = float(error.square().mean())
    values = ssim_map(x, y)
    height, width = inside.shape
    size = (height - values.shape[1] + 1, width - values.shape[2] + 1)
    touched = F.max_pool2d(inside[None, None].double(), size, stride=1)[0, 0] > 0
    free = values[:, ~touched]
    return {
        "psnr": math.inf if squared == 0 else -10 * math.log10(squared),
        "ssim": float(free.mean()) if free.numel() else math.nan,
        "mean_absolute_difference": float(error.abs().mean()),
        "pixels": pixels,
    }


def change_inside(before: Any, after: Any, mask: Any) -> float:
    """Mean absolute difference of the pixels inside a mask, in [0, 1]; 0 for an empty mask."""
    x, y, inside = _pair(before, after, mask)
    return float((x - y)[:, inside].abs().mean()) if bool(inside.any()) else 0.0


def _pair(before: Any, after: Any, mask: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, y = to_tensor(before), to_tensor(after)
    inside = torch.from_numpy(np.array(mask, dtype=bool))
    if x.shape != y.shape or inside.shape != x.shape[1:]:
        sizes = f"{tuple(x.shape)}, {tuple(y.shape)} and {tuple(inside.shape)}"
        raise ReattendError(f"pictures [c, h, w] and mask [h, w] must have one size, got {sizes}")
    return x, y, inside


def _area(box: Box) -> float:
    return max(box[2] - box[0], 0.0) * max(box[3] - box[1], 0.0)
