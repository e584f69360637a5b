"""The reference executor: materialises scores and weights and applies each edit's formula. Obviously right, quadratic memory.

Edits act level by level - operands, scores, weights, output - and inside a level in the order given.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .call import Call
from .edits import Edit, Keep, OperandEdit, Operands, OutputEdit, Rearrange, Rows, ScoreEdit, WeightEdit
from .edits.base import repeat_heads
from .errors import ReattendError
from .kernels import score_rows, softmax_rows, statistics_dtype

LEVELS = ("operands", "scores", "weights", "output")


def check_edits(call: Call, edits: list[Edit]) -> list[Edit]:
    """The edits that act. Raises ReattendError for a head beyond the site's heads, and for edits that contradict each other."""
    for edit in edits:
        if edit.level not in LEVELS:
            raise ReattendError(f"{type(edit).__name__} acts on a projection: give it to the projection door, not to a call")
        if edit.heads and max(edit.heads) >= call.num_heads:
            where = f" of {call.site.name}" if call.site else ""
            raise ReattendError(f"head {max(edit.heads)} does not exist: attention{where} has heads 0 to {call.num_heads - 1}")
    acting = [edit for edit in edits if not edit.is_identity]
    if any(isinstance(e, Rearrange) for e in acting) and any(isinstance(e, Keep) for e in acting):
        raise ReattendError(
            "one recipe leaves the order of segments open (pine), another hides keys by their place in the prompt (streaming): the "
            "answer would depend on the order again, so use one of the two"
        )
    return acting


def reference(call: Call, edits: list[Edit]) -> Tensor:
    """Output [B, H, Tq, Dv] in the query's dtype."""
    return reference_with_weights(call, edits)[0]


def reference_with_weights(call: Call, edits: list[Edit]) -> tuple[Tensor, Tensor]:
    """(output [B, H, Tq, Dv], edited weights [B, H, Tq, Tk] in statistics dtype)."""
    edits = check_edits(call, edits)
    outputs, maps = [], []
    for head in range(call.num_heads):
        # one head at a time, each with the edits that name it: no grouping, so nothing to get wrong
        output, weights = _one_head(call, head, [_for_head(e, head) for e in edits if e.heads is None or head in e.heads])
        outputs.append(output)
        maps.append(weights)
    return torch.cat(outputs, dim=1).to(call.query.dtype), torch.cat(maps, dim=1)


def _for_head(edit: Edit, head: int) -> Edit:
    return edit.at_heads([head if edit.heads is None else list(edit.heads).index(head)])


def _one_head(call: Call, head: int, edits: list[Edit]) -> tuple[Tensor, Tensor]:
    dtype = statistics_dtype(call.query)
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
        if isinstance(edit, OperandEdit):
            x = edit.at_kv_heads([head // (call.num_heads // call.key.shape[1])]).on_operands(x)
    index = torch.arange(x.query.shape[2], device=x.query.device)
    scores, visible = score_rows(x.query, x.key, x.mask, x.is_causal, call.scaling, call.softcap, index)
    rows = Rows(index, visible, x.query, x.key, x.value, call.scaling, x.offset, x.appended)
    for edit in edits:
        if isinstance(edit, ScoreEdit):
            scores = at_chosen(edit, rows, edit.on_scores(scores, rows), scores)
    weights = softmax_rows(scores, None if call.sinks is None else call.sinks[head : head + 1])
    for edit in edits:
        if isinstance(edit, WeightEdit):
            weights = at_chosen(edit, rows, edit.on_weights(weights, rows), weights)
    output = weights @ x.value.to(dtype)
    for edit in edits:
        if isinstance(edit, OutputEdit):
            output = at_chosen(edit, rows, edit.on_output(output, rows), output)
    return output, weights


def at_chosen(edit: Edit, rows: Rows, new: Tensor, old: Tensor) -> Tensor:
    """New values on the rows that the edit names, old ones elsewhere."""
    chosen = edit.chosen(rows)
    return new if chosen is None else torch.where(chosen, new, old)
