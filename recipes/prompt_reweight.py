"""Reweighting the words of a prompt (the reweight part of prompt-to-prompt, Hertz et al., arXiv 2208.01626).

Fixes: a word of the prompt shows too little in the picture, or too much. The attention weights that the image gives to chosen words are
multiplied by a factor c: A'[:, j] = c_j A[:, j]. A factor above 1 strengthens a word, one below 1 weakens it, a negative one turns it round.
Acts on: the prompt's rows (not the negative prompt's), at all cross-attention, or the image tokens' rows of all joint attention (ours:
the paper knows no such models), in steps s with int(start (n + 1)) <= s < int(stop (n + 1)) of n steps, as in the official code.
Rows are not made to sum to 1 again, as in the paper; `renormalise` does so.
Ours: one picture by itself, where the paper takes the weights of the run without the change for the run with it. The factors of several
words are those given: the official code makes rows of factors of its own where there are several values. `stop` 0.8 is what the authors'
examples take.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any, Literal

from pydantic import Field, model_validator

from ..hooks import Edits, SiteTable, Words
from ..hooks.plan import Step
from ..interventions import Call, Clock, Edit, Gain, ReattendError
from .kit.base import Info, Recipe
from .kit.denoisers import reads_prompt, text_layers

WEIGHTED = re.compile(r"\(([^():]+):\s*([-+]?\d*\.?\d+)\s*\)")
Factors = dict[str, float]


class PromptReweight(Recipe):
    slug = "prompt-reweight"
    info = Info(
        does="Multiplies the attention that a picture gives to chosen words of the prompt.",
        paper="Prompt-to-Prompt Image Editing with Cross-Attention Control",
        year=2023,
        arxiv="2208.01626",
        families=("reweighting",),
        kinds=("diffusion",),
        cost="free",
        problems=("the picture ignores a word",),
        try_first={"factor": 2.0},
        sweep={"factor": (0.0, 2.0, 4.0)},
        code="google/prompt-to-prompt",
        licence="Apache-2.0",
    )

    marks = {"words": "words"}

    words: str | list[str] | list[list[str]] | Factors | list[Factors] | None = Field(
        None,
        description='the words: one, several of every prompt, or a list of them per prompt; with factors of their own as {"red": 1.4} or as '
        'the whole prompt "a (red:1.4) circle" (give the pipeline the prompt without them)',
    )
    columns: list[tuple[list[int], float]] | None = Field(
        None,
        description="instead of words, of every prompt: columns of the text that the denoiser gets, from 0, and their factor; for prompts that "
        "were encoded elsewhere",
    )
    factor: float = Field(
        2.0, ge=-2, le=10, description="factor on the weights of words that have none of their own; 1 = no change"
    )
    occurrence: int | Literal["all"] = Field(
        "all", description="which occurrence of a word that occurs more than once, from 0, -1 = the last"
    )
    start: float = Field(0.0, ge=0, lt=1, description="first part of the schedule that is changed, as a fraction of the steps")
    stop: float = Field(0.8, gt=0, le=1, description="the fraction of the steps from which on nothing is changed")
    layers: list[int] | None = Field(
        None,
        description="layers that are changed, numbered over all attention to the text (UNet: down, mid, up); default: all of them",
    )
    renormalise: bool = Field(False, description="scale each row back to its old sum, so that other words give what these gain")

    @model_validator(mode="after")
    def _consistent(self) -> PromptReweight:
        if (self.words is None) == (self.columns is None):
            raise ValueError("give words to reweight, or columns")
        if self.layers == []:
            raise ValueError("layers must not be empty; leave it out for all of them")
        if self.start >= self.stop:
            raise ValueError(f"start {self.start} must lie below stop {self.stop}")
        prompts = self.prompts
        if not any(prompts) and self.columns is None:
            raise ValueError("words names no word")
        for factor in [*(f for prompt in prompts for _, f in prompt), *(f for _, f in self.columns or ())]:
            if not -2 <= factor <= 10:
                raise ValueError(f"a factor must lie between -2 and 10, got {factor}")
        return self

    @property
    def prompts(self) -> list[list[tuple[Any, float]]]:
        """For every prompt, or once for all, its words with their factors."""
        given: Any = self.words or []
        if isinstance(given, str):
            return [weighted(given) or [(given, self.factor)]]
        if isinstance(given, dict):
            return [list(given.items())]
        if given and all(isinstance(item, str) for item in given):
            read = [weighted(item) for item in given]
            if any(read) and not all(read):
                raise ValueError('words must be all words, or all whole prompts with factors as "a (red:1.4) circle"')
            return read if any(read) else [[(word, self.factor) for word in given]]
        return [list(item.items()) if isinstance(item, dict) else [(word, self.factor) for word in item] for item in given]

    def misfit(self, sites: SiteTable) -> str:
        layers, name = text_layers(sites), sites.model_name
        missing = [layer for layer in self.layers or () if layer not in layers]
        if layers and missing:
            return f"layer {missing[0]} does not exist: {name} has layers 0 to {len(layers) - 1}"
        if layers:
            return self.chosen(sites).refusal
        stacks = ", ".join(sorted({s.stack for s in sites})) or "none"
        return f"{self.slug} needs a diffusion model whose images attend to a text; {name} has attention in: {stacks}"

    def chosen(self, sites: SiteTable) -> SiteTable:
        layers = text_layers(sites)
        wanted = layers if self.layers is None else self.layers
        names = {site.name for layer in wanted for site in layers[layer]}
        return sites.where(lambda s: s.name in names)

    def plan(self, sites: SiteTable) -> list[Step]:
        if self.columns is not None:
            factors = [factor for _, factor in self.columns]
            steps = [Words(self._role(n), columns=[[columns]]) for n, (columns, _) in enumerate(self.columns)]
        else:
            # words with one factor are one set of columns
            factors = list(dict.fromkeys(factor for prompt in self.prompts for _, factor in prompt))
            same = [[[word for word, own in prompt if own == factor] for prompt in self.prompts] for factor in factors]
            steps = [Words(self._role(n), words, occurrence=self.occurrence) for n, words in enumerate(same)]
        changing = {step.name: factor for step, factor in zip(steps, factors, strict=True) if factor != 1}
        return [*steps, Edits(self.chosen(sites), partial(self.reweight, changing))] if changing else [*steps]

    def _role(self, number: int) -> str:
        return f"{self.slug}-{self.serial}-{number}"

    def reweight(self, factors: dict[str, float], call: Call) -> list[Edit] | None:
        """A'[:, j] = c_j A[:, j] for the columns j of each role."""
        conditional = call.clock.rows("conditional", call.batch)
        if conditional is None or not self.acts(call.clock) or not reads_prompt(call):
            return None
        rows = conditional[:, None]
        if call.site is not None and call.site.kind == "joint":
            rows = rows & call.query_rows("image")
        whole = "row" if self.renormalise else None
        return [Gain(columns=call.columns(role), factor=c, renormalise=whole, rows=rows) for role, c in factors.items()]

    def acts(self, clock: Clock) -> bool:
        """Whether a step lies in the part of the schedule that is changed."""
        if (self.start, self.stop) == (0, 1):
            return True
        if clock.steps is None:
            raise ReattendError(f"{self.slug}: the number of steps is not known, so start must be 0 and stop 1")
        first, last = (int(part * (clock.steps + 1)) for part in (self.start, self.stop))
        if first >= min(last, clock.steps):
            raise ReattendError(
                f"{self.slug}: none of the {clock.steps} steps of this run lies from {self.start:g} to {self.stop:g} of it: choose a wider "
                "or earlier part, or more steps"
            )
        return first <= clock.step < last


def weighted(text: str) -> list[tuple[tuple[str, int], float]]:
    """[((word, which occurrence of it), factor)] of a prompt with "(word:factor)" in it."""
    plain, found, end = "", [], 0
    for match in WEIGHTED.finditer(text):
        plain += text[end : match.start()]
        word = match[1].strip()
        before = re.findall(rf"(?<!\w){re.escape(word)}(?!\w)", plain, re.IGNORECASE)
        found.append(((word, len(before)), float(match[2])))
        plain, end = plain + match[1], match.end()
    return found
