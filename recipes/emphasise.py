"""Emphasis on passages of the prompt (PASTA, Zhang et al. 2024, arXiv 2311.02262).

Fixes: models overlook an instruction or a fact in a long prompt. In chosen heads the weights of all other prompt tokens are multiplied
by a small alpha and rows are renormalised, so that these heads read almost only the marked passages.
Acts on: the scores of the chosen (layer, head) pairs, on the prompt's key columns, for all rows of prefill and decode. Generated
tokens are never scaled, so the marked passages keep their weight against them.
The heads matter: the paper profiles tens to hundreds per model and uses alpha 0.01. Without `heads` or `profile` this recipe steers
all heads with the weak alpha 0.3, since alpha 0.01 in every head cuts a model off from its first token and from the rest of the prompt.
Measured on SmolLM2-135M-Instruct (benchmarks/effect_emphasise.py, 20 pairs of conflicting facts, each of them marked once): the marked
fact is the top answer in 15 of 40 prompts without emphasis, 18 at alpha 0.55, 31 at 0.3, 38 at 0.09 and again 31 at 0.01.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from ..hooks import Act, SiteTable, Spans, Support
from ..hooks.plan import Step
from ..interventions import Call, KeyBias
from ..interventions.reweighting import prompt_bias
from .base import Info, Recipe, decoder_sites
from .head_choice import as_heads, head_scores, missing_heads, ranked
from .profile import Profile, table_fingerprint

PROFILED_ALPHA, UNPROFILED_ALPHA = 0.01, 0.3
# a role of its own for every session: two sessions on one model may mark different passages
_serial = itertools.count(1)


class Emphasise(Recipe):
    slug = "emphasise"
    info = Info(
        does="Makes a language model read marked passages of its prompt (an instruction, a fact) more than the rest.",
        paper="Tell Your Model Where to Attend: Post-hoc Attention Steering for LLMs",
        year=2024,
        arxiv="2311.02262",
        families=("reweighting", "heads"),
        kinds=("llm", "lvlm"),
        cost="free",
        code="QingruZhang/PASTA",
        licence="MIT",
        profiling="optional: which heads to steer",
    )
    marks = {"highlight": "text"}

    text: str | list[str] | list[list[str]] | None = Field(
        None,
        description="passages to emphasise, exactly as in the prompt: one, several in every prompt, or a list of them per prompt",
    )
    ranges: list[tuple[int, int]] | list[list[tuple[int, int]]] | None = Field(
        None,
        description="token ranges [start, stop) instead, counted from the first real token: for every prompt, or per prompt",
    )
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
    heads: tuple[tuple[int, int], ...] | tuple[int, ...] | None = Field(
        None,
        description="{layer: [query heads]}, or a list of (layer, head) pairs, or a list of whole layers; None = all heads",
    )
    profile_path: str | None = Field(
        None, description="file of a profile with head scores (recipe retrieval-heads makes one): steers its best heads"
    )
    top: int | None = Field(None, ge=1, description="how many of the profile's best heads; None = one in twenty of the model's")
    keep_sink: bool = Field(
        False, description="leave each prompt's first token as it is: models park attention there, and need it to stay fluent"
    )
    official_multi: bool = Field(
        False, description="with several passages add the bias once per passage, as the official code does, instead of once"
    )
    official_span: bool = Field(
        False, description="find passages by the official rule, which also takes the token that ends where a passage begins"
    )
    occurrence: int | None = Field(
        None, description="which occurrence of a passage, from 0, -1 = the last; None: a passage that occurs twice is an error"
    )

    @field_validator("heads", mode="before")
    @classmethod
    def _layers_or_heads(cls, value: Any) -> Any:
        if isinstance(value, str):
            raise ValueError("heads must be {layer: [heads]}, [[layer, head], ...] or [layer, ...]")
        layers = isinstance(value, (list, tuple)) and len(value) > 0 and all(isinstance(v, int) for v in value)
        return tuple(value) if layers else as_heads(value)

    @model_validator(mode="after")
    def _consistent(self) -> Emphasise:
        if self.text is not None and self.ranges is not None:
            raise ValueError("give text or ranges, not both")
        if self.text is None and self.ranges is None and self.position != "generation":
            raise ValueError("text is required: the passage to emphasise, as it stands in the prompt (or ranges of tokens)")
        if (self.text is not None or self.ranges is not None) and not any(self.passages or ()):
            raise ValueError("text (or ranges) names no passage")
        if self.heads is not None and self.profile_path is not None:
            raise ValueError("give heads or profile_path, not both")
        if self.heads is not None and not self.heads:
            raise ValueError("heads is empty: name at least one, or leave it out for all heads")
        if self.top is not None and self.profile_path is None:
            raise ValueError("top goes with profile_path: it says how many of the profile's heads to steer")
        if self.official_multi and len({len(row) for row in self.passages or ()}) > 1:
            raise ValueError("official_multi needs as many passages in every prompt")
        return self

    @property
    def passages(self) -> list[list[Any]] | None:
        """Texts or ranges as one list per prompt (a single list goes for every prompt)."""
        given: Any = [self.text] if isinstance(self.text, str) else self.text if self.text is not None else self.ranges
        if not given:
            return None
        per_prompt = isinstance(given[0], list)
        return list(given) if per_prompt else [list(given)]

    @property
    def factor(self) -> float:
        """alpha, or its default for the heads at hand."""
        if self.alpha is not None:
            return self.alpha
        return UNPROFILED_ALPHA if self.heads is None and self.profile_path is None else PROFILED_ALPHA

    def supports(self, sites: SiteTable) -> Support:
        chosen, support = decoder_sites(sites, self.slug)
        if not support:
            return support
        if getattr(sites.config, "is_encoder_decoder", False):
            return Support(
                False, f"{sites.model_name} reads its prompt with an encoder; {self.slug} needs a decoder that reads it"
            )
        reason = missing_heads([(layer, head or 0) for layer, head in self._pairs(chosen)], chosen)
        return Support(not reason, reason)

    def plan(self, sites: SiteTable) -> list[Step]:
        chosen, _ = decoder_sites(sites, self.slug)
        steps: list[Step] = []
        marked, sections = self._spans(steps)
        # alpha = 1 asks for no change at all: the prompt is still searched for the passages, the model is left alone
        if self.factor != 1:
            amount = math.log(self.factor)
            heads: dict[int, list[int] | None] = {}
            for layer, head in self._pairs(chosen):
                if head is None:
                    heads[layer] = None
                elif (known := heads.setdefault(layer, [])) is not None:
                    known.append(head)
            terms = bias_terms(self.position, amount, sections)
            steps.append(Act(chosen.only(list(heads)), partial(self.emphasis, heads, terms, marked)))
        return steps

    def emphasis(
        self, heads: dict[int, list[int] | None], terms: list[tuple[str, float]], marked: str | None, call: Call
    ) -> KeyBias | None:
        """S[:, j] += b_j on the listed heads: for "exclude" log alpha on the prompt outside the passages, 0 elsewhere."""
        bias = prompt_bias(call, terms, free=("bos",) if self.keep_sink else (), rows_with=marked)
        if bias is None:
            return None
        assert call.site is not None
        return KeyBias(bias=bias, heads=heads[call.site.layer])

    def _spans(self, steps: list[Step]) -> tuple[str | None, list[str]]:
        """Adds the `Spans` steps; returns the role that tells which prompts have passages, and the roles that get a bias each."""
        passages = self.passages
        if passages is None:
            return None, []
        marked = f"emphasis-{next(_serial)}"
        kind = "ranges" if self.ranges is not None else "texts"

        def add(name: str, rows: list[list[Any]]) -> str:
            steps.append(Spans(name, **{kind: rows}, occurrence=self.occurrence, official=self.official_span))  # type: ignore[arg-type]
            return name

        add(marked, passages)
        count = len(passages[0])
        if not self.official_multi or count == 1:
            return marked, [marked]
        return marked, [add(f"{marked}.{k}", [[row[k]] for row in passages]) for k in range(count)]

    def _pairs(self, sites: SiteTable) -> list[tuple[int, int | None]]:
        """(layer, head) pairs to steer; head None = all of the layer."""
        if self.profile_path is not None:
            profile = Profile.load(self.profile_path)
            profile.check(profile.recipe, table_fingerprint(sites))
            ranking = ranked(head_scores(profile))
            return [pair for pair, score in ranking[: self.top or math.ceil(len(ranking) / 20)] if score > 0]
        if self.heads is None:
            return [(site.layer, None) for site in sites]
        return [(item, None) if isinstance(item, int) else item for item in self.heads]


def bias_terms(position: str, amount: float, sections: Sequence[str]) -> list[tuple[str, float]]:
    """(role, bias) terms; amount = log alpha, sections: one role for all passages, or with official_multi one per passage."""
    count = max(1, len(sections))
    if position == "generation":
        return [("prompt", count * amount)]
    if position == "include":
        return [("prompt", -amount), *((role, amount) for role in sections)]
    return [("prompt", count * amount), *((role, -amount) for role in sections)]
