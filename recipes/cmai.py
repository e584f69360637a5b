"""Cross-modality attention inhibition (CMAI): a reconstruction from an abstract, not a reproduction (arXiv 2411.15453).

Read this first: the paper's full text and code were not at hand. What follows was rebuilt from its abstract and a public summary; every
number and most choices are ours, it is not known whether the paper's results need fine-tuning, and none of them are claimed here.
Fixes, by the abstract: much of an image is beside the point of an instruction and weakens its format, length and keyword demands.
Text-to-image attention is passed through text-to-text attention, and pairs of text and image tokens with a low focus are blocked.
Acts on: the weights of text rows after an image, in prefill and decode, on image columns. For each row and layer the `gamma` of its
image tokens with the least focus get no weight; rows are renormalised, text keeps its ratios, one image token always stays.
Choices, all ours: head means, one cut for all heads; F[i, j] = sum over text tokens k <= i of A[i, k] A[k, j], ranked within a row; text
before the image is left out; with lag = 1 the focus comes from the layer before (after its own cut), with lag = 0 from the layer's own
weights. Of generated tokens only the row's own one counts, so that beams may trade places. Newline features are never blocked.
Not here: VMTC, the other half of the paper, which clusters and merges image tokens before the decoder. It changes the set of tokens.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field

from ..hooks import Edits, SiteTable
from ..hooks.plan import Step
from ..hooks.tokens.image_grids import UNPADDED
from ..interventions import Call, Edit, require_whole
from ..interventions.families.inhibition import Inhibited, TextAndImage, focus_scores, least_focused
from ..interventions.families.sinks import SoundMap
from .kit.base import Info
from .kit.images import ImageRecipe, decoder_layers, image_before, image_now, images_told
from .kit.language import pieces_told


class CMAI(ImageRecipe):
    slug = "cmai"
    info = Info(
        does="Blocks the image tokens that a text token's context does not look at. A reconstruction from the paper's abstract.",
        paper="Enhancing Instruction-Following Capability of Visual-Language Models by Reducing Image Redundancy",
        year=2024,
        arxiv="2411.15453",
        families=("sparsity", "reweighting"),
        kinds=("lvlm",),
        cost="decode",
        problems=("the image makes the model overlook the instruction",),
        try_first={"gamma": 0.5},
        sweep={"gamma": (0.25, 0.5, 0.9)},
        status="experiment",
    )

    gamma: float = Field(0.5, ge=0, le=0.9, description="share of a row's image tokens that are blocked; 0 changes nothing")
    lag: Literal[0, 1] = Field(1, description="1: the focus comes from the layer before; 0: from the layer's own plain weights")

    def misfit(self, sites: SiteTable) -> str:
        if reason := super().misfit(sites):
            return reason
        if self.first_layer < self.lag:
            return "first_layer=0 has no layer before it to take the focus from: use lag=0 or first_layer=1"
        return self.chosen(sites).refusal

    def chosen(self, sites: SiteTable) -> SiteTable:
        """The layers that are changed, and with lag the one before them."""
        return decoder_layers(sites, self.first_layer - self.lag, self.last_layer)

    def plan(self, sites: SiteTable) -> list[Step]:
        if self.gamma == 0:
            return []
        chosen = self.chosen(sites)
        # the other families have no separators among their image tokens, which take part where an image's layout cannot be told
        unsure = getattr(sites.config, "model_type", "") in UNPADDED
        told = pieces_told(
            self.slug,
            "separators between the rows of its images cannot be told from image tokens then",
            lambda prompt: unsure and (image_before(prompt) or image_now(prompt)),
        )
        return [images_told(sites, told), Edits(chosen, partial(self.inhibit, max(site.layer for site in chosen)))]

    def inhibit(self, last: int, call: Call) -> Edit | None:
        """A[i, j] = 0 for the image tokens j of text row i with the least focus, rows renormalised."""
        tokens = call.tokens
        if tokens is not None and "image" not in tokens and not tokens.blind:
            return None
        call.columns("image")  # says what is missing: a token map, or ids
        assert tokens is not None and call.site is not None
        now = self._now(call)
        index, rows, where = now["index"], now["rows"], now["where"]
        if not index.numel():
            return None
        layer = call.site.layer
        found = now.get("hidden") if self.lag else self._least(call, [], now)
        edit = None
        if found is not None and layer >= self.first_layer and call.key_start < where.end:
            cut = Inhibited.of(index, found, where, call.key_start).without
            edit = SoundMap(function=cut, rows=None if call.num_queries == 1 and now["all"] else rows)
        if self.lag and layer < last:
            now["hidden"] = self._least(call, [edit] if edit is not None else [], now)
        return edit

    def _now(self, call: Call) -> dict[str, Any]:
        """What all layers of a pass share: the rows that are changed, and which positions are text and image."""
        tokens, memory = call.tokens, call.memory
        assert tokens is not None
        key = (call.total, call.num_queries, tokens.prompt_length, call.clock.step)
        if memory.get("now", {}).get("key") != key:
            if "where" not in memory:
                require_whole(memory, self.slug)
            if memory.get("prompt") != tokens.prompt_length:
                memory["prompt"], memory["where"] = tokens.prompt_length, TextAndImage.of(tokens, call.query.device)
            where = memory["where"]
            start = call.total - call.num_queries
            rows = where.rows(start, call.total)
            if start < where.length:
                index, every = rows.any(dim=0).nonzero()[:, 0], False
            else:  # a step: all of its rows are text, if there is an image at all
                index, every = torch.arange(call.num_queries if where.end else 0, device=rows.device), where.everywhere
            memory["now"] = {"key": key, "where": where, "rows": rows, "index": index, "all": every}
        return memory["now"]

    def _least(self, call: Call, own: list[Edit], now: dict[str, Any]) -> torch.Tensor:
        """Bool [B, R, I]: what this layer's weights, after the edits, leave out of focus."""
        assert call.site is not None
        where, index = now["where"], now["index"]
        known = call.memory.setdefault("looks", {})
        with torch.no_grad():  # which tokens are hidden is chosen, not weighed
            scores, looks = focus_scores(call, [*call.edits, *own], index, known.get(call.site.name), where)
        known[call.site.name] = (where, looks)
        at = index + call.total - call.num_queries
        return least_focused(scores, at, where, self.gamma) & now["rows"][:, index, None]
