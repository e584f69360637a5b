"""Rows of all heads at once, each edit on the heads that it names: decode steps with different edits on different heads, and rows whose
edits look across heads, from which no head may be taken away.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..call import Call
from ..edits import Edit, Mix, Operands, Rows
from ..edits.base import heads_index, key_heads, repeat_heads
from .kernels import grouped_values, rows_per_chunk, score_rows, softmax_rows
from .reference_executor import as_wide, at_chosen, beside, with_columns_alike
from .tasks import Group, Task, all_rows, group_heads, named_rows, plain, take_heads


def rows_of_all_heads(call: Call, edits: Sequence[Edit], index: Tensor) -> tuple[Tensor, Tensor]:
    """(weights [B, H, R, Tk], outputs [B, H, R, Dv]) of the query rows `index` after all edits, in statistics dtype."""
    edits = with_columns_alike(call, edits)
    parts = _parts(call, edits)
    scores = []
    for part in parts:
        x = part.operands
        found, visible = score_rows(x.query, x.key, x.mask, x.is_causal, call.scaling, call.softcap, index)
        part.rows = Rows(index, visible, x.query, x.key, x.value, call.scaling, x.offset, x.appended, x.mask, x.is_causal)
        scores.append(found)
    scores = _level(parts, "scores", edits, scores)
    weights = [softmax_rows(own, part.sinks) for own, part in zip(scores, parts, strict=True)]
    weights = _level(parts, "weights", edits, weights)
    outputs = [grouped_values(own, part.operands.value.to(own.dtype)) for own, part in zip(weights, parts, strict=True)]
    outputs = _level(parts, "output", edits, outputs)
    return _in_order(parts, weights), _in_order(parts, outputs)


@dataclass
class _Part:
    """Heads with the same operands. All heads of a call are one part, unless edits of operands name some of them."""

    heads: list[int]  # not read where the part is the whole call
    whole: bool
    operands: Operands
    sinks: Tensor | None
    rows: Rows = None  # type: ignore[assignment]

    def apply(self, edit: Edit, method: str, values: Tensor) -> Tensor:
        """The values [B, heads, R, ...] of this part after an edit, on the heads that it names."""
        if edit.heads is None:
            own = edit if self.whole else edit.at_heads(self.heads)
            return at_chosen(own, self.rows, getattr(own, method)(values, self.rows), values)
        places: Sequence[int]
        if self.whole:
            places, own = edit.heads, edit
        else:
            named = [head for head in edit.heads if head in self.heads]
            if not named:
                return values
            places = [self.heads.index(head) for head in named]
            own = edit.at_heads([edit.heads.index(head) for head in named])
        index = heads_index(tuple(places), values.device)
        rows, old = self._rows_of(own, places), values.index_select(1, index)
        return values.index_copy(1, index, at_chosen(own, rows, getattr(own, method)(old, rows), old))

    def _rows_of(self, edit: Edit, places: Sequence[int]) -> Rows:
        rows = self.rows
        places, visible = list(places), rows.visible
        if visible is not None and visible.shape[1] > 1:
            visible = take_heads(visible, places)
        mask = rows.mask if rows.mask is None or rows.mask.shape[1] == 1 else take_heads(rows.mask, places)
        if not edit.reads_operands:
            return rows if visible is rows.visible else replace(rows, visible=visible, mask=mask)
        times = rows.query.shape[1] // rows.key.shape[1]
        shared = key_heads(places, times)
        key, value = take_heads(rows.key, shared), take_heads(rows.value, shared)
        return replace(rows, visible=visible, mask=mask, query=take_heads(rows.query, places), key=key, value=value)

    def single_rows(self) -> dict[int, Rows]:
        """{head: its rows alone}."""
        rows, count = self.rows, len(self.heads)
        key, value = repeat_heads(rows.key, count), repeat_heads(rows.value, count)
        visible, mask = (None if t is None else t.expand(-1, count, -1, -1) for t in (rows.visible, rows.mask))
        found = {}
        for i, head in enumerate(self.heads):
            own = slice(i, i + 1)
            shown, hides = (None if t is None else t[:, own] for t in (visible, mask))
            query, keys, values = rows.query[:, own], key[:, own], value[:, own]
            found[head] = replace(rows, visible=shown, mask=hides, query=query, key=keys, value=values)
        return found


def _parts(call: Call, edits: Sequence[Edit]) -> list[_Part]:
    changes = [edit for edit in edits if edit.level == "operands"]
    if not changes:
        offset = call.num_keys - call.num_queries
        x = Operands(call.query, call.key, call.value, call.mask, call.is_causal, offset=offset)
        return [_Part([], True, x, call.sinks)]
    found = []
    for chosen, heads in group_heads(call.num_heads, changes).items():
        group = Group(call, heads, [changes[i] for i in chosen])
        found.append(_Part(heads, group.whole, group.complete(), group.sinks))
    return found


def _level(parts: list[_Part], level: str, edits: Sequence[Edit], values: list[Tensor]) -> list[Tensor]:
    method = f"on_{level}"
    for edit in edits:
        if edit.level != level:
            continue
        if len(parts) > 1 and edit.reads_heads:
            values = _across(parts, edit, method, values)
        else:
            values = [part.apply(edit, method, own) for part, own in zip(parts, values, strict=True)]
    return values


def _across(parts: list[_Part], edit: Edit, method: str, values: list[Tensor]) -> list[Tensor]:
    """An edit that is given its heads side by side although their operands differ."""
    whole = _in_order(parts, values)
    single = {head: rows for part in parts for head, rows in part.single_rows().items()}
    heads = list(range(whole.shape[1])) if edit.heads is None else list(edit.heads)
    rows, index = beside([single[head] for head in range(whole.shape[1])], heads), heads_index(tuple(heads), whole.device)
    old = whole.index_select(1, index)
    whole = whole.index_copy(1, index, at_chosen(edit, rows, getattr(edit, method)(old, rows), old))
    # each with its own columns again: those that edits of operands gave to other heads are not there
    own = [whole.index_select(1, heads_index(tuple(part.heads), whole.device)) for part in parts]
    return [new[..., : old.shape[-1]] for new, old in zip(own, values, strict=True)]


def _in_order(parts: list[_Part], values: list[Tensor]) -> Tensor:
    """[B, H, ...] in the order of the heads."""
    if len(parts) == 1:
        return values[0]
    order = [head for part in parts for head in part.heads]
    places = tuple(order.index(head) for head in range(len(order)))
    return torch.cat(as_wide(values), dim=1).index_select(1, heads_index(places, values[0].device))


def can_share(task: Task) -> bool:
    """Whether one map of few rows serves all heads that have edits: none changes operands or outputs, or makes a map of its own."""
    if not task.few or not task.names_heads or len(task.groups) == 1:
        return False
    own = any(isinstance(edit, Mix) and edit.reads_operands for edit in task.edits)
    return not own and all(edit.level in ("scores", "weights") for edit in task.edits)


def is_alone(task: Task) -> bool:
    """Whether an accelerator has few rows to compute of which some heads have edits, all of them the same.

    All heads under these edits are a few launches then, where any of its ways fits, and a map of all heads is many.
    """
    return task.call.query.device.type != "cpu" and can_share(task) and len(task.groups) == 2 and () in task.groups


def alone(task: Task, _: object) -> Tensor:
    """The edits on all heads; those that have none keep the model's own numbers."""
    call = task.call
    edits = [edit.on_every_head(call.num_heads) for edit in task.edits]
    return with_untouched(task, task.compute(Group(call, list(range(call.num_heads)), edits)))


