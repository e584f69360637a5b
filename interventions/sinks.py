"""Attention sinks: tokens that draw attention without carrying content, how they are found, and how their weight is given back.

A sink's hidden state holds a huge value in a few fixed dimensions of the model (the first token's does too), so sinks are found
from the input of a layer, long before any attention is computed.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .edits import Rows
from .errors import ReattendError

# Room for this many further tokens is kept when column groups are widened for a growing cache.
SPARE_COLUMNS = 256


def sink_scores(hidden: Tensor, dims: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """|x| / rms(x) of hidden states [B, T, D], float32: [B, T, len(dims)], or all D where dims is None. At most sqrt(D)."""
    norm = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True, dtype=torch.float32)
    chosen = hidden if dims is None else hidden[..., dims]
    return chosen.abs().float() * torch.rsqrt(norm.square() / hidden.shape[-1] + eps)


def sink_tokens(hidden: Tensor, dims: Tensor, threshold: float) -> Tensor:
    """Bool [B, T]: tokens whose score in any of the dimensions exceeds the threshold."""
    return (sink_scores(hidden, dims) > threshold).any(dim=-1)


class VisualSinks:
    """The column groups of one layer that `give_back` needs, prepared once at prefill and read at every decode step.

    sinks, image: bool [B, T] over the prompt. Later columns (generated tokens) belong to no group.
    """

    def __init__(self, sinks: Tensor, image: Tensor) -> None:
        visual = sinks & image
        self.any = bool(visual.any())
        # float32 [B, 3, T]: visual sinks, other sinks, image tokens that are no sinks
        self.groups = torch.stack([visual, sinks & ~image, image & ~sinks], dim=1).float()
        # the share of visual sinks is taken of (mass + count * 1e-6), as in the official code
        self.floor = image.sum(dim=1).mul(1e-6)[:, None, None].float()
        self.has = visual.any(dim=1)[:, None, None]

    def columns(self, start: int, stop: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Groups [B, 3, stop - start] at absolute columns start..stop-1."""
        if stop > self.groups.shape[2]:
            self.groups = pad(self.groups, (0, stop + SPARE_COLUMNS - self.groups.shape[2]))
        return self.groups[:, :, start:stop].to(device, dtype)


def give_back(
    weights: Tensor, groups: Tensor, floor: Tensor, has: Tensor, *, move: float, most_sink: float, least_image: float
) -> Tensor:
    """VAR's redistribution (ICLR 2025): sinks give `move` of their weight to the image tokens that are no sinks, by what these have.

    weights [B, H, R, Tk]; groups [B, 3, Tk], floor and has [B, 1, 1] from `VisualSinks`. A row is changed if its image mass is at
    least `least_image` and at most `most_sink` of it lies on visual sinks; then its sum stays what it was. Rows without image weight
    beside the sinks, and samples without a visual sink, are left alone.
    """
    batch, heads, rows, keys = weights.shape
    flat = weights.reshape(batch, heads * rows, keys)
    visual, other, rest = (flat @ groups.transpose(1, 2)).split(1, dim=2)
    total = visual + rest
    chosen = (visual <= most_sink * (total + floor)) & (total >= least_image) & (rest > 0) & has
    taken = torch.where(chosen, move, 0.0).to(flat.dtype)
    given = taken * (visual + other) / rest.clamp_min(torch.finfo(flat.dtype).tiny)
    change = torch.cat([-taken, -taken, given], dim=2)
    return (flat + flat * (change @ groups)).reshape(weights.shape)


def redistribution(sinks: VisualSinks, key_start: int, *, move: float, most_sink: float, least_image: float):
    """`give_back` as the function of a `WeightMap`; key_start: absolute position of key column 0."""

    def function(weights: Tensor, rows: Rows) -> Tensor:
        if rows.offset is None:
            raise ReattendError("weight cannot be moved between image tokens whose columns another edit has merged")
        groups = sinks.columns(key_start, key_start + weights.shape[3], weights.dtype, weights.device)
        return give_back(weights, groups, sinks.floor, sinks.has, move=move, most_sink=most_sink, least_image=least_image)

    return function
