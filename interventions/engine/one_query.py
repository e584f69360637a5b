"""The way of queries that are all one (`BlurQuery` with sigma inf): one row of attention per head, O(keys), in the place of a map."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..edits.base import heads_mask
from ..families.guidance import BlurQuery
from .kernels import attend, statistics_dtype
from .tasks import Task, plain

NAME = "one query"


def is_one(task: Task) -> bool:
    """Whether the one edit gives all places of a raster their mean query, and these see the same keys."""
    call = task.call
    if task.few or len(task.edits) != 1 or call.is_causal or (call.mask is not None and call.mask.shape[2] > 1):
        return False
    edit = task.edits[0]
    return isinstance(edit, BlurQuery) and edit.sigma == math.inf


def run(task: Task, _: object) -> Tensor:
    """[B, H, Tq, Dv]; batch rows, heads and rows that the edit does not name keep the model's own numbers, bit for bit."""
    call, (edit,) = task.call, task.edits
    assert isinstance(edit, BlurQuery)
    index = edit.grid.flatten().to(call.query.device)
    mean = call.query[:, :, index].to(statistics_dtype(call.query)).mean(dim=2, keepdim=True).to(call.query.dtype)
    new = attend(mean, call.key, call.value, call.mask, False, call.scaling, call.softcap, call.sinks)[0]
    output = plain(call)
    old = output[:, :, index]
    new = new.to(output.dtype).expand_as(old)
    chosen = None if edit.heads is None else heads_mask(tuple(edit.heads), call.num_heads, output.device)[:, :, None, None]
    if edit.rows is not None:
        rows = (edit.rows if edit.rows.shape[1] == 1 else edit.rows[:, index])[:, None, :, None]
        chosen = rows if chosen is None else chosen & rows
    return output.index_copy(2, index, new if chosen is None else torch.where(chosen, new, old))
