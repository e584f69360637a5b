"""What recipes for language models share: the decoder's sites, and passages of the prompt that a user marks."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from ...hooks import Capture, Edits, Probe, Prompt, SiteTable, Spans
from ...hooks.plan import Step
from ...interventions import Call, Edit, ReattendWarning
from ...interventions.families.reweighting import shared_by_layers
from .base import Recipe
from .heads import as_heads, at_layers, missing_heads

Text = str | list[str] | list[list[str]] | None
Ranges = list[tuple[int, int]] | list[list[tuple[int, int]]] | None

TEXT_HELP = "exactly as in the prompt: one, several in every prompt, or a list of them per prompt"
RANGES_HELP = "token ranges [start, stop) instead, counted from the first real token: for every prompt, or per prompt"
OCCURRENCE_HELP = (
    "which occurrence of a passage, from 0, -1 = the last; None: a passage that occurs twice in a prompt is an error"
)


def decoder_sites(sites: SiteTable) -> SiteTable:
    """Self-attention of a causal decoder."""
    return sites.stack("decoder").kind("self").where(lambda s: s.causal)


def decoder_misfit(sites: SiteTable, slug: str) -> str:
    """Why a recipe for causal decoders does not fit a model; "" where it does."""
    chosen = decoder_sites(sites)
    if len(chosen):
        return chosen.refusal
    stacks = ", ".join(sorted({s.stack for s in sites})) or "none"
    return f"{slug} needs a language model with a causal decoder; {sites.model_name} has attention in: {stacks}"


def prompt_misfit(sites: SiteTable, slug: str) -> str:
    """The same for recipes that act on the prompt: the decoder has to read it."""
    reads = not getattr(sites.config, "is_encoder_decoder", False)
    apart = f"{sites.model_name} reads its prompt with an encoder; {slug} needs a decoder that reads it"
    return decoder_misfit(sites, slug) or ("" if reads else apart)


def per_prompt(text: Text, ranges: Ranges) -> list[list[Any]] | None:
    """Texts or ranges as one list per prompt (a single list goes for every prompt); None where neither names anything."""
    given: Any = [text] if isinstance(text, str) else text if text is not None else ranges
    if not given:
        return None
    return list(given) if isinstance(given[0], list) else [list(given)]


def check_passages(text: Text, ranges: Ranges, what: str) -> None:
    """Raises ValueError unless exactly one of text and ranges names a passage. what: what happens to it, for the message."""
    if text is not None and ranges is not None:
        raise ValueError("give text or ranges, not both")
    if text is None and ranges is None:
        raise ValueError(f"text is required: the passage to {what}, as it stands in the prompt (or ranges of tokens)")
    if not any(per_prompt(text, ranges) or ()):
        raise ValueError("text (or ranges) names no passage")


def marked_role(recipe: Recipe) -> str:
    """A role of its own for every recipe object: two on one model may mark different passages, and one that is begun again has its own."""
    return f"{recipe.slug}-{recipe.serial}"


def passage_spans(
    role: str, text: Text, ranges: Ranges, occurrence: int | None = None, official: bool | Literal["inside"] = False
) -> Spans:
    """The step that makes the passages a role of the prompt's tokens."""
    rows = per_prompt(text, ranges)
    if ranges is not None:
        return Spans(role, ranges=rows, official=official)
    return Spans(role, texts=rows, occurrence=occurrence, official=official)


class Marked(Recipe):
    """Base of recipes that act on passages of a decoder's prompt, named by their text or by token ranges."""

    marks = {"highlight": "text"}

    text: Text = Field(None, description=f"passages to emphasise, {TEXT_HELP}")
    ranges: Ranges = Field(None, description=RANGES_HELP)
    occurrence: int | None = Field(None, description=OCCURRENCE_HELP)

    @model_validator(mode="after")
    def _passages_named(self) -> Marked:
        if self.needs_passages() or self.text is not None or self.ranges is not None:
            check_passages(self.text, self.ranges, "emphasise")
        return self

    def needs_passages(self) -> bool:
        """Whether the method means anything without passages."""
        return True

    @property
    def passages(self) -> list[list[Any]] | None:
        """Texts or ranges as one list per prompt (a single list goes for every prompt)."""
        return per_prompt(self.text, self.ranges)

    def spans(self, official: bool | Literal["inside"] = False) -> Spans:
        """The step that makes the passages the role `marked_role(self)`."""
        return passage_spans(marked_role(self), self.text, self.ranges, self.occurrence, official)

    def misfit(self, sites: SiteTable) -> str:
        return prompt_misfit(sites, self.slug)


