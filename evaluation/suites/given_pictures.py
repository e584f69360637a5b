"""What suites share that give a picture to an image generator: the pipeline that takes it, and boxes in it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

import numpy as np
from PIL import Image
from pydantic import AfterValidator

from ...interventions import ReattendError
from ...zoo.worlds.shapes import Scene, Thing
from ..subject import Subject

Box = tuple[float, float, float, float]
# of a picture, so that scenes of that many are found soon
MOST_THINGS = 5


def _things(value: tuple[int, int]) -> tuple[int, int]:
    if not 1 <= value[0] <= value[1] <= MOST_THINGS:
        raise ValueError(f"must be [fewest, most], 1 <= fewest <= most <= {MOST_THINGS}")
    return value


# fewest and most things of a scene
Things = Annotated[tuple[int, int], AfterValidator(_things)]


def check_steps(steps: int, strength: float) -> None:
    """Raises ValueError where image to image and inpainting would do no step at all: they do the share `strength`, rounded down."""
    if int(steps * strength) < 1:
        raise ValueError(f"strength {strength} of {steps} steps is less than one step: raise strength or steps")


def pipeline_of(subject: Subject, by: Literal["image", "inpaint", "text"], suite: str) -> Any:
    """The pipeline of the wanted kind, of the subject's own parts. Raises ReattendError where diffusers has none."""
    try:
        from diffusers.pipelines.auto_pipeline import (
            AutoPipelineForImage2Image,
            AutoPipelineForInpainting,
            AutoPipelineForText2Image,
        )
    except (
        ImportError,
        RuntimeError,
    ) as error:  # diffusers 0.36 beside transformers 5 has no tokenizer for one of its pipelines
        reason = " ".join(str(error).split())[-200:]
        raise ReattendError(f"suite {suite!r} needs diffusers' AutoPipeline, which cannot be imported here: {reason}") from None

    kinds = {"image": AutoPipelineForImage2Image, "inpaint": AutoPipelineForInpainting, "text": AutoPipelineForText2Image}
    try:
        return kinds[by].from_pipe(subject.source)
    except ValueError as error:
        name = type(subject.source).__name__
        raise ReattendError(f"suite {suite!r}: diffusers has no pipeline by={by!r} for {name}: {error}") from None


def side_of(pipe: Any) -> int:
    """The side of the pictures that a pipeline draws by itself, in pixels."""
    denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    return denoiser.config.sample_size * pipe.vae_scale_factor


def touched(box: Box, side: int) -> np.ndarray:
    """Bool [side, side]: the pixels that a box, in shares of the picture's side, touches."""
    left, top, right, bottom = (edge * side for edge in box)
    held = np.zeros((side, side), dtype=bool)
    held[math.floor(top) : math.ceil(bottom), math.floor(left) : math.ceil(right)] = True
    return held


def apart(box: Box, other: Box) -> bool:
    """Whether two boxes have nothing in common."""
    return other[0] >= box[2] or other[2] <= box[0] or other[1] >= box[3] or other[3] <= box[1]


def alone(scene: Scene, box: Callable[[Thing], Box]) -> list[int]:
    """The places of the things whose box touches no other thing."""
    things = list(enumerate(scene.things))
    return [i for i, thing in things if all(apart(box(thing), other.box) for n, other in things if n != i)]


def mask_picture(mask: np.ndarray) -> Image.Image:
    """A mask as pipelines take it: white where it holds."""
    return Image.fromarray(mask.astype(np.uint8) * 255)
