"""What recipes share that change how chosen heads read marked passages: their parameters, and what is refused."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator, model_validator

from ...hooks import SiteTable, Support
from .base import Recipe, decoder_sites
from .heads import as_heads, missing_heads
from .passages import OCCURRENCE_HELP, RANGES_HELP, TEXT_HELP, Ranges, Text, check_passages, per_prompt


class Highlighter(Recipe):
    """Base of recipes that act on passages of a decoder's prompt, named by their text or by token ranges.

    `passage_spans` (passages.py) makes a role of them, `heads_at` says which heads act at which layer.
    """

    marks = {"highlight": "text"}

    text: Text = Field(None, description=f"passages to emphasise, {TEXT_HELP}")
    ranges: Ranges = Field(None, description=RANGES_HELP)
    occurrence: int | None = Field(None, description=OCCURRENCE_HELP)
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
        if self.needs_passages() or self.text is not None or self.ranges is not None:
            check_passages(self.text, self.ranges, "emphasise")
        if self.heads is not None and not self.heads:
            raise ValueError("heads is empty: name at least one, or leave it out for all heads")
        return self

    def needs_passages(self) -> bool:
        """Whether the method means anything without passages."""
        return True

    @property
    def passages(self) -> list[list[Any]] | None:
        """Texts or ranges as one list per prompt (a single list goes for every prompt)."""
        return per_prompt(self.text, self.ranges)

    def supports(self, sites: SiteTable) -> Support:
        chosen, support = decoder_sites(sites, self.slug)
        if not support:
            return support
        if getattr(sites.config, "is_encoder_decoder", False):
            return Support(
                False, f"{sites.model_name} reads its prompt with an encoder; {self.slug} needs a decoder that reads it"
            )
        pairs = self.pairs(chosen)
        if not pairs:
            return Support(False, "profile_path: no head of this profile has a score above 0, so none would be steered")
        reason = missing_heads([(layer, head or 0) for layer, head in pairs], chosen)
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