class Highlighter(Marked):
    """Base of recipes that change how heads read marked passages. A subclass fills in `neutral` and `edit`."""

    heads: tuple[tuple[int, int], ...] | tuple[int, ...] | None = Field(
        None,
        description="{layer: [query heads]}, or a list of (layer, head) pairs, or a list of whole layers; None = all heads",
    )

    @field_validator("heads", mode="before")
    @classmethod
    def _layers_or_heads(cls, value: Any) -> Any:
        if isinstance(value, str):
            raise ValueError("heads must be {layer: [heads]}, [[layer, head], ...] or [layer, ...]")
        layers = isinstance(value, (list, tuple)) and len(value) > 0 and all(isinstance(v, int) for v in value)
        return tuple(value) if layers else as_heads(value)

    @model_validator(mode="after")
    def _heads_named(self) -> Highlighter:
        if self.heads is not None and not self.heads:
            raise ValueError("heads is empty: name at least one, or leave it out for all heads")
        return self

    @property
    def neutral(self) -> bool:
        """Whether the parameters ask for no change at all; the prompt is searched for the passages all the same."""
        raise NotImplementedError

    def edit(self, role: str, call: Call) -> Edit | None:
        """The edit for the passages of `role`, one for all layers and heads of a pass; None where no prompt has any."""
        raise NotImplementedError

    def plan(self, sites: SiteTable) -> list[Step]:
        return [self.spans()] if self.neutral else [self.spans(), self.on_heads(sites, partial(self.edit, marked_role(self)))]

    def on_heads(self, sites: SiteTable, make: Callable[[Call], Edit | None]) -> Edits:
        """The step that puts make(call), made once a pass, on the heads that act."""
        chosen = decoder_sites(sites)
        heads = at_layers(self.pairs(chosen))

        def intervene(call: Call) -> Edit | None:
            assert call.site is not None
            edit = shared_by_layers(call, self.slug, partial(make, call))
            return None if edit is None else edit.on_heads(heads[call.site.layer])

        return Edits(chosen.only(list(heads)), intervene)

    def misfit(self, sites: SiteTable) -> str:
        if reason := super().misfit(sites):
            return reason
        chosen = decoder_sites(sites)
        pairs = self.pairs(chosen)
        if not pairs:
            return "profile_path: no head of this profile has a score above 0, so none would be steered"
        return missing_heads([(layer, head or 0) for layer, head in pairs], chosen)

    def pairs(self, sites: SiteTable) -> list[tuple[int, int | None]]:
        """(layer, head) pairs that act; head None = all of the layer."""
        if self.heads is None:
            return [(site.layer, None) for site in sites]
        return [(item, None) if isinstance(item, int) else item for item in self.heads]


def prompt_told(table: SiteTable, look: Callable[[Prompt], Any], in_pieces: Callable[[Prompt], None] | None = None) -> Probe:
    """A step that looks at prompts before any layer runs, to refuse one or to say something, and never asks for a pass.

    look: returns None. in_pieces: see `Probe` and `pieces_told`.
    """
    decoder = table.stack("decoder").kind("self")
    return Probe([Capture(decoder.where(lambda s: s is decoder[0]), _unread)], look, in_pieces=in_pieces)


def _unread(call: object, edits: object) -> None:
    """No pass is asked for."""


def pieces_told(slug: str, changes: str, matters: Callable[[Prompt], bool]) -> Callable[[Prompt], None]:
    """What says, once a prompt, that a prompt in pieces gives other numbers than at once. changes: in what; matters: whether it does."""
    return partial(_tell, slug, changes, matters)


def _tell(slug: str, changes: str, matters: Callable[[Prompt], bool], prompt: Prompt) -> None:
    if not prompt.memory.get("told in pieces") and matters(prompt):
        prompt.memory["told in pieces"] = True
        warnings.warn(
            f"{slug}: this prompt comes in pieces (chunked prefill, or a cache of its first tokens), and {changes}: the answer is not "
            "quite that to the whole prompt; pass it at once (prefill_chunk_size=None) where that matters",
            ReattendWarning,
            stacklevel=2,
        )
