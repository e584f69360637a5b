"""What observers, pictures and interventions read of a call, row by row, under the edits that `fused` computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..call import Call
from ..edits import Edit, Operands, Rows
from ..edits.groups import grouped_as_weights
from .all_heads import rows_of_all_heads
from .kernels import grouped_values, statistics_dtype
from .materialised import edited_weights
from .reference_executor import as_wide, at_chosen, check_edits, chosen_pairs, rows_apart
from .tasks import Group, group_heads
from .ways import fused


def untouched_heads(call: Call, heads: Sequence[int]) -> tuple[Operands, Tensor]:
    """(operands, log-sum-exp [B, heads, Tq]) of some heads in ascending order, without edits.

    The output that comes with it is kept on the call: if the same heads are then edited, `fused` starts from it.
    """
    group = Group(call, list(heads), [])
    output, lse = group.kernel(None, True)
    assert lse is not None
    if torch.is_grad_enabled() or not any(own.requires_grad for own in (group.x.query, group.x.key, group.x.value)):
        # where the output will have a gradient, one that was only read has none to give
        call.attended[tuple(heads)] = output, lse
    return group.x, lse


def row_weights(call: Call, edits: Sequence[Edit], index: Tensor) -> Tensor:
    """Weights [B, H, R, Tk] of the query rows `index` [R], after the edits: the maps that observers and pictures need, row by row."""
    edits = grouped_as_weights(check_edits(call, list(edits)))
    apart = rows_apart(edits)
    if apart is not None:
        new, old = as_wide([row_weights(call, others, index) for others in apart[1]])
        chosen = chosen_pairs(call, apart[0])
        return torch.where(chosen if chosen.shape[2] == 1 else chosen[:, :, index], new, old)
    if any(edit.reads_heads for edit in edits):
        # edits of outputs say nothing of weights, and some ask for all rows
        return rows_of_all_heads(call, [edit for edit in edits if edit.level != "output"], index)[0]
    return by_heads(call, edits, lambda group, x: edited_weights(x, index, group.edits, call, group.sinks))


def row_outputs(call: Call, edits: Sequence[Edit], index: Tensor) -> Tensor:
    """Outputs [B, H, R, Dv] of the query rows `index` [R] after the edits, in statistics dtype: what `fused` gives for these rows."""
    edits = check_edits(call, list(edits))
    if any(edit.reads_rows for edit in edits) or rows_apart(edits) is not None:
        return fused(call, edits)[:, :, index].to(statistics_dtype(call.query))
    if any(edit.reads_heads for edit in edits):
        return rows_of_all_heads(call, edits, index)[1]

    def outputs(group: Group, x: Operands) -> Tensor:
        weights = edited_weights(x, index, group.edits, call, group.sinks)
        output = grouped_values(weights, x.value.to(weights.dtype))
        rows = Rows(index, None, x.query, x.key, x.value, call.scaling, x.offset, x.appended, x.mask, x.is_causal)
        for edit in group.outputs:
            output = at_chosen(edit, rows, edit.on_output(output, rows), output)
        return output

    return by_heads(call, edits, outputs)


def by_heads(call: Call, edits: Sequence[Edit], read: Callable[[Group, Operands], Tensor]) -> Tensor:
    """What is read [B, H, R, ...] of heads with the same edits and of what they attend with, put together again."""
    parts: list[Tensor] = []
    order: list[int] = []
    for chosen, heads in group_heads(call.num_heads, edits).items():
        group = Group(call, heads, [edits[i] for i in chosen])
        found = read(group, group.complete())
        if group.whole:
            return found
        parts.append(found)
        order += heads
    return torch.cat(as_wide(parts), dim=1)[:, [order.index(head) for head in range(call.num_heads)]]
