"""Attention sinks plus a sliding window (StreamingLLM, Xiao et al. 2023, arXiv 2309.17453).

Fixes: a pure sliding window collapses once the first tokens leave it, because models park attention on them. Keeping a few first
tokens (sinks) and the recent window bounds the work per token; it gives no access to what lies between.
Acts on: the scores of every decoder layer, prefill and decode. Positions stay the original ones, right for prompts within the
trained length; the paper's mode for endless text (positions inside the cache) needs the rotary door and is not here yet.
`last_rows` is the tri-shape of MInference: the prompt's last rows see everything. `start_layer`: layers below stay dense (TriangleMix).
"""

from __future__ import annotations

import torch
from pydantic import Field

from ..hooks import Edits, SiteTable
from ..hooks.plan import Step
from ..interventions import Band, Call, Keep
from ..interventions.families.heads import prompt_end
from ..interventions.families.reweighting import shared_by_layers
from .kit.base import Info, Recipe
from .kit.language import decoder_misfit, decoder_sites


class Streaming(Recipe):
    slug = "streaming"
    info = Info(
        does="Keeps only the first few tokens and a recent window visible, so that long prompts cost less.",
        paper="Efficient Streaming Language Models with Attention Sinks",
        year=2024,
        arxiv="2309.17453",
        families=("sparsity", "sinks"),
        kinds=("llm",),
        cost="free",
        problems=("the prompt is too long",),
        try_first={"window": 1020},
        sweep={"window": (508, 1020, 2044)},
        code="mit-han-lab/streaming-llm",
    )

    sinks: int = Field(4, ge=0, le=4096, description="how many of each sequence's first tokens stay visible to all later ones")
    window: int = Field(1020, ge=1, description="how many recent tokens, the current one included, stay visible")
    last_rows: int = Field(0, ge=0, description="how many of the prompt's last rows see everything (tri-shape: 100); 0 = none")
    start_layer: int = Field(0, ge=0, description="first layer with the window; the layers below see everything")

    def misfit(self, sites: SiteTable) -> str:
        chosen = decoder_sites(sites)
        beyond = f"start_layer {self.start_layer} lies beyond the model's {chosen.num_layers} layers"
        return decoder_misfit(sites, self.slug) or ("" if len(chosen.layers(self.start_layer)) else beyond)

    def plan(self, sites: SiteTable) -> list[Step]:
        return [Edits(decoder_sites(sites).layers(self.start_layer), self.window_with_sinks)]

    def window_with_sinks(self, call: Call) -> Keep | None:
        """keep(i, j) = j <= i and (j < sinks or i - j < window), counted from each sequence's first real token."""
        if call.total <= self.sinks + self.window:
            return None
        if self.last_rows and call.tokens is not None:
            prompt_end(call, self.slug)  # says where the last rows of a prompt in pieces cannot be told
        return shared_by_layers(call, self.slug, lambda: self._band(call))

    def _band(self, call: Call) -> Keep:
        tokens = call.tokens
        dense_after = dense_until = None
        if self.last_rows and tokens is not None and call.total - call.num_queries < tokens.prompt_length:
            # the prompt's last real tokens, wherever padding and drafted or generated tokens of this pass lie
            real = tokens.positions("prompt", 0, tokens.prompt_length)
            end = torch.where(real, torch.arange(1, tokens.prompt_length + 1), 0).amax(dim=1) - call.key_start
            dense_after, dense_until = end - self.last_rows, end
        elif self.last_rows and tokens is None and call.clock.phase == "prefill":
            dense_after = call.num_keys - self.last_rows
        first, there = self._first(call)
        band = Band(self.sinks, self.window, first, dense_after, dense_until)
        if there is not None:
            band.on(there.device, "first", there)
        return Keep(pattern=band)

    @staticmethod
    def _first(call: Call) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Each sequence's first real column [B], on the CPU and where the model computes; None where that is column 0."""
        tokens, device = call.tokens, call.query.device
        if tokens is not None:
            key = (tokens.prompt_length, device)
            if call.memory.get("prompt") != key:
                found = None
                if bool(tokens.positions("padding", 0, tokens.prompt_length).any()):
                    first = tokens.positions("bos", 0, tokens.prompt_length).long().argmax(dim=1)
                    found = first, first.to(device)
                call.memory.update(prompt=key, first=found)
            if call.memory["first"] is not None:
                here, there = call.memory["first"]
                return here - call.key_start, there - call.key_start
        if not call.key_start:
            return None, None
        # a sliding-window cache has dropped sinks
        here, there = (torch.full((1,), -call.key_start, device=at) for at in ("cpu", device))
        return here, there
