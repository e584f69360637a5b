"""The cut by heads: heads with the same edits are computed together, heads without edits keep the model's numbers, bit for bit."""

from __future__ import annotations

from torch import Tensor

from ..call import Call
from ..edits.base import heads_index
from .tasks import Group, Task, plain


def run(task: Task, _: object) -> Tensor:
    groups = task.groups
    if len(groups) == 1:
        (chosen, heads), *_ = groups.items()
        return task.group(heads, chosen)
    output = _untouched(task, groups.get(()))
    for chosen, heads in groups.items():
        if chosen:
            output.index_copy_(1, heads_index(tuple(heads), output.device), task.group(heads, chosen))
    return output


def _untouched(task: Task, heads: list[int] | None) -> Tensor:
    """An output with the heads without edits filled in."""
    call = task.call
    if heads and (task.few or not _splits_exactly(call)):
        # the model's own function on all heads, overwritten where heads have edits
        return plain(call).clone()
    output = call.query.new_empty(call.batch, call.num_heads, call.num_queries, call.value.shape[3])
    if heads:
        # SDPA gives a head the same bits whichever others run beside it
        output.index_copy_(1, heads_index(tuple(heads), output.device), Group(call, heads, []).kernel(None, False)[0])
    return output


def _splits_exactly(call: Call) -> bool:
    """Whether SDPA on some heads gives the bits of SDPA on all: unless the memory layout would choose another kernel for a copy of them."""
    return call.original_is_sdpa and all(x.stride(-1) == 1 for x in (call.query, call.key, call.value))
