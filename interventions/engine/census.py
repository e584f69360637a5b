"""Census: what the rows of a call gave to its columns and how far they looked, read in one chunked pass without the n x n matrix.

Everything kept is linear in the weights and per head, so that heads can be put into groups afterwards without a second pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..call import Call
from ..edits import Edit, PoolKV, Reorder
from ..errors import ReattendError
from ..families.calibration import weight_chunks
from .kernels import rows_per_chunk, statistics_dtype, visible_rows
from .reading import row_weights
from .statistics import Chunk


@dataclass
class Census:
    """Of one call, in statistics dtype. Rows of padding count nowhere; `rows` [B, Tq] are the rows that distances and bands are read from.

    sums, counts [B, H, Tk]: weight that a column got from all real rows, and the number of rows that see it. distance [B, H, Tq]:
    sum over columns s <= t of weight * (t - s). near [B, H, Tq]: the same with the distance capped at the window. ahead [B, H, Tk]:
    weight that a column got from the `rows` that lie within the horizon after it; ahead_rows [B, Tk]: how many these are.
    """

    sums: Tensor
    counts: Tensor
    distance: Tensor
    near: Tensor
    ahead: Tensor
    ahead_rows: Tensor
    rows: Tensor

    @property
    def means(self) -> Tensor:
        """[B, H, Tk]: mean weight over the rows that see the column; 0 where none does."""
        return self.sums / self.counts.clamp_min(1)

    @property
    def span(self) -> Tensor:
        """[B, H]: mean distance that the rows look back, in tokens."""
        return self.distance.sum(dim=2) / self.rows.sum(dim=1).clamp_min(1)[:, None]


def census(
    call: Call,
    edits: Sequence[Edit] = (),
    rows: Tensor | None = None,
    window: int = 10,
    horizon: tuple[int, int] = (10, 50),
) -> Census:
    """Reads the weights of a call after these edits, all heads.

    rows: bool [B, Tq], the rows that distances and bands are read from, by default all real ones. window: distances beyond it count as
    it in `near`. horizon: how far after a column, in tokens, first to last, a row counts in `ahead`. Raises ReattendError where an
    edit merges columns, or has an order per head, because their weights have no position any more.
    """
    if not keeps_positions(edits):
        raise ReattendError(
            "weights of columns that are merged, or that heads or rows put elsewhere, belong to no position: not counted"
        )
    dtype, device, batch = statistics_dtype(call.query), call.query.device, call.batch
    real = torch.ones(batch, call.num_queries, dtype=torch.bool, device=device)
    if call.tokens is not None:
        real = call.query_rows("prompt")
    chosen = real if rows is None else real & rows.to(device)
    heads, queries, keys = call.num_heads, call.num_queries, call.num_keys
    columns = torch.arange(keys, device=device)
    found = Census(
        *(torch.zeros(batch, heads, size, dtype=dtype, device=device) for size in (keys, keys, queries, queries, keys)),
        ahead_rows=torch.zeros(batch, keys, dtype=dtype, device=device),
        rows=chosen,
    )
    for start, weights, visible in _chunks(call, edits):
        size, seen = weights.shape[2:]
        part = slice(start, start + size)
        gap = (keys - queries + torch.arange(start, start + size, device=device)[:, None] - columns[:seen]).to(dtype)
        every, some = (x[:, part].to(dtype) for x in (real, chosen))
        found.sums[..., :seen] += torch.einsum("br,bhrk->bhk", every, weights)
        found.counts[..., :seen] += torch.einsum("br,bhrk->bhk", every, _shown(visible, every, size, seen))
        found.distance[:, :, part] = (weights * gap.clamp_min(0)).sum(dim=3)
        found.near[:, :, part] = (weights * gap.clamp(0, window)).sum(dim=3)
        inside = ((gap >= horizon[0]) & (gap <= horizon[1])).to(dtype)
        found.ahead[..., :seen] += torch.einsum("br,bhrk->bhk", some, weights * inside)
        found.ahead_rows[..., :seen] += some @ inside
    found.distance *= chosen[:, None]
    found.near *= chosen[:, None]
    if call.tokens is not None:
        padding = call.columns("padding")
        for values in (found.sums, found.counts, found.ahead):
            values.masked_fill_(padding[:, None], 0)
        found.ahead_rows.masked_fill_(padding, 0)
    return found


def keeps_positions(edits: Sequence[Edit]) -> bool:
    """Whether every column still stands for one token after these edits, the same for all rows and heads, so that `at_positions` can
    say which."""
    return not any(isinstance(edit, PoolKV) or (isinstance(edit, Reorder) and _is_partial(edit)) for edit in edits)


def _is_partial(edit: Reorder) -> bool:
    """Whether heads or rows have orders of their own."""
    return edit.heads is not None or edit.rows is not None or edit.order.shape[1] > 1


def at_positions(weights: Tensor, edits: Sequence[Edit], keys: int) -> Tensor:
    """Weights [B, ..., columns] after the edits as [B, ..., keys] in the order of the call's own columns, without appended ones."""
    weights = weights[..., :keys]
    for edit in reversed(edits):
        if isinstance(edit, Reorder):
            order = edit.order.to(weights.device).view(-1, *[1] * (weights.dim() - 2), keys)
            weights = torch.zeros_like(weights).scatter_add(-1, order.expand_as(weights), weights)
    return weights


def _shown(visible: Tensor | None, rows: Tensor, size: int, seen: int) -> Tensor:
    if visible is None:
        return rows.new_ones(rows.shape[0], 1, size, seen)
    return visible.to(rows.dtype).expand(rows.shape[0], -1, size, seen)


def _chunks(call: Call, edits: Sequence[Edit]) -> Iterator[Chunk]:
    """Weights in the order of the model's own columns, whatever the edits did to it; columns that they appended are left out."""
    if not edits:
        yield from weight_chunks(call, range(call.num_heads))
        return
    step = rows_per_chunk(call.batch, call.num_heads, call.num_keys, call.query.device)
    for start in range(0, call.num_queries, step):
        index = torch.arange(start, min(start + step, call.num_queries), device=call.query.device)
        weights = at_positions(row_weights(call, edits, index), edits, call.num_keys)
        yield Chunk(start, weights, visible_rows(call.mask, call.is_causal, index, call.num_queries, call.num_keys))
