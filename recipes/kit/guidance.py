"""Guidance by a weaker branch of the denoiser, which pag and its kin share: the formula, its part of the schedule, and perturbed attention."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

from pydantic import Field, model_validator
from torch import Tensor

from ...hooks import Edits, Guide, Predictions, SiteTable
from ...hooks.doors.guide import away
from ...hooks.plan import Step
from ...interventions import Call, Clock, Edit, MixValue, ReattendError
from ...interventions.families.guidance import MixOwnAnd
from .base import Recipe
from .denoisers import default_layers, image_layers
from .heads import at_layers


class BranchGuidance(Recipe):
    """Base of recipes that push an image away from a weaker branch of the denoiser, which the conditional rows are copied into.

    prediction' = prediction + scale (conditional - branch), brought back to the conditional prediction's size by `rescale`. The conditional
    and unconditional rows are computed as without the recipe.
    """

    scale: float = Field(3.0, ge=0, le=100, description="how far the image is pushed away from the perturbed branch; 0 = not")
    rescale: float = Field(
        0.0,
        ge=0,
        le=1,
        description="how far the guided prediction is brought back to the spread of the conditional one, against pale or glaring pictures; "
        "0 = not (a pipeline's own guidance_rescale does the same)",
    )
    start: float = Field(0.0, ge=0, lt=1, description="first part of the schedule with guidance, as a fraction of the steps")
    stop: float = Field(1.0, gt=0, le=1, description="the fraction of the steps from which on there is none")

    @model_validator(mode="after")
    def _part_of_the_schedule(self) -> BranchGuidance:
        if self.start >= self.stop:
            raise ValueError(f"start {self.start} must lie below stop {self.stop}")
        return self

    @property
    def neutral(self) -> bool:
        """Whether the parameters perturb nothing: a branch that nothing perturbs would only cost."""
        raise NotImplementedError

    def scale_at(self, clock: Clock) -> float:
        """The scale of a step."""
        return self.scale

    def guide(self) -> Guide:
        """The branch, and what becomes of its prediction."""
        varies = type(self).scale_at is not BranchGuidance.scale_at
        scale: Any = 0.0 if self.neutral or self.scale == 0 else self.scale_at if varies else self.scale
        formula = partial(rescaled, share=self.rescale) if self.rescale else away
        return Guide(self.slug, scale, self.start, self.stop, formula=formula)


def rescaled(seen: Predictions, share: float) -> Tensor:
    """The shift that ends in (1 - share) x + share x std(conditional) / std(x), with x the guided prediction, std over all but the batch.

    Raises ReattendError where the pipeline's guided prediction is not known.
    """
    x = seen.conditional
    if seen.guidance != 1:
        if seen.guidance is None or seen.unconditional is None:
            raise ReattendError(
                "rescale: what the pipeline makes of its two halves is not known here, so its size cannot be brought back: leave rescale at 0"
            )
        x = seen.unconditional + seen.guidance * (x - seen.unconditional)
    guided = x + away(seen)
    axes = list(range(1, guided.dim()))
    ratio = seen.conditional.std(dim=axes, keepdim=True) / guided.std(dim=axes, keepdim=True).clamp_min(1e-12)
    return guided * (1 + share * (ratio - 1)) - x


class PerturbedGuidance(BranchGuidance):
    """Base of recipes whose branch has its attention perturbed. A subclass fills in `perturbed`: the edit of the branch's rows at the
    chosen layers and heads."""

    layers: list[int] | None = Field(
        None,
        description="layers that are perturbed in all heads, numbered over all self-attention of the denoiser (UNet: down, mid, up; "
        "Flux: double, then single blocks); default: a UNet's mid block (for small pictures, where that sees fewer than 8 x 8 places, the "
        "last layer of the first block after it that sees as many), layer 9 of SD3-medium, the middle layer of other models",
    )
    heads: list[tuple[int, int]] | None = Field(
        None, description="single heads as [layer, head] pairs, instead of whole layers; for example found by a head search"
    )

    @model_validator(mode="after")
    def _places_named(self) -> PerturbedGuidance:
        if self.layers is not None and self.heads is not None:
            raise ValueError("give layers or heads, not both")
        if self.layers == [] or self.heads == []:
            raise ValueError("layers and heads must not be empty; leave them out for the default layer")
        return self

    def perturbed(self, call: Call, heads: list[int] | None, rows: Tensor) -> Edit | Sequence[Edit] | None:
        """The edits of a call at these heads (None = all) and rows [B, Tq or 1]: the branch's, of image tokens where text joins them."""
        raise NotImplementedError

    @property
    def image_only(self) -> bool:
        """Whether text that shares a stream with the image is left as it is."""
        return True

    @property
    def outputs_alone(self) -> bool:
        """Whether the edits of self-attention need no weights, so that linear attention (Sana) is served too."""
        return False

    def misfit(self, sites: SiteTable) -> str:
        layers, name = image_layers(sites), sites.model_name
        if not layers:
            stacks = ", ".join(sorted({s.stack for s in sites})) or "none"
            return f"{self.slug} needs a diffusion model with self-attention; {name} has attention in: {stacks}"
        for layer, head in self.selection(sites):
            if not 0 <= layer < len(layers):
                return f"layer {layer} does not exist: {name} has layers 0 to {len(layers) - 1}"
            if reason := layers[layer].refused(self.outputs_alone):
                return reason
            for site in layers[layer]:
                if head is not None and site.num_heads and not 0 <= head < site.num_heads:
                    return f"head {head} does not exist: layer {layer} has heads 0 to {site.num_heads - 1}"
        return ""

    def plan(self, sites: SiteTable) -> list[Step]:
        layers = image_layers(sites)
        steps = [
            step for layer, heads in at_layers(self.selection(sites)).items() for step in self.acting(layers[layer], heads)
        ]
        return [*steps, self.guide()]

    def acting(self, layer: SiteTable, heads: list[int] | None) -> list[Step]:
        """What perturbs one layer's sites in these heads (None = all)."""
        return [Edits(layer, partial(self.weaken, heads), self.slug, self.outputs_alone)]

    def selection(self, sites: SiteTable) -> list[tuple[int, int | None]]:
        """(layer, head) pairs in order; head None = all of the layer."""
        if self.heads is not None:
            return sorted(self.heads)
        return [(layer, None) for layer in sorted(self.layers or default_layers(sites))]

    def weaken(self, heads: list[int] | None, call: Call) -> Edit | Sequence[Edit] | None:
        """`perturbed` on the branch's rows. Attention to other tokens (an image prompt's) is left alone."""
        branch = call.clock.rows(self.slug, call.batch)
        if branch is None or (call.query_tokens is not None and not _sees_itself(call)):
            return None
        joint = call.site is not None and call.site.kind == "joint"
        rows = branch[:, None]
        if (joint and self.image_only) or (call.tokens is not None and call.tokens.unknown):
            rows = rows & call.query_rows("image")  # where the tokens cannot be told apart, this says so
        return self.perturbed(call, heads, rows)


