"""Soft perturbed-attention guidance (SoftPAG; Ahn et al., NeurIPS 2025, "Where and How to Perturb").

Fixes: weak structure and detail in generated images, without another model or prompt. A further branch of the denoiser runs with the
attention of chosen heads weakened; the prediction is pushed away from that branch. PAG replaces the whole map of a layer by the
identity, which over-smooths; here the strength is continuous and the heads are chosen one by one.
Acts on: self (UNet, cross-attention DiT; with the identity also the linear one of Sana) or joint attention (MM-DiT) of the branch alone, all
steps; the conditional and unconditional rows are computed as without the recipe. Strength 1 on all heads of a layer is PAG.
Conventions: scale is the paper's w, prediction + w (prediction - branch), 3 to 8 there (8 for FLUX.1-dev). Good whole layers of SD3-medium
are 7 to 10; single heads are best searched for (`headhunter`), at strength 1, which is then lowered against artifacts. Layers are numbered
double before single blocks in Flux; a second attention of SD3.5's dual layers has a number of its own, after all others.
Ours: beside classifier-free guidance the shift is added as PAG's is. In a joint stream the paper writes the full identity, `scope` "all";
"image" (the default) leaves the text rows alone, "masked" is the form of diffusers' SD3 PAG pipelines. Of equally strong tokens "argmax"
takes the first.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator
from torch import Tensor

from ..interventions import Call, Edit, Mix, ScaleQuery
from ..interventions.families.guidance import Soften
from .kit.base import Info
from .kit.guidance import IdentityGuidance


class SoftPAG(IdentityGuidance):
    slug = "softpag"
    info = Info(
        does="Pushes an image away from a copy whose chosen attention heads were weakened: clearer structure and detail.",
        paper="Where and How to Perturb: On the Design of Perturbation Guidance in Diffusion and Flow Models",
        year=2025,
        arxiv="2506.10978",
        families=("guidance", "heads"),
        kinds=("diffusion",),
        cost="forward",
        problems=("the picture ignores a word", "the picture lacks structure and detail"),
        try_first={"strength": 0.5},
        sweep={"scale": (1.0, 2.5, 5.0), "strength": (0.5, 1.0)},
        code="cvlab-kaist/HeadHunter",
    )

    strength: float = Field(0.5, ge=0, le=1, description="how far the chosen heads are weakened in the branch; 1 = PAG")
    scale: float = Field(5.0, ge=0, le=100, description="how far the image is pushed away from the weakened branch; 0 = not")
    perturbation: Literal["identity", "uniform", "mean_query", "argmax", "temperature"] = Field(
        "identity",
        description="what the maps are pulled towards: each token itself, all tokens evenly, the mean query's map, each row's "
        'strongest token, or a flatter softmax; scope "masked" goes with "identity" only',
    )
    temperature: float = Field(2.0, ge=0.05, le=100, description='softmax temperature of perturbation "temperature"; 1 = none')

    @model_validator(mode="after")
    def _consistent(self) -> SoftPAG:
        if self.scope == "masked" and self.perturbation != "identity":
            raise ValueError('scope "masked" goes with perturbation "identity" only')
        return self

    @property
    def neutral(self) -> bool:
        return self.strength == 0

    @property
    def outputs_alone(self) -> bool:
        return self.perturbation == "identity"

    def perturbed(self, call: Call, heads: list[int] | None, rows: Tensor) -> Edit | None:
        """A' = (1 - u) A + u P."""
        if self.perturbation == "identity":
            return self.towards_itself(call, self.strength, heads, rows)
        named: dict[str, Any] = {"heads": heads, "rows": rows}
        if self.perturbation != "temperature":
            return Mix(target=self.perturbation, strength=self.strength, **named)
        if self.strength == 1:
            return ScaleQuery(factor=1 / self.temperature, **named)
        return Soften(temperature=self.temperature, strength=self.strength, **named)
