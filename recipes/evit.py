"""Token reorganisation by the attention of the class token (EViT, Liang et al., ICLR 2022, arXiv 2202.07800), without training.

Fixes: background patches cost as much as all others and hardly change what an image encoder answers. In some layers those that the class
token looks at least leave, or become one token, and all that follows runs on fewer.
Acts on: the tokens of an image encoder with a class token, between attention and MLP of the chosen layers; attention itself is not edited.
A patch counts by the weight of the class token's row, mean over heads, in float32. In layer b ceil(rho_b (N - 1)) of the N - 1 tokens
besides the class token stay, in the order of their weights; the others become one, their sum times these weights, which are not
normalised (`normalise` does that, ours). A fused token is an ordinary one in later layers.
Ours: a distillation token and registers stay (official code protects the class token alone). In LLaVA, whose decoder reads the order,
those that stay keep theirs. Official models are trained or tuned with the reduction; without that begin at 0.8 to 0.95.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pydantic import Field, field_validator

from ..hooks import Capture, Merge, Passing, SiteTable
from ..hooks.plan import Step
from ..interventions import Call, Edit, ReattendError, row_weights
from ..interventions.families.merging import Regroup
from .kit.base import Info, Recipe
from .kit.encoders import class_token_misfit, encoder_layers, encoder_misfit, layers_misfit


class EViT(Recipe):
    slug = "evit"
    info = Info(
        does="An image encoder goes on with the patches that its class token looks at, and runs faster.",
        paper="Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations",
        year=2022,
        arxiv="2202.07800",
        families=("sparsity",),
        kinds=("vision",),
        cost="free",
        problems=("an image's tokens cost too much",),
        try_first={"keep": 0.9},
        sweep={"keep": (0.95, 0.9, 0.8, 0.7)},
        code="youweiliang/evit",
    )

    keep: float | dict[int, float] = Field(
        0.7,
        description="part of the tokens that stays at each reduction, above 0, 1 = all; or {layer: part}, other layers keep all",
    )
    layers: tuple[int, ...] | None = Field(
        None, description="layers that reduce, from 0; default: those after a quarter, a half and three quarters of the depth"
    )
    fuse: bool = Field(
        True, description="the others become one token, their sum weighted by the class token's attention; False: they leave"
    )
    restore: bool = Field(
        False,
        description="every layer gives all tokens back, for dense heads and for decoders that need all features of an image",
    )
    normalise: bool = Field(False, description="these weights sum to 1, so that the fused token is a mean")

    @field_validator("keep")
    @classmethod
    def _parts(cls, value: float | dict[int, float]) -> float | dict[int, float]:
        parts = value if isinstance(value, dict) else {0: value}
        if not parts or any(not 0 < part <= 1 for part in parts.values()) or min(parts) < 0:
            raise ValueError("a part must be above 0 and at most 1, and layers count from 0")
        return value

    def rates(self, sites: SiteTable) -> dict[int, float]:
        """{layer: part that stays} where less than all does."""
        depth = sites.num_layers
        layers = (depth // 4, depth // 2, 3 * depth // 4) if self.layers is None else self.layers
        rates = self.keep if isinstance(self.keep, dict) else dict.fromkeys(layers, self.keep)
        return {layer: part for layer, part in rates.items() if part < 1}

    def misfit(self, sites: SiteTable) -> str:
        if reason := encoder_misfit(sites, self.slug) or class_token_misfit(sites, self.slug):
            return reason
        return layers_misfit(sites, self.rates(encoder_layers(sites)))

    def plan(self, sites: SiteTable) -> list[Step]:
        rates = self.rates(encoder_layers(sites))
        chosen = encoder_layers(sites).only(rates)
        if not rates:
            return []
        ordered = getattr(sites.config, "image_token_id", None) is not None

        def reduce(passing: Passing) -> Regroup | None:
            return self.reduced(passing, rates[passing.site.layer], ordered)

        return [Capture(chosen, self.read), Merge(chosen, reduce, restore=self.restore)]

    @staticmethod
    def read(call: Call, edits: Sequence[Edit]) -> None:
        """a [B, N]: the class token's row after all edits, mean over heads."""
        if call.site is not None:
            row = row_weights(call, edits, torch.zeros(1, dtype=torch.long, device=call.query.device))
            call.memory["row", call.site.name] = row[:, :, 0].float().mean(dim=1)

    def reduced(self, passing: Passing, rate: float, ordered: bool) -> Regroup | None:
        """Which tokens go on; None where all do."""
        row = passing.memory.pop(("row", passing.site.name))
        tokens, length = passing.tokens, row.shape[1]
        if "cls" not in tokens:
            raise ReattendError(f"{self.slug}: it is not known which token of {passing.site.name} is the class token")
        first = sum(int(tokens.roles[role][0].sum()) for role in ("cls", "distillation", "register") if role in tokens)
        kept = math.ceil(rate * (length - first))
        if kept == length - first:
            return None
        index = row[:, first:].topk(kept, dim=1).indices + first
        index = index.sort(dim=1).values if ordered else index
        index = torch.cat([torch.arange(first, device=row.device).expand(len(row), -1), index], dim=1)
        stay = Regroup.keep(index, length)
        if not self.fuse or stay.groups is None:
            return stay
        gone = stay.groups < 0
        weights = row / row.masked_fill(~gone, 0).sum(dim=1, keepdim=True) if self.normalise else row
        index = torch.nn.functional.pad(index, (0, 1), value=-1)
        return Regroup(index, stay.groups.masked_fill(gone, kept + first), torch.where(gone, weights, 1.0))