class IdentityGuidance(PerturbedGuidance):
    """Base of recipes whose branch has its attention pulled towards the identity: each token sees itself. In a joint stream `scope` says
    which tokens, and whether image tokens go on seeing the text."""

    scope: Literal["image", "all", "masked"] = Field(
        "image",
        description="rows weakened where image and text share a stream: image tokens only, all tokens, or image tokens that still "
        'see the text ("masked"), as diffusers has it in its SD3 PAG pipeline',
    )

    @property
    def image_only(self) -> bool:
        return self.scope != "all"

    @property
    def outputs_alone(self) -> bool:
        return True

    def towards_itself(self, call: Call, strength: float, heads: list[int] | None, rows: Tensor) -> Edit:
        """A' = (1 - u) A + u I, or with I + text, renormalised."""
        if self.scope != "masked" or call.site is None or call.site.kind != "joint":
            return MixValue(strength=strength, heads=heads, rows=rows)
        text = call.columns("text")
        if call.tokens is not None and "register" in call.tokens:  # AuraFlow's come with its text
            text = text | call.columns("register")
        return MixOwnAnd(columns=text, strength=strength, heads=heads, rows=rows)


def _sees_itself(call: Call) -> bool:
    """Whether the queries of a call are its last keys too, after those of a text (Kandinsky 2.2). Raises ReattendError where they are
    keys, but not the last ones: edits take a query's own key to be as far from the end as the query."""
    own = None if call.tokens is None else call.tokens.own
    if own is not None and own != call.num_keys - call.num_queries:
        where = "this call" if call.site is None else call.site.name
        raise ReattendError(f"{where}: the image's own keys come before the others, and this is not served")
    return own is not None
