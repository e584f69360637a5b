"""OPERA's over-trust penalty (arXiv 2311.17911, CVPR 2024).

Fixes: before a vision-language model starts to invent, many of its tokens in a row look at one earlier token of the answer, a summary that
stands for the image by then. OPERA tries the likeliest next tokens and lowers the score of those that would go on with such a column.
Acts on: the next-token logits. Each of the `candidates` likeliest tokens is tried in a pass of its own. Its row of last-layer weights
(the largest of all heads, made to sum to 1) joins the rows of the answer so far; down every column the weights times `scale` are
multiplied. In an answer of more than 10 tokens the largest product is the penalty, before that minus the row's weight on the image.
All other tokens get the logit -999.
Left out: retrospection (going back when one column stays the largest for `threshold` steps), which is a beam search of its own: this is
the method with a threshold that is never reached, with any number of beams (5 in the paper), and with greedy or sampled decoding, which
the official code does not have. Hence an experiment.
Ours: products in double precision, where the code's buffer is half precision, and no window of 512. Prompts are padded on the left.
Cost: one pass per candidate and token more. Needs a cache that gives tokens back (the default one does); no drafts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field

from ..hooks import Capture, Lookahead, SiteTable, Trials
from ..hooks.plan import Step
from ..interventions import Call, Edit, require_whole
from ..interventions.families.logits import at_least_float
from ..interventions.families.over_trust import OverTrust, over_trust_penalty, strongest_row
from .kit.base import Info, Recipe
from .kit.images import image_misfit, images_told
from .kit.language import marked_role, passage_spans

# What the official code gives to tokens that were not tried.
NOT_TRIED = -999.0


class OPERA(Recipe):
    slug = "opera"
    weighs = frozenset({"image"})
    info = Info(
        does="Penalises next tokens that go on looking at one earlier token of the answer instead of the image.",
        paper="OPERA: Alleviating Hallucination in Multi-Modal Large Language Models via Over-Trust Penalty and Retrospection-Allocation",
        year=2024,
        arxiv="2311.17911",
        families=("decoding", "sinks"),
        kinds=("lvlm",),
        cost="forward",
        problems=("the model describes what is not there",),
        try_first={"penalty_weight": 1.0},
        sweep={"penalty_weight": (0.5, 1.0, 2.0)},
        code="shikiw/OPERA",
        licence="MIT",
        status="experiment",
    )

    candidates: int = Field(
        5, ge=1, le=50, description="how many of the likeliest next tokens are tried; all others are ruled out"
    )
    penalty_weight: float = Field(
        1.0, ge=0, le=100, allow_inf_nan=False, description="weight of the penalty; 0 = only rule out"
    )
    scale: float = Field(50.0, gt=0, le=1000, allow_inf_nan=False, description="factor on the weights that are multiplied")
    image_range: tuple[int, int] | None = Field(
        None,
        description="token range [start, stop) of the image, where it cannot be found by its token (prompts of embeddings)",
    )

    def misfit(self, sites: SiteTable) -> str:
        if self.image_range is None and (reason := image_misfit(sites, self.slug)):
            return reason
        last = self._last(sites)
        return last.refusal if len(last) else f"{sites.model_name} has no decoder self-attention"

    @staticmethod
    def _last(table: SiteTable) -> SiteTable:
        return table.stack("decoder").kind("self").layers(-1, -1)

    def plan(self, sites: SiteTable) -> list[Step]:
        last, role = self._last(sites), "image"
        steps: list[Step] = []
        if self.image_range is not None:
            role = marked_role(self)
            steps.append(passage_spans(role, None, [self.image_range]))
        else:
            steps.append(images_told(sites))

        def score(trials: Trials) -> torch.Tensor:
            return self.score(role, trials)

        return [*steps, Capture(last, self.remember), Lookahead(self.candidates, last, strongest_row, score)]

    def remember(self, call: Call, edits: Sequence[Edit]) -> None:
        """The row of the token that was written last; a new prompt starts a new answer."""
        if call.clock.phase != "decode":
            call.memory["trust"] = OverTrust(self.scale)
        elif call.tokens is not None:
            if "trust" not in call.memory:
                require_whole(call.memory, self.slug)
            call.memory["trust"].keep(strongest_row(call, list(edits)), call.tokens.prompt_length)

    def score(self, role: str, trials: Trials) -> torch.Tensor:
        """Logits less the penalty for the tried tokens, -999 for all others."""
        logits = at_least_float(trials.logits)
        tried = logits.gather(1, trials.ids)
        if self.penalty_weight != 0:
            tried = tried - self.penalty_weight * self.penalties(role, trials).to(tried)
        return torch.full_like(logits, NOT_TRIED).scatter(1, trials.ids, tried)

    @staticmethod
    def penalties(role: str, trials: Trials) -> torch.Tensor:
        """[B, n]: the over-trust penalty of every tried token."""
        trust: OverTrust = trials.memory["trust"]
        start = trials.tokens.prompt_length
        penalties = []
        for row in trials.readings:
            image = torch.zeros_like(row[:, 0])
            if role in trials.tokens or trials.tokens.blind:
                image = (row * trials.tokens.positions(role, 0, row.shape[1], row.device)).sum(dim=1)
            penalties.append(over_trust_penalty(trust.extended(row, start), image))
        return torch.stack(penalties, dim=1)
