"""Prompt-to-prompt (Hertz et al., arXiv 2208.01626): reweighting the words of a prompt, and editing a picture by its prompt.

Fixes: a word of the prompt shows too little in the picture, or too much. The attention weights that the image gives to chosen words are
multiplied by a factor c: A'[:, j] = c_j A[:, j]. A factor above 1 strengthens a word, one below 1 weakens it, a negative one turns it round.
With `edit`, prompts beside a source prompt are drawn with the source's attention, so that what the words do not change stays: "replace"
A' = A_source M with words swapped one for one, "refine" A' = A_source at the words that both have, A at new ones; then factors.
Acts on: the prompt's rows (not the negative prompt's, nor the source's), at all cross-attention, or the image tokens' rows of all joint
attention (ours: the paper knows no such models), in steps s with int(start (n + 1)) <= s < int(stop (n + 1)) of n steps, as in the official
code; an edit also at self-attention of at most `self_places` keys, int(self_start n) <= s < int(self_stop n).
Conventions: rows are not made to sum to 1 again, as in the paper; `renormalise` does so. The factors of several words are those given: the
official code makes rows of factors of its own where there are several values.
Ours: reweighting one picture by itself, where the paper takes the weights of the run without the change for the run with it (`edit` does,
with the same prompt twice). `stop` 0.8 is what the authors' examples take. In joint attention the image's own columns are taken as
self-attention's, of any size: such models have one size of maps. The source may be the session's first run instead of the batch's first
prompt, whose queries and keys are then kept. The local blend of latents is left out. Pictures to be edited have to begin with the same
noise: give the pipeline `latents`, or a list of generators with the same seed (`compare` does so by itself). An edit goes with no recipe
that puts a text of its own after the prompt (vsf, regional): whose weights its columns would take is not defined.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from pydantic import Field, model_validator

from ..hooks import Edits, SiteTable, Words
from ..hooks.plan import Step
from ..interventions import Call, Clock, Edit, Gain, ReattendError
from .kit.base import Info, Recipe
from .kit.denoisers import image_layers, reads_prompt, text_layers
from .kit.source_prompt import SourcePrompt
from .kit.weighted_prompts import weighted, written_weights

Factors = dict[str, float]


class PromptReweight(Recipe):
    slug = "prompt-reweight"
    info = Info(
        does="Multiplies the attention that a picture gives to chosen words of the prompt, or edits a picture by its prompt.",
        paper="Prompt-to-Prompt Image Editing with Cross-Attention Control",
        year=2023,
        arxiv="2208.01626",
        families=("reweighting",),
        kinds=("diffusion",),
        cost="decode",
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
        'the whole prompt "a (red:1.4) circle" (the pipeline gets reattend.recipes.plain_prompt of it)',
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
        "all", description='which occurrence of a word that occurs more than once, from 0, -1 = the last, or "all" of them'
    )
    start: float = Field(0.0, ge=0, lt=1, description="first part of the schedule that is changed, as a fraction of the steps")
    stop: float = Field(0.8, gt=0, le=1, description="the fraction of the steps from which on nothing is changed")
    layers: list[int] | None = Field(
        None,
        description="layers that are changed, numbered over all attention to the text (UNet: down, mid, up); default: all of them",
    )
    renormalise: bool = Field(False, description="scale each row back to its old sum, so that other words give what these gain")

    edit: Literal["replace", "refine"] | None = Field(
        None,
        description='draw the prompts after the first with the attention of the first one: "replace", words swapped one for one (a cat / a '
        'dog), or "refine", words added (a cat / a fluffy cat); give the pipeline both prompts, the same noise, and words only to reweight '
        'too, of each prompt its own: [{}, {"dog": 2.0}]',
    )
    source: Literal["batch", "run"] = Field(
        "batch", description="with edit: the attention is that of the first prompt of the batch, or of the session's first run"
    )
    pictures: int = Field(1, ge=1, description="with edit: how many pictures each prompt has (num_images_per_prompt)")
    self_start: float = Field(0.0, ge=0, lt=1, description="with edit: the first part of the schedule, for self-attention")
    self_stop: float = Field(
        0.4,
        ge=0,
        le=1,
        description="with edit: the fraction of the steps from which on self-attention is no longer taken; 0 = never",
    )
    self_places: int = Field(
        256,
        ge=1,
        description="with edit: self-attention is taken where it sees at most so many places; joint models have no such limit",
    )
    aligned: bool = Field(
        False,
        description='with edit "replace": words after a swapped one that has more tokens, or fewer, take their own attention, and not that of '
        "the place at which they stand",
    )

    @model_validator(mode="after")
    def _consistent(self) -> PromptReweight:
        if self.edit is None and (self.words is None) == (self.columns is None):
            raise ValueError("give words to reweight, or columns")
        if self.edit is not None and self.columns is not None:
            raise ValueError("edit reads the prompts itself: give words, or nothing, instead of columns")
        if self.edit is None and (self.source, self.pictures, self.aligned) != ("batch", 1, False):
            raise ValueError('source, pictures and aligned go with edit: give edit="replace" or "refine"')
        if self.aligned and self.edit != "replace":
            raise ValueError('aligned goes with edit "replace"')
        if self.edit is not None and 0 < self.self_stop <= self.self_start:
            raise ValueError(f"self_start {self.self_start} must lie below self_stop {self.self_stop}")
        if self.layers == []:
            raise ValueError("layers must not be empty; leave it out for all of them")
        if self.start >= self.stop:
            raise ValueError(f"start {self.start} must lie below stop {self.stop}")
        if self.columns == []:
            raise ValueError("columns names no column")
        prompts = self.prompts
        if any(not (word if isinstance(word, str) else word[0]).strip() for prompt in prompts for word, _ in prompt):
            raise ValueError("words must not hold an empty word")
        if not any(prompts) and (self.words is not None or self.edit is None) and self.columns is None:
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

    @property
    def written(self) -> list[str]:
        """The weights of whole prompts as they stand in them, "(red:1.4)"."""
        given = [self.words] if isinstance(self.words, str) else self.words
        texts = [item for item in given or () if isinstance(item, str)] if isinstance(given, list) else []
        return [weight for text in texts for weight in written_weights(text)]

    @property
    def follows(self) -> Literal["", "batch", "run"]:
        return "" if self.edit is None else self.source

    @property
    def hint(self) -> str:
        """What may be wrong where a word is not in its prompt."""
        if self.written:
            return "a prompt with weights in it is for this recipe, the pipeline takes reattend.recipes.plain_prompt(prompt)"
        if self.edit is not None and len(self.prompts) == 1:
            return "words hold for all prompts, the source too: give a mapping for each prompt, as [{}, {word: factor}]"
        return ""

    def misfit(self, sites: SiteTable) -> str:
        layers, name = text_layers(sites), sites.model_name
        missing = [layer for layer in self.layers or () if layer not in layers]
        if layers and missing:
            return f"layer {missing[0]} does not exist: {name} has layers 0 to {len(layers) - 1}"
        if layers and self.edit is not None and any(s.kind == "temporal" or s.stack.endswith(".motion") for s in sites):
            return f"{self.slug} edits pictures; {name} draws videos"
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
            steps = [Words(self._role(n), words, occurrence=self.occurrence, hint=self.hint) for n, words in enumerate(same)]
        changing = {step.name: factor for step, factor in zip(steps, factors, strict=True) if factor != 1}
        given: list[Step] = [*steps]
        editing = None
        if self.edit is not None:
            read = Words(f"{self.slug}-{self.serial}")
            editing = SourcePrompt(
                self.slug, self.edit, self.source, read, self.acts, self.within, self.self_places, self.pictures, self.aligned
            )
            given += [read, editing.step(self.taken(sites))]
        if changing:
            given.append(
                Edits(self.chosen(sites), partial(self.reweight, changing, editing, read=steps[0] if self.written else None))
            )
        return given

    def taken(self, sites: SiteTable) -> SiteTable:
        """Where an edit takes the source's attention: to the text, and among image tokens."""
        names = {site.name for site in self.chosen(sites)}
        names |= {
            site.name for table in image_layers(sites).values() for site in table if site.kind == "self" and site.supported
        }
        return sites.where(lambda s: s.name in names)

    def _role(self, number: int) -> str:
        return f"{self.slug}-{self.serial}-{number}"

    def reweight(
        self, factors: dict[str, float], editing: SourcePrompt | None, call: Call, read: Words | None = None
    ) -> list[Edit] | None:
        """A'[:, j] = c_j A[:, j] for the columns j of each role; of an edit only the rows that are edited.

        read: the step that has read a prompt whose weights were given as they stand in it.
        """
        conditional = call.clock.rows("conditional", call.batch)
        if conditional is None or not self.acts(call.clock) or not reads_prompt(call):
            return None
        if read is not None:
            self.check_plain(read, call)
        chosen = conditional if editing is None else editing.edited(call)
        if chosen is None:
            return None
        rows = chosen[:, None]
        if call.site is not None and call.site.kind == "joint":
            rows = rows & call.query_rows("image")
        whole = "row" if self.renormalise else None
        return [Gain(columns=call.columns(role), factor=c, renormalise=whole, rows=rows) for role, c in factors.items()]

    def check_plain(self, read: Words, call: Call) -> None:
        """Raises ReattendError for a prompt that the pipeline was given with the weights in it: they would be tokens. Looked at once a text."""
        texts = call.memory[read]
        if call.memory.get("plain") is texts:
            return
        for text in (one for row in texts.values() for one in row):
            literal = next((weight for weight in self.written if text.places(weight)), None)
            if literal is not None:
                raise ReattendError(
                    f"{self.slug}: the pipeline was given {literal!r} as text, which its text encoders read as words: give it "
                    "reattend.recipes.plain_prompt(prompt), and this recipe the prompt itself as words"
                )
        call.memory["plain"] = texts

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

    def within(self, clock: Clock) -> bool:
        """Whether self-attention is taken in a step."""
        if clock.steps is None:
            raise ReattendError(f"{self.slug}: the number of steps is not known; run the pipeline, or its schedule, as a whole")
        return int(self.self_start * clock.steps) <= clock.step < int(self.self_stop * clock.steps)
