"""Attention scaled for other image sizes by its entropy (Jin et al., NeurIPS 2023, arXiv 2306.08645).

Fixes: pictures of another size than the model was trained on. The entropy of softmax attention grows with the number of keys: on a smaller
canvas each token gathers too little (objects are cut off), on a larger one too much (objects are repeated and disordered).
Acts on: the scores of self-attention over an image, in all heads, at all steps. With N keys now and T keys at the model's own size, the
scores are multiplied by sqrt(log N / log T): sharper where N > T, flatter where N < T, and no bit changes where they are equal. Each level
of a UNet counts its own tokens. Cross-attention has as many keys as ever and is left alone, attention over frames too. Costs no matrix.
Conventions: the size is that which the pipeline draws where nobody names one, or the configuration's sample_size; `base` names another.
Only numbers of tokens count, so a canvas may have any sides. diffusers calls the factor proportional attention (base_sequence_length).
Ours: strength, an exponent on the factor. In joint attention N and T hold the text's tokens too, and whole rows are scaled (`scope`
"image": only image tokens count, and only their scores with each other change). Padded keys are not counted, where diffusers counts them.
In a video the frames of the clip stand on both sides. A bare denoiser's `base` is taken for pixels of an 8 times smaller latent.
Not for models whose pipeline scales by the number of tokens itself (Lumina), nor for linear attention, which has no scores (Sana).
"""

from __future__ import annotations

import inspect
import re
from functools import partial
from math import log
from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from ..hooks import Edits, SiteTable
from ..hooks.plan import Step
from ..hooks.sites.canvas import Canvas
from ..hooks.tokens.rasters import patch_of
from ..interventions import Call, Edit, LowRankBias, ScaleQuery
from ..interventions.edits.base import repeat_heads
from .kit.base import Info, Recipe
from .kit.denoisers import grids_of, image_layers

# an additive mask hides a key by a score far below all others
HIDDEN = -5000


