"""Key biases inside the fused kernel: an additive row where rows are few, more dimensions of q and k where they are many."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..edits import Operands, ScoreEdit
from ..edits.base import repeat_heads
from .kernels import attend, is_accelerator, rows_per_chunk, statistics_dtype, visible_rows

# Dimensions that a fold adds to each head: as few as kernels take at a time.
EXTRA = 8
# The widest head that fused kernels of accelerators take.
WIDEST = 256


def sum_biases(biases: Sequence[ScoreEdit], x: Operands) -> Tensor | None:
    """What these edits add to each key, as one [B or 1, heads or 1, Tk] in statistics dtype; None without any."""
    total = None
    for edit in biases:
        assert edit.per_key is not None
        own = edit.per_key.to(statistics_dtype(x.query))
        total = own if total is None else total + own
    if total is None:
        return None
    return torch.nn.functional.pad(total, (0, x.appended)) if x.appended else total


def folds(query: Tensor) -> bool:
    """Whether key biases of many rows go into more dimensions of q and k.

    On an accelerator only where its fused kernels still take the wider heads. One that has a kernel for the columns themselves does
    better with that where few of them are biased, because the wider heads are slower in all rows.
    """
    return not is_accelerator(query.device) or query.shape[-1] + EXTRA <= WIDEST


def mask_of_rows(x: Operands, bias: Tensor | None, index: Tensor) -> Tensor | None:
    """What the query rows `index` [R] see, and key biases [B or 1, H or 1, Tk], as one mask [B or 1, H or 1, R or 1, Tk]: bool where
    nothing is added, else in the query's dtype."""
    visible = visible_rows(x.mask, x.is_causal, index, x.query.shape[2], x.key.shape[2])
    added = None if bias is None else bias[:, :, None]
    if x.mask is not None and x.mask.dtype != torch.bool:
        own = (x.mask if x.mask.shape[2] == 1 else x.mask[:, :, index]).float()
        added = own if added is None else added + own
    if added is None:
        return visible
    return (added if visible is None else added.masked_fill(~visible, float("-inf"))).to(x.query.dtype)


def attend_biased(
    x: Operands, bias: Tensor, few: bool, scale: float, softcap: float | None, sinks: Tensor | None, need_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """`attend` with key biases [B or 1, heads or 1, Tk]."""
    if few or softcap is not None or x.query.shape[-1] != x.value.shape[-1]:
        mask = x.dense_mask()
        row = bias[:, :, None, :]
        if mask is None:
            mask = row
        elif mask.dtype == torch.bool:
            mask = row.masked_fill(~mask, float("-inf"))
        else:
            mask = row + mask.to(row.dtype)
        mask = mask.to(x.query.dtype if softcap is None else row.dtype)
        return attend(x.query, x.key, x.value, mask, False, scale, softcap, sinks, need_lse)
    if not folds(x.query):
        return _in_pieces(x, bias, scale, sinks, need_lse)
    query, key, value = with_bias_dimensions(x.query, x.key, x.value, bias, scale)
    output, lse = attend(query, key, value, x.mask, x.is_causal, scale, None, sinks, need_lse)
    return output[..., : x.value.shape[3]], lse


def _in_pieces(x: Operands, bias: Tensor, scale: float, sinks: Tensor | None, need_lse: bool) -> tuple[Tensor, Tensor | None]:
    """Heads that are too wide for a fold: additive masks of some rows at a time, so that none of all pairs is held."""
    rows, keys, device = x.query.shape[2], x.key.shape[2], x.query.device
    sizes = bias.shape[:2] if x.mask is None else torch.broadcast_shapes(bias.shape[:2], x.mask.shape[:2])
    outputs, statistics = [], []
    for index in torch.arange(rows, device=device).split(rows_per_chunk(sizes[0], sizes[1], keys, device)):
        query = x.query if index.numel() == rows else x.query[:, :, index]
        mask = mask_of_rows(x, bias, index)
        output, lse = attend(query, x.key, x.value, mask, False, scale, None, sinks, need_lse, piece=query is not x.query)
        outputs.append(output)
        statistics.append(lse)
    return torch.cat(outputs, dim=2), torch.cat(statistics, dim=2) if need_lse else None


def with_bias_dimensions(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v with `EXTRA` more dimensions whose product adds bias [B or 1, H or 1, Tk] to the scores; v is padded with zeros.

    The constant on q's side is a power of two and the bias is split into three parts of the working dtype, so that half precision
    loses nothing of it.
    """
    batch, heads, rows, _ = query.shape
    keys = key.shape[2]
    constant = 2.0 ** round(math.log2(1.0 / scale))
    exact = statistics_dtype(query)
    rest = bias.to(exact) / (scale * constant)
    parts = []
    for _ in range(3):
        part = rest.to(query.dtype)
        parts.append(part)
        rest = rest - part.to(exact)
    extra_key = torch.zeros(*rest.shape, EXTRA, dtype=key.dtype, device=key.device)
    for i, part in enumerate(parts):
        extra_key[..., i] = part
    if rest.shape[1] > 1 and key.shape[1] != heads:
        key, value = repeat_heads(key, heads), repeat_heads(value, heads)
    extra_query = torch.zeros(EXTRA, dtype=query.dtype, device=query.device)
    extra_query[:3] = constant
    query = torch.cat([query, extra_query.expand(batch, heads, rows, EXTRA)], dim=3)
    key = torch.cat([key, extra_key.expand(batch, key.shape[1], keys, EXTRA)], dim=3)
    return query, key, torch.nn.functional.pad(value, (0, EXTRA))
