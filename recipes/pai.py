"""Paying more attention to the image (PAI, arXiv 2407.21771, ECCV 2024).

Fixes: a vision-language model goes on by what language makes likely, and would write much of its answer without any image ("text
inertia"). Two parts work against that, each with a switch of its own.
Attention (`alpha`): the scores of all image tokens grow by alpha |s|, in the last prompt row and in every generated row, in all heads
from layer 2 on; the row's softmax then takes from the text what the image gains.
Logits (`gamma`): a second branch reads the prompt without its images and then the same tokens. With c and u the log-probabilities with
and without the image, the logits become u + gamma (c - u), and tokens with less than a tenth of the likeliest one's probability in c
are left out. The branch runs without the attention part. Meant for nucleus sampling; works with every way of decoding.
Conventions: layers count from 0. alpha 0 and gamma 1 switch a part off. Defaults are those of the official README; its CHAIR script
takes gamma 2, and papers that compare with PAI take alpha up to 0.6.
Ours: image tokens per row of a batch, where the code takes one range for all; hidden columns stay hidden; wrapper tokens of an image
leave the second branch with it; prompts without an image keep their logits bit for bit. With gamma other than 1 a prompt in pieces
(prefill_chunk_size, a further turn on an old cache) is refused; with gamma 1 the last row of each piece is changed, which is said.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field

from ..hooks import Branch, Edits, Fusion, Prompt, SiteTable
from ..hooks.plan import Step
from ..hooks.prompts.text_only import placeholders, without_images
from ..interventions import Call, ReattendError, ScoreGain
from ..interventions.edits.row_values import sent
from ..interventions.families.gaze import focused_rows
from ..interventions.families.logits import at_least_float, contrasted
from ..interventions.families.reweighting import marked_prompt, of_call, shared_by_layers
from .kit.base import Info
from .kit.images import EACH_LAST_ROW, ImageRecipe, image_before, images_told
from .kit.language import pieces_told


class PAI(ImageRecipe):
    slug = "pai"
    info = Info(
        does="Strengthens all image tokens while an answer is written, and favours words that the image makes likelier.",
        paper="Paying More Attention to Image: A Training-Free Method for Alleviating Hallucination in LVLMs",
        year=2024,
        arxiv="2407.21771",
        families=("reweighting", "decoding"),
        kinds=("lvlm",),
        cost="forward",
        problems=("the model describes what is not there",),
        try_first={"alpha": 0.2},
        sweep={"alpha": (0.1, 0.2, 0.4), "gamma": (1.0, 1.1)},
        code="LALBJ/PAI",
        licence="MIT",
    )

    alpha: float = Field(
        0.2, ge=0, le=10, allow_inf_nan=False, description="growth of the image's scores; 0 = none, sensible up to 0.6"
    )
    gamma: float = Field(
        1.1,
        ge=0,
        le=10,
        allow_inf_nan=False,
        description="weight of what the image adds to the logits; 1 = no second branch, at half the cost per token",
    )
    cutoff: float = Field(
        0.1,
        gt=0,
        le=1,
        description="tokens below this share of the likeliest one's probability are left out (gamma other than 1)",
    )

    def plan(self, sites: SiteTable) -> list[Step]:
        steps: list[Step] = []
        if self.alpha != 0:
            steps.append(images_told(sites, pieces_told(self.slug, EACH_LAST_ROW, image_before)))
            steps.append(Edits(self.chosen(sites), self.strengthen))
        if self.gamma != 1:
            steps.append(Branch([self.text_only], self.fuse))
        return steps

    def strengthen(self, call: Call) -> ScoreGain | None:
        """s_j += alpha |s_j| for image tokens j, on the last row of the prompt and the rows after it."""
        tokens = call.tokens
        if tokens is not None and "image" not in tokens and not tokens.blind:
            return None

        def make() -> ScoreGain | None:
            known = marked_prompt(call, "image")
            if known is None:
                return None
            # rows without an image have a gain of 0: naming rows would cost every layer of a step an operation
            acting = known.seen(call) if call.num_queries == 1 else focused_rows(call) & known.seen(call)
            if not bool(acting.any()):
                return None
            rows = None if call.num_queries == 1 else sent(acting, call.query.device)
            return ScoreGain(factor=self.alpha * of_call(call, known.there), rows=rows)

        return shared_by_layers(call, None, make)

    def text_only(self, prompt: Prompt) -> dict[str, Any] | None:
        """The prompt of the second branch; None where no row has an image."""
        ids = prompt.arguments.get("input_ids")
        if ids is None:
            raise ReattendError("pai cannot tell which tokens of inputs_embeds are images: pass input_ids instead")
        prompt.memory["rows"] = placeholders(ids, prompt.config).any(dim=1)
        return without_images(prompt, "left") if bool(prompt.memory["rows"].any()) else None

    def fuse(self, step: Fusion) -> torch.Tensor:
        """u + gamma (c - u) in the rows that have an image."""
        real, text = at_least_float(step.logits), at_least_float(step.others[0])
        rows = step.memory["rows"].to(real.device)[:, None, None]
        return torch.where(rows, contrasted(real, text, self.gamma, self.cutoff), real)
