"""Attention calibration of hidden sinks (ACT, Yu et al. 2024, arXiv 2406.15765).

Fixes: besides the first token, heads park large weights on later tokens without meaning (punctuation, articles, line breaks).
The sink on the first token is useful; the hidden ones cost accuracy in many heads of the middle layers.
Acts on: the weights of listed heads, every row of the prompt and of what is generated. A prompt column is a hidden sink of a
head if the mean weight of the rows that see it is over a threshold. Its weight is scaled by beta; what is freed goes to all
other columns in proportion. Which heads gain from that depends on model and task: `profile` searches, published lists come
along by name.
Ours: sinks are found per batch row, without padding; generated tokens are never sinks. A prompt in pieces (chunked prefill) is
refused: its first rows would follow sinks that were found in a part of it. A later turn of a conversation adds up its rows with
those before, and follows the sinks known by then. The official code handles one unpadded prompt and a single
generated token. Beside other recipes the sinks are those of the attention before anybody's edits at that layer.
"""

from __future__ import annotations

import functools
import json
from importlib import resources
from typing import Annotated, Any, cast

from pydantic import BeforeValidator, Field

from ..hooks import Capture, Edits, Probe, Prompt, SiteTable
from ..hooks.plan import Step
from ..interventions import Call, ReattendError, Transfer, require_whole
from ..interventions.families.calibration import learn_sinks
from ..interventions.families.reweighting import kept_by_steps
from .kit.base import Info, Recipe
from .kit.contents import Contents, Numbers
from .kit.heads import Head, as_heads, by_layer, missing_heads
from .kit.language import decoder_misfit, decoder_sites
from .kit.profile import CACHED, Profile, cached_path, find_profile

REMEDY = (
    "name heads=[[layer, head], ...], a published list (see ACT.published()), heads='all', or a profile_path, or let "
    "`reattend profile act MODEL` (reattend.recipes.cached_profile('act', model, processor)) search and keep them"
)