class EntropyScaling(Recipe):
    slug = "entropy-scaling"
    info = Info(
        does="Keeps attention as spread as in training on smaller and larger canvases: fewer cut-off or repeated objects.",
        paper="Training-free Diffusion Model Adaptation for Variable-Sized Text-to-Image Synthesis",
        year=2023,
        arxiv="2306.08645",
        families=("calibration",),
        kinds=("diffusion",),
        cost="free",
        problems=("the picture lacks structure and detail",),
        sweep={"strength": (0.5, 1.0, 2.0)},
    )

    idle = "the picture has as many places as those of the training, at which nothing changes: draw another size, or name base"

    base: int | tuple[int, int] | None = Field(
        None,
        description="the size of the pictures that the model was trained on, in pixels: one side of a square, or [height, width]; default: the "
        "size that the pipeline draws where nobody names one",
    )
    strength: float = Field(1.0, ge=0, le=2, description="exponent of the factor: 0 = none, 1 = as published")
    layers: list[int] | None = Field(
        None,
        description="layers that are scaled, numbered over all self-attention of the denoiser (UNet: down, mid, up; Flux: double, then "
        "single blocks); default: all",
    )
    scope: Literal["all", "image"] = Field(
        "all",
        description='where text and image share a stream: "all" counts all tokens and scales whole rows; "image" counts image tokens and '
        "scales only what these see of each other, at up to twice the cost of attention",
    )

    @field_validator("base")
    @classmethod
    def _a_size(cls, value: int | tuple[int, int] | None) -> int | tuple[int, int] | None:
        if value is not None and min(sides(value)) < 1:
            raise ValueError("must be a number of pixels, one side or [height, width]")
        return value

    @field_validator("layers")
    @classmethod
    def _some_layers(cls, value: list[int] | None) -> list[int] | None:
        if value == []:
            raise ValueError("must not be empty; leave it out for all layers")
        return value

    def misfit(self, sites: SiteTable) -> str:
        layers, name, canvas = image_layers(sites), sites.model_name, sites.canvas
        if not layers or canvas is None:
            return f"entropy-scaling needs a diffusion model with self-attention over an image; {name} has none"
        if wrong := [layer for layer in self.layers or () if not 0 <= layer < len(layers)]:
            return f"layer {wrong[0]} does not exist: {name} has layers 0 to {len(layers) - 1}"
        chosen = self.chosen(sites)
        if reason := next(filter(None, (table.refusal for table in chosen.values())), ""):
            return reason
        if type(canvas.denoiser).__name__ == "LuminaNextDiT2DModel":
            return f"the pipelines of {name} scale attention by the number of tokens themselves (base_sequence_length)"
        if self.base is None and canvas.size is None:
            return f"the size of the pictures that {name} was trained on is not known: give it as base, in pixels"
        for table in chosen.values():
            if min(base_places(canvas, table[0].name, self.base), default=1) < 1:
                return f"base {self.base} is smaller than one token of {name}"
            if not base_places(canvas, table[0].name, self.base):
                return f"how many tokens {table[0].name} sees at the model's own size is not known"
        return ""

    def chosen(self, sites: SiteTable) -> dict[int, SiteTable]:
        return {n: table for n, table in image_layers(sites).items() if self.layers is None or n in self.layers}

    def plan(self, sites: SiteTable) -> list[Step]:
        if self.strength == 0 or sites.canvas is None:
            return []
        return [
            Edits(table, partial(self.scaled, places))
            for table in self.chosen(sites).values()
            if (places := base_places(sites.canvas, table[0].name, self.base))
        ]

    def scaled(self, base: tuple[int, int], call: Call) -> Edit | None:
        """The edit of a call whose image has `base` (rows, columns) places at the model's own size."""
        if call.query_tokens is not None and (call.tokens is None or call.tokens.own is None):
            return None  # an image prompt's keys are as many as ever
        grid = grids_of(call.tokens if call.query_tokens is None else call.query_tokens, call.site, self.slug)[0]
        now, trained = grid.index.numel(), grid.frames * base[0] * base[1]
        if now == trained:
            return None
        if self.scope == "image" and call.num_keys != now:
            return self.among_image_tokens(call, self.factor(now, trained))
        return ScaleQuery(factor=self.row_factor(call, now, trained))

    def factor(self, now: float, trained: float) -> float:
        """(log N / log T) ** (strength / 2); 1 where there is but one key."""
        return (log(now) / log(trained)) ** (self.strength / 2) if min(now, trained) > 1 else 1.0

    def row_factor(self, call: Call, now: int, trained: int) -> float | Tensor:
        """The factor, of each row [B, heads or 1, Tq or 1] where a mask hides keys; now, trained: image tokens."""
        others = call.num_keys - now
        if call.mask is None:
            return self.factor(call.num_keys, others + trained)
        kept = call.memory.get("factor")
        if kept is None or kept[0] is not call.mask or kept[1] != (call.num_keys, now, trained):
            mask = call.mask if call.mask.dtype == torch.bool else call.mask > HIDDEN
            seen = mask.expand(*mask.shape[:-1], call.num_keys).sum(dim=-1).double()
            before = seen - now + trained
            ratio = (seen.clamp_min(2).log() / before.clamp_min(2).log()) ** (self.strength / 2)
            ratio = torch.where((seen > 1) & (before > 1), ratio, 1.0).to(call.query.dtype)
            kept = call.memory["factor"] = (call.mask, (call.num_keys, now, trained), ratio)
        return kept[2]

    def among_image_tokens(self, call: Call, factor: float) -> LowRankBias:
        """S += (factor - 1) scale q k for image tokens that look at image tokens."""
        rows, columns = call.query_rows("image"), call.columns("image")
        return LowRankBias(
            U=call.query * rows[:, None, :, None] * ((factor - 1) * call.scaling),
            V=repeat_heads(call.key, call.num_heads) * columns[:, None, :, None],
        )


def sides(base: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) in pixels."""
    return (base, base) if isinstance(base, int) else base


def base_places(canvas: Canvas, site: str, base: int | tuple[int, int] | None) -> tuple[int, int] | tuple[()]:
    """(rows, columns) of the image's tokens at a site on a canvas of the model's own size, or of `base` pixels; () where not known."""
    if base is not None:
        height, width = (side // canvas.pixels for side in sides(base))
    elif canvas.size is not None:
        height, width = canvas.size
    else:
        return ()
    if not hasattr(canvas.denoiser, "down_blocks"):
        # pipelines that hand over packed latents pack 2 x 2 of them
        packed = {"img_ids", "img_shapes"} & set(inspect.signature(type(canvas.denoiser).forward).parameters)
        _, rows, columns = (1, 2, 2) if packed else patch_of(canvas.denoiser, {})
        return height // rows, width // columns
    blocks = getattr(canvas.denoiser.config, "down_block_types", None)
    if not blocks:
        return ()
    place = re.search(r"(down|mid|up)_block(?:s\.(\d+))?\.", site)
    if place is None:
        return ()
    last = len(blocks) - 1
    level = last if place[1] == "mid" else int(place[2]) if place[1] == "down" else last - int(place[2])
    # each level halves the one before it, rounding up
    return -(-height // 2**level), -(-width // 2**level)
