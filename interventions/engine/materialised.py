"""The way that takes every edit: the rows that it names with their whole score and weight maps, in chunks, by the edits' own formulas."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..call import Call
from ..edits import Edit, Operands, Rows
from ..edits.base import versions
from .kernels import grouped_values, rows_per_chunk, score_rows, softmax_rows, statistics_dtype
from .reference_executor import at_chosen
from .tasks import Group, all_rows, named_rows


def edited_weights(x: Operands, index: Tensor, edits: Sequence[Edit], call: Call, sinks: Tensor | None) -> Tensor:
    """Weights [B, H, R, Tk] of the rows `index` after all score and weight edits."""
    scores, visible = score_rows(x.query, x.key, x.mask, x.is_causal, call.scaling, call.softcap, index)
    rows = Rows(index, visible, x.query, x.key, x.value, call.scaling, x.offset, x.appended, x.mask, x.is_causal)
    for edit in edits:
        if edit.level == "scores":
            scores = at_chosen(edit, rows, edit.on_scores(scores, rows), scores)  # type: ignore[attr-defined]
    weights = softmax_rows(scores, sinks)
    for edit in edits:
        if edit.level == "weights":
            weights = at_chosen(edit, rows, edit.on_weights(weights, rows), weights)  # type: ignore[attr-defined]
    return weights


def materialise(group: Group, index: Tensor) -> Tensor:
    """Rows `index` [R] with every edit of scores and weights: [B, heads, R, Dv] in statistics dtype."""
    x = group.complete()
    step = rows_per_chunk(x.query.shape[0], x.query.shape[1], x.key.shape[2], x.query.device)
    value = x.value.to(statistics_dtype(x.query))
    parts = [index] if index.numel() <= step else index.split(step)
    outputs = [grouped_values(edited_weights(x, part, group.edits, group.call, group.sinks), value) for part in parts]
    return torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0]


def mend(group: Group, output: Tensor, unsafe: Tensor) -> Tensor:
    """The output with the rows materialised that are flagged [B, H, Tq] in any batch row or head."""
    if not bool(unsafe.any()):
        return output
    index = unsafe.flatten(0, 1).any(dim=0).nonzero()[:, 0]
    return output.index_copy(2, index, materialise(group, index).to(output.dtype))


def named(group: Group) -> Tensor:
    """The rows to materialise: at decode all of them, whose maps cost what the kernel would."""
    query = group.x.query
    if group.few or group.pending is not None:
        return all_rows(query)
    edits = (*group.scores, *group.weights)
    key = edits[1:], versions(edits[1:]), query.shape[2], query.device
    return edits[0].remember_size("named", key, lambda: named_rows(edits, query))


def run(group: Group, index: Tensor) -> Tensor:
    if index.numel() == group.x.query.shape[2]:
        return materialise(group, index)
    output = group.kernel(group.bias(), False)[0]
    return output.index_copy(2, index, materialise(group, index).to(output.dtype)) if index.numel() else output
