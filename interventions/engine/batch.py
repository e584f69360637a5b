"""Edits that name only some rows of the batch: those rows alone are computed anew, the others stay as they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..call import Call
from ..edits import Band, Edit, WeightMap


def acting_rows(call: Call, edits: Sequence[Edit]) -> Tensor | None:
    """Long [n]: the batch rows that some edit names; None where that is all of them, or where an edit cannot be cut to them."""
    if call.batch == 1 or not all(_can_cut(edit, call.batch) for edit in edits):
        return None
    named = torch.stack([edit.rows.any(dim=1) for edit in edits if edit.rows is not None]).any(dim=0)
    index = named.nonzero()[:, 0]
    return None if index.numel() == call.batch else index


def named_pairs(call: Call, edits: Sequence[Edit]) -> Tensor | None:
    """Bool [B, H or 1]: the batch rows in which some edit names a head, or a row of it. Batch rows of heads that no edit names at all
    count as named: the executor leaves those heads alone. None where nothing is left over; on an accelerator, whose values are not
    read, where that is plain from the edits.
    """
    every = [edit for edit in edits if edit.heads is None]
    if any(edit.rows is None for edit in every):
        return None
    named = torch.zeros(call.batch, 1, dtype=torch.bool, device=call.query.device)
    for edit in every:
        named = named | _named(edit)
    if len(every) < len(edits):
        own, count = named.expand(-1, call.num_heads).clone(), torch.zeros(call.num_heads, dtype=torch.bool)
        for edit in edits:
            if edit.heads is not None:
                heads = list(edit.heads)
                count[heads] = True
                own[:, heads] = True if edit.rows is None else own[:, heads] | _named(edit)
        if not every:
            own[:, (~count).nonzero()[:, 0].to(own.device)] = True
        named = own
    return None if named.device.type == "cpu" and bool(named.all()) else named


def _named(edit: Edit) -> Tensor:
    """Bool [B or 1, 1]: the batch rows that an edit names, in any query row."""
    assert edit.rows is not None
    return edit.rows.any(dim=1, keepdim=True)


def _can_cut(edit: Edit, batch: int) -> bool:
    if edit.rows is None or edit.rows.shape[0] != batch or isinstance(edit, WeightMap) or edit.reads_batch:
        return False
    return not any(
        isinstance(getattr(edit, f.name), Band) or (isinstance(getattr(edit, f.name), Tensor) and f.name not in edit.broadcast)
        for f in dataclasses.fields(edit)
        if f.name != "rows"
    )


def edit_at(edit: Edit, index: Tensor) -> Edit:
    """The same edit for these rows of the batch."""
    new = object.__new__(type(edit))
    for f in dataclasses.fields(edit):
        value = getattr(edit, f.name)
        per_row = f.name == "rows" or (f.name in edit.broadcast and isinstance(value, Tensor) and value.dtype != torch.long)
        object.__setattr__(new, f.name, value[index] if per_row and value.shape[0] > 1 else value)
    return new


def call_at(call: Call, index: Tensor, original: Callable[[], Tensor]) -> Call:
    """The same call for these rows of the batch; `original` gives their untouched output."""
    mask = call.mask if call.mask is None or call.mask.shape[0] == 1 else call.mask[index]
    query, key, value = call.query[index], call.key[index], call.value[index]
    attended = {heads: (output[index], lse[index]) for heads, (output, lse) in call.attended.items()}
    return dataclasses.replace(
        call,
        query=query,
        key=key,
        value=value,
        mask=mask,
        original=original,
        original_is_sdpa=False,
        tokens=None,
        attended=attended,
    )
