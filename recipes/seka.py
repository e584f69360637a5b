"""SEKA and AdaSEKA: spectral key amplification of marked passages (ICLR 2026, arXiv 2603.01281).

Fixes: a model overlooks a fact or an instruction in its prompt. The keys of the marked tokens are stretched along the directions that
a question makes relevant, so that queries meet them more strongly. No attention matrix is touched, and a step costs nothing.
Acts on: the keys of marked prompt tokens before RoPE (after the key norm, where there is one), per key head, in the pass that reads the
prompt; the edited keys stay in the cache. Values and other keys stay as they are.
The directions come from a profile: keys of answers in texts with a question about them, with another question, and without one
(`profiling/seka.py`). k += g+ P+ k, or with a negative gain k += (g+ P+ k + g- P- k) / 2, where P+ holds the leading directions of the
right question and P- all but the leading ones of the wrong question. The bias can have either sign: a stretched key also meets
queries on its far side more strongly.
Adaptive: several subspaces (experts), one per kind of question, are mixed by the query of the prompt's last token.
Ours: layers by number, whatever the profile holds (`official_index` for the official order); strict overlap of tokens and passage; the
adaptive query is read in the same pass before the layer's keys, per row, and experts that learned nothing are left out, where the
official code runs a pass of its own and takes the first row for all. A prompt read in chunks is routed chunk by chunk. With a feature
function only marked tokens are changed, and squared-exponential is not offered, since it has no inverse. min_diff is 0 here, since its
scale depends on the model and on the number of texts.
Measured on SmolLM2-135M-Instruct (suite highlight, 30 prompts, a profile of 100 texts): the marked one of two contradicting facts is
followed in 0.50 of the prompts without steering, 0.73 at half the default gains, 0.90 at the defaults and 0.97 at twice. The
adaptive form did not help there: 0.53 at gain 0.3, and 0.57 with broken answers at gain 1.
"""

from __future__ import annotations

import functools
import re
from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from ..hooks import Projected, Projection, Prompt, SiteTable
from ..hooks.plan import Step
from ..hooks.sites.projections import projection_misfit
from ..interventions import ProjectKey, ReattendError, require_whole
from ..interventions.families.subspaces import Rule, Subspaces, expert_weights, group_query, mixed_projection
from .kit.base import Info
from .kit.contents import Contents, Numbers
from .kit.language import Marked, decoder_sites, marked_role, pieces_told, prompt_told
from .kit.profile import CACHED, Profile, find_profile


