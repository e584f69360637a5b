"""Emphasis on passages of the prompt (PASTA, Zhang et al. 2024, arXiv 2311.02262).

Fixes: models overlook an instruction or a fact in a long prompt. In chosen heads the weights of all other prompt tokens are multiplied
by a small alpha and rows are renormalised, so that these heads read almost only the marked passages.
Acts on: the scores of the chosen (layer, head) pairs, on the prompt's key columns, for all rows of prefill and decode. Generated
tokens are never scaled, so the marked passages keep their weight against them.
The heads matter: the paper profiles tens to hundreds per model and uses alpha 0.01. Without `heads` or `profile` this recipe steers
all heads with the weak alpha 0.3, since alpha 0.01 in every head cuts a model off from its first token and from the rest of the prompt.
Measured on SmolLM2-135M-Instruct (docs/results.md: 100 prompts with two contradicting facts, either of them marked): the marked fact wins in
0.50 of them without emphasis, in 0.89 at the default and in 0.98 at alpha 0.01 on all heads, where the text that follows breaks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from pydantic import Field, model_validator

from ..hooks import SiteTable, Spans
from ..hooks.plan import Step
from ..interventions import Call, KeyBias
from ..interventions.families.reweighting import prompt_bias
from .kit.base import Info
from .kit.contents import Contents, Fact, Numbers
from .kit.heads import head_scores, ranked
from .kit.language import Highlighter
from .kit.profile import Profile, find_profile

PROFILED_ALPHA, UNPROFILED_ALPHA = 0.01, 0.3


class Emphasise(Highlighter):
    slug = "emphasise"
    info = Info(
        does="Makes a language model read marked passages of its prompt (an instruction, a fact) more than the rest.",
        paper="Tell Your Model Where to Attend: Post-hoc Attention Steering for LLMs",
        year=2024,
        arxiv="2311.02262",
        families=("reweighting", "heads", "calibration"),
        kinds=("llm", "lvlm"),
        cost="free",
        problems=("my instruction is overlooked",),
        try_first={"alpha": 0.3},
        sweep={"alpha": (0.55, 0.3, 0.09)},
        code="QingruZhang/PASTA",
        licence="MIT",
        profiling="optional: which heads to steer, on contradicting facts of which one is marked",
    )

    contents = Contents({"score": Numbers(("layers", "heads"))}, {"top": Fact(int, least=0, needed=False)})

    alpha: float | None = Field(
        None,
        gt=0,
        le=1e4,
        allow_inf_nan=False,
        description="factor on the other prompt tokens' weights; 1 = no change, None = 0.01 with chosen heads, 0.3 on all heads",
    )
    position: Literal["exclude", "include", "generation"] = Field(
        "exclude",
        description='"exclude" multiplies the other prompt tokens by alpha, "include" divides them by it (so alpha > 1 emphasises), '
        '"generation" multiplies the whole prompt, which weakens it against the generated text',
    )
    profile_path: str | None = Field(
        None,
        description="file of a profile with head scores: that of `reattend profile emphasise MODEL`, or of recipe retrieval-heads; "
        '"cached" = the first of these, as it is kept for the model. Its best heads are steered',
    )
    top: int | None = Field(
        None, ge=1, description="how many of the profile's best heads; None = as it advises, or one in twenty"
    )
    keep_sink: bool = Field(
        False, description="leave each prompt's first token as it is: models park attention there, and need it to stay fluent"
    )
    official_multi: bool = Field(
        False, description="with several passages add the bias once per passage, as the official code does, instead of once"
    )
    official_span: bool = Field(
        False, description="find passages by the official rule, which also takes the token that ends where a passage begins"
    )

    def needs_passages(self) -> bool:
        return self.position != "generation"

    @model_validator(mode="after")
    def _consistent(self) -> Emphasise:
        if self.heads is not None and self.profile_path is not None:
            raise ValueError("give heads or profile_path, not both")
        if self.top is not None and self.profile_path is None:
            raise ValueError("top goes with profile_path: it says how many of the profile's heads to steer")
        if self.official_multi and len({len(row) for row in self.passages or ()}) > 1:
            raise ValueError("official_multi needs as many passages in every prompt")
        return self

    @property
    def factor(self) -> float:
        """alpha, or its default for the heads at hand."""
        if self.alpha is not None:
            return self.alpha
        return UNPROFILED_ALPHA if self.heads is None and self.profile_path is None else PROFILED_ALPHA

    def plan(self, sites: SiteTable) -> list[Step]:
        spans = self.sections()
        # alpha = 1 asks for no change at all: the prompt is still searched for the passages, the model is left alone
        if self.factor == 1:
            return [*spans]
        terms = bias_terms(self.position, math.log(self.factor), [s.name for s in spans[1:] or spans])
        return [*spans, self.on_heads(sites, partial(self.emphasis, terms, spans[0].name if spans else None))]

    def emphasis(self, terms: list[tuple[str, float]], marked: str | None, call: Call) -> KeyBias | None:
        """S[:, j] += b_j: for "exclude" log alpha on the prompt outside the passages, 0 elsewhere."""
        bias = prompt_bias(call, terms, free=("bos",) if self.keep_sink else (), rows_with=marked)
        return None if bias is None else KeyBias(bias=bias)

    def sections(self) -> list[Spans]:
        """All passages of a prompt as one role; with official_multi and several of them, then each as a role of its own."""
        passages = self.passages
        if passages is None:
            return []
        whole, count = self.spans(self.official_span), len(passages[0])
        kind = "texts" if self.ranges is None else "ranges"
        each = range(count if self.official_multi and count > 1 else 0)
        return [whole, *(replace(whole, name=f"{whole.name}.{k}", **{kind: [[row[k]] for row in passages]}) for k in each)]

    def pairs(self, sites: SiteTable) -> list[tuple[int, int | None]]:
        if self.profile_path is None:
            return super().pairs(sites)
        profile = find_profile(self, self.profile_path, sites, of_any=True)  # scores of any recipe will do
        ranking = ranked(head_scores(profile))
        count = self.top or profile.facts.get("top") or math.ceil(len(ranking) / 20)
        return [pair for pair, score in ranking[:count] if score > 0]

    @classmethod
    def profile(cls, model: Any, processor: Any, **options: Any) -> Profile:
        """Searches the heads whose steering makes answers follow a marked fact; see `profiling.emphasise.search_heads`."""
        from .profiling.emphasise import search_heads

        return search_heads(cls, model, processor, **options)


def bias_terms(position: str, amount: float, sections: Sequence[str]) -> list[tuple[str, float]]:
    """(role, bias) terms; amount = log alpha, sections: one role for all passages, or with official_multi one per passage."""
    count = max(1, len(sections))
    if position == "generation":
        return [("prompt", count * amount)]
    if position == "include":
        return [("prompt", -amount), *((role, amount) for role in sections)]
    return [("prompt", count * amount), *((role, -amount) for role in sections)]
