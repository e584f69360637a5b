"""The way of rows that see their own token and a few columns (the text of a joint stream): attention over these alone, beside the kernel's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..edits.base import repeat_heads
from ..edits.row_values import values_of
from ..families.guidance import MixOwnAnd
from .kernels import attend, statistics_dtype, visible_rows
from .tasks import Group, named_rows

NAME = "own and columns"


@dataclass(frozen=True)
class Plan:
    """columns [c], the same for all: those that some batch row or head keeps. rows [R]: the query rows that some batch row mixes."""

    columns: Tensor
    rows: Tensor


def is_own(group: Group) -> bool:
    """Whether the one edit is a `MixOwnAnd`, and what a row sees is the same for all rows."""
    x, call = group.x, group.call
    if group.few or group.scores or group.biases or len(group.weights) != 1 or not isinstance(group.weights[0], MixOwnAnd):
        return False
    plain = call.softcap is None and group.sinks is None and x.offset is not None and not x.is_causal and not x.appended
    return plain and (x.mask is None or x.mask.shape[2] == 1)


def plan(group: Group) -> Plan | None:
    """None where no row is named at all: a call that holds nothing of the branch."""
    edit, x = group.weights[0], group.x
    assert isinstance(edit, MixOwnAnd)
    rows = named_rows([edit], x.query)
    if not rows.numel():
        return None
    device = x.query.device

    def find(kept: Tensor) -> Tensor:
        return kept.flatten(0, -2).any(dim=0).nonzero()[:, 0].to(device)

    return Plan(edit.remember_size("columns", device, lambda: find(values_of(edit.columns))), rows)


def run(group: Group, known: Plan) -> Tensor:
    """[B, heads, Tq, Dv]: (1 - s) o + s o_kept. With t the text's part, o_kept = o_t + p (v - o_t), where p = sigmoid(s_own - lse_t)."""
    edit, x = group.weights[0], group.x
    assert isinstance(edit, MixOwnAnd) and x.offset is not None
    index, columns, heads = known.rows, known.columns, x.query.shape[1]
    own = index + x.offset
    dtype, query = statistics_dtype(x.query), x.query[:, :, index]
    kept, shown, seen = edit.columns[:, :, None], edit.columns[:, :, None, columns], None
    scores = (query.to(dtype) * repeat_heads(x.key[:, :, own], heads).to(dtype)).sum(dim=-1) * group.call.scaling
    if x.mask is not None:
        visible = visible_rows(x.mask, False, index, x.query.shape[2], x.key.shape[2])
        assert visible is not None
        shown, seen = shown & visible[..., columns], visible[:, :, 0, own]
        if x.mask.dtype != torch.bool:
            shown = x.mask[..., columns].to(dtype).masked_fill(~shown, float("-inf"))
            scores = scores + x.mask[:, :, 0, own].to(dtype)
    any_shown = (shown if shown.dtype == torch.bool else shown > float("-inf")).any(dim=-1)
    value = repeat_heads(x.value[:, :, own], heads).to(dtype)
    if columns.numel():
        text, lse = attend(query, x.key[:, :, columns], x.value[:, :, columns], shown, False, group.call.scaling, need_lse=True)
        assert lse is not None
        share = torch.sigmoid(scores - lse.to(dtype))
        # one of the columns: its own token is among them already
        share = share.masked_fill(kept[:, :, 0, own], 0)
        share = share if seen is None else share.masked_fill(~seen, 0)
        share = share.masked_fill(~any_shown, 1)[..., None]
        text = torch.where(any_shown[..., None], text.to(dtype), 0)
        mixed = text + share * (value - text)
    else:
        mixed = value
    output = group.kernel(None, False)[0]
    old = output[:, :, index].to(dtype)
    # who sees neither itself nor any of the columns keeps what it has
    named = None if seen is None else (seen | any_shown)[..., None]
    chosen = edit.chosen(group.rows(index))
    if chosen is not None:
        named = chosen if named is None else named & chosen
    mixed = torch.lerp(old, mixed, edit.strength)
    mixed = mixed if named is None else torch.where(named, mixed, old)
    return output.index_copy(2, index, mixed.to(output.dtype))
