"""The reference executor: materialises scores and weights and applies each edit's formula. Obviously right, quadratic memory.

Edits act level by level - operands, scores, weights, output - and inside a level in the order given.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from ..call import Call
from ..edits import (
    AppendKV,
    Edit,
    HeldKV,
    Keep,
    OperandEdit,
    Operands,
    OutputEdit,
    PoolKV,
    Rearrange,
    Rows,
    ScoreEdit,
    Shape,
    WeightEdit,
)
from ..edits.base import repeat_heads
from ..edits.groups import grouped_as_weights, grouped_beside_others
from ..errors import ReattendError
from .kernels import score_rows, softmax_rows

LEVELS = ("operands", "scores", "weights", "output")


def check_edits(call: Call, edits: list[Edit]) -> list[Edit]:
    """The edits that act. Raises ReattendError for a head beyond the site's heads, and for edits that contradict each other."""
    merged = any(isinstance(edit, PoolKV) for edit in edits)
    shape = Shape(call.batch, call.num_heads, call.key.shape[1], call.num_queries, None if merged else call.num_keys)
    for edit in edits:
        if edit.level not in LEVELS:
            raise ReattendError(f"{type(edit).__name__} acts on a projection: give it to the projection door, not to a call")
        if edit.heads and max(edit.heads) >= call.num_heads:
            where = f" of {call.site.name}" if call.site else ""
            raise ReattendError(f"head {max(edit.heads)} does not exist: attention{where} has heads 0 to {call.num_heads - 1}")
        if edit.reads and edit.level == "operands":
            raise ReattendError(f"{type(edit).__name__} is given the operands of some heads at a time: it can read no others")
        edit.check_shapes(shape)
    acting = [edit.fitted(shape.heads, shape.kv_heads) for edit in edits if not edit.is_identity]
    if len(acting) > 1 and any(isinstance(e, Rearrange) for e in acting) and any(isinstance(e, Keep) for e in acting):
        raise ReattendError(
            "one recipe leaves the order of segments open (pine), another hides keys by their place in the prompt (streaming): the "
            "answer would depend on the order again, so use one of the two"
        )
    held = [edit for edit in acting if isinstance(edit, HeldKV)]
    odd = next(
        (edit for edit in acting if held and _names_columns(edit) and any(_share_heads(edit, own) for own in held)), None
    )
    if odd is not None:
        raise ReattendError(
            f"{type(odd).__name__} names columns of a sequence of which tokens have left the cache, so that its columns are others: let it "
            "act before they leave, or hide the tokens instead (Keep)"
        )
    return grouped_beside_others(acting)


def _names_columns(edit: Edit) -> bool:
    """Whether it says by number which keys it acts on."""
    if isinstance(edit, (HeldKV, Keep)):
        return isinstance(edit, Keep)
    sets = [getattr(edit, name, None) for name in ("source", "target", "columns")]
    wide = [getattr(edit, name) for name in edit.per_column]
    return any(isinstance(x, Tensor) for x in sets) or any(isinstance(x, Tensor) and x.shape[-1] > 1 for x in wide)


def _share_heads(a: Edit, b: Edit) -> bool:
    return a.heads is None or b.heads is None or not set(a.heads).isdisjoint(b.heads)


def reference(call: Call, edits: list[Edit]) -> Tensor:
    """Output [B, H, Tq, Dv] in the query's dtype."""
    return reference_with_weights(call, edits)[0]


def reference_with_weights(call: Call, edits: list[Edit]) -> tuple[Tensor, Tensor]:
    """(output [B, H, Tq, Dv], edited weights [B, H, Tq, Tk] in statistics dtype)."""
    edits = grouped_as_weights(check_edits(call, edits))
    apart = rows_apart(edits)
    if apart is not None:
        # each row takes what it is in attention with the edit, or without
        with_it, without = (reference_with_weights(call, others) for others in apart[1])
        chosen = chosen_pairs(call, apart[0])
        new, old = as_wide([with_it[1], without[1]])
        return torch.where(chosen, with_it[0], without[0]), torch.where(chosen, new, old)
    edits = list(with_columns_alike(call, edits))
    # one head at a time, each with the edits that name it: no grouping, so nothing to get wrong
    operands = [_operands(call, head, edits) for head in range(call.num_heads)]
    index = torch.arange(call.num_queries, device=call.query.device)
    scores, rows = [], []
    for x in operands:
        found, visible = score_rows(x.query, x.key, x.mask, x.is_causal, call.scaling, call.softcap, index)
        scores.append(found)
        rows.append(Rows(index, visible, x.query, x.key, x.value, call.scaling, x.offset, x.appended, x.mask, x.is_causal))
    scores = _level(ScoreEdit, "on_scores", edits, scores, rows)
    sinks = [None] * call.num_heads if call.sinks is None else call.sinks.split(1)
    weights = [softmax_rows(own, sink) for own, sink in zip(scores, sinks, strict=True)]
    weights = _level(WeightEdit, "on_weights", edits, weights, rows)
    outputs = [own @ x.value.to(own.dtype) for own, x in zip(weights, operands, strict=True)]
    outputs = _level(OutputEdit, "on_output", edits, outputs, rows)
    return torch.cat(outputs, dim=1).to(call.query.dtype), torch.cat(as_wide(weights), dim=1)


