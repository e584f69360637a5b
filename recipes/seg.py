"""Smoothed energy guidance (SEG; Hong, NeurIPS 2024, arXiv 2408.00760).

Fixes: weak structure and detail in generated images, without another model or prompt. A further branch of the denoiser runs with its
queries blurred over the image, and the prediction is pushed away from that branch. Blurred queries give flatter attention: with sigma the
weakening moves continuously from none (0) to one query for all places (above 9999), with fewer side effects than PAG.
Acts on: the queries of self-attention (UNet, cross-attention DiT), or of the image tokens in a joint stream (MM-DiT), of the branch alone.
Keys, values and text tokens stay; the conditional and unconditional rows are computed as without the recipe.
Conventions: sigma in places of the layer's own raster; the author keeps the scale at 3 and changes sigma (1, 4, 16, ...). The official
code takes rasters to be square; here height and width are the image's own, each with a kernel of its own.
Ours: joint streams, where a blur over text has no meaning; videos, blurred frame by frame. Where queries are turned by position (RoPE) they
are blurred as they are projected, before the turn and before the model's norm of them. Tried against the official processors. The guider of
the same name in diffusers 0.42 is another thing: it never acts, and its blur is the wrong way round (a mean for a finite width, a blur for
an infinite one; diffusers' pull request 14187 says so).
"""

from __future__ import annotations

import math
from functools import partial

import torch
from pydantic import Field
from torch import Tensor

from ..hooks import Projected, Projection, SiteTable, Step
from ..hooks.sites.denoisers import turned_by_position
from ..hooks.sites.projections import projection_misfit
from ..interventions import Call
from ..interventions.families.guidance import BlurQuery, blurred
from .kit.base import Info
from .kit.denoisers import grids_of, image_grid, image_layers
from .kit.guidance import PerturbedGuidance

INFINITE = 9999


class SEG(PerturbedGuidance):
    slug = "seg"
    info = Info(
        does="Pushes an image away from a copy whose attention was blurred over the image: clearer structure, few side effects.",
        paper="Smoothed Energy Guidance: Guiding Diffusion Models with Reduced Energy Curvature of Attention",
        year=2024,
        arxiv="2408.00760",
        families=("guidance", "calibration"),
        kinds=("diffusion",),
        cost="forward",
        problems=("the picture lacks structure and detail",),
        try_first={"sigma": 1e7},
        sweep={"sigma": (1.0, 4.0, 1e7)},
        code="SusungHong/SEG-SDXL",
    )

    sigma: float = Field(
        1e7,
        ge=0,
        allow_inf_nan=False,
        description="width of the blur in places of the image as a layer sees it; 0 = none, above 9999 all places share one query",
    )

    @property
    def neutral(self) -> bool:
        return self.sigma == 0

    def misfit(self, sites: SiteTable) -> str:
        if reason := super().misfit(sites):
            return reason
        layers = image_layers(sites)
        reasons = (projection_misfit(turned_in(layers[layer]), ("query",)) for layer, _ in self.selection(sites))
        return next(filter(None, reasons), "")

    def acting(self, layer: SiteTable, heads: list[int] | None) -> list[Step]:
        turned = turned_in(layer)
        plain = layer.where(lambda site: site not in turned.sites)
        steps = super().acting(plain, heads) if len(plain) else []
        before = Projection(turned, partial(self.blur, heads), label=self.slug, of=("query",), normed=False)
        return [*steps, before] if len(turned) else steps

    def blur(self, heads: list[int] | None, seen: Projected) -> Tensor | None:
        """q' = G q of the branch's image tokens, before they are turned; text that a joint block projects for itself stays."""
        rows = seen.clock.rows(self.slug, seen.states.shape[0])
        if rows is None or seen.added:
            return None
        new = seen.states.clone()
        for grid in grids_of(seen.tokens, seen.site, self.slug):
            new[grid.row] = blurred(new[grid.row][None], grid.index, self.width)[0]
        named = torch.zeros(new.shape[1], dtype=torch.bool, device=rows.device)
        named[slice(None) if heads is None else heads] = True
        return torch.where((rows[:, None] & named)[..., None, None], new, seen.states)

    @property
    def width(self) -> float:
        return math.inf if self.sigma > INFINITE else self.sigma

    def perturbed(self, call: Call, heads: list[int] | None, rows: Tensor) -> BlurQuery:
        """q' = G q over the image's places, so that S' = G S."""
        return BlurQuery(grid=image_grid(call, self.slug), sigma=self.width, heads=heads, rows=rows)


def turned_in(layer: SiteTable) -> SiteTable:
    """The sites that turn their queries by position."""
    return layer.where(lambda site: turned_by_position(layer.module(site)))
