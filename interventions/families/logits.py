"""Formulas of decoding branches: the logits of a prompt against those of the same prompt without a part of it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# What the official code of SPA clips to: the change in its two forms, and the result.
PLAIN_CHANGE, MODULATED_CHANGE, LARGEST_LOGIT = 1000.0, 100.0, 1000.0
# A strength nearer than this to 1 or 0 counts as 1 or 0.
SAME_STRENGTH = 1e-4
LEAST_PROBABILITY = 1e-6


def at_least_float(logits: Tensor) -> Tensor:
    """Logits in float32, or in the better type that they have."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def anchored(full: Tensor, hidden: Tensor, strength: float, modulated: bool = False) -> Tensor:
    """SPA: hidden + strength * (full - hidden), the logits [..., V] with what a hidden passage contributes made larger.

    strength 1 returns `full`, 0 returns `hidden`. modulated (only beyond -1..1): each token's change is scaled by its probability over
    the largest one of its row. Changes and results are clipped as in the official code; tokens of logit -inf stay out.
    """
    if abs(strength - 1) < SAME_STRENGTH:
        return full
    if abs(strength) < SAME_STRENGTH:
        return hidden
    difference = torch.nan_to_num(full - hidden)
    if modulated and abs(strength) > 1:
        chance = full.softmax(dim=-1).clamp(LEAST_PROBABILITY, 1)
        share = chance / chance.amax(dim=-1, keepdim=True)
        change = ((strength - 1) * share * difference).clamp(-MODULATED_CHANGE, MODULATED_CHANGE)
    else:
        change = ((strength - 1) * difference).clamp(-PLAIN_CHANGE, PLAIN_CHANGE)
    result = (full + change).clamp(-LARGEST_LOGIT, LARGEST_LOGIT)
    return result.masked_fill(full == -math.inf, -math.inf)


def contrasted(given: Tensor, without: Tensor, gamma: float, cutoff: float = 0.1) -> Tensor:
    """PAI: u + gamma * (c - u) of the log-probabilities c with and u without a part of the input, from logits [..., V].

    Tokens less likely in c than `cutoff` times the likeliest one get -inf. gamma 1 returns c, without the cutoff.
    """
    c = given.log_softmax(dim=-1)
    if gamma == 1:
        return c
    u = without.log_softmax(dim=-1)
    out = gamma * (c - u) + u
    kept = c >= c.amax(dim=-1, keepdim=True) + math.log(cutoff)
    return out.masked_fill(~kept, -math.inf)
