"""Retrieval heads: detection, masking and reinforcement (Wu et al., ICLR 2025, arXiv 2404.15574).

A few heads copy tokens from the context into the answer. `profile` finds them: a needle sentence is planted in filler text, and a head
scores for every needle token that is generated while its heaviest key is exactly that token.
Modes "mask" and "zero" switch heads off at decode steps, to see what they do: masked heads attend evenly to all keys, as in the
official code. Modes "sharpen", "sink_down" and "gain" strengthen them; these are ours, not the paper's, and measured gains are
not reliable: always compare with `random_heads=True`, which treats as many other heads the same way. To favour a passage in these
heads alone, give the profile to `emphasise`.
Acts on: listed heads of the decoder, at decode steps (masking) or in every row (strengthening).
A profile is kept per model (`reattend profile retrieval-heads MODEL`) or shared as a file; head scores as the official repository
publishes them, JSON of {"layer-head": score or scores}, are read too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor

from ..hooks import Edits, SiteTable
from ..hooks.plan import Step
from ..interventions import Call, Edit, Gain, HeadGain, Mix, ScaleQuery
from ..interventions.edits.row_values import sent, values_of
from ..interventions.families.heads import prompt_end
from ..interventions.families.reweighting import kept_by_steps, shared_by_layers
from .kit.base import Info, Recipe
from .kit.contents import Contents, Numbers
from .kit.heads import Head, as_heads, by_layer, head_scores, missing_heads, random_control, ranked, scores_of_json
from .kit.language import decoder_misfit, decoder_sites
from .kit.profile import CACHED, Profile, cached_path, find_profile

REMEDY = (
    "name heads=[[layer, head], ...], or a profile_path, or let `reattend profile retrieval-heads MODEL` "
    "(reattend.recipes.cached_profile('retrieval-heads', model, processor)) find and keep them"
)
Mode = Literal["mask", "zero", "sharpen", "sink_down", "gain"]


class RetrievalHeads(Recipe):
    slug = "retrieval-heads"
    info = Info(
        does="Masks or strengthens the few heads that copy facts from the context into the answer.",
        paper="Retrieval Head Mechanistically Explains Long-Context Factuality",
        year=2025,
        arxiv="2404.15574",
        families=("heads",),
        kinds=("llm",),
        cost="decode",
        problems=("a fact in a long prompt is not found",),
        try_first={"strength": 0.2},
        sweep={"strength": (0.1, 0.2, 0.4)},
        code="nightdessert/Retrieval_Head",
        profiling="which heads copy a planted sentence from the context",
        status="experiment",
    )

    contents = Contents({"score": Numbers(("layers", "heads"))})

    mode: Mode = Field(
        "sharpen",
        description="mask: attend evenly to all keys; zero: no output; sharpen: larger scores; sink_down: less weight on the first "
        "token; gain: larger output",
    )
    strength: float | None = Field(
        None, ge=0, le=8, description="how much; 0 = nothing; None = 1 to mask or zero (completely), 0.2 otherwise"
    )
    top: int = Field(10, ge=1, description="how many of the profile's best heads")
    min_score: float = Field(
        0.1,
        ge=0,
        allow_inf_nan=False,
        description="and only those with at least this score: the share of a sentence that a head copied",
    )
    heads: Annotated[tuple[Head, ...] | None, BeforeValidator(as_heads)] = Field(
        None,
        description="heads instead of a profile: [[layer, head], ...] or {layer: [heads]}, all treated with the full strength",
    )
    profile_path: str | None = Field(
        None,
        description='file with the head scores of a profiling run, or .json as the official repository has them; "cached" = the profile '
        "kept for this model, which is also what counts when neither heads nor a file are given",
    )
    where: Literal["auto", "decode", "last_row", "all"] = Field(
        "auto",
        description="decode: rows of generated tokens; last_row: the prompt's last row too, which chooses the first new token; "
        "all: every row; auto: decode to mask or zero, all otherwise",
    )
    random_heads: bool = Field(False, description="control: as many heads drawn outside the best 100, with the same strengths")
    seed: int = Field(0, ge=0, description="which random heads")

    @model_validator(mode="after")
    def _check_strength(self) -> RetrievalHeads:
        if self.mode in ("mask", "zero", "sink_down") and self.strength is not None and self.strength > 1:
            raise ValueError(f"strength must be at most 1 with mode {self.mode!r}, got {self.strength}")
        if self.heads is not None and self.profile_path is not None:
            raise ValueError("give heads or profile_path, not both")
        return self

    @property
    def amount(self) -> float:
        """The strength, or the mode's default for None."""
        if self.strength is not None:
            return self.strength
        return 1.0 if self.mode in ("mask", "zero") else 0.2

    def misfit(self, sites: SiteTable) -> str:
        if reason := decoder_misfit(sites, self.slug):
            return reason
        if self.heads is None and self.profile_path is None and not cached_path(self.slug, sites).is_file():
            return f"retrieval-heads must be told which heads those are: {REMEDY}"
        weighted = self.weighted_heads(sites)
        if self.heads is None and not weighted:
            return f"no head of the profile has a score of {self.min_score} or more: lower min_score"
        return missing_heads([head for head, _ in weighted], decoder_sites(sites))

    def plan(self, sites: SiteTable) -> list[Step]:
        weights = dict(self.weighted_heads(sites))
        layers = by_layer(weights)
        make = functools.cache(functools.partial(self.edit, weights, layers))
        # an empty list of heads acts nowhere and is the identity
        return [Edits(decoder_sites(sites).only(list(layers)), functools.partial(self.intervene, make))] if layers else []

    def weighted_heads(self, sites: SiteTable) -> list[tuple[Head, float]]:
        """The heads on this model with their relative score (best = 1). Raises ReattendError for a profile of another model."""
        every = [(s.layer, h) for s in decoder_sites(sites) for h in range(s.num_heads or 0)]
        if self.heads is None:
            order = self.scored_heads(sites)
            ranking, outside = [head for head, _ in order], 100
            best = max(order[0][1], 1e-9)
            weights = [score / best for _, score in order[: self.top] if score >= self.min_score]
        else:
            listed = list(self.heads)
            ranking, outside = [*listed, *(h for h in every if h not in set(listed))], 0
            weights = [1.0] * len(listed)
        heads = ranking[: len(weights)]
        if self.random_heads:
            heads = random_control(ranking, len(weights), self.seed, outside)
        return list(zip(heads, weights, strict=True))

    def scored_heads(self, sites: SiteTable) -> list[tuple[Head, float]]:
        """All heads with their scores, best first. Raises ReattendError where there is no profile, or one of another model."""
        path = self.profile_path or CACHED
        if path.endswith(".json"):
            return scores_of_json(path)
        return ranked(head_scores(find_profile(self, path, sites)))

    def intervene(self, make: Callable[[int, torch.device], Callable[..., Edit | None]], call: Call) -> Edit | None:
        """The mode's edit on the listed heads of this layer, in the rows that `where` names."""
        assert call.site is not None
        where = self.where
        if where == "auto":
            where = "decode" if self.mode in ("mask", "zero") else "all"
        end = prompt_end(call, self.slug) if where == "last_row" else None
        rows = None
        if where != "all" and not _only_generated(call):
            # without a cache a pass holds the prompt too, and the pass that reads a prompt may hold drafts
            rows = shared_by_layers(call, "rows", functools.partial(_generated_or, end, call))
            if rows is None:
                return None
        return make(call.site.layer, call.query.device)(call, rows)

    def edit(
        self, weights: dict[Head, float], layers: dict[int, list[int]], layer: int, device: torch.device
    ) -> Callable[[Call, Tensor | None], Edit | None]:
        """A function (call, rows) -> Edit for the heads of one layer; None where nothing can change."""
        heads, s = layers[layer], self.amount
        share = torch.tensor([weights[layer, h] for h in heads], device=device)[None, :, None]
        fixed: dict[str, Callable[..., Edit]] = {
            "mask": functools.partial(Mix, target="uniform", strength=s),
            "zero": functools.partial(HeadGain, factor=1 - s),
            "sharpen": functools.partial(ScaleQuery, factor=1.0 if s == 0 else 1 + s * share),
            "gain": functools.partial(HeadGain, factor=1.0 if s == 0 else 1 + s * share[..., 0]),
        }
        if self.mode == "sink_down":
            factor = 1.0 if s == 0 else 1 - s * share
            return functools.partial(self._less_on_first, heads, factor)
        whole = fixed[self.mode](heads=heads)
        return lambda call, rows: whole if rows is None else fixed[self.mode](heads=heads, rows=rows)

    @staticmethod
    def _less_on_first(heads: list[int], factor: float | Tensor, call: Call, rows: Tensor | None) -> Gain | None:
        if not _sees_bos(call):
            return None
        columns = shared_by_layers(call, "first", lambda: call.columns("bos"))
        edit = Gain(columns=columns, factor=factor, heads=heads, rows=rows)
        if call.clock.phase == "decode":
            edit.lasting(kept_by_steps(call, call.memory.setdefault("kept", {})))
        return edit

    @classmethod
    def profile(cls, model: Any, processor: Any, **options: Any) -> Profile:
        """Scores every head by the share of planted sentences that it copies; see `profiling.retrieval_heads.detect` for the options."""
        from .profiling.retrieval_heads import detect

        return detect(cls.slug, model, processor, **options)


def _sees_bos(call: Call) -> bool:
    """Whether there is a first token to take weight from, and another one to give it to: a window may have left it behind."""
    if call.tokens is None:
        return True  # asking for its columns says what is missing

    def look() -> bool:
        assert call.tokens is not None
        there = call.tokens.positions("bos", call.key_start, call.key_start + call.num_keys)
        return call.num_keys > 1 and bool(there.any())

    return shared_by_layers(call, "bos", look)


def _generated_or(end: Tensor | None, call: Call) -> Tensor | None:
    """Bool [B, Tq]: rows of generated tokens, and those of `end`; None for none."""
    if call.tokens is None:
        call.query_rows("generated")  # says what is missing
    assert call.tokens is not None
    rows = call.tokens.positions("generated", call.total - call.num_queries, call.total)
    if end is not None:
        rows = rows | values_of(end)
    return sent(rows, call.query.device) if bool(rows.any()) else None


def _only_generated(call: Call) -> bool:
    """Whether all rows of a call are those of tokens that were generated."""
    if call.tokens is None:
        return call.clock.phase == "decode"
    return call.total - call.num_queries >= call.tokens.prompt_length
