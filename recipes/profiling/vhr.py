"""How far the heads' outputs move when the image is taken away, token by token of an answer (VHD and T-VHD of arXiv 2412.13949).

Answers that a model would have given without the image show small values. Both branches read the same answer in one pass each, which
gives what two caches advanced token by token would.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...hooks import Capture, Plan, Probe, SiteTable, attach, running
from ...hooks.prompts.text_only import PER_TOKEN, without_images
from ...hooks.sites.discovery import unwrapped_model
from ...interventions import Call, ReattendError, row_outputs
from ...interventions.families.heads import divergence


@dataclass
class VisionDivergence:
    """heads: {layer: float [B, steps, H]}, the distance of each head's outputs with and without the image when it chose answer[step].

    tokens [B, steps]: the sum over layers of the k largest of them (T-VHD).
    """

    heads: dict[int, Tensor]
    tokens: Tensor


def vision_divergence(model: Any, table: SiteTable, inputs: Mapping[str, Any], answer: Tensor, k: int = 4) -> VisionDivergence:
    """Reads both branches at the sites of `table`.

    inputs: what the processor made of the prompts, equal lengths or padded on the left. answer [B, steps]: token ids of what was
    answered. Cost: two passes. Raises ReattendError for other padding or while a session is active.
    """
    if running(model):
        raise ReattendError("the divergence is one of the plain model: end the session that is active on it first")
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        raise ReattendError("inputs must hold input_ids [batch, length], as a processor makes them")
    if answer.dim() != 2 or answer.shape[0] != ids.shape[0] or not answer.shape[1]:
        raise ReattendError(
            f"answer must be token ids [{ids.shape[0]}, steps] with at least one step, got {tuple(answer.shape)}"
        )
    if k < 1:
        raise ReattendError(f"k must be 1 or more, got {k}")
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and not bool(mask[:, -1].all()):
        raise ReattendError("inputs must be padded on the left, so that the answer follows each prompt")
    steps = answer.shape[1]
    read: dict[tuple[bool, int], Tensor] = {}

    def keep(with_image: bool) -> Any:
        def reader(call: Call, edits: object) -> None:
            assert call.site is not None and call.tokens is not None
            real = ~call.columns("padding")
            last = (real * torch.arange(1, call.total + 1, device=real.device)).argmax(dim=1)
            # the row of a token is the one before it, which chose it
            rows = last[:, None] - steps + torch.arange(steps, device=real.device)
            index, place = rows.unique(return_inverse=True)
            output = row_outputs(call, [], index).transpose(1, 2)  # [B, R, H, D]
            read[with_image, call.site.layer] = output[torch.arange(call.batch, device=real.device)[:, None], place]

        return reader

    root = unwrapped_model(model)
    plan = Plan("vision divergence", [Probe([Capture(table, keep(False))], without_images), Capture(table, keep(True))])
    with torch.no_grad(), attach(model, [plan]):
        root(**_answered(inputs, answer.to(ids.device), root))
    heads = {s.layer: divergence(read[True, s.layer].flatten(0, 1), read[False, s.layer].flatten(0, 1)) for s in table}
    heads = {layer: values.unflatten(0, (-1, steps)).cpu() for layer, values in heads.items()}
    tokens = sum(values.topk(min(k, values.shape[2]), dim=2).values.sum(dim=2) for values in heads.values())
    assert isinstance(tokens, Tensor)
    return VisionDivergence(heads, tokens)


def _answered(inputs: Mapping[str, Any], answer: Tensor, model: Any) -> dict[str, Any]:
    """The inputs with the answer after the prompt; numbers per token go on as `generate` lets them go on."""
    result = dict(inputs)
    result["input_ids"] = torch.cat([result["input_ids"], answer], dim=1)
    if isinstance(result.get("attention_mask"), Tensor):
        result["attention_mask"] = torch.cat([result["attention_mask"], torch.ones_like(answer)], dim=1)
    for name in PER_TOKEN:
        if isinstance(result.get(name), Tensor):
            # PaliGemma: a prompt sees all of itself (0), an answer what is before it (1); elsewhere 0 is text
            kind = int(name == "token_type_ids" and getattr(model.config, "model_type", "") == "paligemma")
            result[name] = torch.cat([result[name], torch.full_like(answer, kind).to(result[name].dtype)], dim=1)
    sees = result.get("cross_attention_mask")
    if isinstance(sees, Tensor):  # mllama: an answer sees the images that the last token of the prompt sees
        result["cross_attention_mask"] = torch.cat([sees, sees[:, -1:].expand(-1, answer.shape[1], -1, -1)], dim=1)
    return result
