"""What recipes share that highlight passages of a prompt: how passages are named, which heads act on them, and what is refused."""

from __future__ import annotations

import itertools
from typing import Any

from pydantic import Field, field_validator, model_validator

from ..hooks import SiteTable, Spans, Support
from .base import Recipe, decoder_sites
from .head_choice import as_heads, missing_heads

# a role of its own for every session: two sessions on one model may mark different passages
_serial = itertools.count(1)


class Highlighter(Recipe):
    """Base of recipes that act on passages of a decoder's prompt, named by their text or by token ranges.

    `spans` makes a role of them, `heads_at` says which heads act at which layer.
    """

    marks = {"highlight": "text"}

    text: str | list[str] | list[list[str]] | None = Field(
        None,
        description="passages to emphasise, exactly as in the prompt: one, several in every prompt, or a list of them per prompt",
    )
    ranges: list[tuple[int, int]] | list[list[tuple[int, int]]] | None = Field(
        None,
        description="token ranges [start, stop) instead, counted from the first real token: for every prompt, or per prompt",
    )
    occurrence: int | None = Field(
        None, description="which occurrence of a passage, from 0, -1 = the last; None: a passage that occurs twice is an error"
    )
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
    def _passages_named(self) -> Highlighter:
        if self.text is not None and self.ranges is not None:
            raise ValueError("give text or ranges, not both")
        if self.text is None and self.ranges is None and self.needs_passages():
            raise ValueError("text is required: the passage to emphasise, as it stands in the prompt (or ranges of tokens)")
        if (self.text is not None or self.ranges is not None) and not any(self.passages or ()):
            raise ValueError("text (or ranges) names no passage")
        if self.heads is not None and not self.heads:
            raise ValueError("heads is empty: name at least one, or leave it out for all heads")
        return self

    def needs_passages(self) -> bool:
        """Whether the method means anything without passages."""
        return True

    @property
    def passages(self) -> list[list[Any]] | None:
        """Texts or ranges as one list per prompt (a single list goes for every prompt)."""
        given: Any = [self.text] if isinstance(self.text, str) else self.text if self.text is not None else self.ranges
        if not given:
            return None
        per_prompt = isinstance(given[0], list)
        return list(given) if per_prompt else [list(given)]

    def supports(self, sites: SiteTable) -> Support:
        chosen, support = decoder_sites(sites, self.slug)
        if not support:
            return support
        if getattr(sites.config, "is_encoder_decoder", False):
            return Support(
                False, f"{sites.model_name} reads its prompt with an encoder; {self.slug} needs a decoder that reads it"
            )
        reason = missing_heads([(layer, head or 0) for layer, head in self.pairs(chosen)], chosen)
        return Support(not reason, reason)

    def pairs(self, sites: SiteTable) -> list[tuple[int, int | None]]:
        """(layer, head) pairs that act; head None = all of the layer."""
        if self.heads is None:
            return [(site.layer, None) for site in sites]
        return [(item, None) if isinstance(item, int) else item for item in self.heads]

    def heads_at(self, sites: SiteTable) -> dict[int, tuple[int, ...] | None]:
        """{layer: heads that act there, None = all}."""
        found: dict[int, tuple[int, ...] | None] = {}
        for layer, head in self.pairs(sites):
            if head is None:
                found[layer] = None
            elif (known := found.setdefault(layer, ())) is not None:
                found[layer] = (*known, head)
        return found

    def new_role(self) -> str:
        """A name for this session's passages."""
        return f"{self.slug}-{next(_serial)}"

    def spans(self, role: str, passages: list[list[Any]] | None = None, official: bool = False) -> Spans:
        """The step that makes `role` of the passages (or of some of them); official: PASTA's rule for their first and last token."""
        kind = "ranges" if self.ranges is not None else "texts"
        rows = self.passages if passages is None else passages
        return Spans(role, **{kind: rows}, occurrence=self.occurrence, official=official)  # type: ignore[arg-type]