class SEKA(Marked):
    slug = "seka"
    info = Info(
        does="Stretches the keys of marked passages of the prompt along directions that questions make relevant.",
        paper="Spectral Attention Steering for Prompt Highlighting",
        year=2026,
        arxiv="2603.01281",
        families=("reweighting", "calibration"),
        kinds=("llm", "lvlm"),
        cost="prefill",
        problems=("my instruction is overlooked",),
        try_first={"gain": 0.8},
        sweep={"gain": (0.4, 0.8, 1.6)},
        code="waylonli/SEKA",
        licence="Apache-2.0",
        profiling="directions of relevance per key head, from synthetic questions",
    )
    contents = Contents(
        {
            **{f"*.{kind}.vectors": Numbers(("key_heads", "head_dim", "head_dim")) for kind in ("relevant", "irrelevant")},
            **{f"*.{kind}.values": Numbers(("key_heads", "head_dim"), least=0) for kind in ("relevant", "irrelevant")},
            "*.distance": Numbers(("key_heads",), needed={"distance": "code", "adaptive": False}),
            "*.mean_distance": Numbers(("key_heads",), needed={"distance": "paper", "adaptive": False}),
            "*.experts.vectors": Numbers(
                ("experts", "key_heads", "head_dim", "head_dim"), unknown=True, needed={"adaptive": True}
            ),
            "*.experts.values": Numbers(("experts", "key_heads", "head_dim"), least=0, needed={"adaptive": True}),
            "*.experts.distance": Numbers(("experts", "key_heads"), needed={"adaptive": True, "distance": "code"}),
            "*.experts.mean_distance": Numbers(("experts", "key_heads"), needed={"adaptive": True, "distance": "paper"}),
        }
    )

    gain: float | None = Field(
        None,
        ge=-8,
        le=8,
        allow_inf_nan=False,
        description="g+: how far keys are stretched along the relevant directions; 0 = not, below 0 shrinks, None = 0.8, adaptive 1",
    )
    negative_gain: float | None = Field(
        0.2,
        ge=-8,
        le=8,
        allow_inf_nan=False,
        description="g-: the same away from what a wrong question makes relevant; both are then halved, as in the official code. "
        "None = without, and g+ at its full size; not used when adaptive",
    )
    layers: str | tuple[int, ...] = Field(
        "last10", description="layers to steer: all, first10, last10 (any number), or their numbers"
    )
    top_pct: float = Field(
        0.9,
        gt=0,
        le=1,
        description="share of the singular values' sum that the leading directions hold; more = more directions",
    )
    min_diff: float = Field(
        0.0, ge=0, description="key heads whose keys a question moves less than this are left alone; see distance"
    )
    distance: Literal["code", "paper"] = Field(
        "paper",
        description="how far keys move: the mean norm over tokens (paper), or the official code's norm over all tokens divided by "
        "their number, which shrinks with the number of examples",
    )
    feature: Literal["tanh", "elu"] | None = Field(
        None, description="stretch a function of the keys instead and invert it; the profile must be made with the same one"
    )
    adaptive: bool = Field(
        False, description="AdaSEKA: mix the subspaces of several kinds of questions by the prompt's last token"
    )
    top_k: int | None = Field(5, ge=1, description="adaptive: leading directions of each expert; None = all")
    rule: Rule = Field("weighted_top_k", description="adaptive: how the query weighs an expert's directions")
    profile_path: str = Field(
        CACHED, description='file of a profile, or "cached" for the one that `reattend profile seka MODEL` keeps'
    )
    official_span: bool = Field(
        False, description="find passages by the official rule, which loses tokens that begin before the passage"
    )
    official_index: bool = Field(
        False, description="give the profile's layers to the chosen ones in order, as the official code does, not by number"
    )

    @field_validator("layers", mode="before")
    @classmethod
    def _layers(cls, value: Any) -> Any:
        if isinstance(value, str) and re.fullmatch(r"all|(first|last)[1-9][0-9]{0,5}", value):
            return value
        numbers = value if isinstance(value, (list, tuple)) else ()
        plain = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers)
        if not numbers or not plain or len(set(numbers)) != len(numbers):
            raise ValueError("layers must be 'all', 'firstN', 'lastN' or a list of distinct layer numbers, counted from 0")
        return tuple(numbers)

    @model_validator(mode="after")
    def _consistent(self) -> SEKA:
        if self.adaptive and self.feature is not None:
            raise ValueError("feature does not go with adaptive: its experts are learned from the keys themselves")
        return self

    @property
    def strength(self) -> float:
        """g+, or its default for the mode."""
        return self.gain if self.gain is not None else 1.0 if self.adaptive else 0.8

    @property
    def read(self) -> tuple[str, ...]:
        """What has to be known before RoPE: experts are mixed by queries."""
        return ("query", "key") if self.adaptive else ("key",)

    def misfit(self, sites: SiteTable) -> str:
        if reason := super().misfit(sites):
            return reason
        try:
            chosen = self.chosen_sites(sites)
        except ReattendError as error:
            return str(error)
        if reason := projection_misfit(chosen, self.read):
            return reason
        profile = find_profile(self, self.profile_path, sites)
        learned = profile.facts.get("feature")
        if learned != self.feature and not self.adaptive:
            return f"the profile was made with feature={learned!r}, the recipe has {self.feature!r}"
        far = self.distances(profile, chosen)
        if not far:
            return f"the profile knows none of the chosen layers; it knows {known_layers(profile)}"
        largest = max(float(values.max()) for values in far.values())
        return (
            ""
            if largest >= self.min_diff
            else f"min_diff={self.min_diff} leaves no key head: questions move keys by {largest:.3g} at most"
        )

    def plan(self, sites: SiteTable) -> list[Step]:
        chosen, role = self.chosen_sites(sites), marked_role(self)
        profile = find_profile(self, self.profile_path, sites)
        steps: list[Step] = [self.spans("inside" if self.official_span else False)]
        if self.adaptive:
            changes = "the experts of each piece follow that piece's last token"
            steps.append(
                prompt_told(sites, lambda prompt: None, pieces_told(self.slug, changes, functools.partial(is_marked, role)))
            )
        for site, entry in zip(chosen, self.entries(profile, chosen), strict=True):
            if entry is None or (self.strength == 0 and (self.adaptive or not self.negative_gain)):
                continue
            stretch = self.adapting(profile, entry) if self.adaptive else self.fixed(profile, entry)
            if stretch is not None:
                here = chosen.where(lambda s, site=site: s is site)
                steps.append(Projection(here, functools.partial(self.edit, role, stretch), of=self.read, prompts=True))
        return steps

    def edit(self, role: str, stretch: Any, seen: Projected) -> ProjectKey | None:
        """k += (change of k) on the marked tokens of this pass of a prompt; nothing where there is none."""
        rows = marked_rows(role, seen) if seen.which == "key" else None
        return None if rows is None else stretch(rows, seen)

    def fixed(self, profile: Profile, layer: int) -> Any:
        """A function (rows, Projected) -> ProjectKey with the projections of one layer, or None where no head moves enough."""
        keep = profile.tensors[f"{layer}.{DISTANCES[self.distance]}"] >= self.min_diff
        change = self.strength * subspaces(profile, f"{layer}.relevant").onto(self.top_pct)
        if self.negative_gain is not None:
            beside = subspaces(profile, f"{layer}.irrelevant").beside(self.top_pct)
            change = (change + self.negative_gain * beside) / 2
        return self._on_heads(keep, change)

    def _on_heads(self, keep: Tensor, change: Tensor) -> Any:
        heads = keep.nonzero()[:, 0].tolist()
        if not heads:
            return None
        on: dict[torch.device, Tensor] = {}

        def stretch(rows: Tensor, seen: Projected) -> ProjectKey:
            device = seen.key.device
            on.setdefault(device, change.to(device))
            return ProjectKey(projection=on[device], heads=heads, rows=rows, feature=self.feature)

        return stretch

    def adapting(self, profile: Profile, layer: int) -> Any:
        """The same with the layer's experts, mixed by the query of each row's last prompt token."""
        experts = subspaces(profile, f"{layer}.experts")
        keep = profile.tensors[f"{layer}.experts.{DISTANCES[self.distance]}"] >= self.min_diff
        if not bool(keep.any()):
            return None
        vectors = experts.vectors.masked_fill(~keep[..., None, None], float("nan"))
        top = None if self.rule == "all_weighted" else self.top_k
        on: dict[torch.device, Subspaces] = {}

        def stretch(rows: Tensor, seen: Projected) -> ProjectKey:
            device = seen.key.device
            known = on.setdefault(device, Subspaces(vectors.to(device), experts.values.to(device)))
            # one axis for the batch between experts and heads
            each = Subspaces(known.vectors[:, None], known.values[:, None])
            weights = expert_weights(last_queries(seen), each, top, self.rule)
            return ProjectKey(projection=mixed_projection(weights, each, top), strength=self.strength, rows=rows)

        return stretch

    # -- what the profile says of the chosen layers --------------------------------------------------------------------

    def chosen_sites(self, sites: SiteTable) -> SiteTable:
        """The sites of `layers`. Raises ReattendError for a layer that the decoder does not have."""
        every = decoder_sites(sites)
        if isinstance(self.layers, tuple):
            there = [site.layer for site in every]
            wrong = [n for n in self.layers if n not in there]
            if wrong:
                raise ReattendError(f"layers: the decoder has layers {min(there)} to {max(there)}, not {wrong[0]}")
            return every.only(self.layers)
        if self.layers == "all":
            return every
        count = int(self.layers.lstrip("firstla"))
        return every.layers(0, count - 1) if self.layers.startswith("first") else every.layers(max(-count, -every.num_layers))

    def entries(self, profile: Profile, chosen: SiteTable) -> list[int | None]:
        """The profile's layer for each site, None where it has none."""
        known = known_layers(profile)
        if self.official_index:
            return [known[i] if i < len(known) else None for i in range(len(chosen))]
        return [site.layer if site.layer in known else None for site in chosen]

    def distances(self, profile: Profile, chosen: SiteTable) -> dict[int, Tensor]:
        """{layer of the profile: how far questions move its keys}, of the chosen layers that it knows."""
        kind = f"experts.{DISTANCES[self.distance]}" if self.adaptive else DISTANCES[self.distance]
        return {n: profile.tensors[f"{n}.{kind}"] for n in self.entries(profile, chosen) if n is not None}

    @classmethod
    def profile(cls, model: Any, processor: Any, **options: Any) -> Profile:
        """Learns the directions of relevance; see `profiling.seka.learn_subspaces` for the options."""
        from .profiling.seka import learn_subspaces

        return learn_subspaces(cls.slug, model, processor, **options)


