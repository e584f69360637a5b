"""Rows of all heads at once, each edit on the heads that it names: decode steps with different edits on different heads, and rows whose
edits look across heads, from which no head may be taken away.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..call import Call
from ..edits import (
    Edit,
    Gain,
    Keep,
    KeyBias,
    Lift,
    Mix,
    OperandEdit,
    Operands,
    OutputEdit,
    PairBias,
    Rows,
    ScoreEdit,
    ScoreGain,
    Transfer,
    WeightEdit,
)
from ..edits.base import repeat_heads
from .head_group import HeadGroup, key_heads, take_heads
from .kernels import grouped_values, score_rows, softmax_rows
from .reference_executor import at_chosen, beside

# Edits whose formulas ask q, k and v for nothing but their sizes, so that these need not be cut to the heads they name.
SIZES_ONLY = (KeyBias, ScoreGain, PairBias, Keep, Gain, Lift, Transfer)


def rows_of_all_heads(call: Call, edits: Sequence[Edit], index: Tensor) -> tuple[Tensor, Tensor]:
    """(weights [B, H, R, Tk], outputs [B, H, R, Dv]) of the query rows `index` after all edits, in statistics dtype."""
    parts = _parts(call, edits)
    scores = []
    for part in parts:
        x = part.operands
        found, visible = score_rows(x.query, x.key, x.mask, x.is_causal, call.scaling, call.softcap, index)
        part.rows = Rows(index, visible, x.query, x.key, x.value, call.scaling, x.offset, x.appended)
        scores.append(found)
    scores = _level(parts, ScoreEdit, "on_scores", edits, scores)
    weights = [softmax_rows(own, part.sinks) for own, part in zip(scores, parts, strict=True)]
    weights = _level(parts, WeightEdit, "on_weights", edits, weights)
    outputs = [grouped_values(own, part.operands.value.to(own.dtype)) for own, part in zip(weights, parts, strict=True)]
    outputs = _level(parts, OutputEdit, "on_output", edits, outputs)
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
            visible = visible[:, places]
        if isinstance(edit, SIZES_ONLY) or (isinstance(edit, Mix) and edit.target != "mean_query"):
            return rows if visible is rows.visible else replace(rows, visible=visible)
        times = rows.query.shape[1] // rows.key.shape[1]
        shared = key_heads(places, times) if places == sorted(places) else [place // times for place in places]
        key, value = take_heads(rows.key, shared), take_heads(rows.value, shared)
        return replace(rows, visible=visible, query=take_heads(rows.query, places), key=key, value=value)

    def single_rows(self) -> dict[int, Rows]:
        """{head: its rows alone}."""
        rows, count = self.rows, len(self.heads)
        key, value = repeat_heads(rows.key, count), repeat_heads(rows.value, count)
        visible = None if rows.visible is None else rows.visible.expand(-1, count, -1, -1)
        found = {}
        for i, head in enumerate(self.heads):
            own = slice(i, i + 1)
            shown = None if visible is None else visible[:, own]
            found[head] = replace(rows, visible=shown, query=rows.query[:, own], key=key[:, own], value=value[:, own])
        return found


def _parts(call: Call, edits: Sequence[Edit]) -> list[_Part]:
    changes = [edit for edit in edits if isinstance(edit, OperandEdit)]
    if not changes:
        offset = call.num_keys - call.num_queries
        x = Operands(call.query, call.key, call.value, call.mask, call.is_causal, offset=offset)
        return [_Part([], True, x, call.sinks)]
    found = []
    for chosen, heads in group_heads(call.num_heads, changes).items():
        group = HeadGroup(call, heads, [changes[i] for i in chosen])
        found.append(_Part(heads, group.whole, group.edited_operands(), group.sinks))
    return found


def _level(parts: list[_Part], level: type[Edit], method: str, edits: Sequence[Edit], values: list[Tensor]) -> list[Tensor]:
    for edit in edits:
        if not isinstance(edit, level):
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
    return [whole.index_select(1, heads_index(tuple(part.heads), whole.device)) for part in parts]


def _in_order(parts: list[_Part], values: list[Tensor]) -> Tensor:
    """[B, H, ...] in the order of the heads."""
    if len(parts) == 1:
        return values[0]
    order = [head for part in parts for head in part.heads]
    places = tuple(order.index(head) for head in range(len(order)))
    return torch.cat(values, dim=1).index_select(1, heads_index(places, values[0].device))


def group_heads(num_heads: int, edits: Sequence[Edit]) -> dict[tuple[int, ...], list[int]]:
    """Heads with the same edits: {indices of edits: heads}."""
    groups: dict[tuple[int, ...], list[int]] = {}
    if all(edit.heads is None for edit in edits):
        return {tuple(range(len(edits))): list(range(num_heads))}
    for head in range(num_heads):
        groups.setdefault(tuple(i for i, e in enumerate(edits) if e.heads is None or head in e.heads), []).append(head)
    return groups


@functools.lru_cache(maxsize=1024)
def heads_index(heads: tuple[int, ...], device: torch.device) -> Tensor:
    """The heads as a tensor on the device, made once: every layer asks for its own at every step."""
    with torch.inference_mode(False):
        return torch.tensor(heads, device=device)
