"""Value sign flip (VSF; 2025, arXiv 2508.10931).

Fixes: negative prompts for models of 1 to 8 steps at the price of a few more tokens: no second branch and no second attention. The push
adapts to each place: it is as strong as the image attends to the negative words.
Acts on: the negative text's tokens stand after the prompt's, in rows of the prompt; in those tokens' columns the image's rows have
score -= offset, value *= -scale, and no renormalisation: o = sum A v over what is seen plainly - scale sum A v over the negative text. In
cross-attention (UNets, PixArt, Wan) that is all. In joint attention the image sees everything, the prompt sees image and prompt, the negative
text image and itself, both with plain values; SD3.5's second attention, of the image alone, is left as it is.
Conventions: scale is the authors' a, offset their d. text_rows "pipeline" is the layout of their SD3 pipeline, which joins the negative text
to the prompt before it adds it: one unflipped copy stays visible as if it were part of the prompt; "script" is that of their earlier script.
It is meant for runs without classifier-free guidance (guidance_scale 1 or 0); under it, it acts on conditional rows only.
Weights on the negative's columns are negative: rows do not sum to 1, and maps of them show signed numbers.
Ours: an empty text is no change (the authors' start and end tokens still act); each text has its own length; every block of Flux, with
the positions that its text has (theirs: double blocks only); pooled texts are the prompt's; Wan's prompt keeps all of its tokens; learned
registers count as part of the prompt; joint models that the authors do not name get SD3.5's numbers, those with cross-attention Wan's;
a part of the schedule.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..hooks import Context, SecondText, SiteTable
from ..hooks.plan import Step
from ..interventions import Call, Edit, Gain, KeyBias, LowRankBias
from .kit.base import Info
from .kit.second_texts import NegativeText, by_model, text_sites

# a bias that leaves no weight
HIDDEN = 1024.0


class VSF(NegativeText):
    slug = "vsf"
    info = Info(
        does="Takes a negative text's values away inside attention: negative prompts for few-step models without CFG, without a further pass.",
        paper="VSF: Simple, Efficient, and Effective Negative Guidance in Few-Step Image Generation Models By Value Sign Flip",
        year=2025,
        arxiv="2508.10931",
        families=("guidance",),
        kinds=("diffusion",),
        cost="decode",
        problems=("the picture shows what it should not",),
        try_first={"negative": "what should not be there"},
        sweep={"scale": (1.0, 2.0, 4.0)},
        code="weathon/VSF",
        licence="MIT",
    )

    negative: str | list[str] = Field(
        "",
        description='what is taken out of the image: one text, or one per prompt; "" = nothing, no change. The pipeline\'s own '
        "negative_prompt is not read",
    )
    scale: float | None = Field(
        None,
        ge=0,
        le=100,
        description="how much of the negative text's values is taken away; 1 = as much as they would have added; 0 = none, but its tokens "
        "still take their share of the attention, so the picture is not the untouched one. Default: 3 for SD3, 6 for Flux, 1.7 for Wan and "
        "other models with cross-attention, 3 for others",
    )
    offset: float | None = Field(
        None,
        ge=-10,
        le=100,
        description="how much less the image attends to the negative text, subtracted from scores before the softmax; below 0 = more. "
        "Default: 0.08 for SD3, 0 for Flux, 0.2 for Wan and other models with cross-attention, 0.08 for others",
    )
    text_rows: Literal["pipeline", "script"] = Field(
        "pipeline",
        description="in joint attention: whether a plain copy of the negative text stays in the prompt, as in the authors' pipeline, or "
        'none, as in their script ("script")',
    )

    def plan(self, sites: SiteTable) -> list[Step]:
        named = [self.negative] if isinstance(self.negative, str) else self.negative
        if self.tensors is None and not any(text.strip() for text in named):
            return [*self.unnamed(acts=False)]
        chosen = text_sites(sites)
        other, cross = (3.0, 0.08), (1.7, 0.2)
        flux = (6.0, 0.0) if sites.model_name.startswith("Flux") else other
        scale, offset = by_model(sites, sd3=(3.0, 0.08), flux=flux, wan=cross, unet=cross, cross=cross)
        scale = scale if self.scale is None else self.scale
        offset = offset if self.offset is None else self.offset

        def use(call: Call, text: SecondText) -> list[Edit]:
            return self.flip(call, text, scale, offset)

        copies = 2 if self.text_rows == "pipeline" and len(chosen.kind("joint")) else 1
        return [Context("vsf", chosen, use, place="after", copies=copies, **self.text())]

    def flip(self, call: Call, text: SecondText, scale: float, offset: float) -> list[Edit]:
        """The edits of one call."""
        rows = call.clock.rows("conditional", call.batch)
        if rows is None or text.columns is None or call.site is None:
            return []
        # the same for all sites of a pass that have as many tokens
        size, kept = (call.site.kind, call.batch, call.num_queries, call.num_keys), call.memory.setdefault("edits", {})
        if kept.get(size, (None,))[0] is not call.clock:
            kept[size] = call.clock, self._edits(call, text.columns & rows[:, None], rows[:, None], scale, offset)
        return kept[size][1]

    def _edits(self, call: Call, negative: Tensor, rows: Tensor, scale: float, offset: float) -> list[Edit]:
        """negative bool [B, Tk], rows bool [B, 1]."""
        flip: dict[str, Any] = {"columns": negative, "factor": -scale, "renormalise": None}
        if call.site is None or call.site.kind == "cross":
            chosen = None if bool(rows.all()) else rows
            return [KeyBias(bias=negative * -offset), Gain(rows=chosen, **flip)] if offset else [Gain(rows=chosen, **flip)]
        image = call.query_rows("image")
        if call.tokens is not None and "reference" in call.tokens:
            image = image | call.query_rows("reference")  # images that the one being made looks at
        prompt = ~image & ~negative
        # which rows are of a kind, and what that kind does not see: image, prompt, negative text
        kinds = torch.stack([image & rows, prompt & rows, negative], dim=-1)
        hidden = torch.stack([negative * offset, negative * HIDDEN, prompt * HIDDEN], dim=-1)
        return [LowRankBias(U=-kinds.float()[:, None], V=hidden[:, None]), Gain(rows=image & rows, **flip)]
