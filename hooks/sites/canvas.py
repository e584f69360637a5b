"""How large a denoiser's own pictures are: what its pipeline draws where nobody names a size, or what its configuration says."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn

# what diffusers' pipelines call the pixels of a picture along one side of a place of the latents
FACTORS = (
    "vae_scale_factor", "vae_scale_factor_spatial", "vae_spatial_compression_ratio", "vae_spatial_scale_factor", "movq_scale_factor",
)  # fmt: skip
USUAL_FACTOR = 8


@dataclass(frozen=True)
class Canvas:
    """The size for which a denoiser was made.

    size: (height, width) of the latents, None where neither pipeline nor configuration tells. pixels: of a picture along one side of a
    place of the latents; a bare denoiser is taken to have the usual `USUAL_FACTOR`.
    """

    denoiser: nn.Module
    size: tuple[int, int] | None
    pixels: int = USUAL_FACTOR


def canvas_of(model: Any, denoiser: nn.Module) -> Canvas:
    """model: the pipeline, or the denoiser itself."""
    pixels = next((value for name in FACTORS if isinstance(value := getattr(model, name, None), int) and value), USUAL_FACTOR)
    taken = inspect.signature(type(model).__call__).parameters if not isinstance(model, nn.Module) else {}
    defaults = _pair(*(taken[name].default if name in taken else None for name in ("height", "width")))
    if defaults is not None:
        return Canvas(denoiser, (defaults[0] // pixels, defaults[1] // pixels), pixels)
    config = getattr(denoiser, "config", None)
    own = _pair(getattr(config, "sample_height", None), getattr(config, "sample_width", None))
    sizes = [getattr(config, "sample_size", None), getattr(model, "default_sample_size", None)]
    found = [
        own,
        *(_pair(*size) if isinstance(size, (list, tuple)) and len(size) == 2 else _pair(size, size) for size in sizes),
    ]
    return Canvas(denoiser, next((size for size in found if size is not None), None), pixels)


def _pair(height: Any, width: Any) -> tuple[int, int] | None:
    return (height, width) if all(isinstance(side, int) and side > 0 for side in (height, width)) else None