DISTANCES = {"code": "distance", "paper": "mean_distance"}


def subspaces(profile: Profile, name: str) -> Subspaces:
    return Subspaces(profile.tensors[f"{name}.vectors"], profile.tensors[f"{name}.values"])


def known_layers(profile: Profile) -> list[int]:
    """The layers that a profile holds, in ascending order."""
    return sorted(int(name.partition(".")[0]) for name in profile.tensors if name.endswith(".relevant.values"))


def marked_rows(role: str, seen: Projected) -> Tensor | None:
    """Bool [B, T] on the keys' device, or None where none of this pass's tokens is marked. Found once per pass for all layers."""
    tokens, width, device = seen.tokens, seen.key.shape[2], seen.key.device
    since = getattr(seen.memory, "since", 0)
    if since and tokens is not None and role in tokens and bool(tokens.positions(role, 0, since).any()):
        require_whole(seen.memory, "seka")  # those keys stand in the cache as they were
    if tokens is not None and tokens.length - width >= tokens.prompt_length:
        return None  # decode: passages lie in the prompt
    made_for = (tokens and tokens.roles.get(role), seen.start, width, device)
    known = seen.memory.get("marked")
    if known is None or known[0][0] is not made_for[0] or known[0][1:] != made_for[1:]:
        rows = seen.places(role)
        known = (made_for, rows if bool(rows.any()) else None)
        seen.memory["marked"] = known
    return known[1]


def is_marked(role: str, prompt: Prompt) -> bool:
    """Whether a prompt has a marked token."""
    return role in prompt.tokens and bool(prompt.tokens.anywhere(role).any())


def last_queries(seen: Projected) -> Tensor:
    """Float32 [B, Hkv, D]: the unit query of the last prompt token of each row in this pass, mean over the heads of a group."""
    real = seen.places("prompt")
    last = (real * torch.arange(1, real.shape[1] + 1, device=real.device)).argmax(dim=1)
    query = seen.query[torch.arange(len(last), device=last.device), :, last]
    return group_query(query, seen.key.shape[1])
