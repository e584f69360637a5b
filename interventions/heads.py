"""Heads: where each head of a call looks, and how much of a planted phrase a head copied while it was being generated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .call import Call
from .errors import ReattendError
from .kernels import score_rows


@dataclass
class Glance:
    """Where the last query row of one call looks. strongest [B, H] long: position of its heaviest key; first [B] long: of the first
    key that it can see (above 0 with padding or a sliding window). Positions are absolute, padding included."""

    strongest: Tensor
    first: Tensor


def glance(call: Call) -> Glance:
    """The heaviest key of each head for the last row. The largest score is the largest weight, so no softmax is taken."""
    mask = call.mask if call.mask is None or call.mask.shape[2] == 1 else call.mask[:, :, -1:]
    index = torch.zeros(1, dtype=torch.long, device=call.query.device)
    scores, visible = score_rows(call.query[:, :, -1:], call.key, mask, False, call.scaling, call.softcap, index)
    start = call.key_start
    first = torch.full((call.batch,), start, device=call.query.device)
    if visible is not None:
        first = first + visible[:, 0, 0].expand(call.batch, -1).to(torch.uint8).argmax(dim=1)
    return Glance(scores[:, :, 0].argmax(dim=2) + start, first)


def copy_score(strongest: Tensor, generated: Tensor, prompt: Tensor, span: tuple[int, int], once: bool = False) -> Tensor:
    """Float64 [...]: the share of a phrase that each head copied.

    strongest [steps, ...] long: the position of each head's heaviest key when it chose generated[step]. prompt [n]: token ids.
    span: the phrase's positions [start, stop). A step counts if that position lies in the span and holds the generated token. Steps add
    up, so repeats can push the sum over 1; once: each position of the phrase counts a single time.
    """
    start, stop = span
    if not 0 <= start < stop <= prompt.numel():
        raise ReattendError(f"span must lie in the prompt's {prompt.numel()} tokens and not be empty, got {span}")
    steps = generated.shape[0]
    inside = (strongest >= start) & (strongest < stop)
    tokens = prompt[strongest.clamp(0, prompt.numel() - 1)]
    copied = inside & (tokens == generated.view(steps, *[1] * (strongest.dim() - 1)))
    if not once:
        return copied.sum(dim=0).double() / (stop - start)
    found = torch.zeros(stop - start, *strongest.shape[1:], dtype=torch.bool, device=strongest.device)
    place = (strongest - start).clamp(0, stop - start - 1)
    for step in range(steps):
        found |= torch.zeros_like(found).scatter_(0, place[step][None], copied[step][None])
    return found.sum(dim=0).double() / (stop - start)


def find_phrase(prompt: Sequence[int], phrase: Sequence[int], exact_first: bool = True) -> tuple[int, int] | None:
    """[start, stop) of a phrase's tokens in a prompt, or None. exact_first: an exact match wins.

    Without one (a phrase is often tokenised differently inside a text) it is the first window of the phrase's length that shares
    over 90 % of the phrase's distinct tokens. That window, which the official code always takes, can start a token early.
    """
    prompt, phrase = list(prompt), list(phrase)
    width, wanted = len(phrase), set(phrase)
    windows = range(len(prompt) - width + 1) if width else range(0)
    if exact_first:
        for start in windows:
            if prompt[start : start + width] == phrase:
                return start, start + width
    for start in windows:
        if len(wanted & set(prompt[start : start + width])) / len(wanted) > 0.9:
            return start, start + width
    return None
