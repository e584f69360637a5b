"""The ways of one factor on few columns: the kernel's output corrected, or a kernel that is not shown columns which lose their weight."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..edits import Transfer, WeightEdit
from .columns import bias_on_columns, factor_columns, single_factor, visible_on_columns
from .correction import column_scores, column_weights, correct_factor, join_columns
from .kernels import rows_per_chunk, statistics_dtype
from .materialised import mend
from .tasks import Group

# Up to this many weights, a dozen passes over them cost less than the small operations of a correction.
FEW_WEIGHTS = 1 << 15
# A score so low that its weight is exactly 0 beside any other, and that half precision can hold.
HIDING = -1e4

Factor = tuple[WeightEdit, Tensor, Tensor]


def is_factor(group: Group) -> bool:
    if group.scores or len(group.weights) != 1:
        return False
    x = group.x
    if group.few and x.query.shape[0] * x.query.shape[1] * x.key.shape[2] <= FEW_WEIGHTS:
        return False
    return not x.query.requires_grad and factor_columns(group.weights, x) is not None


def is_avoidable(group: Group) -> bool:
    """Whether the factor is a transfer to all others, and the kernel can do without its columns; not where its output is known."""
    if group.few or not is_factor(group) or not isinstance(group.weights[0], Transfer) or not group.hides_columns:
        return False
    return bool(group.biases) or not group.is_attended


def find(group: Group) -> Factor | None:
    return single_factor(group.weights, group.x)


def corrected(group: Group, factor: Factor) -> Tensor:
    """One factor on few columns, in chunks of rows; rows where the correction is not accurate enough are materialised."""
    edit, columns, chosen = factor
    call, x, dtype, bias = group.call, group.x, statistics_dtype(group.x.query), group.bias()
    output, lse = group.kernel(bias, True)
    assert lse is not None
    key, value = x.key[:, :, columns].to(dtype), x.value[:, :, columns].to(dtype)
    pieces, flags = [], []
    for span, index in _chunks(group, columns):
        visible = visible_on_columns(x, index, columns)
        part = lse[:, :, span].to(dtype)
        hidden = None if visible is None else ~visible
        added = bias_on_columns(x, bias, index, columns)
        weights = column_weights(x.query[:, :, span], key, part, call.scaling, hidden, added, call.softcap)
        total = None if group.sinks is None else 1 - (group.sinks.to(dtype).view(1, -1, 1) - part).exp()[..., None]
        new, unsafe = correct_factor(output[:, :, span], weights, value, edit, chosen, group.rows(index), total)
        pieces.append(new.to(output.dtype))
        flags.append(unsafe)
    output = torch.cat(pieces, dim=2) if len(pieces) > 1 else pieces[0]
    unsafe = torch.cat(flags, dim=2) if len(flags) > 1 else flags[0]
    if isinstance(edit, Transfer) and group.hides_columns:
        rows = x.query.shape[2]
        if int(unsafe.flatten(0, 1).any(0).sum()) > max(16, rows // 16):
            return torch.where(unsafe[..., None], around(group, factor).to(output.dtype), output)
    return mend(group, output, unsafe)


def around(group: Group, factor: Factor) -> Tensor:
    """A transfer from few columns to all others: the kernel runs without these columns, which then join with what is left to them.

    Away from a sink that holds nearly all of a row, a correction of the whole row would amplify the kernel's rounding.
    """
    edit, columns, chosen = factor
    assert isinstance(edit, Transfer)
    call, x, dtype, bias = group.call, group.x, statistics_dtype(group.x.query), group.bias()
    hidden = torch.zeros(*chosen.shape[:2], x.key.shape[2], dtype=dtype, device=x.key.device)
    hidden[..., columns] = chosen[:, :, 0].to(dtype) * HIDING
    output, lse = group.kernel(hidden if bias is None else hidden + bias, True)
    assert lse is not None
    key, value = x.key[:, :, columns].to(dtype), x.value[:, :, columns].to(dtype)
    pieces = []
    for span, index in _chunks(group, columns):
        added = bias_on_columns(x, bias, index, columns)
        scores = column_scores(x.query[:, :, span].to(dtype), key, call.scaling, added)
        visible = visible_on_columns(x, index, columns)
        scores = scores.masked_fill(~(chosen if visible is None else chosen & visible), float("-inf"))
        joined = join_columns(output[:, :, span], lse[:, :, span].to(dtype), scores, value, edit, group.rows(index))
        pieces.append(joined.to(output.dtype))
    return torch.cat(pieces, dim=2) if len(pieces) > 1 else pieces[0]


def _chunks(group: Group, columns: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Query rows a chunk at a time, as a slice and as [R] long."""
    query = group.x.query
    width = 64 + columns.numel() + 2 * group.x.value.shape[3]
    step = rows_per_chunk(query.shape[0], query.shape[1], width, query.device)
    for start in range(0, query.shape[2], step):
        stop = min(start + step, query.shape[2])
        yield slice(start, stop), torch.arange(start, stop, device=query.device)
