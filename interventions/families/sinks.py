"""Attention sinks: tokens that draw attention without carrying content, how they are found, and how their weight is given back.

A sink's hidden state holds a huge value in a few fixed dimensions of the model (the first token's does too), so sinks are found
from the input of a layer, long before any attention is computed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..call import Call, TokenMap
from ..edits import Rows, WeightEdit, WeightMap
from ..errors import ReattendError

# Room for this many further tokens is kept when column groups are widened for a growing cache.
SPARE_COLUMNS = 256

T = TypeVar("T")


def sink_scores(hidden: Tensor, dims: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """|x| / rms(x) of hidden states [B, T, D], float32 at least: [B, T, len(dims)], or all D where dims is None. At most sqrt(D)."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    norm = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True, dtype=dtype)
    chosen = hidden if dims is None else hidden[..., dims]
    return chosen.abs().to(dtype) * torch.rsqrt(norm.square() / hidden.shape[-1] + eps)


def sink_tokens(hidden: Tensor, dims: Tensor, threshold: float) -> Tensor:
    """Bool [B, T]: tokens whose score in any of the dimensions exceeds the threshold."""
    return (sink_scores(hidden, dims) > threshold).any(dim=-1)


def _end(image: Tensor) -> int:
    """The position after the last image token of any sample, from bool [B, T] on the CPU."""
    return int(image.any(dim=0).nonzero()[-1]) + 1


class VisualSinks:
    """Which prompt tokens are sinks at one layer, as the column groups that `give_back` needs: learned at prefill, read at decode.

    any: whether some sample has a sink on an image. on_first: whether some sample's first token is one, as it should be. end: the
    position after the last image token.
    """

    def __init__(self, sinks: Tensor, tokens: TokenMap) -> None:
        self.sinks = sinks
        prompt, device = sinks.shape[1], sinks.device
        image = tokens.positions("image", 0, prompt, device) if "image" in tokens else torch.zeros_like(sinks)
        visual = sinks & image
        first = sinks & tokens.positions("bos", 0, prompt, device)
        self.any, self.on_first = torch.stack([visual.any(), first.any()]).tolist()
        # float32 [B, 4, T]: all sinks, image tokens that are none, visual sinks, the image; generated tokens are in no group
        self.groups = torch.stack([sinks, image & ~sinks, visual, image], dim=1).float()
        # the share of visual sinks is taken of (mass + count * 1e-6), as in the official code; nothing is below -inf
        floor = image.sum(dim=1).mul(1e-6).masked_fill(~visual.any(dim=1), float("-inf"))
        self.floor = floor[:, None, None]
        self.end = _end(tokens.positions("image", 0, prompt)) if self.any else 0
        self.known: dict[Hashable, Any] = {}

    def crop(self, length: int) -> VisualSinks:
        """The same for the first `length` tokens."""
        other = copy.copy(self)
        other.sinks, other.groups, other.known = self.sinks[:, :length], self.groups[:, :, :length], {}
        visual, image = other.groups[:, 2].bool().any(dim=1), other.groups[:, 3]
        other.any = bool(visual.any())
        other.floor = image.sum(dim=1).mul(1e-6).masked_fill(~visual, float("-inf"))[:, None, None]
        other.end = int(image.any(dim=0).nonzero()[-1]) + 1 if other.any else 0
        return other

    @classmethod
    def learn(cls, known: VisualSinks | None, hidden: Tensor, tokens: TokenMap, dims: Tensor, tau: float) -> VisualSinks:
        """From hidden states [B, T, D] entering the layer at prefill; `known` is what earlier chunks or turns of the prompt gave."""
        start = tokens.length - hidden.shape[1]
        stop = max(start, tokens.prompt_length)
        sinks = sink_tokens(hidden[:, : stop - start], dims, tau)
        sinks &= ~tokens.positions("padding", start, stop, hidden.device)
        if known is not None and start:
            before = known.sinks[:, :start]
            sinks = torch.cat([pad(before, (0, start - before.shape[1])), sinks], dim=1)
        return cls(pad(sinks, (stop - sinks.shape[1], 0)), tokens)

    def columns(self, start: int, stop: int) -> Tensor:
        """Groups [B, 4, stop - start] of the absolute columns start..stop-1."""
        if stop > self.groups.shape[2]:
            self.groups = pad(self.groups, (0, stop + SPARE_COLUMNS - self.groups.shape[2]))
        return self.groups[:, :, start:stop]

    def limit(self, rho: float, like: Tensor) -> Tensor:
        """rho times the floor [B, 1, 1]."""
        return self.remember(("limit", rho, like.dtype, like.device), lambda: rho * self.floor.to(like))

    def remember(self, key: Hashable, make: Callable[[], T]) -> T:
        """make(), once for all steps of an answer."""
        if key not in self.known:
            self.known[key] = make()
        return self.known[key]


