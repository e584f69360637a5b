"""Smoothed energy guidance (SEG; Hong, NeurIPS 2024, arXiv 2408.00760).

Fixes: weak structure and detail in generated images, without another model or prompt. A further branch of the denoiser runs with its
queries blurred over the image, and the prediction is pushed away from that branch. Blurred queries give flatter attention: with sigma the
weakening moves continuously from none (0) to one query for all places (above 9999), with fewer side effects than PAG.
Acts on: the queries of self-attention (UNet, cross-attention DiT), or of the image tokens in a joint stream (MM-DiT), of the branch alone.
Keys, values and text tokens stay; the conditional and unconditional rows are computed as without the recipe.
Conventions: sigma in places of the layer's own raster; the author keeps the scale at 3 and changes sigma (1, 4, 16, ...). The official
code takes rasters to be square; here height and width are the image's own, each with a kernel of its own.
Ours: joint streams, where a blur over text has no meaning. Models that turn queries by position (RoPE) are refused: the blur belongs before
the turn. Tried against the official processors; the guider of the same name in diffusers 0.42 is another thing (it never acts).
"""

from __future__ import annotations

import math

from pydantic import Field
from torch import Tensor

from ..hooks import SiteTable
from ..interventions import Call
from ..interventions.families.guidance import BlurQuery
from .kit.base import Info
from .kit.denoisers import PerturbedGuidance, image_grid, image_layers, rotary_misfit

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
        reasons = (rotary_misfit(layers[layer], self.slug) for layer, _ in self.selection(sites))
        return next(filter(None, reasons), "")

    def perturbed(self, call: Call, heads: list[int] | None, rows: Tensor) -> BlurQuery:
        """q' = G q over the image's places, so that S' = G S."""
        sigma = math.inf if self.sigma > INFINITE else self.sigma
        return BlurQuery(grid=image_grid(call, self.slug), sigma=sigma, heads=heads, rows=rows)
