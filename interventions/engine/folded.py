"""Biases of low rank inside the fused kernel: more dimensions of q and k whose product is the bias, exactly, without a matrix of pairs."""

from __future__ import annotations

import copy
import dataclasses
import math

import torch
from torch import Tensor

from ..edits import LowRankBias, Operands
from ..edits.base import repeat_heads
from .kernels import statistics_dtype
from .tasks import Group

# Kernels take heads whose width is a multiple of this.
WIDTH = 8


def is_low_rank(group: Group) -> bool:
    """Whether the edits of scores are biases of low rank, and nothing else asks for q and k."""
    if group.few or not group.scores or group.call.softcap is not None or group.pending is not None:
        return False
    return all(isinstance(e, LowRankBias) for e in group.scores) and not any(e.reads_operands for e in group.weights)


def folded(group: Group) -> Group:
    """The same heads with the biases in their q and k, and without edits of outputs."""
    x, dim = group.x, group.x.query.shape[3]
    pairs = [_factors(edit, x, group.call.scaling) for edit in group.scores if isinstance(edit, LowRankBias)]
    left, right = (torch.cat(_alike(sides), dim=3) for sides in zip(*pairs))
    extra = -(dim + left.shape[3]) % WIDTH
    left, right = (torch.nn.functional.pad(side, (0, extra)) for side in (left, right))
    query = torch.cat([x.query, left], dim=3)
    key, value = x.key, torch.nn.functional.pad(x.value, (0, left.shape[3]))
    if right.shape[1] not in (1, key.shape[1]):
        key, value = repeat_heads(key, right.shape[1]), repeat_heads(value, right.shape[1])
    key = torch.cat([key, right.expand(key.shape[0], key.shape[1], -1, -1)], dim=3)
    inner = copy.copy(group)
    inner.x = dataclasses.replace(x, query=query, key=key, value=value)
    inner.scores, inner.outputs, inner.original = [], [], False
    inner.edits = [edit for edit in group.edits if not isinstance(edit, LowRankBias) and edit.level != "output"]
    return inner


def _alike(sides: tuple[Tensor, ...]) -> list[Tensor]:
    """The same with as many batch rows and heads each."""
    sizes = [max(size) for size in zip(*(side.shape[:2] for side in sides))]
    return [side.expand(*sizes, -1, -1) for side in sides]


def _factors(edit: LowRankBias, x: Operands, scale: float) -> tuple[Tensor, Tensor]:
    """(dimensions of q [B, H, Tq, s], of k [B or 1, H or 1, Tk, s]) whose products times the scale are the bias.

    Each side takes half of 1 / scale, so that half precision holds both; there each factor is two parts, of whose products only the
    smallest, 2^-16 of the bias (bfloat16), is left out.
    """
    exact, dtype = statistics_dtype(x.query), x.query.dtype
    half = 2.0 ** round(math.log2(1.0 / scale) / 2)
    left, right = edit.U.to(exact) * half, edit.V.to(exact) / (half * scale)
    if edit.rows is not None:
        left = left * edit.rows[:, None, :, None]
    left = left.expand(*x.query.shape[:3], -1)
    right = torch.nn.functional.pad(right, (0, 0, 0, x.appended))
    if dtype == exact:
        return left, right
    (high, low), (top, rest) = (_split(side, dtype) for side in (left, right))
    return torch.cat([high, high, low], dim=3), torch.cat([top, rest, top], dim=3)


def _split(side: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    high = side.to(dtype)
    return high, (side - high.to(side.dtype)).to(dtype)
