"""Selective token emphasis, PAINT (arXiv 2501.12206).

Fixes: attention on the image fades in deep layers, and strengthening all of it also strengthens what says nothing. Two small sets are
picked from what image tokens receive inside the vision encoder: local tokens, which its first layer looks at most, and summary tokens,
outliers in its layer before the last. Their decoder scores grow by alpha |s| and beta |s|.
Acts on: the scores of the last prompt row and of every generated row, from layer 2 on, in all heads. The sets are found once per image.
Conventions: alpha, beta and the share of local tokens are those of the official command line. As in its code all heads are treated
alike; the abstract's boost by head is `by_head`, off by default: alpha and beta times the head's share of the most image-bound head's
image weight, in the row as it was.
Ours: sets per image or tile (the code takes the batch's first image for all); exactly the outliers (its rounding may lose one);
`spatial_share` takes the tokens that all patches look at most (in the code these sums are all 1, so its choice is arbitrary); encoders
without a class token (SigLIP, Qwen, Pixtral) are read as the mean of all patches' rows, which is an experiment; merged tokens get the
sum of their patches; in a prompt that is read in chunks the last row of each chunk is changed too (which is said). Videos
are refused. The logits refinement that the official script adds is another method (PAI) and not part of this one.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from pydantic import Field

from ..hooks import Edits, SiteTable
from ..hooks.plan import Step
from ..hooks.tokens.patches import PatchReader, encoder_sites
from ..interventions import Call, Edit, ReattendError, ScoreGain, TokenGrid, require_whole
from ..interventions.edits.row_values import sent
from ..interventions.families.gaze import focused_rows
from ..interventions.families.reweighting import OverPrompt, of_call, shared_by_layers
from ..interventions.families.visual_tokens import attention_received, head_shares, informed_tokens
from .kit.base import Info
from .kit.images import EACH_LAST_ROW, ImageRecipe, image_before, images_told
from .kit.language import pieces_told


class SelectiveEmphasis(ImageRecipe):
    slug = "selective-emphasis"
    info = Info(
        does="Strengthens the image tokens that the vision encoder itself singles out: grounded details and summaries.",
        paper="Fixing Imbalanced Attention to Mitigate In-Context Hallucination of Large Vision-Language Model",
        year=2025,
        arxiv="2501.12206",
        families=("reweighting", "heads"),
        kinds=("lvlm",),
        cost="decode",
        problems=("the model describes what is not there",),
        try_first={"alpha": 0.7, "beta": 0.3},
        sweep={"alpha": (0.35, 0.7, 1.4), "beta": (0.15, 0.3, 0.6)},
        code="hasanar1f/PAINT",
        licence="Apache-2.0",
    )

    alpha: float = Field(
        0.7, ge=0, le=2, allow_inf_nan=False, description="growth of local tokens' scores; 0 = none, answers break up above 0.8"
    )
    beta: float = Field(0.3, ge=0, le=2, allow_inf_nan=False, description="growth of summary tokens' scores; 0 = none")
    local_share: float = Field(0.25, ge=0, le=1, description="how many of an image's tokens are local ones, as a share of all")
    spatial_share: float = Field(
        0.0, ge=0, le=1, description="as many more, by what all patches together look at in the first encoder layer"
    )
    by_head: bool = Field(False, description="strengthen each head by its share of image attention, as the abstract describes")

    # -- what it fits ------------------------------------------------------------------------------------------------

    def misfit(self, sites: SiteTable) -> str:
        if reason := super().misfit(sites):
            return reason
        name = sites.model_name
        encoder = encoder_sites(sites)
        if not len(encoder):
            return f"{self.slug} reads the attention of the vision encoder, and {name} has none that can be read"
        read = encoder.layers(0, 0) + encoder.layers(-2, -2)
        if not len(encoder.layers(-2, -2)):
            return f"{self.slug} reads the encoder's layer before the last, and the encoder of {name} has only one"
        return read.refusal

    # -- what it does ------------------------------------------------------------------------------------------------

    def plan(self, sites: SiteTable) -> list[Step]:
        if self.alpha == 0 and self.beta == 0:
            return []
        encoder = encoder_sites(sites)
        first, penultimate = encoder.layers(0, 0)[0], encoder.layers(-2, -2)[0]
        readings: dict[str, Any] = {"first": (first, attention_received), "penultimate": (penultimate, attention_received)}
        if self.spatial_share:
            readings["spatial"] = (first, lambda call, query: attention_received(call))
        patches = PatchReader(encoder, readings)
        return [
            images_told(sites, pieces_told(self.slug, EACH_LAST_ROW, image_before)),
            *patches.steps,
            Edits(self.chosen(sites), partial(self.strengthen, patches)),
        ]

    def strengthen(self, patches: PatchReader, call: Call) -> ScoreGain | list[Edit] | None:
        """s_j += alpha |s_j| for local tokens j, beta |s_j| for summary tokens, on the last row of the prompt and the rows after it."""
        tokens = call.tokens
        if tokens is not None and "image" not in tokens and not tokens.blind:
            return None

        def make() -> ScoreGain | None:
            call.columns("image")  # says what is missing: a token map, or ids
            known = self._gain(patches, call)
            rows = None if call.num_queries == 1 else focused_rows(call)
            # a window may have left the image behind
            if known is None or (rows is not None and not bool(rows.any())) or not bool(known.seen(call).any()):
                return None
            return ScoreGain(factor=of_call(call, known.there), rows=None if rows is None else sent(rows, call.query.device))

        found = shared_by_layers(call, None, make)
        if found is None or not self.by_head:
            return found
        device, rows = call.query.device, found.rows
        index = torch.zeros(1, dtype=torch.long, device=device) if rows is None else rows.any(dim=0).nonzero()[:, 0]
        shares = head_shares(call, index, call.columns("image"))
        places = torch.arange(call.num_queries, device=device)
        # the shares are each row's own: one edit per acting row
        return [
            ScoreGain(factor=found.factor * shares[:, :, i, None], rows=None if rows is None else rows & (places == index[i]))
            for i in range(len(index))
        ]

    def _gain(self, patches: PatchReader, call: Call) -> OverPrompt | None:
        """Alpha on local tokens, beta on summary tokens, 0 elsewhere; images of a later turn join those before."""
        tokens, memory = call.tokens, call.memory
        assert tokens is not None
        if memory.get("read") is not call.clock and call.clock.phase != "decode":
            if "video" in tokens:
                raise ReattendError(
                    "selective-emphasis reads what the vision encoder looks at in images, and this prompt holds a video: leave the video "
                    "out, or pass its frames as images"
                )
            if "known" not in memory:
                require_whole(memory, self.slug)
            # what a pass that failed has found in the place of this one is no image of this prompt
            start = call.total - call.num_queries
            known: list[TokenGrid] = [grid for grid in memory.get("known", ()) if int(grid.index.max()) < start]
            gain = torch.zeros(tokens.batch, tokens.prompt_length, device=call.query.device)
            before = memory.get("gain", gain)[:, :start]
            gain[:, : before.shape[1]] = before
            for grid, values in patches.per_image(call, known) or ():
                known.append(grid)
                each = {name: value.flatten().to(gain.device) for name, value in values.items()}
                local, summary = informed_tokens(
                    each["first"], each["penultimate"], self.local_share, each.get("spatial"), self.spatial_share
                )
                gain[grid.row, grid.index.flatten().to(gain.device)] = self.alpha * local + self.beta * summary
            memory.update(gain=gain, shown=gain.cpu(), known=known, read=call.clock)
        if call.clock.phase == "decode" and (not memory.get("known") or len(memory["known"]) < len(tokens.grids)):
            raise ReattendError(
                "selective-emphasis cannot tell which places of the image the image tokens of this prompt are: pass the images "
                "as the model's processor makes them, and the whole prompt at once (prefill_chunk_size=None)"
            )
        return OverPrompt(memory["shown"], memory["gain"]) if memory["known"] else None
