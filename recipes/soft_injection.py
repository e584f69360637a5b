"""Soft injection of task embeddings (2025, arXiv 2507.20906; ACL 2026 Findings).

Fixes: demonstrations of a task cost prompt length at every call. They run once, beforehand: what each head hands on at the last token,
averaged over many prompts with demonstrations, is the task's embedding of that head.
Acts on: the per-head outputs before the output projection, at the last prompt token alone, in all layers and heads. A share alpha of
each head's output is replaced by the embedding: o = (1 - alpha) o + alpha t. Decode steps are untouched; what was mixed in stays in
the cache of later layers. `profile` makes embeddings and learns the alphas by gradient descent with the model's weights frozen.
Conventions: query heads and layers from 0, alpha in float32, embeddings in float32 and used in the model's type. Embeddings belong to
a template ("Q: {x}\\nA:" unless the profile was made with another one) and to prompts of that form: see `prompt`.
Ours: padding on either side and batches; without a cache the prompt's last row is mixed again in every pass; the best alphas of the
checks are kept (the official code keeps the last ones); several tasks in one profile. Each turn of a conversation has a last prompt
token of its own. A prompt that comes in pieces is refused at its second piece, since nothing told that the first was not its end.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from ..hooks import Edits, SiteTable
from ..hooks.plan import Step
from ..interventions import Call, HeadMix, ReattendError
from ..interventions.families.heads import mixture, prompt_end
from .kit.base import Info, Recipe
from .kit.contents import Contents, Fact, Numbers
from .kit.heads import Heads, missing_heads
from .kit.language import decoder_sites, prompt_misfit
from .kit.profile import CACHED, Profile, find_profile


class SoftInjection(Recipe):
    slug = "soft-injection"
    info = Info(
        does="Mixes what demonstrations of a task taught each head into the last token of prompts that come without them.",
        paper="Soft Injection of Task Embeddings Outperforms Prompt-Based In-Context Learning",
        year=2026,
        arxiv="2507.20906",
        families=("heads", "calibration"),
        kinds=("llm",),
        cost="free",
        problems=("demonstrations make every prompt long",),
        try_first={"scale": 1.0},
        sweep={"scale": (0.5, 1.0)},
        code="SNU-DRL/Soft_Injection",
        profiling="what each head hands on after demonstrations, and how much of it to mix in",
    )

    contents = Contents(
        {
            "task_embedding": Numbers(("tasks", "layers", "heads", "head_dim")),
            "alpha": Numbers(("layers", "heads"), least=0, most=1),
        },
        {"tasks": Fact(list, size="tasks")},
    )

    task: str | None = Field(None, description="which of the profile's tasks; needed where it holds several")
    scale: float = Field(1.0, ge=0, le=1, description="factor on the learned shares; 0 changes nothing")
    alpha: float | None = Field(
        None,
        ge=0,
        le=1,
        description="this share for every head instead of the learned ones, which then only say which are best",
    )
    top_k: int | None = Field(None, ge=1, description="only the heads with the largest learned shares; None = all heads")
    heads: Heads = Field(None, description="only these heads: [[layer, head], ...] or {layer: [heads]}; None = all heads")
    profile_path: str = Field(
        CACHED,
        description='file of a profile, or "cached" for the one kept for this model (see reattend.recipes.cached_profile)',
    )

    def misfit(self, sites: SiteTable) -> str:
        if reason := prompt_misfit(sites, self.slug):
            return reason
        chosen = decoder_sites(sites)
        if self.heads is not None:
            reason = missing_heads(self.heads, chosen) or ("" if self.heads else "heads must name at least one head")
            if reason:
                return reason
        embedding, _ = self.learned(sites)
        # a decoder can have layers without attention; what was learned knows only those that have some
        lost = sorted({s.layer for s in chosen} - {i for i in range(embedding.shape[0]) if bool(embedding[i].any())})
        if lost:
            return f"the profile holds nothing for the attention of layers {lost}: make it anew for this model"
        return ""

    def plan(self, sites: SiteTable) -> list[Step]:
        embedding, alpha = self.learned(sites)
        layers = [i for i in range(alpha.shape[0]) if bool(alpha[i].any())]
        # nothing to mix is the identity
        on = functools.cache(lambda device: (embedding.to(device), alpha.to(device)))
        return [Edits(decoder_sites(sites).only(layers), functools.partial(self.inject, on))] if layers else []

    def learned(self, sites: SiteTable) -> tuple[Tensor, Tensor]:
        """(embedding [layers, heads, D], alpha [layers, heads] as it is used). Raises ReattendError for a profile that does not fit."""
        profile = find_profile(self, self.profile_path, sites)
        tasks = profile.facts["tasks"]
        if self.task is None and len(tasks) > 1:
            raise ReattendError(f"the profile holds several tasks, name one with task: {', '.join(tasks)}")
        if self.task is not None and self.task not in tasks:
            raise ReattendError(f"the profile holds no task {self.task!r}; it has: {', '.join(tasks)}")
        embedding = profile.tensors["task_embedding"][tasks.index(self.task) if self.task else 0]
        return embedding, self.shares(profile.tensors["alpha"], embedding)

    def shares(self, learned: Tensor, embedding: Tensor) -> Tensor:
        """alpha [layers, heads] that the parameters make of the learned one."""
        there = (embedding != 0).any(dim=2)
        used = (learned if self.alpha is None else learned.new_full(learned.shape, self.alpha)) * there
        if self.heads is not None:
            wanted = used.new_zeros(used.shape)
            for layer, head in self.heads:
                wanted[layer, head] = 1.0
            used = used * wanted
            learned = learned * wanted
        if self.top_k is not None and self.top_k < used.numel():
            best = learned.flatten().argsort(descending=True, stable=True)[: self.top_k]
            used = used * used.new_zeros(used.numel()).index_fill(0, best, 1.0).view(used.shape)
        return self.scale * used

    def inject(self, on: Callable[[torch.device], tuple[Tensor, Tensor]], call: Call) -> HeadMix | None:
        """o = (1 - alpha) o + alpha t at the last prompt token of every row of the batch."""
        rows = prompt_end(call, self.slug)
        return None if rows is None else mixture(call, rows, *on(call.query.device))

    @staticmethod
    def prompt(x: str, demonstrations: Sequence[tuple[str, str]] = (), template: str | None = None) -> str:
        """The prompt for an input, without demonstrations or after (input, output) pairs, in the template of the profile."""
        from .profiling.soft_injection import TEMPLATE, task_prompt

        return task_prompt(x, demonstrations, template or TEMPLATE)

    @classmethod
    def profile(cls, model: Any, processor: Any, **options: Any) -> Profile:
        """Makes task embeddings and learns their shares; see `profiling.soft_injection.learn_task` for the options."""
        from .profiling.soft_injection import learn_task

        return learn_task(cls.slug, model, processor, **options)
