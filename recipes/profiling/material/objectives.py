"""What a picture can be scored by: statistics of its pixels that need no model, and the likeness of a CLIP model that a user brings.

An objective is any callable (pictures, prompts) -> one number per picture, higher = better; pictures are PIL images.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ....interventions import ReattendError
from ...kit.checks import shown

Objective = Callable[[Sequence[Any], Sequence[str]], Any]


def _pixels(picture: Any) -> np.ndarray:
    """[height, width, 3] from 0 to 1."""
    return np.asarray(picture.convert("RGB"), dtype=np.float64) / 255


def _grey(picture: Any) -> np.ndarray:
    return _pixels(picture).mean(axis=2)


def sharpness(picture: Any) -> float:
    """Mean square difference of neighbouring pixels."""
    grey = _grey(picture)
    return sum(float((np.diff(grey, axis=axis) ** 2).mean()) for axis in (0, 1))


def contrast(picture: Any) -> float:
    """Standard deviation of brightness."""
    return float(_grey(picture).std())


def brightness(picture: Any) -> float:
    return float(_grey(picture).mean())


def saturation(picture: Any) -> float:
    """Mean distance of each pixel's strongest channel from its weakest."""
    pixels = _pixels(picture)
    return float((pixels.max(axis=2) - pixels.min(axis=2)).mean())


def warmth(picture: Any) -> float:
    """Mean of red less blue."""
    pixels = _pixels(picture)
    return float((pixels[..., 0] - pixels[..., 2]).mean())


BUILT_IN = {
    "sharpness": sharpness, "contrast": contrast, "brightness": brightness, "saturation": saturation, "warmth": warmth,
}  # fmt: skip


def near_colour(red: float, green: float, blue: float) -> Objective:
    """The objective that a picture's mean colour (0 to 1 each) is near this one: less the distance between them."""
    wanted = np.asarray([red, green, blue])

    def objective(pictures: Sequence[Any], prompts: Sequence[str]) -> list[float]:
        return [-float(np.linalg.norm(_pixels(picture).mean(axis=(0, 1)) - wanted)) for picture in pictures]

    objective.__name__ = f"near_colour({red}, {green}, {blue})"
    return objective


def clip_likeness(model: Any, processor: Any) -> Objective:
    """The objective that a picture shows its prompt: the cosine of both under a transformers CLIP or SigLIP model with its processor."""

    @torch.no_grad()
    def objective(pictures: Sequence[Any], prompts: Sequence[str]) -> list[float]:
        inputs = processor(text=list(prompts), images=list(pictures), return_tensors="pt", padding=True, truncation=True)
        seen = model(**{name: value.to(model.device) for name, value in inputs.items()})
        image, text = (torch.nn.functional.normalize(t.float(), dim=-1) for t in (seen.image_embeds, seen.text_embeds))
        return (image * text).sum(dim=-1).tolist()

    objective.__name__ = f"clip_likeness({getattr(model.config, '_name_or_path', '') or type(model).__name__})"
    return objective


def objective_of(given: Any) -> tuple[str, Objective]:
    """(name, objective) of what a user gives: a callable, or the name of a built-in one. Raises ReattendError for anything else."""
    if isinstance(given, str) and given in BUILT_IN:
        statistic = BUILT_IN[given]
        return given, lambda pictures, prompts: [statistic(picture) for picture in pictures]
    if isinstance(given, str) or not callable(given):
        raise ReattendError(
            f"objective must be a callable (pictures, prompts) -> scores, or one of {', '.join(BUILT_IN)}, got {shown(given)}"
        )
    name = getattr(given, "__name__", type(given).__name__)
    try:
        inspect.signature(given).bind([], [])
    except TypeError as error:
        raise ReattendError(
            f"objective is called as objective(images, prompts), and {name} does not take that: {error}"
        ) from None
    except ValueError:
        pass  # a callable that does not say what it takes
    return name, given


def scored(objective: Objective, pictures: Sequence[Any], prompts: Sequence[str]) -> list[float]:
    """The objective's scores, one finite number per picture. Raises ReattendError where it gives anything else."""
    given = objective(pictures, prompts)
    given = given.detach().cpu() if isinstance(given, Tensor) else given
    try:
        values = np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError):
        values = None
    if values is None or values.shape != (len(pictures),):
        what = shown(given) if values is None or values.ndim != 1 else f"{len(values)} scores"
        raise ReattendError(f"objective must give one number for each of {len(pictures)} pictures, got {what}")
    if not np.isfinite(values).all():
        raise ReattendError(
            f"objective gave {values[~np.isfinite(values)][0]} for a picture; its scores must be finite numbers"
        )
    return values.tolist()
