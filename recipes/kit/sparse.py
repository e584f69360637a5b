"""What recipes share whose rows read chosen blocks of a decoder's keys instead of all of them."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, field_validator

from ...hooks import Edits, SiteTable
from ...hooks.plan import Step
from ...interventions import Call, Keep
from .base import Recipe
from .language import decoder_misfit, decoder_sites


class BlockSparse(Recipe):
    """Base of recipes that leave blocks of keys unread. A subclass fills in `keep`, and says which rows it is for and what stays dense."""

    # whose rows: those of the prompt, those of the tokens that were written after it, or all
    reads: ClassVar[Literal["prompt", "answer", "all"]] = "all"

    block_size: int = Field(64, ge=1, le=1024, description="tokens per block")
    dense_layers: tuple[int, ...] = Field((), description="layers that read everything, counted from 0")

    @field_validator("dense_layers")
    @classmethod
    def _counted_from_0(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(layer < 0 for layer in value):
            raise ValueError("layers are counted from 0, so none may be negative")
        return value

    @property
    def dense_until(self) -> int:
        """How many keys a call has to have before blocks are left out."""
        return 0

    def keep(self, call: Call, written: int) -> Keep | None:
        """The pairs that stay. written: how many of the call's last rows belong to tokens after the prompt; None: all pairs."""
        raise NotImplementedError

    def misfit(self, sites: SiteTable) -> str:
        if reason := decoder_misfit(sites, self.slug):
            return reason
        there = [site.layer for site in decoder_sites(sites)]
        beyond = [layer for layer in self.dense_layers if layer > max(there)]
        if beyond:
            return f"dense_layers names layer {beyond[0]}; {sites.model_name} has layers {min(there)} to {max(there)}"
        return "" if len(self.sparse(sites)) else f"dense_layers leaves no layer of {sites.model_name} that reads blocks"

    def sparse(self, sites: SiteTable) -> SiteTable:
        """The layers that read blocks."""
        return decoder_sites(sites).where(lambda site: site.layer not in self.dense_layers)

    def plan(self, sites: SiteTable) -> list[Step]:
        return [Edits(self.sparse(sites), self.read_blocks)]

    def read_blocks(self, call: Call) -> Keep | None:
        """`keep`, where there are more keys than `dense_until` and rows that the method is for."""
        written = written_rows(call)
        rows = {"prompt": call.num_queries - written, "answer": written, "all": call.num_queries}[self.reads]
        return self.keep(call, written) if rows and call.num_keys > self.dense_until else None


def written_rows(call: Call) -> int:
    """How many of a call's last rows belong to tokens that were written after the prompt."""
    if call.tokens is None:
        return call.num_queries if call.clock.phase == "decode" else 0
    return max(0, min(call.num_queries, call.total - call.tokens.prompt_length))
