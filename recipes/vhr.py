"""Vision-aware head reinforcement (VHR, He et al. 2025, "Cracking the Code of Hallucination in LVLMs", ACL 2025, arXiv 2412.13949).

Fixes: vision-language models hallucinate where they would have said the same without the image. VHR measures for every head how far
its output moves when the image is taken away, and strengthens the half of the heads that moves most, so that they count for more
against what the language model expects.
Acts on: the outputs of these heads before the output projection, at every position of the prompt and of the answer. They are chosen
per sample at prefill: a further pass over the prompt's text alone gives the outputs without the image; then layer by layer the real
pass compares its own last prompt token, which earlier layers have strengthened already, and multiplies what it has chosen.
Conventions: layers and heads count from 0, heads are query heads. The default layers are the paper's for 32-layer models, carried over
to other depths: layer 1 and the last 14. The paper's TA is read as the length of the text-only output (`ta_squared`: its square), the
standard deviation as the unbiased one, the median as the lower one, and the text-only pass as not strengthened.
Ours: batches, with samples without an image left alone; models with cross-attention to the image (mllama), whose self-attention heads
are compared. The image's wrapper tokens are taken out with it where the family is known to write them. Not here: a prompt that comes
in pieces (chunked prefill, or an image in a later turn after a cache), because its first tokens would be cached unstrengthened.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field, model_validator

from ..hooks import Capture, Edits, Probe, Prompt, SiteTable, sites
from ..hooks.plan import Step
from ..hooks.prompts.text_only import NEVER_WITHOUT, placeholders, without_images
from ..interventions import Call, Edit, HeadGain, ReattendError, require_whole
from ..interventions.edits.row_values import values_of
from ..interventions.families.heads import last_prompt_outputs, vision_aware_heads
from .kit.base import Info, Recipe
from .kit.heads import Heads, by_layer, missing_heads

if TYPE_CHECKING:
    from .profiling.vhr import VisionDivergence

FIRST, LAST = 1, 14


class VHR(Recipe):
    slug = "vhr"
    info = Info(
        does="Strengthens the heads whose output depends on the image most, chosen anew for every image and question.",
        paper="Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence",
        year=2025,
        arxiv="2412.13949",
        families=("heads",),
        kinds=("lvlm",),
        cost="forward",
        problems=("the model describes what is not there",),
        try_first={"alpha": 2.0},
        sweep={"alpha": (1.5, 2.0, 3.0)},
        code="jinghan1he/VHR",
    )

    alpha: float = Field(
        2.0,
        ge=0,
        le=10,
        description="factor on the chosen heads' outputs; 1 changes nothing, 2 or 3 are good, from 4 on text breaks",
    )
    layers: tuple[int, ...] | None = Field(
        None, description="layers in which heads are chosen, from 0; None = layer 1 and the last 14, as published for 32 layers"
    )
    remove_outliers: bool = Field(
        True, description="pass over heads that merely surge when the image is missing, instead of seeing something in it"
    )
    ta_squared: bool = Field(
        False, description="judge that surge by the squared length of the text-only output instead of its length"
    )
    heads: Heads = Field(
        None,
        description="for research: strengthen these heads of every sample, [[layer, head], ...] or {layer: [heads]}, without measuring",
    )

    @model_validator(mode="after")
    def _consistent(self) -> VHR:
        if self.heads is not None and self.layers is not None:
            raise ValueError("heads names the layers itself: give heads or layers, not both")
        if self.layers is not None and not self.layers:
            raise ValueError("layers must name at least one layer")
        if self.heads is not None and not self.heads:
            raise ValueError("heads must name at least one head")
        return self

    # -- what it fits ------------------------------------------------------------------------------------------------

    def misfit(self, sites: SiteTable) -> str:
        config, name = sites.config, sites.model_name
        if not isinstance(getattr(config, "image_token_id", None), int):
            return f"vhr compares answers with and without an image, and {name} takes none (its config has no image_token_id)"
        if getattr(config, "model_type", "") in NEVER_WITHOUT:
            return f"{name} cannot be run without an image, so what its heads do without one is not known"
        if getattr(config, "is_encoder_decoder", False):
            return f"{name} reads the image in an encoder, not in the sequence whose heads vhr compares"
        decoder = sites.stack("decoder").kind("self")
        if not len(decoder):
            return f"{name} has no decoder self-attention"
        if self.heads is not None:
            reason = missing_heads(self.heads, decoder)
            if reason:
                return reason
        there = sorted(s.layer for s in decoder)
        for layer in self.layers or ():
            if layer not in there:
                return f"layers names {layer}, but the self-attention layers of {name} are {there[0]} to {there[-1]}" + (
                    "" if len(there) == there[-1] - there[0] + 1 else f" without {sorted(set(range(there[-1])) - set(there))}"
                )
        return self.chosen(sites).refusal

    def chosen(self, table: SiteTable) -> SiteTable:
        """The self-attention sites that are strengthened."""
        decoder = table.stack("decoder").kind("self")
        if self.heads is not None:
            return decoder.only([layer for layer, _ in self.heads])
        if self.layers is not None:
            return decoder.only(self.layers)
        depth = 1 + max(s.layer for s in table.stack("decoder"))
        return decoder.where(lambda s: s.layer == FIRST or s.layer >= depth - LAST)

    # -- what it does ------------------------------------------------------------------------------------------------

    def plan(self, sites: SiteTable) -> list[Step]:
        chosen = self.chosen(sites)
        return [Probe([Capture(chosen, self.remember)], self.prepare), Edits(chosen, self.reinforce)]

    def prepare(self, prompt: Prompt) -> dict[str, Any] | None:
        """The text-only pass of a prompt; None where no row has an image or nothing has to be measured."""
        if self.alpha == 1:
            return None
        ids = prompt.arguments.get("input_ids")
        if ids is None:
            raise ReattendError("vhr cannot tell which tokens of inputs_embeds are images: pass input_ids instead")
        rows = placeholders(ids, prompt.config).any(dim=1)
        prompt.memory["rows"] = rows
        if self.heads is not None or not bool(values_of(rows).any()):
            return None
        return without_images(prompt)

    @staticmethod
    def remember(call: Call, edits: object) -> None:
        """B: what each head hands on at the last token of the prompt without its image."""
        assert call.site is not None
        call.memory["text only", call.site.name] = last_prompt_outputs(call)

    def reinforce(self, call: Call) -> HeadGain | None:
        """O_h *= alpha for the chosen heads h: at prefill they are chosen, afterwards they stay."""
        assert call.site is not None
        if self.alpha == 1:
            return None
        name = call.site.name
        if call.num_queries < call.total or call.clock.phase == "decode":
            self._check_goes_on(call)
            return call.memory.get(name)
        rows: torch.Tensor | None = call.memory.get("rows")
        if rows is None or not bool(values_of(rows).any()):
            return None
        if self.heads is not None:
            heads = torch.zeros(call.num_heads, dtype=torch.bool, device=rows.device)
            heads[by_layer(self.heads)[call.site.layer]] = True
        else:
            with torch.no_grad():
                text = call.memory.pop(("text only", name))
                image = last_prompt_outputs(call, _known_edits(call))
                heads = vision_aware_heads(image, text, self.remove_outliers, self.ta_squared)
        strengthened = heads & rows.to(heads.device)[:, None]
        # an accelerator is not asked: factors of 1 change nothing
        if strengthened.device.type == "cpu" and not bool(strengthened.any()):
            return None
        gain = HeadGain(factor=torch.where(strengthened, self.alpha, 1.0))
        call.memory[name] = gain
        return gain

    def _check_goes_on(self, call: Call) -> None:
        """Raises ReattendError for a prompt that comes in pieces: its first tokens were cached with other heads, or with none."""
        memory = call.memory
        if memory.get("rows") is None and call.tokens is not None and ("image" in call.tokens or call.tokens.unread):
            require_whole(memory, self.slug)
        if call.clock.phase == "decode":
            memory["answering"] = True
            return
        rows = memory.get("rows")
        seen = rows is not None and bool(rows.any())
        if seen and not memory.get("answering"):
            raise ReattendError(
                "vhr chooses heads from the last token of the whole prompt, but this prompt comes in pieces: pass it at once "
                "(prefill_chunk_size=None, and no cache of its first tokens)"
            )
        start = call.total - call.num_queries
        image = None if call.tokens is None else call.tokens.roles.get("image")
        new = None if image is None else image[:, start:].any(dim=1)
        if new is not None and bool((new if rows is None else new.to(rows.device) & ~rows).any()):
            raise ReattendError(
                "vhr found an image after tokens that a cache already holds without reinforcement: pass the whole conversation "
                "without its cache"
            )

    # -- what can be measured with it --------------------------------------------------------------------------------

    @classmethod
    def measure(cls, model: Any, inputs: Mapping[str, Any], answer: torch.Tensor, *, k: int = 4) -> VisionDivergence:
        """How much each token of an answer [B, steps] owes to the image: VHD per head and T-VHD per token, over all layers.

        inputs: what the processor made of the prompts, padded on the left. k: heads per layer that count for T-VHD. Cost: two passes.
        """
        from .profiling.vhr import vision_divergence

        table = sites(model)
        if reason := cls.model_construct().misfit(table):
            raise ReattendError(f"vhr cannot measure this model: {reason}")
        return vision_divergence(model, table.stack("decoder").kind("self"), inputs, answer, k)


def _known_edits(call: Call) -> list[Edit]:
    """What the recipes before this one do to the call: the heads are judged by what they hand on with it."""
    return [edit for edit in call.edits if not edit.is_identity]
