"""The same prompt with passages hidden or replaced: for methods that measure what a passage contributes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...interventions import ReattendError
from ..tokens.image_grids import runs
from .prompt import Prompt
from .text_only import PER_TOKEN, placeholders


def without_span(
    prompt: Prompt, span: Tensor, placeholder: Sequence[int] | None = None, hide: bool = True, official_mask: bool = False
) -> dict[str, Any]:
    """The arguments of a branch whose prompt lacks a token set, bool [B, T]: hidden from attention in its place.

    placeholder: token ids that take the place of each run of the set instead; they are hidden too unless hide is False, with
    official_mask while the prompt is read only. Raises ReattendError for embeddings with a placeholder, for spans that hold image
    tokens, and for rows of which nothing would be left.
    """
    ids = prompt.arguments.get("input_ids")
    width = prompt.tokens.prompt_length
    device = (ids if isinstance(ids, Tensor) else prompt.arguments["inputs_embeds"]).device
    real = prompt.tokens.positions("prompt", 0, width, device)
    span = span.to(device) & real
    empty = (real & ~span).sum(dim=1) == 0
    if bool(empty.any()):
        raise ReattendError(f"the passages are all of prompt {int(empty.nonzero()[0, 0])}: nothing is left to compare it with")
    if placeholder is None:
        return {**prompt.arguments, "attention_mask": (real & ~span).long()}
    if not isinstance(ids, Tensor):
        raise ReattendError("a placeholder takes the place of tokens: pass input_ids instead of embeds")
    if bool((placeholders(ids[:, :width], prompt.config)).any()):
        raise ReattendError(
            "a placeholder would move the images of a prompt: leave it out, then passages are hidden in their places"
        )
    rows = []
    for row in range(len(ids)):
        pieces, shown, at = [], [], 0
        for _, start, length in runs(span[row : row + 1].cpu()):
            pieces += [ids[row, at:start][real[row, at:start]], ids.new_tensor(list(placeholder))]
            shown += [
                torch.ones(len(pieces[-2]), device=device),
                torch.full((len(placeholder),), float(not hide), device=device),
            ]
            at = start + length
        pieces.append(ids[row, at:width][real[row, at:width]])
        shown.append(torch.ones(len(pieces[-1]), device=device))
        rows.append((torch.cat(pieces), torch.cat(shown).long()))
    longest = max(len(tokens) for tokens, _ in rows)
    pad = getattr(prompt.config.get_text_config(), "pad_token_id", None)
    made = ids.new_full((len(rows), longest), pad if isinstance(pad, int) and pad >= 0 else 0)
    mask, seen = made.new_zeros(made.shape), made.new_zeros(made.shape)
    for row, (tokens, visible) in enumerate(rows):
        made[row, longest - len(tokens) :] = tokens
        mask[row, longest - len(tokens) :] = 1
        seen[row, longest - len(tokens) :] = visible
    arguments: dict[str, Any] = {
        "input_ids": made, "attention_mask": seen, "position_ids": (mask.cumsum(dim=1) - 1).clamp_min(0),
    }  # fmt: skip
    if official_mask:
        arguments["later_attention_mask"] = mask
    for name in PER_TOKEN:
        if isinstance(prompt.arguments.get(name), Tensor):
            arguments[name] = torch.zeros_like(made)
    return arguments
