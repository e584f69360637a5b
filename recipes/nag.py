"""Normalised attention guidance (NAG; NeurIPS 2025, arXiv 2505.21179).

Fixes: a distilled model of 1 to 8 steps ignores a negative prompt, or breaks under classifier-free guidance. Here the push away from the
negative text happens in the outputs of attention, and its size is held to that of the untouched ones.
Acts on: the image rows of the prompt at every site that reads text, all heads of a token together, before the output projection. With z the
output of a row that sees the prompt and z- that of the same query with the negative text, g = z + (scale - 1)(z - z-), R = |g| / |z|,
out = strength g min(R, limit) / R + (1 - strength) z. In cross-attention the negative text's keys and values are the only thing added; in joint
attention the negative text has rows of its own, whose image tokens are the guided ones (about the cost of classifier-free guidance).
Conventions: scale is the authors' nag_scale (the paper's phi is scale - 1), limit their tau, strength their alpha; the defaults are those
of their files for SDXL, Flux, SD3.5 and Wan. The norm is l1, as in the paper and later files; `norm` "l2" is that of their first Flux
file. Under classifier-free guidance the unconditional rows stay as they are, also where they come in a call of their own.
Ours: part of the schedule in steps; each text has its own length in cross-attention; norms are taken to be 1e-6 at least.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..hooks import Context, SecondText, SiteTable
from ..hooks.plan import Step
from ..interventions import Call, Edit, Extrapolate, Second, TakeOutput
from ..interventions.edits.second import extrapolated
from .kit.base import Info
from .kit.second_texts import NegativeText, by_model, text_sites


class NAG(NegativeText):
    slug = "nag"
    info = Info(
        does="Pushes an image away from a negative text inside attention: negative prompts for few-step models without CFG.",
        paper="Normalized Attention Guidance: Universal Negative Guidance for Diffusion Models",
        year=2025,
        arxiv="2505.21179",
        families=("guidance",),
        kinds=("diffusion",),
        cost="decode, in joint attention forward",
        problems=("the picture shows what it should not", "the picture lacks structure and detail"),
        try_first={"negative": "what should not be there"},
        sweep={"scale": (2.0, 4.0, 8.0)},
        code="ChenDarYen/Normalized-Attention-Guidance",
        licence="MIT",
    )

    negative: str | list[str] = Field(
        "",
        description='what the image is pushed away from: one text, or one per prompt; "" = away from the empty text, as the authors have it. '
        "The pipeline's own negative_prompt is not read",
    )
    scale: float | None = Field(
        None, ge=1, le=100, description="how far the push goes; 1 = off. Default: 3 for UNets, 9 for Wan, 5 for others"
    )
    limit: float = Field(2.5, ge=0.1, le=100, description="a pushed token is at most this many times as large as it was")
    strength: float | None = Field(
        None,
        ge=0,
        le=1,
        description="share of the pushed output; 0 = off. Default: 0.5 for UNets, 0.125 for SD3, 0.25 for others",
    )
    norm: Literal["l1", "l2"] = Field(
        "l1", description='how the size of a token is measured; "l2" as in the first published file'
    )

    def plan(self, sites: SiteTable) -> list[Step]:
        scale, strength = by_model(
            sites, sd3=(5.0, 0.125), flux=(5.0, 0.25), wan=(9.0, 0.25), unet=(3.0, 0.5), cross=(5.0, 0.25)
        )
        scale = scale if self.scale is None else self.scale
        strength = strength if self.strength is None else self.strength

        def use(call: Call, text: SecondText) -> list[Edit]:
            return self.push(call, text, scale, strength)

        if scale == 1 or strength == 0:
            return []
        return [Context("nag", text_sites(sites), use, **self.text()), *self.unnamed(acts=True)]

    def push(self, call: Call, text: SecondText, scale: float, strength: float) -> list[Edit]:
        """The edits of one call."""

        def away(output: Tensor, other: Tensor, _: Any) -> Tensor:
            return extrapolated(output, other, scale, self.limit, strength, self.norm)

        if text.rows is None or text.partner is None:
            rows = call.clock.rows("conditional", call.batch)
            if rows is None or text.key is None or text.value is None:
                return []
            return [Second(key=text.key, value=text.value, mask=text.mask, combine=away, reads="heads", rows=rows[:, None])]
        # the same for all layers of a pass
        kept = call.memory.get("edits")
        if kept is None or kept[0] is not text.partner or kept[1] != call.num_queries:
            image, own = call.query_rows("image"), text.rows[:, None]
            if call.tokens is not None and "reference" in call.tokens:
                image = image | call.query_rows("reference")  # images that the one being made looks at
            tied = (text.partner != torch.arange(call.batch, device=text.partner.device))[:, None]
            measures: dict[str, Any] = {"factor": scale, "limit": self.limit, "strength": strength, "norm": self.norm}
            pushed = Extrapolate(other=text.partner, rows=image & tied & ~own, **measures)
            # the image tokens of the negative text's rows are the guided ones
            kept = call.memory["edits"] = (
                text.partner,
                call.num_queries,
                [pushed, TakeOutput(batch=text.partner, rows=image & own)],
            )
        return kept[2]
