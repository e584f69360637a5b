"""Cuts by batch rows: at prefill the rows that edits name are computed alone, at decode all are, and the others keep the model's numbers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..call import Call
from ..edits import Edit
from ..edits.base import heads_mask
from ..edits.row_values import found_in, sent, values_of
from .tasks import Task, plain


def can_cut(task: Task) -> bool:
    call = task.call
    return task.names_rows and not task.few and call.batch > 1 and all(edit.can_split_batch(call.batch) for edit in task.edits)


def find_rows(task: Task) -> Tensor | None:
    return acting_rows(task.call, task.edits)


def acting_rows(call: Call, edits: Sequence[Edit]) -> Tensor | None:
    """Long [n]: the batch rows that some edit names; None where that is all of them. For edits that `can_split_batch`."""
    rows = [edit.rows for edit in edits if edit.rows is not None]

    def find(first: Tensor) -> Tensor | None:
        named = torch.stack([values.any(dim=1) for values in (first, *map(values_of, rows[1:]))]).any(dim=0)
        index = named.nonzero()[:, 0]
        return None if index.numel() == call.batch else sent(index, call.query.device)

    if all(other is rows[0] for other in rows):
        return found_in(rows[0], ("acting", call.batch, call.query.device), find)
    with torch.inference_mode(False):  # so that what is sent can be looked up
        return find(values_of(rows[0]))


def run_rows(task: Task, acting: Tensor) -> Tensor:
    """Batch rows that no edit names keep the model's own output, bit for bit; the edits run on the others alone."""
    if acting.numel() == 0:
        return plain(task.call)
    output = plain(task.call).clone()
    own = output[acting]
    output[acting] = task.again(call_at(task.call, acting, lambda: own), [_cut(edit, acting) for edit in task.edits])
    return output


def takes_place(task: Task) -> bool:
    """Whether an edit takes attention's place in some batch rows, with all their heads and query rows."""
    return task.call.batch > 1 and any(map(_replaces, task.edits)) and all(edit.knows_rows for edit in task.edits)


def _replaces(edit: Edit) -> bool:
    return edit.replaces and edit.heads is None and edit.rows is not None and edit.rows.shape[1] == 1


def find_replaced(task: Task) -> tuple[Edit, Tensor, Tensor]:
    """(the edit, the batch rows that it does not name, those that it names), long."""
    edit = next(filter(_replaces, task.edits))
    batch, device = task.call.batch, task.call.query.device

    def find(rows: Tensor) -> list[Tensor]:
        named = rows[:, 0].expand(batch)
        return [sent(which.nonzero()[:, 0], device) for which in (~named, named)]

    assert edit.rows is not None
    with torch.inference_mode(False):  # so that what is sent can be looked up
        others, own = found_in(edit.rows, ("replaced", batch, device), find)
    return edit, others, own


def run_replaced(task: Task, found: tuple[Edit, Tensor, Tensor]) -> Tensor:
    """Its own rows are computed by the edit alone, the others without it."""
    edit, others, own = found
    call, output = task.call, None
    left = [one for one in task.edits if one is not edit]
    if not len(own):
        return task.again(call, left)
    if not len(others):
        return task.again(call, [_everywhere(one) if one is edit else one for one in task.edits])
    for index, edits in ((others, left), (own, task.edits)):
        cut = [_everywhere(_cut(one, index)) if one is edit else _cut(one, index) for one in edits]
        part = task.again(call_at(call, index, lambda index=index: plain(call)[index]), cut)  # type: ignore[misc]
        output = part.new_empty(call.batch, *part.shape[1:]) if output is None else output
        output[index] = part
    assert output is not None
    return output


def _everywhere(edit: Edit) -> Edit:
    """An edit that names all rows, without naming them."""
    return edit.remember("everywhere", lambda: edit._copy(rows=None))


def _cut(edit: Edit, acting: Tensor) -> Edit:
    """The edit for these rows of the batch; layers that share the edit share it too. One that names all of them names none: more ways fit."""
    rows = edit.rows
    names_all = rows is not None and rows.shape[0] > 1 and bool(values_of(rows)[values_of(acting)].all())

    def at_acting() -> Edit:
        new = edit.at_batch(acting)
        return new._copy(rows=None) if names_all else new

    if edit._needs_gradient():
        return at_acting()  # a cut that is kept would belong to one backward pass

    def cut() -> Edit:
        with torch.inference_mode(False):  # kept longer than the pass that makes it, and its rows can be looked up
            return at_acting()

    return edit.remember_size("batch rows", (acting.device, *values_of(acting).tolist()), cut)


def may_leave_pairs(task: Task) -> bool:
    return task.names_rows and not task.settled and not any(e.heads is None and e.rows is None for e in task.edits)


def find_pairs(task: Task) -> Tensor | None:
    """Bool [B, H or 1]: the batch rows in which some edit names a head, or a row of it. Batch rows of heads that no edit names at all
    count as named: the executor leaves those heads alone. None where nothing is left over; on an accelerator, whose values are not
    read, where that is plain from the edits.
    """
    call, found = task.call, []
    for edit in task.edits:
        heads = None if edit.heads is None else heads_mask(edit.heads, call.num_heads, call.query.device)
        found.append(_named(edit) if heads is None else heads if edit.rows is None else _named(edit) & heads)
    free = task.groups.get(())
    if free:
        found.append(heads_mask(tuple(free), call.num_heads, call.query.device))
    named = functools.reduce(torch.logical_or, found)
    return None if named.device.type == "cpu" and bool(named.all()) else named


def run_pairs(task: Task, named: Tensor) -> Tensor:
    """Batch rows and heads that are computed beside the named ones, but are not named, get the model's own numbers."""
    original = functools.cache(functools.partial(plain, task.call))
    output = task.again(dataclasses.replace(task.call, original=original), task.edits, settled=True)
    return torch.where(named[:, :, None, None], output, original())


def _named(edit: Edit) -> Tensor:
    """Bool [B or 1, 1]: the batch rows that an edit names, in any query row."""
    assert edit.rows is not None
    return edit.rows if edit.rows.shape[1] == 1 else edit.rows.any(dim=1, keepdim=True)


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
        original_with_lse=None,
        tokens=None,
        attended=attended,
    )
