"""The way of a lone `Lift` on few rows: their map in as few operations as its formula has, on the CPU, where rows are short."""

from __future__ import annotations

import torch
from torch import Tensor

from ..call import Call
from ..edits import Lift
from ..edits.base import column_mask
from .factors import FEW_WEIGHTS
from .kernels import grouped_values, score_rows, softmax_rows, statistics_dtype
from .one_row import keep_known
from .tasks import Task, all_rows

NAME = "lifted share"


def is_lifted(task: Task) -> bool:
    if len(task.edits) != 1:
        return False
    edit, call = task.edits[0], task.call
    if not isinstance(edit, Lift) or edit.heads is not None or edit.rows is not None:
        return False
    few = task.few and call.batch * call.num_heads * call.num_keys <= FEW_WEIGHTS
    return few and call.query.device.type == "cpu" and call.sinks is None and not isinstance(edit.share, Tensor)


def find(task: Task) -> Tensor:
    """The lifted columns as 1 among zeros, [B or 1, heads or 1, 1, Tk] in statistics dtype."""
    edit, call = task.edits[0], task.call
    assert isinstance(edit, Lift)
    mask = column_mask(edit.columns, call.num_keys, call.query.device)
    chosen = mask[:, :, None].to(statistics_dtype(call.query))
    keep_known(task, NAME, lambda call, _: lifted(call, edit, chosen), True)
    return chosen


def run(task: Task, chosen: Tensor) -> Tensor:
    edit = task.edits[0]
    assert isinstance(edit, Lift)
    return lifted(task.call, edit, chosen)


def lifted(call: Call, edit: Lift, chosen: Tensor) -> Tensor:
    """Attention whose rows give the chosen columns the share that the edit asks for; rows sum to 1 before and after it."""
    query = call.query
    scores, visible = score_rows(query, call.key, call.mask, call.is_causal, call.scaling, call.softcap, all_rows(query))
    weights = scores.softmax(dim=-1) if visible is None else softmax_rows(scores, None)
    mass = (weights * chosen).sum(dim=-1, keepdim=True)
    growth = edit.growth(mass, 1.0)
    scale = (growth * mass).add_(1).reciprocal_() if not torch.is_grad_enabled() else 1 / (1 + growth * mass)
    # growth 0, or nothing on the columns, multiplies by exactly 1
    weights = weights * torch.addcmul(scale, scale * growth, chosen)
    return grouped_values(weights, call.value.to(weights.dtype)).to(query.dtype)
