"""What the columns of a call get from its rows, and how many rows see them, without the matrix: one kernel, or chunks of rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .kernels import chunk_values, is_accelerator, score_rows, statistics_dtype
from .op import DTYPES, LARGEST_HEAD, has_triton

# Weights of one chunk on a CPU: 256 Ki float32 = 1 MiB, so that score, exp and sum of a chunk run in the processor's own cache.
CHUNK_WEIGHTS = 1 << 18


class Chunk(NamedTuple):
    """Some query rows of a call. weights [B, heads, R, seen]: of the rows start..start + R - 1 on the first `seen` columns, beyond
    which they see nothing. visible: bool, broadcastable to it; None where all is visible."""

    start: int
    weights: Tensor
    visible: Tensor | None


def chunks(
    query: Tensor, key: Tensor, lse: Tensor, mask: Tensor | None, is_causal: bool, scale: float, softcap: float | None
) -> Iterator[Chunk]:
    """The weights of a call with this log-sum-exp [B, H, Tq], some rows at a time."""
    lse = lse.to(statistics_dtype(query)).masked_fill(lse == float("-inf"), 0.0)
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    most = chunk_values(query.device) if is_accelerator(query.device) else CHUNK_WEIGHTS
    step = max(16, most // (batch * heads * keys))
    for start in range(0, queries, step):
        stop = min(start + step, queries)
        seen = keys - queries + stop if is_causal else keys
        index = torch.arange(stop - start, device=query.device)
        part = None if mask is None else mask if mask.shape[2] == 1 else mask[:, :, start:stop]
        part = None if part is None else part[..., :seen]
        # cut to these rows and to the keys up to the last of them, a causal chunk is a causal call of its own
        scores, visible = score_rows(query[:, :, start:stop], key[:, :, :seen], part, is_causal, scale, softcap, index)
        yield Chunk(start, scores.sub_(lse[:, :, start:stop, None]).exp_(), visible)


@torch.library.custom_op("reattend::column_statistics", mutates_args=())
def column_statistics(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    softcap: float | None,
    rows: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(sums [B, H, Tk] of each column's weights over the chosen rows, counts [B, 1 or H, Tk] of those rows that see it), statistics dtype.

    query [B, H, Tq, D], key [B, Hkv, Tk, D], mask, is_causal and softcap as in `Call`, lse [B, H, Tq] its log-sum-exp. rows: bool
    [B or 1, Tq], None = all.
    """
    sums, counts = _empty(query, key, mask)
    if query.dtype in DTYPES and query.shape[3] <= LARGEST_HEAD and has_triton(query.device):
        from .triton.statistics import sum_columns

        with torch.cuda.device_of(query):
            sum_columns(query, key, lse, mask, is_causal, scale, softcap, rows, sums, counts)
        return sums, counts
    sums.zero_()
    counts.zero_()
    for start, weights, visible in chunks(query, key, lse, mask, is_causal, scale, softcap):
        size, seen = weights.shape[2:]
        chosen = torch.ones(query.shape[0], size, dtype=sums.dtype, device=sums.device)
        chosen = chosen if rows is None else chosen * rows[:, start : start + size]
        sums[..., :seen] += (chosen[:, None, None] @ weights)[:, :, 0]
        if visible is None:
            counts += chosen.sum(dim=1)[:, None, None]
        else:
            shown = visible.to(sums.dtype).expand(query.shape[0], -1, size, seen)
            counts[..., :seen] += (chosen[:, None, None] @ shown)[:, :, 0]
    return sums, counts


@column_statistics.register_fake
def _(query, key, lse, mask, *rest, **named):
    return _empty(query, key, mask)


def _empty(query: Tensor, key: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    heads = 1 if mask is None or mask.shape[1] == 1 else query.shape[1]
    dtype, shape = statistics_dtype(query), (query.shape[0], query.shape[1], key.shape[2])
    return query.new_empty(shape, dtype=dtype), query.new_empty(shape[0], heads, shape[2], dtype=dtype)
