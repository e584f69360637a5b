"""Selective prompt anchoring (SPA, arXiv 2408.09121, ICML 2025).

Fixes: the longer a model writes, the less it heeds the part of the prompt that matters (code generators drift from their task). SPA
estimates what marked passages contribute to every next token, and makes that contribution larger.
Acts on: the next-token logits, before all logits processors. A second branch reads the same prompt with the passages hidden and then
the same tokens: with its logits z0 the result is z0 + strength (z - z0). No attention of the real branch is changed.
Conventions: strength and `modulated` as in the official code, whose defaults (1.4, modulated) are not the paper's (modulated False).
Modulated, each token's change is scaled by its probability over the largest one of its own row (the code: of the whole batch).
Ours: passages are hidden from attention and keep their places, so that all other tokens keep their positions. The official code puts the
text MASKTOKEN (or the tokenizer's mask token) in the place of a passage first: `placeholder` takes its token ids; neighbouring ones
merge. hide=False is then the paper's setting (the placeholder can be seen); official_mask=True is the code to the letter, whose second
branch sees the placeholders again from the second step on. Prompts without a passage keep their logits bit for bit.
Cost: two passes per token, two caches. A prompt in pieces (prefill_chunk_size, further turns on an old cache) is refused.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from pydantic import Field, model_validator

from ..hooks import Branch, Fusion, Prompt, SiteTable
from ..hooks.plan import Step
from ..hooks.prompts.replaced import without_span
from ..interventions.families.logits import SAME_STRENGTH, anchored, at_least_float
from .kit.base import Info
from .kit.language import Marked, marked_role


class SPA(Marked):
    slug = "spa"
    info = Info(
        does="Makes marked passages count more for every next token, by the difference that hiding them makes.",
        paper="Selective Prompt Anchoring for Code Generation",
        year=2025,
        arxiv="2408.09121",
        families=("decoding", "reweighting"),
        kinds=("llm", "lvlm"),
        cost="forward",
        problems=("my instruction is overlooked",),
        try_first={"strength": 1.4},
        sweep={"strength": (1.2, 1.4, 1.8)},
        code="magic-YuanTian/Selective-Prompt-Anchoring",
        licence="Apache-2.0",
    )

    strength: float = Field(
        1.4,
        ge=-50,
        le=50,
        allow_inf_nan=False,
        description="weight of what the passages contribute: 1 changes nothing, 0 ignores them, below 0 turns against them; plain up "
        "to 2, modulated up to 20",
    )
    modulated: bool = Field(
        True, description="change likely tokens most, which bears larger strengths; acts on strengths beyond -1 to 1"
    )
    placeholder: tuple[int, ...] | None = Field(
        None, description="token ids that stand for a passage in the second branch; None = its own tokens, hidden"
    )
    hide: bool = Field(True, description="hide the passages' tokens (or placeholders) from the second branch's attention")
    official_mask: bool = Field(
        False, description="hide placeholders while the prompt is read only, as the official code does by leaving out a mask"
    )

    @model_validator(mode="after")
    def _consistent(self) -> SPA:
        if self.placeholder is not None and (not self.placeholder or min(self.placeholder) < 0):
            raise ValueError("placeholder must name at least one token id, none below 0")
        if self.placeholder is None and not self.hide:
            raise ValueError("hide=False needs a placeholder: without both, the second branch would read the same prompt")
        if self.official_mask and (self.placeholder is None or not self.hide):
            raise ValueError(
                "official_mask needs a placeholder and hide=True: it shows the placeholder from the second step on"
            )
        return self

    def misfit(self, sites: SiteTable) -> str:
        if reason := super().misfit(sites):
            return reason
        known, highest = getattr(sites.config.get_text_config(), "vocab_size", None), max(self.placeholder or (0,))
        if known is not None and highest >= known:
            return f"placeholder names token {highest}, but the model knows tokens 0 to {known - 1}"
        return ""

    def plan(self, sites: SiteTable) -> list[Step]:
        # a strength of 1 asks for no change: the prompt is still searched for the passages
        if abs(self.strength - 1) < SAME_STRENGTH:
            return [self.spans()]
        return [self.spans(), Branch([partial(self.without_passages, marked_role(self))], self.fuse)]

    def without_passages(self, role: str, prompt: Prompt) -> dict[str, Any] | None:
        """The prompt of the second branch; None where no row has a passage."""
        found = prompt.tokens.positions(role, 0, prompt.tokens.prompt_length)
        prompt.memory["rows"] = found.any(dim=1)
        if not bool(found.any()):
            return None
        return without_span(prompt, found, self.placeholder, self.hide, self.official_mask)

    def fuse(self, step: Fusion) -> torch.Tensor:
        """z0 + strength (z - z0) in the rows that have a passage."""
        real, hidden = at_least_float(step.logits), at_least_float(step.others[0])
        if step.memory["rows"].device != real.device:  # with the prompt; the steps after it find them there
            step.memory["rows"] = step.memory["rows"].to(real.device)
        rows = step.memory["rows"][:, None, None]
        return torch.where(rows, anchored(real, hidden, self.strength, self.modulated), real)