def rows_apart(edits: list[Edit]) -> tuple[OperandEdit, tuple[list[Edit], list[Edit]]] | None:
    """(the first edit of operands whose rows need an attention of their own, the edits with it on all rows and those without it)."""
    for i, edit in enumerate(edits):
        if isinstance(edit, OperandEdit) and edit.rows is not None and not edit.tells_rows:
            others = edits[:i], edits[i + 1 :]
            return edit, ([*others[0], edit.on_all_rows(), *others[1]], [*others[0], *others[1]])
    return None


def with_columns_alike(call: Call, edits: Sequence[Edit]) -> Sequence[Edit]:
    """The edits where heads stand side by side: what is appended for some of these is there for all heads, hidden from the others."""
    some = [edit for edit in edits if isinstance(edit, AppendKV) and edit.heads is not None]
    if not some:
        return edits
    every = range(call.num_heads)
    crossing = [set(every if edit.heads is None else edit.heads) for edit in edits if edit.reads_heads]
    apart = [e for e in some if any(together & set(e.heads or ()) and together - set(e.heads or ()) for together in crossing)]
    return [edit.for_all_heads(call.num_heads) if isinstance(edit, AppendKV) and edit in apart else edit for edit in edits]


def chosen_pairs(call: Call, edit: Edit) -> Tensor:
    """Bool [B or 1, H, Tq or 1, 1]: the heads and rows that an edit names."""
    assert edit.rows is not None
    named = torch.ones(call.num_heads, dtype=torch.bool, device=call.query.device)
    if edit.heads is not None:
        named = torch.zeros_like(named)
        named[list(edit.heads)] = True
    return edit.rows[:, None, :, None] & named[:, None, None]


def as_wide(weights: list[Tensor]) -> list[Tensor]:
    """The weights of several heads with as many columns each: 0 on those that edits of operands gave to others alone."""
    most = max(own.shape[-1] for own in weights)
    return [torch.nn.functional.pad(own, (0, most - own.shape[-1])) for own in weights]


def _operands(call: Call, head: int, edits: list[Edit]) -> Operands:
    """What one head attends with, after the edits of operands."""
    mask = call.mask if call.mask is None or call.mask.shape[1] == 1 else call.mask[:, head : head + 1]
    x = Operands(
        call.query[:, head : head + 1],
        repeat_heads(call.key, call.num_heads)[:, head : head + 1],
        repeat_heads(call.value, call.num_heads)[:, head : head + 1],
        mask,
        call.is_causal,
        offset=call.num_keys - call.num_queries,
    )
    for edit in edits:
        if isinstance(edit, OperandEdit) and (edit.heads is None or head in edit.heads):
            own = edit.at_heads([head if edit.heads is None else list(edit.heads).index(head)])
            assert isinstance(own, OperandEdit)
            x = own.at_kv_heads([head // (call.num_heads // call.key.shape[1])]).on_operands(x)
    return x


def _level(level: type[Edit], method: str, edits: list[Edit], values: list[Tensor], rows: list[Rows]) -> list[Tensor]:
    """The values of every head after the edits of one level. An edit that reads heads is given those that it names side by side."""
    values = list(values)
    for edit in edits:
        if not isinstance(edit, level):
            continue
        heads = list(range(len(values))) if edit.heads is None else list(edit.heads)
        if edit.reads_heads:
            together, old = beside(rows, heads), torch.cat([values[head] for head in heads], dim=1)
            new = at_chosen(edit, together, getattr(edit, method)(old, together), old)
            for place, head in enumerate(heads):
                values[head] = new[:, place : place + 1]
            continue
        for place, head in enumerate(heads):
            own = edit.at_heads([place])
            values[head] = at_chosen(own, rows[head], getattr(own, method)(values[head], rows[head]), values[head])
    return values


def beside(rows: list[Rows], heads: list[int]) -> Rows:
    """The rows of single heads as those of all these heads. Raises ReattendError where an edit made some heads wider than others."""
    chosen = [rows[head] for head in heads]
    if len({(part.query.shape[3], part.key.shape[2], part.mask is None) for part in chosen}) > 1:
        raise ReattendError(
            "an edit that reads several heads needs their q, k and v alike: merge or rearrange all of them or none"
        )
    names = ("query", "key", "value", "visible", "mask")
    whole = {
        name: torch.cat([getattr(p, name) for p in chosen], dim=1) for name in names if getattr(chosen[0], name) is not None
    }
    return dataclasses.replace(chosen[0], **whole)


def at_chosen(edit: Edit, rows: Rows, new: Tensor, old: Tensor) -> Tensor:
    """New values on the rows that the edit names, old ones elsewhere."""
    chosen = edit.chosen(rows)
    return new if chosen is None else torch.where(chosen, new, old)
