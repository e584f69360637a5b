"""Roles of tokens, from what a forward pass was given: ids, padding mask, image grids, and the tokenizer's chat template."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..interventions import ReattendError, TokenMap


def build_roles(tokens: TokenMap, model: Any, ids: Tensor | None, mask: Any, given: dict[str, Any], sessions: list) -> None:
    """Fills tokens.roles and tokens.images. Raises ReattendError when a span that a session asked for is not in the prompt."""
    prompt = tokens.prompt_length
    padding = torch.zeros(tokens.batch, prompt, dtype=torch.bool)
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[0] == tokens.batch:
        padding = ~mask[:, :prompt].bool().cpu()
        if padding.shape[1] < prompt:
            padding = torch.nn.functional.pad(padding, (prompt - padding.shape[1], 0))
    tokens.roles["padding"] = padding
    # the first real token: models park attention there whether or not it is a BOS token
    real = ~padding
    tokens.roles["bos"] = real & (real.cumsum(dim=1) == 1)
    if ids is None:
        return
