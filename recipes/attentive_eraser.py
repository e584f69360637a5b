"""Attentive Eraser (Sun et al., AAAI 2025): removal of a thing from a picture, by redirected self-attention.

Fixes: a mask over a thing, and an inpainting pipeline that draws a thing there again, because the tokens in the hole attend to each other.
A further branch of the denoiser runs in which no token reads from the mask, and tokens in the mask read broadly from the rest; its
prediction is followed beyond: eps = eps_source + scale (eps_branch - eps_source).
Acts on: the scores of self-attention of the branch alone, all heads of the second half of the layers (as published: blocks 7 to 15 of SD's
16, 34 to 69 of SDXL's 70, which are a UNet's up blocks), all steps. S' = S - inf at masked columns; at the first steps rows in the mask
have factor * S. Cross-attention and the pipeline's own rows are computed as without the recipe. Where `image` is given, also the latents:
outside the mask they are the picture's own at every step, so the background stays.
Conventions: an empty prompt, guidance_scale 1, image-to-image from strength 0.8 on (50 steps; 10 of the 40 that run have `factor`). A place
of a layer's raster is masked where the mask touches it at all (max-pooling).
Ours: beside classifier-free guidance the shift is added as PAG's is. Any raster, also of pictures that are not square; a layer in which the
mask touches every place is left alone (the official code reads evenly there). In a joint stream image tokens alone are redirected, which
nobody published. The noise on the background is what the start of the run holds beside the picture, and follows the scheduler's own
levels; `invert` is DDIM inversion under the prompt of the run, for every scheduler whose levels are known (with one that draws noise at its
steps, an ancestral or SDE one, DDPM or LCM, the run does not lead back into the mask). `grow` is a square, where the official scripts blur
the mask and cut it at 0.1. FreeU, which the SD 2.1 scripts add, stays with diffusers (`pipe.enable_freeu`).
"""

from __future__ import annotations

from functools import cached_property
from numbers import Real
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor

from ..hooks import AtStep, Latents, SiteTable
from ..hooks.plan import Step
from ..interventions import Call, Clock, Edit, ReattendError, ScaleQuery, TokenMap
from .kit.base import Info
from .kit.denoisers import grids_of, hidden, image_layers
from .kit.guidance import PerturbedGuidance
from .kit.layout import Box, Mask, of_picture, pictures_of, read_box
from .kit.pictures import Masks, Pictures, listed, mask_of, opened, touched
from .kit.samplers import encoded, inverted, levels, place, reached

# the raster at which boxes must leave something: the latents of pictures of 2048 pixels
FINEST = 256
WHOLE = "it covers the whole picture, so there is nothing left to fill it from: make it smaller"


def _boxes(value: Any) -> Any:
    """A box, a list of boxes, or a list of these for each prompt, as one of the latter two."""
    value = value.tolist() if getattr(value, "ndim", 0) else value
    if not isinstance(value, (list, tuple)) or not all(
        isinstance(one, (list, tuple)) or hasattr(one, "tolist") for one in value
    ):
        return None if value is None else [read_box(value)]
    nested = [isinstance(one, (list, tuple)) and (not one or not isinstance(one[0], Real)) for one in value]
    if not value or any(isinstance(one, (list, tuple)) and not one for one in value):
        raise ValueError("must not be empty: name at least one for each picture")
    if any(nested) and not all(nested):
        raise ValueError("must be a list of boxes for all pictures, or a list of such lists, one for each prompt")
    return [[read_box(box) for box in one] for one in value] if nested[0] else [read_box(one) for one in value]


def _covers(region: Mask | list[Box], height: int, width: int, grow: float, whose: str) -> bool:
    return bool(touched(region, height, width, grow, whose).all())


