"""What token-reweighting recipes share: biases on the prompt's columns, from token roles and factors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .call import Call, TokenMap
from .errors import ReattendError


def prompt_bias(
    call: Call,
    terms: Sequence[tuple[str, float]],
    *,
    free: Sequence[str] = (),
    rows_with: str | None = None,
    name: str = "prompt_bias",
) -> Tensor | None:
    """Bias [B, Tk] for `KeyBias`: each term (role, b) adds b to the prompt's columns of that role; generated columns keep 0.

    Weights of the role are thus multiplied by exp(b) against those of generated tokens. free: roles whose columns keep 0 in the
    end. rows_with: sequences without any token of this role get no bias at all. None where no column is biased, so that the call stays
    untouched. Made once per prompt and device (and cut or extended once per step), kept in call.memory under `name`.
    """
    tokens = call.tokens
    if tokens is None:
        call.columns("prompt")  # raises, and says where
        return None
    device = call.query.device
    store = call.memory.setdefault(name, {})
    made_for = (tokens.prompt_length, device)
    if made_for not in store:
        whole = over_prompt(tokens, terms, free, rows_with)
        store[made_for] = whole.to(device) if bool(whole.any()) else None
    whole = store[made_for]
    if whole is None:
        return None
    start, stop = call.key_start, call.key_start + call.num_keys
    step = store.get(device)
    if step is None or step[0] != (made_for, start, stop):
        piece = whole[:, start:stop]
        step = ((made_for, start, stop), torch.nn.functional.pad(piece, (0, call.num_keys - piece.shape[1])))
        store[device] = step
    bias = step[1]
    if bias.shape[0] != call.batch:
        where = call.site.name if call.site else "this call"
        raise ReattendError(f"{where} has a batch of {call.batch}, but the prompt was read with a batch of {bias.shape[0]}")
    return bias


def over_prompt(tokens: TokenMap, terms: Sequence[tuple[str, float]], free: Sequence[str], rows_with: str | None) -> Tensor:
    """The sum of the terms over the prompt's real columns: float32 [B, prompt_length] on the CPU."""
    length = tokens.prompt_length

    def columns(role: str) -> Tensor:
        return tokens.positions(role, 0, length)

    bias = torch.zeros(tokens.batch, length)
    for role, amount in terms:
        bias += amount * columns(role)
    bias *= columns("prompt")
    for role in free:
        bias *= ~columns(role)
    if rows_with is not None:
        bias *= columns(rows_with).any(dim=1, keepdim=True)
    return bias