class ACT(Recipe):
    slug = "act"
    info = Info(
        does="Takes weight from meaningless tokens that attract attention inside the prompt and gives it to the others.",
        paper="Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without Training through "
        "Attention Calibration",
        year=2024,
        arxiv="2406.15765",
        families=("sinks", "calibration"),
        kinds=("llm",),
        cost="prefill",
        problems=("answers to classification questions are poor",),
        try_first={"beta": 0.4},
        sweep={"beta": (0.7, 0.4, 0.1)},
        code="GATECH-EIC/ACT",
        licence="Apache-2.0",
        profiling="which heads gain from calibration, on labelled prompts of the task",
    )

    contents = Contents({"selected": Numbers(("chosen", 2), whole=True, least=0, empty=True)})

    beta: float = Field(0.4, ge=0, le=1, description="factor on the weight of hidden sinks; 1 changes nothing, 0 removes it")
    threshold: float = Field(
        0.1, gt=0, lt=1, description="a column is a sink if the mean weight of the rows that see it exceeds this"
    )
    threshold_alpha: float | None = Field(
        None,
        gt=0,
        description="the paper's rule instead: the threshold is this number over the prompt's length; 5 in the paper",
    )
    heads: Annotated[tuple[Head, ...] | str | None, BeforeValidator(as_heads)] = Field(
        None, description="heads to calibrate: [[layer, head], ...], {layer: [heads]}, a published list's name, or 'all'"
    )
    profile_path: str | None = Field(
        None,
        description='file with the heads that a profiling run selected, instead of heads; "cached" = the one kept for this model',
    )
    official_exempt: bool = Field(
        False, description="spare the first column over the threshold, as the official code does, instead of the first token"
    )
    min_rows: int = Field(
        1, ge=1, description="rows that must see a column before it can be a sink; 4 to 8 spares the prompt's last tokens"
    )

    def misfit(self, sites: SiteTable) -> str:
        if reason := decoder_misfit(sites, self.slug):
            return reason
        if self.heads is not None and self.profile_path is not None:
            return "heads and profile_path both name heads: give one of them"
        heads = self.chosen_heads(sites)
        if heads is None:
            return f"act must be told which heads to calibrate: {REMEDY}"
        if not heads:
            return f"no head is left to calibrate ({'heads' if self.heads is not None else 'the profile'} is empty)"
        return missing_heads(heads, decoder_sites(sites))

    def plan(self, sites: SiteTable) -> list[Step]:
        chosen = decoder_sites(sites)
        heads = by_layer(self.chosen_heads(sites) or ())
        act = Edits(chosen.only(list(heads)), functools.partial(self.calibrate, heads))
        if self.beta == 1:
            return [act]
        first = chosen.where(lambda s: s is chosen[0])
        whole = Probe([Capture(first, lambda call, edits: None)], lambda prompt: None, in_pieces=self.refuse_pieces)
        return [whole, act]

    @staticmethod
    def refuse_pieces(prompt: Prompt) -> None:
        raise ReattendError(
            "act finds sinks in the whole prompt, but this prompt comes in pieces, whose first rows were calibrated already: pass it at "
            "once (prefill_chunk_size=None, and no cache of its first tokens)"
        )

    def chosen_heads(self, sites: SiteTable) -> tuple[Head, ...] | None:
        """The heads that parameters or profile name on this model, or None. Raises ReattendError for an unknown list or profile."""
        if self.heads is None:
            # a profile that is kept for the model is what a call without any heads means
            if self.profile_path is None and not cached_path(self.slug, sites).is_file():
                return None
            profile = find_profile(self, self.profile_path or CACHED, sites)
            return tuple((int(layer), int(head)) for layer, head in profile.tensors["selected"].tolist())
        if self.heads == "all":
            return tuple((s.layer, h) for s in decoder_sites(sites).layers(2, -2) for h in range(s.num_heads or 0))
        if isinstance(self.heads, str):
            lists = self.published()
            if self.heads not in lists:
                raise ReattendError(f"heads: no published list {self.heads!r}; there are: all, {', '.join(lists)}")
            return lists[self.heads]
        return cast("tuple[Head, ...]", self.heads)

    @property
    def rule(self) -> dict[str, Any]:
        """What makes a column a sink, as `learn_sinks` takes it."""
        return {
            "threshold": self.threshold,
            "alpha": self.threshold_alpha,
            "exempt_first_over": self.official_exempt,
            "min_rows": self.min_rows,
        }

    def calibrate(self, heads: dict[int, list[int]], call: Call) -> Transfer | None:
        """A'[i, k] = beta A[i, k] on the sinks k of a head; the other columns share the rest in proportion to their weights."""
        assert call.site is not None
        if self.beta == 1:
            return None
        known = call.memory.get(call.site.name)
        if known is None:
            require_whole(call.memory, self.slug)
        if call.clock.phase != "decode":
            known = learn_sinks(call, heads[call.site.layer], known, **self.rule)
            call.memory[call.site.name] = known
        if known is None or not known.heads or call.key_start >= known.end:
            return None  # no sink, or the window has left them behind
        edit = Transfer(heads=known.heads, source=known.columns(call), strength=1 - self.beta)
        return edit.lasting(kept_by_steps(call, known.kept)) if call.clock.phase == "decode" else edit

    @classmethod
    def profile(cls, model: Any, processor: Any, **options: Any) -> Profile:
        """Searches the heads whose calibration raises accuracy on labelled prompts; see `profiling.act.search_heads` for the options."""
        from .profiling.act import search_heads

        return search_heads(cls, model, processor, **options)

    @staticmethod
    @functools.cache
    def published() -> dict[str, tuple[Head, ...]]:
        """Head lists of the official repository, by model and task."""
        text = resources.files(__package__ or __name__).joinpath("profiling", "act_heads.json").read_text(encoding="utf-8")
        data = cast("dict[str, dict[str, list[int]]]", json.loads(text))
        return {name: as_heads(layers) for name, layers in data.items()}