class AttentiveEraser(PerturbedGuidance):
    slug = "attentive-eraser"
    info = Info(
        does="Takes a masked thing out of a picture and goes on with what is around it, instead of drawing another thing there.",
        paper="Attentive Eraser: Unleashing Diffusion Model's Object Removal Potential via Self-Attention Redirection Guidance",
        year=2025,
        arxiv="2412.12974",
        families=("guidance", "sparsity", "calibration"),
        kinds=("diffusion",),
        cost="forward",
        problems=("something in a picture should be gone",),
        try_first={"scale": 5.0},
        sweep={"scale": (3.0, 5.0, 9.0)},
        code="Anonym0u3/AttentiveEraser",
        licence="Apache-2.0",
    )

    beside = {"picture": "image"}
    areas = {"removed": "boxes"}

    mask: Masks | None = Field(
        None,
        description="what is to go: the path of a picture that is not black there (a tenth of its brightest pixel and less counts as black), a "
        "PIL picture, or rows of numbers; one for all pictures, or a list of one for each prompt",
    )
    boxes: Annotated[Box | list[Box] | list[list[Box]] | None, BeforeValidator(_boxes)] = Field(
        None,
        description="instead of a mask: a box [left, top, right, bottom] in shares of the picture's sides, or several; of all pictures, or a "
        "list for each prompt",
    )
    image: Pictures | None = Field(
        None,
        description="the picture that the thing is taken out of, a path or a PIL picture (or a list of one for each prompt): all outside the "
        "mask is kept as it is there. Without it that is left to the pipeline, which inpainting ones do",
    )
    invert: bool = Field(
        False,
        description="begin with the noise that leads to `image` (one more pass of the denoiser for each step), instead of the pipeline's own; "
        "then call a text-to-image pipeline",
    )
    scale: float = Field(
        9.0,
        ge=0,
        le=100,
        description="how far the prediction goes to, and beyond, the one that does not see the thing; 0 = not, 1 = there",
    )
    factor: float = Field(
        0.3,
        ge=0,
        le=1,
        description="scores of tokens in the mask are multiplied by this at the first steps, so that they read more broadly; 1 = not",
    )
    steps: int = Field(10, ge=0, description="how many of the first steps have that")
    grow: float = Field(
        0.0,
        ge=0,
        le=0.25,
        description="the mask is made larger by this much to every side, in shares of the picture's shorter side (the authors: 0.004 to 0.015)",
    )
    layers: list[int] | None = Field(
        None,
        description="layers that are redirected, numbered over all self-attention of the denoiser (UNet: down, mid, up); default: a UNet's "
        "up blocks, the second half of other models",
    )

    @model_validator(mode="after")
    def _told(self) -> AttentiveEraser:
        if (self.mask is None) == (self.boxes is None):
            raise ValueError("give a mask of what is to go, or boxes")
        if self.invert and self.image is None:
            raise ValueError("invert needs image, the picture whose noise is to be found")
        if self.boxes is not None and any(_covers(boxes, FINEST, FINEST, self.grow, "boxes") for boxes in self.regions):
            raise ValueError(f"boxes: {WHOLE}")
        return self

    @cached_property
    def regions(self) -> list[Mask | list[Box]]:
        """What is to go, for each prompt or once for all. Raises ReattendError for a file that is no mask, and one that grows over all."""
        if self.boxes is not None:
            return self.boxes if isinstance(self.boxes[0], list) else [self.boxes]  # type: ignore[return-value]
        masks = [mask_of(one, "mask") for one in listed(self.mask)]
        if any(_covers(mask, len(mask), len(mask[0]), self.grow, "mask") for mask in masks):
            raise ReattendError(f"mask: {WHOLE}")
        return masks  # type: ignore[return-value]

    @cached_property
    def pictures(self) -> list[Any]:
        """The pictures (PIL) that `image` names. Raises ReattendError for a file that is none."""
        return [opened(one, "image") for one in listed(self.image)]

    @property
    def called(self) -> str:
        return "mask" if self.boxes is None else "boxes"

    @property
    def neutral(self) -> bool:
        return False

    def scale_at(self, clock: Clock) -> float:
        """Towards the branch, where a guide goes away from it."""
        return -self.scale

    def selection(self, sites: SiteTable) -> list[tuple[int, int | None]]:
        if self.layers is not None or self.heads is not None:
            return super().selection(sites)
        layers = image_layers(sites)
        up = [number for number, table in layers.items() if table[0].stack == "denoiser.up"]
        return [(number, None) for number in up or list(layers)[len(layers) // 2 :]]

    def plan(self, sites: SiteTable) -> list[Step]:
        # files that cannot be read are an error now
        assert self.regions and (self.image is None or self.pictures)
        kept = [] if self.image is None or self.scale == 0 else [Latents(self.begin, self.keep)]
        return [*super().plan(sites), *kept]

    # -- the branch ----------------------------------------------------------------------------------------------------

    def perturbed(self, call: Call, heads: list[int] | None, rows: Tensor) -> list[Edit]:
        """S' = factor S in rows of the mask, then -inf in its columns."""
        columns = self.masked(call, call.tokens, call.num_keys)
        if not bool(columns.any()):
            return []
        edits: list[Edit] = []
        if self.factor != 1 and call.clock.step < self.steps:
            own = call.query_tokens
            inside = columns if own is None else self.masked(call, own, call.num_queries)
            edits.append(ScaleQuery(factor=self.factor, heads=heads, rows=rows & inside.to(rows.device)))
        return [*edits, hidden(columns.to(rows.device), heads=heads, rows=rows)]

    def masked(self, call: Call, tokens: TokenMap | None, length: int) -> Tensor:
        """Bool [B, length], on the CPU: places of the mask among these tokens; none in rows where it would leave no place."""
        numbers, _, count = ([0] * call.batch, [], 1) if len(self.regions) == 1 else pictures_of(call)
        found = torch.zeros(call.batch, length, dtype=torch.bool)
        for grid in grids_of(tokens, call.site, self.slug):
            inside = self.places(numbers[grid.row], count, grid.height, grid.width)
            if not bool(inside.all()):
                found[grid.row, grid.index.cpu()] = inside
        return found

    def places(self, number: int, count: int, height: int, width: int) -> Tensor:
        """Bool [height, width]: the places of one of the run's pictures that its mask touches."""
        region = of_picture(self.regions, number, count, self.called)
        key = id(region), height, width
        if key not in self.rasters:
            self.rasters[key] = touched(region, height, width, self.grow, self.called)
        return self.rasters[key]

    @cached_property
    def rasters(self) -> dict[tuple[int, int, int], Tensor]:
        """What `places` has found, of each of `regions` at each raster, for all layers and steps."""
        return {}

    # -- the background ------------------------------------------------------------------------------------------------

    def begin(self, at: AtStep) -> Tensor | None:
        """Before the first step: what outside the mask is to be at every step."""
        if at.clock.step:
            return None
        clean = encoded(at.pipeline, self.pictures, at.latents, "image")
        count = len(at.latents)
        clean = torch.stack([of_picture(list(clean), number, count, "image") for number in range(count)])
        inside = torch.stack([self.places(number, count, *clean.shape[-2:]) for number in range(count)])[:, None]
        if bool(inside.flatten(1).all(dim=1).any()):
            raise ReattendError(f"{self.called}: {WHOLE}")
        at.memory.update(clean=clean, inside=inside.to(clean.device))
        if self.invert:
            at.memory["inverted"] = found = inverted(at, clean)
            return found[place(at.scheduler, at.clock)]
        start = levels(at.scheduler)[place(at.scheduler, at.clock)]
        at.memory["noise"] = start.noise_of(at.latents, clean)
        return None

    def keep(self, at: AtStep) -> Tensor:
        """After every step: x = M x + (1 - M) x_picture at the level that the scheduler has reached."""
        known, now, clean = levels(at.scheduler), reached(at.scheduler, at.clock), at.memory["clean"]
        if now == len(known) - 1:
            kept = clean
        elif self.invert:
            kept = at.memory["inverted"][now]
        else:
            kept = known[now].mixed(clean, at.memory["noise"])
        return torch.where(at.memory["inside"], at.latents, kept)
