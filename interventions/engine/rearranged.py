"""Attention under `Rearrange`, block by block: each block runs in the fused kernel, and blocks are merged by their log-sum-exps.

Rows before the segments are ordinary. Rows of a segment meet three blocks: their own segment causally, the others, the prefix. Rows
after the segments each have an order of their own, so they meet one block per segment with a query turned for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..call import Call
from ..edits.base import Edit, repeat_heads
from ..edits.operands import Operands
from ..edits.rearrange import Rearrange
from ..rotary import Rotary
from .kernels import attend, grouped_matmul, grouped_values, softmax_rows, statistics_dtype
from .one_row import sizes_of
from .tasks import FEW_ROWS, Group

NAME = "rearranged blocks"
# Up to this many groups a decode step scores every key with every turn of its query: fewer operations than block by block.
FEW_GROUPS = 8


def is_rearranged(group: Group) -> bool:
    return isinstance(group.pending, Rearrange) and not (group.biases or group.scores or group.weights)


def run(group: Group, _: object) -> Tensor:
    edit, call = group.pending, group.call
    assert isinstance(edit, Rearrange)
    output = rearranged_attention(group.x, edit, call.scaling, call.softcap, group.sinks)
    if (
        group.few
        and edit.shared["after all"]
        and group.whole
        and len(group.edits) == 1
        and edit.heads is None
        and edit.rows is None
    ):
        # layers of a pass have edits of their own, which share what was found
        edit.shared["known"] = sizes_of(call), call.num_keys, (), None, NAME, _again
    return output


def _again(call: Call, edits: Sequence[Edit]) -> Tensor:
    edit = edits[0]
    assert isinstance(edit, Rearrange)
    x = Operands(call.query, call.key, call.value, call.mask, call.is_causal, offset=edit.start)
    return _few_rows(x, edit, call.scaling, call.softcap, call.sinks)


def rearranged_attention(x: Operands, edit: Rearrange, scale: float, softcap: float | None, sinks: Tensor | None) -> Tensor:
    """The output [B, H, Tq, Dv] of operands under `Rearrange` alone: the numbers of its `on_operands`, without its memory."""
    if x.query.shape[2] <= FEW_ROWS:
        if "after all" not in edit.shared:
            edit.shared["after all"] = int(edit.spans.max()) <= edit.start
            edit.shared["same"], edit.shared["padded"] = len(alike_rows(edit)) == 1, int(edit.first.max()) > 0
        if edit.shared["after all"]:
            return _few_rows(x, edit, scale, softcap, sinks)
    alike = alike_rows(edit)
    output = x.query.new_zeros(*x.query.shape[:3], x.value.shape[3])
    for rows in alike:
        whole = len(alike) == 1
        pick = slice(None) if whole else torch.tensor(rows, device=x.query.device)
        steps = edit.steps if edit.steps.shape[0] == 1 else edit.steps[pick]
        hidden = None if edit.hidden is None else edit.hidden[pick, 0]
        spans = [(a, b) for a, b in edit.spans[rows[0], 0].tolist() if b > a]
        blocks = _Blocks(
            x.query[pick], x.key[pick], x.value[pick], steps, hidden, int(edit.first[rows[0], 0]), spans, edit.start, edit.rotary,
            scale, softcap, sinks,
        )  # fmt: skip
        output[pick] = blocks.run()
    return output


def alike_rows(edit: Rearrange) -> list[list[int]]:
    """Batch rows with the same segments at the same places, together."""
    found: dict[str, list[int]] = {}
    for row, (spans, first) in enumerate(zip(edit.spans.tolist(), edit.first.tolist(), strict=True)):
        found.setdefault(f"{spans} {first}", []).append(row)
    return list(found.values())


@dataclass
class _Blocks:
    """Batch rows of one layout, computed block by block."""

    query: Tensor
    key: Tensor
    value: Tensor
    steps: Tensor
    hidden: Tensor | None
    first: int
    spans: list[tuple[int, int]]
    start: int
    rotary: Rotary
    scale: float
    softcap: float | None
    sinks: Tensor | None
    # values for every query head
    wide: Tensor | None = None
    # the mask of the columns before the segments, once it is known
    holes: tuple[Tensor | None] | None = None

    def run(self) -> Tensor:
        rows = self.query.shape[2]
        output = self.query.new_zeros(*self.query.shape[:3], self.value.shape[3])
        begin, end = (self.spans[0][0], self.spans[-1][1]) if self.spans else (self.start + rows,) * 2
        low, high = max(0, self.first - self.start), min(rows, begin - self.start)
        if high > low:
            output[:, :, low:high] = self._merge([self._causal(low, high, self.first)])
        for i, (a, b) in enumerate(self.spans):
            if b > self.start:
                output[:, :, a - self.start : b - self.start] = self._segment(i, a - self.start, b - self.start)
        after = max(0, end - self.start)
        if after < rows:
            output[:, :, after:] = self._after(after, begin, end)
        return output

    def _segment(self, i: int, low: int, high: int) -> Tensor:
        """Rows of segment i: its own keys causally, the prefix and all other segments whole. All rows of a head share one order."""
        a, _ = self.spans[i]
        begin = self.spans[0][0]
        query, steps = self.query[:, :, low:high], self.steps[:, :, low]
        parts = [self._causal(low, high, a)]
        # one turn to the base position serves the prefix; keys of the other segments are turned, per head, by what is left
        query = self.rotary.turn(query, steps[:, :, :1])
        left = steps[..., :1] - steps[..., 1:]
        if begin > self.first:
            parts.append(self._prefix(query, begin))
        for others in (range(i), range(i + 1, len(self.spans))):
            if others:
                parts.append(self._attend(query, *self._turned(others, left)))
        return self._merge(parts)

    def _turned(self, segments: range, steps: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of neighbouring segments for every query head, the keys turned by steps [B, H, m]."""
        begin, end = self.spans[segments[0]][0], self.spans[segments[-1]][1]
        batch, heads, _ = steps.shape
        shared, dim = self.key.shape[1], self.key.shape[3]
        shape = (batch, shared, heads // shared, end - begin, dim)
        keys = torch.empty(shape, dtype=statistics_dtype(self.key), device=self.key.device)
        cos, sin = (t.unflatten(1, shape[1:3]) for t in self.rotary.trigonometry(steps, self.key))
        for j in segments:
            a, b = self.spans[j]
            own = slice(a - begin, b - begin)
            self.rotary.turned(self.key[:, :, None, a:b], cos[:, :, :, None, j], sin[:, :, :, None, j], keys[:, :, :, own])
        if self.wide is None:
            self.wide = repeat_heads(self.value, heads)
        return keys.flatten(1, 2).to(self.key.dtype), self.wide[:, :, begin:end]

    def _after(self, after: int, begin: int, end: int) -> Tensor:
        """Rows after the segments, each with an order of its own: one turn of the query per segment."""
        query, steps = self.query[:, :, after:], self.steps[:, :, after:]
        parts = [self._causal(after, self.query.shape[2], end)]
        if begin > self.first and self.spans:
            parts.append(self._prefix(query, begin))
        for j, (a, b) in enumerate(self.spans):
            parts.append(self._attend(self.rotary.turn(query, steps[..., j + 1]), self.key[:, :, a:b], self.value[:, :, a:b]))
        return self._merge(parts)

    def _prefix(self, query: Tensor, begin: int) -> tuple[Tensor, Tensor]:
        """Query rows over what stands before the segments, all of it but columns that nobody sees."""
        if self.holes is None:
            hidden = None if self.hidden is None else self.hidden[:, self.first : begin]
            self.holes = (None if hidden is None or not bool(hidden.any()) else ~hidden[:, None, None],)
        return self._attend(query, self.key[:, :, self.first : begin], self.value[:, :, self.first : begin], self.holes[0])

    def _causal(self, low: int, high: int, column: int) -> tuple[Tensor, Tensor]:
        """Query rows low..high over the columns from `column` up to their own."""
        stop = self.start + high
        query, key, value = self.query[:, :, low:high], self.key[:, :, column:stop], self.value[:, :, column:stop]
        hidden = None if self.hidden is None else self.hidden[:, column:stop]
        if hidden is None or not bool(hidden.any()):
            return self._attend(query, key, value, is_causal=True)
        rows, columns = torch.arange(low, high) + self.start, torch.arange(column, stop)
        causal, own = (f(columns[None], rows[:, None]).to(query.device) for f in (torch.le, torch.eq))
        return self._attend(query, key, value, mask=((causal & ~hidden[:, None]) | own)[:, None])

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask=None, is_causal: bool = False) -> tuple[Tensor, Tensor]:
        output, lse = attend(query, key, value, mask, is_causal, self.scale, self.softcap, None, True, piece=True)
        assert lse is not None
        return output, lse

    def _merge(self, parts: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Attention over the keys of all parts, from their outputs and log-sum-exps."""
        if len(parts) == 1 and self.sinks is None:
            return parts[0][0]
        dtype = statistics_dtype(self.query)
        lse = torch.stack([part for _, part in parts]).to(dtype)
        total = lse.logsumexp(dim=0)
        if self.sinks is not None:
            total = torch.logaddexp(total, self.sinks.to(dtype).view(1, -1, 1))
        share = (lse - total).exp()[..., None]
        output = parts[0][0] * share[0]
        for (part, _), weight in zip(parts[1:], share[1:]):
            output = output.addcmul_(part.to(output.dtype), weight) if not output.requires_grad else output + part * weight
        return output.to(self.query.dtype)


def _few_rows(x: Operands, edit: Rearrange, scale: float, softcap: float | None, sinks: Tensor | None) -> Tensor:
    """Decode: one or few rows after the segments, all batch rows at once."""
    dtype = statistics_dtype(x.query)
    batch, heads, rows, dim = x.query.shape
    stop, m = edit.start + rows, edit.spans.shape[2]
    key, value = x.key[:, :, :stop].to(dtype), x.value[:, :, :stop].to(dtype)
    query = x.query.to(dtype) * scale
    blocks = edit.rotary.turn(query.unsqueeze(2), edit.steps.transpose(2, 3))  # [B, H, m + 1, T, D]
    if m < FEW_GROUPS or not edit.shared["same"]:
        scores = grouped_matmul(blocks.reshape(batch, heads, (m + 1) * rows, dim), key).unflatten(2, (m + 1, rows))
        key_of = "groups", stop, batch, heads, rows
        group = edit.shared.get(key_of)
        if group is None:
            group = edit.groups_on(stop, scores.device)[:, None, None, None].expand(batch, heads, 1, rows, -1)
            edit.shared[key_of] = group
        scores = scores.gather(2, group).squeeze(2)
    else:
        scores = grouped_matmul(query, key)
        for j, (a, b) in enumerate(edit.spans[0, 0].tolist()):
            scores[..., a:b] = grouped_matmul(blocks[:, :, j + 1], key[:, :, a:b])
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if rows > 1 or edit.hidden is not None or edit.shared["padded"]:
        seen = edit.shared.get(("seen", rows, stop))
        if seen is None:
            seen = edit.shared[("seen", rows, stop)] = edit.visible(torch.arange(rows, device=scores.device), stop)
        scores = scores.masked_fill(~seen, float("-inf"))
    else:
        seen = None
    # every row sees something here
    weights = scores.softmax(dim=-1) if seen is None and sinks is None else softmax_rows(scores, sinks)
    return grouped_values(weights, value).to(x.query.dtype)
