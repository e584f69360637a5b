"""Sums of edited attention weights without the matrix: rows are read in chunks, and where a gradient is wanted each chunk is computed once
more on the way back instead of being kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from ..call import Call
from ..edits import Edit, Operands
from ..errors import ReattendError
from .kernels import grouped_matmul, grouped_values, needs_gradient, rows_per_chunk
from .op import has_triton
from .reading import by_heads, row_weights, untouched_heads
from .reference_executor import check_edits
from .statistics import column_statistics
from .tasks import Group


def _chunks(call: Call, edits: Sequence[Edit], rows: Tensor | None, read: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
    """What `read(weights [B, H, R, Tk], index [R])` gives for the chunks of the query rows `rows` (None = all)."""
    device = call.query.device
    index = torch.arange(call.num_queries, device=device) if rows is None else rows.to(device)
    parts = index.split(rows_per_chunk(call.batch, call.num_heads, call.num_keys, device)) if index.numel() else (index,)
    if len(parts) == 1 or not torch.is_grad_enabled():
        return [read(row_weights(call, edits, part), part) for part in parts]

    def again(part: Tensor) -> Tensor:
        return read(row_weights(call, edits, part), part)

    return [checkpoint(again, part, use_reentrant=False, preserve_rng_state=False) for part in parts]  # type: ignore[misc]


def column_weights(call: Call, edits: Sequence[Edit], columns: Tensor, rows: Tensor | None = None) -> Tensor:
    """Weights [B, H, R, m] of the columns `columns`, of the query rows `rows` [R], None = all.

    columns: numbers [m] or [B, m], or bool [Tk] or [B, Tk] with as many columns in every row. Raises ReattendError for others.
    """
    columns = _numbered(columns)

    def read(weights: Tensor, part: Tensor) -> Tensor:
        if columns.dim() == 1:
            return weights[..., columns.to(weights.device)]
        index = columns.to(weights.device)[:, None, None].expand(*weights.shape[:3], -1)
        return weights.gather(3, index)

    return torch.cat(_chunks(call, edits, rows, read), dim=2)


def _numbered(columns: Tensor) -> Tensor:
    """Column numbers [m] or [B, m] of a column set."""
    if columns.dtype != torch.bool:
        return columns.long()
    counts = columns.sum(dim=-1)
    if columns.dim() > 2 or bool((counts != counts.flatten()[0]).any()):
        raise ReattendError(
            f"columns must be numbers, or bool [keys] or [batch, keys] with as many in every row; got {list(columns.shape)} with "
            f"{counts.flatten().tolist()}: read rows with other numbers of columns by `row_weights`"
        )
    index = columns.nonzero()[:, -1]
    return index if columns.dim() == 1 else index.view(len(columns), -1)


def column_sums(call: Call, edits: Sequence[Edit], rows: Tensor | None = None) -> Tensor:
    """[B, H, Tk]: the weights of every column, summed over the query rows `rows` [R], each once (None = all)."""
    if not edits and has_triton(call.query.device) and not needs_gradient(call.query, call.key, call.mask):
        chosen = None
        if rows is not None:
            chosen = torch.zeros(1, call.num_queries, dtype=torch.bool, device=call.query.device)
            chosen = chosen.index_fill(1, rows.to(chosen.device), True)
        x, lse = untouched_heads(call, range(call.num_heads))
        return column_statistics(x.query, x.key, lse, x.mask, x.is_causal, call.scaling, call.softcap, chosen)[0]
    parts = _chunks(call, edits, rows, lambda weights, part: weights.sum(dim=2))
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(dim=0)


def row_maxima(call: Call, edits: Sequence[Edit], rows: Tensor | None = None) -> Tensor:
    """[B, H, R]: the largest weight of every query row."""
    return torch.cat(_chunks(call, edits, rows, lambda weights, part: weights.amax(dim=3)), dim=2)


def weighted(call: Call, edits: Sequence[Edit], values: Tensor, rows: Tensor | None = None) -> Tensor:
    """[B, H, R, d]: the weights times `values` [B, H or Hkv or 1, Tk, d] (other numbers than the site's own values)."""

    def read(weights: Tensor, part: Tensor) -> Tensor:
        other = values.to(weights)
        return weights @ other if other.shape[1] in (1, weights.shape[1]) else grouped_values(weights, other)

    return torch.cat(_chunks(call, edits, rows, read), dim=2)


def block_sums(call: Call, edits: Sequence[Edit], size: int | tuple[int, int]) -> Tensor:
    """[B, H, ceil(Tq / a), ceil(Tk / b)]: the weights summed over blocks of a x b (one number: squares); the last blocks may be smaller.

    Raises ReattendError for a size below 1.
    """
    down, across = (size, size) if isinstance(size, int) else size
    if down < 1 or across < 1:
        raise ReattendError(f"size must be 1 or more, got {size}")
    blocks = -(-call.num_queries // down)

    def read(weights: Tensor, part: Tensor) -> Tensor:
        keys = weights.shape[3]
        summed = pad(weights, (0, -keys % across)).unflatten(3, (-1, across)).sum(dim=4)
        where = torch.div(part, down, rounding_mode="floor")
        return summed.new_zeros(*summed.shape[:2], blocks, summed.shape[3]).index_add(2, where, summed)

    parts = _chunks(call, edits, None, read)
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(dim=0)


def weights_gradient(call: Call, edits: Sequence[Edit], gradient: Tensor, rows: Tensor | None = None) -> Tensor:
    """[B, H, R, Tk]: the gradient of a loss with respect to the weights of the query rows `rows` [R], from its gradient [B, H, Tq, Dv] with
    respect to the call's output: dL/dA = dL/dO V^T.

    Raises ReattendError for edits of outputs, after which the output is not A V.
    """
    if any(edit.level == "output" for edit in edits):
        raise ReattendError("the gradient of weights cannot be told from outputs that were edited themselves")
    index = torch.arange(call.num_queries, device=gradient.device) if rows is None else rows.to(gradient.device)

    def read(group: Group, x: Operands) -> Tensor:
        return grouped_matmul(gradient[:, list(group.heads)][:, :, index].to(x.value.dtype), x.value)

    return by_heads(call, check_edits(call, [edit for edit in edits if edit.level == "operands"]), read)
