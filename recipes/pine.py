"""Answers that do not depend on the order of segments (PINE, Wang et al. 2025, arXiv 2407.01100).

Fixes: causal masking and RoPE make a model prefer documents or options by where they stand in its prompt. Here the segments see each
other in both directions, and every query meets them in the order of their importance to it - attention without positions, per token of a
segment - nearest first, instead of the order of the prompt. What is written then no longer depends on that order.
Acts on: every decoder layer and query head, prefill and decode. The tokens before the first segment are left as they are, the rows of a
segment share one order of the other segments, each row after the segments has its own.
Positions: keys keep the ones they have in the prompt; each query is turned once per segment by the difference, which gives the scores of
keys at the positions of the paper. The order is exact in real numbers and is kept within rounding; in half precision a near tie may be
ranked differently in two orders of the prompt. Keys without positions are kept beside the cache, in float32.
Ours: `order` ("reverse" and "prompt" are the paper's ablations), batches with other segments in every row, padding, soft-capping and
attention sinks. RoPE factors (YaRN) stay in the ranking. What parts the segments counts as part of each one. Sliding windows have to
cover the whole sequence. Segments should be tokenised by themselves (`reattend.hooks.tokens.segments.joined`) where their borders would melt.
Beside other recipes: those that hide keys by their place (streaming) are refused; act finds its sinks in the order of the prompt, and
with it the order matters again.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from pydantic import Field, model_validator

from ..hooks import Edits, Segments, SiteTable
from ..hooks.plan import Step
from ..hooks.sites.rotary import rotary_misfit
from ..hooks.tokens.segments import role_of
from ..interventions import Call, Rearrange
from ..interventions.families.order import Layout, rearranged
from .kit.base import Info, Recipe
from .kit.language import decoder_sites, marked_role, per_prompt, prompt_misfit

# parameters of layers that carry a state from token to token beside attention
RECURRENT = ("mamba_", "ssm_", "conv_", "linear_attn_", "linear_num_", "lru_")


class Pine(Recipe):
    slug = "pine"
    info = Info(
        does="Makes answers independent of the order in which documents or options stand in the prompt.",
        paper="Eliminating Position Bias of Language Models: A Mechanistic Approach",
        year=2025,
        arxiv="2407.01100",
        families=("calibration", "reweighting"),
        kinds=("llm",),
        cost="decode",
        problems=("the answer depends on the order of the documents",),
        code="wzq016/PINE",
    )
    marks = {"segments": "segments"}

    segments: list[str] | list[list[str]] | None = Field(
        None, description="the segments exactly as in the prompt, in any order: for every prompt, or a list of them per prompt"
    )
    ranges: list[tuple[int, int]] | list[list[tuple[int, int]]] | None = Field(
        None,
        description="token ranges [start, stop) of the segments instead, from the first real token: for every prompt, or per prompt",
    )
    order: Literal["importance", "reverse", "prompt"] = Field(
        "importance",
        description='"importance" puts what matters most to a query nearest to it, "reverse" farthest (worse), "prompt" leaves '
        "segments where they stand (they still see each other; the order then matters)",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Pine:
        if (self.segments is None) == (self.ranges is None):
            raise ValueError("give the segments of the prompt as segments=[texts] or as ranges=[(start, stop), ...], not both")
        if not any(per_prompt(self.segments, self.ranges) or ()):
            raise ValueError("segments (or ranges) names no segment")
        return self

    def misfit(self, sites: SiteTable) -> str:
        if reason := prompt_misfit(sites, self.slug):
            return reason
        chosen, config = decoder_sites(sites), sites.config.get_text_config()
        mixing = next((name for name in vars(config) if name.startswith(RECURRENT)), None)
        layers = getattr(config, "num_hidden_layers", chosen.num_layers)
        if mixing or chosen.num_layers < layers:
            what = f"({mixing})" if mixing else f"({layers - chosen.num_layers} of {layers} layers)"
            return f"{sites.model_name} carries the order of its tokens by other means than attention {what}"
        return rotary_misfit(chosen)

    def plan(self, sites: SiteTable) -> list[Step]:
        rows = per_prompt(self.segments, self.ranges) or []
        kind: dict[str, Any] = {"ranges" if self.ranges is not None else "texts": rows}
        name, most = marked_role(self), max(map(len, rows))
        return [Segments(name, **kind), Edits(decoder_sites(sites), partial(self.rearrange, name, most))]

    def rearrange(self, name: str, most: int, call: Call) -> Rearrange | None:
        """Every query of the call meets the segments in the order of their importance to it; None where there is nothing to order."""
        layout = self._layout(name, most, call)
        return None if layout is None else rearranged(call, layout, self.order)

    def _layout(self, name: str, most: int, call: Call) -> Layout | None:
        """Where the segments of each prompt lie, worked out once per prompt; None where no prompt has two of them."""
        if call.tokens is None:
            call.columns(role_of(name, 0))  # says what is missing
        assert call.tokens is not None
        key = call.tokens.prompt_length
        if call.memory.get("layout", (None,))[0] != key:
            roles = [call.tokens.positions(role_of(name, k), 0, key) for k in range(most)]
            found = Layout.of(roles, call.tokens.positions("bos", 0, key))
            call.memory["layout"] = (key, found)
        return call.memory["layout"][1]
