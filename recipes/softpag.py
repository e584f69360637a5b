"""Soft perturbed-attention guidance (SoftPAG; Ahn et al., NeurIPS 2025, "Where and How to Perturb").

Fixes: weak structure and detail in generated images, without another model or prompt. A further branch of the denoiser runs with the
attention of chosen heads weakened; the prediction is pushed away from that branch. PAG replaces the whole map of a layer by the
identity, which over-smooths; here the strength is continuous and the heads are chosen one by one.
Acts on: self (UNet, cross-attention DiT) or joint attention (MM-DiT) of the branch alone; the conditional and unconditional rows are
computed as without the recipe. Strength 1 on all heads of a layer is PAG. In a joint stream the paper writes the full identity;
`scope` "image" (the default) leaves the text rows alone, "all" is the paper's form, "masked" the one of diffusers' SD3 PAG pipelines.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from pydantic import Field, model_validator

from ..hooks import Edits, Guide, SiteTable, Support
from ..hooks.plan import Step
from ..interventions import Call, Edit, Mix, MixValue, ScaleQuery
from ..interventions.families.guidance import MixOwnAnd, Soften
from .kit.base import Info, Recipe
from .kit.denoisers import default_layers, image_layers, needs_denoiser


class SoftPAG(Recipe):
    slug = "softpag"
    info = Info(
        does="Pushes an image away from a copy whose chosen attention heads were weakened: clearer structure and detail.",
        paper="Where and How to Perturb: On the Design of Perturbation Guidance in Diffusion and Flow Models",
        year=2025,
        arxiv="2506.10978",
        families=("heads",),
        kinds=("diffusion",),
        cost="forward",
        problems=("the picture ignores a word",),
        try_first={"strength": 0.5},
        sweep={"scale": (1.0, 2.5, 5.0), "strength": (0.5, 1.0)},
        code="cvlab-kaist/HeadHunter",
    )

    strength: float = Field(0.5, ge=0, le=1, description="how far the chosen heads are weakened in the branch; 1 = PAG")
    scale: float = Field(5.0, ge=0, le=100, description="how far the image is pushed away from the weakened branch; 0 = not")
    layers: list[int] | None = Field(
        None,
        description="layers whose heads are all weakened, numbered over all self-attention of the denoiser (UNet: down, mid, up; "
        "Flux: double, then single blocks); default: a UNet's mid block (for small pictures, where that sees fewer than 8 x 8 places, the "
        "last layer of the first block after it that sees as many), layer 9 of SD3-medium, the middle layer of other models",
    )
    heads: list[tuple[int, int]] | None = Field(
        None, description="single heads as [layer, head] pairs, instead of whole layers; for example found by a head search"
    )
    scope: Literal["image", "all", "masked"] = Field(
        "image",
        description="rows weakened where image and text share a stream: image tokens only, all tokens, or image tokens that still "
        'see the text ("masked", perturbation "identity" only)',
    )
    perturbation: Literal["identity", "uniform", "mean_query", "argmax", "temperature"] = Field(
        "identity",
        description="what the maps are pulled towards: each token itself, all tokens evenly, the mean query's map, each row's "
        "strongest token, or a flatter softmax",
    )
    temperature: float = Field(2.0, ge=0.05, le=100, description='softmax temperature of perturbation "temperature"; 1 = none')
    start: float = Field(0.0, ge=0, lt=1, description="first part of the schedule with guidance, as a fraction of the steps")
    stop: float = Field(1.0, gt=0, le=1, description="the fraction of the steps from which on there is none")

    @model_validator(mode="after")
    def _consistent(self) -> SoftPAG:
        if self.layers is not None and self.heads is not None:
            raise ValueError("give layers or heads, not both")
        if self.layers == [] or self.heads == []:
            raise ValueError("layers and heads must not be empty; leave them out for the default layer")
        if self.scope == "masked" and self.perturbation != "identity":
            raise ValueError('scope "masked" goes with perturbation "identity" only')
        if self.start >= self.stop:
            raise ValueError(f"start {self.start} must lie below stop {self.stop}")
        return self

    def supports(self, sites: SiteTable) -> Support:
        support = needs_denoiser(sites, self.slug)
        if not support:
            return support
        layers = image_layers(sites)
        for layer, head in self.selection(sites):
            if not 0 <= layer < len(layers):
                return Support(False, f"layer {layer} does not exist: {sites.model_name} has layers 0 to {len(layers) - 1}")
            if layers[layer].refusal:
                return Support(False, layers[layer].refusal)
            for site in layers[layer]:
                if head is not None and site.num_heads and not 0 <= head < site.num_heads:
                    return Support(False, f"head {head} does not exist: layer {layer} has heads 0 to {site.num_heads - 1}")
        return Support(True)

    def plan(self, sites: SiteTable) -> list[Step]:
        layers = image_layers(sites)
        wanted: dict[int, set[int] | None] = {}
        for layer, head in self.selection(sites):
            if head is None:
                wanted[layer] = None
            elif (known := wanted.setdefault(layer, set())) is not None:
                known.add(head)
        steps: list[Step] = [
            Edits(layers[layer], partial(self.weaken, None if heads is None else sorted(heads)), self.slug)
            for layer, heads in sorted(wanted.items())
        ]
        # a branch that nothing weakens would only cost
        return [*steps, Guide(self.slug, self.scale if self.strength else 0.0, self.start, self.stop)]

    def selection(self, sites: SiteTable) -> list[tuple[int, int | None]]:
        """(layer, head) pairs; head None = all of the layer."""
        if self.heads is not None:
            return [(layer, head) for layer, head in self.heads]
        return [(layer, None) for layer in (self.layers or default_layers(sites))]

    def weaken(self, heads: list[int] | None, call: Call) -> Edit | None:
        """A' = (1 - u) A + u P on the branch's rows. Attention to other tokens (an image prompt's) is left alone."""
        branch = call.clock.rows(self.slug, call.batch)
        if branch is None or call.num_keys != call.num_queries:
            return None
        joint = call.site is not None and call.site.kind == "joint"
        rows = branch[:, None]
        if joint and self.scope != "all":
            rows = rows & call.query_rows("image")
        named: dict[str, Any] = {"heads": heads, "rows": rows}
        if self.perturbation == "identity":
            if joint and self.scope == "masked":
                return MixOwnAnd(columns=call.columns("text"), strength=self.strength, **named)
            return MixValue(strength=self.strength, **named)
        if self.perturbation != "temperature":
            return Mix(target=self.perturbation, strength=self.strength, **named)
        if self.strength == 1:
            return ScaleQuery(factor=1 / self.temperature, **named)
        return Soften(temperature=self.temperature, strength=self.strength, **named)