@dataclass(frozen=True, eq=False, kw_only=True)
class SoundMap(WeightMap):
    """A `WeightMap` whose function cannot make a row negative or infinite, so that no row is looked at twice (it shows at decode)."""

    def on_weights(self, weights: Tensor, rows: Rows) -> Tensor:
        return self.function(weights, rows)


@dataclass(frozen=True, eq=False, kw_only=True)
class GiveBack(WeightEdit):
    """`give_back` on the rows of a call whose key column 0 lies at the absolute position key_start."""

    found: VisualSinks
    key_start: int
    move: float
    rho: float
    summ: float
    splits_batch = False  # what was found is of the whole batch

    @property
    def is_identity(self) -> bool:
        return super().is_identity or self.move == 0

    def on_weights(self, weights: Tensor, rows: Rows) -> Tensor:
        if rows.offset is None:
            raise ReattendError("weight cannot be moved between image tokens whose columns another edit has merged")
        groups = self.found.columns(self.key_start, self.key_start + weights.shape[3])
        if groups.dtype != weights.dtype or groups.device != weights.device:
            groups = groups.to(weights)
        return give_back(weights, groups, self.found.limit(self.rho, weights), move=self.move, rho=self.rho, summ=self.summ)


def rows_after(call: Call, role: str) -> Tensor:
    """Bool [B, Tq] on the CPU: query rows after the last token of a role, in samples that have such tokens; padding is left out."""
    tokens = call.tokens
    assert tokens is not None
    marked = tokens.positions(role, 0, call.total)
    after = marked.flip(1).cumsum(dim=1).flip(1) == 0
    after &= marked.any(dim=1, keepdim=True)
    return (after & ~tokens.positions("padding", 0, call.total))[:, call.total - call.num_queries :]


def give_back(weights: Tensor, groups: Tensor, limit: Tensor, *, move: float, rho: float, summ: float) -> Tensor:
    """VAR's redistribution (ICLR 2025): sinks give `move` of their weight to the image tokens that are no sinks, by what these have.

    weights [B, H, R, Tk]; groups [B, 4, Tk] and limit [B, 1, 1] from `VisualSinks`. A row is changed if its image mass is at least
    `summ` and at most `rho` of that lies on visual sinks; its sum stays what it was. Rows without image weight beside the sinks, and
    samples without a visual sink, are left alone. Few operations on purpose: at decode their number is the cost.
    """
    batch, heads, rows, keys = weights.shape
    flat = weights.reshape(batch, heads * rows, keys)
    sinks, rest, visual, image = (flat @ groups.transpose(1, 2)).split(1, dim=2)
    chosen = (torch.sub(visual, image, alpha=rho) <= limit) & (image >= summ) & (rest > 0)
    taken = move * chosen
    given = taken * sinks / rest.clamp_min(torch.finfo(flat.dtype).tiny)
    change = torch.cat([-taken, given], dim=2) @ groups[:, :2]
    return torch.addcmul(flat, flat, change).view(weights.shape)