def shared(task: Task, _: object) -> Tensor:
    output = rows_of_all_heads(task.call, task.edits, all_rows(task.call.query))[1].to(task.call.query.dtype)
    return with_untouched(task, output)


def with_untouched(task: Task, output: Tensor) -> Tensor:
    """The output with the model's own numbers for the heads that have no edit."""
    untouched = task.groups.get(())
    if not untouched:
        return output
    index = heads_index(tuple(untouched), output.device)
    return output.index_copy(1, index, plain(task.call).index_select(1, index))


def crossing_rows(task: Task) -> Tensor:
    """The rows [R] in which some edit looks across heads; at decode all."""
    query = task.call.query
    if task.few or any(edit.reads_rows for edit in task.edits):
        return all_rows(query)
    return named_rows([edit for edit in task.edits if edit.reads_heads], query)


def crosses_in_outputs(task: Task) -> bool:
    """Whether heads are looked across in outputs alone, so that nothing need be materialised for it."""
    if not task.crosses or any(edit.reads_heads and edit.level != "output" for edit in task.edits):
        return False
    changed = any(edit.level == "operands" for edit in task.edits)
    return not (changed and any(edit.level == "output" and edit.reads_operands for edit in task.edits))


def across_outputs(task: Task, _: object) -> Tensor:
    """Everything up to the first edit of outputs that looks across heads goes through the table; it and what follows it act on all heads."""
    call, edits = task.call, task.edits
    first = next(i for i, edit in enumerate(edits) if edit.reads_heads)
    later = [edit for edit in edits[first:] if edit.level == "output"]
    earlier = [*edits[:first], *(edit for edit in edits[first:] if edit.level != "output")]
    if later[0].replaces and later[0].heads is None and later[0].rows is None:
        output = call.query.new_zeros(call.batch, call.num_heads, call.num_queries, call.value.shape[3])
    else:
        output = task.again(call, earlier)
    x = Operands(call.query, call.key, call.value, call.mask, call.is_causal, offset=call.num_keys - call.num_queries)
    index = all_rows(call.query)
    rows = Rows(index, None, x.query, x.key, x.value, call.scaling, x.offset, x.appended, x.mask, x.is_causal)
    part = _Part([], True, x, call.sinks, rows)
    for edit in later:
        output = part.apply(edit, "on_output", output)
    return output.to(call.query.dtype)


def across(task: Task, index: Tensor) -> Tensor:
    """Edits some of which look across heads: the rows that these name hold all heads together, the others have the rest of the edits."""
    call, edits = task.call, task.edits
    crossing = [edit for edit in edits if edit.reads_heads]
    heads = None
    if all(edit.heads is not None for edit in crossing):
        heads = sorted({head for edit in crossing for head in edit.heads or ()})
    whole = heads is None and index.numel() == call.num_queries
    output = None if whole else task.again(call, [edit for edit in edits if not edit.reads_heads])
    if output is not None and not index.numel():
        return output
    step = rows_per_chunk(call.batch, call.num_heads, call.num_keys, call.query.device)
    step = index.numel() if any(edit.reads_rows for edit in edits) else step
    chunks = [rows_of_all_heads(call, edits, part)[1].to(call.query.dtype) for part in index.split(step)]
    new = torch.cat(chunks, dim=2) if len(chunks) > 1 else chunks[0]
    if output is None:
        return new
    if heads is None:
        return output.index_copy(2, index, new)
    chosen = heads_index(tuple(heads), output.device)
    return output.index_copy(1, chosen, output.index_select(1, chosen).index_copy(2, index, new.index_select(1, chosen)))
