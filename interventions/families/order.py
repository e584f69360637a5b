"""Segments of a prompt whose order should not matter (PINE): how important each is to a query, and at which distance it is then seen.

Importance is attention without positions, from queries and keys that are turned back by their own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..call import Call
from ..edits.rearrange import Rearrange
from ..engine.kernels import attend, grouped_matmul, statistics_dtype
from ..errors import ReattendError
from ..rotary import Rotary

Order = Literal["importance", "reverse", "prompt"]


@dataclass(frozen=True, eq=False)
class Layout:
    """spans int32 [B, m, 2] and first int32 [B] as in `Rearrange`, at absolute positions; empty spans fill up rows with fewer segments."""

    spans: Tensor
    first: Tensor
    # what steps after the segments need of them, by device and dtype
    held: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of(cls, segments: list[Tensor], bos: Tensor) -> Layout | None:
        """From bool [B, n] per segment and [B, n] for each sequence's first real token; rows with one segment have nothing to order."""
        held = torch.stack(segments, dim=1).cpu()  # [B, m, n]
        there = held.any(dim=2)
        start = held.int().argmax(dim=2)
        spans = torch.stack([start, start + held.sum(dim=2)], dim=2) * there[..., None]
        spans = spans * (there.sum(dim=1) > 1)[:, None, None]
        return None if not bool(spans.any()) else cls(spans.int(), bos.cpu().int().argmax(dim=1).int())

    @property
    def lengths(self) -> Tensor:
        """Int32 [B, m]."""
        return self.spans[..., 1] - self.spans[..., 0]

    @property
    def end(self) -> Tensor:
        """Int32 [B]: where the last segment ends."""
        return self.spans[..., 1].amax(dim=1)

    def sizes(self, longest: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        """For rows after the segments: lengths, their logarithms and `following` [B, 1, 1, m] on a device, and which of `longest` places
        of a segment are empty, bool [B, 1, 1, m, longest], or None.
        """
        key = (longest, device, dtype)
        if key not in self.held:
            with torch.inference_mode(False):  # kept longer than the pass that makes it
                empty = torch.arange(longest) >= self.lengths[..., None]
                lengths, following = (x[:, None, None].to(device, dtype) for x in (self.lengths, self.following))
                self.held[key] = {
                    "empty": empty[:, None, None].to(device) if bool(empty.any()) else None,
                    "lengths": lengths,
                    "log": lengths.clamp_min(1).log(),
                    "following": following,
                }
        return self.held[key]

    @property
    def following(self) -> Tensor:
        """Int32 [B, m]: tokens of the segments after each one, by which its base position exceeds its own."""
        return self.lengths.flip(1).cumsum(1, dtype=torch.int32).flip(1) - self.lengths


def segment_scores(
    query: Tensor, key: Tensor, lengths: list[int], own: list[tuple[int, int]], scale: float, softcap: float | None
) -> Tensor:
    """[B, H, T, m]: log of the summed exp(scores) of each query over the keys of each segment; -inf for a row's own segment.

    query [B, H, T, D] and key [B, Hkv, sum of lengths, D], both turned back by their positions, in statistics dtype. own: for each
    segment its rows [start, stop), which may be none. The sums are the fused kernel's: writing scores out takes longer.
    """
    rows = query.shape[2]
    result = query.new_full((*query.shape[:3], len(lengths)), float("-inf"))
    for j, (part, (low, high)) in enumerate(zip(key.split(lengths, dim=2), own, strict=True)):
        for start, stop in ((0, low), (high, rows)) if high > low else ((0, rows),):
            if stop > start:
                lse = attend(query[:, :, start:stop], part, part, None, False, scale, softcap, None, True, piece=True)[1]
                assert lse is not None
                result[:, :, start:stop, j] = lse
    return result


def moves(importance: Tensor, lengths: Tensor, order: Order) -> Tensor:
    """Like importance [..., m]: how many tokens of segments that rank higher stand between a query and each segment.

    lengths: of importance's dtype and broadcastable to it. Equal importance keeps the order of the prompt.
    """
    if order == "reverse":
        # whatever is at +inf (a query's own segment) stays nearest
        importance = torch.where(importance == float("inf"), importance, -importance)
    ranking = importance.sort(dim=-1, descending=True, stable=True).indices
    sizes = lengths.expand(importance.shape).gather(-1, ranking)
    return torch.empty_like(sizes).scatter_(-1, ranking, sizes.cumsum(dim=-1) - sizes)


def rearranged(call: Call, layout: Layout, order: Order) -> Rearrange:
    """The edit that lets every query of a call meet the segments in the order of their importance to it.

    All segments must have been in one pass; keys without positions stay in call.memory for the steps after it (in float32). Raises
    ReattendError where that is not so, and for calls whose window or frequencies do not cover the whole sequence.
    """
    rotary = call.rotary
    total, keys, rows = call.total, call.key.shape[2], call.query.shape[2]
    start = total - rows
    known = call.memory.get("pass")
    if known is None or known[0] != (total, rows):
        check_reach(call, rotary)
        known = call.memory["pass"] = ((total, rows), _checked(call, layout, rotary, start))
    shared: dict = known[1]
    if shared["reached"].get(keys) is not rotary:  # layers of a pass share it
        check_reach(call, rotary)
        shared["reached"][keys] = rotary
    positions = rotary.positions
    if positions is None:
        positions = torch.arange(start, call.total, device=call.query.device)[None]
    if shared["inside"]:
        steps = _prompt_steps(call, layout, rotary, positions, start, order)
    else:
        steps = _later_steps(call, layout, rotary, positions, order, shared)
    like = shared.get("like")
    if like is not None and like.steps.shape == steps.shape:
        return like.again(steps, rotary, shared)
    edit = Rearrange(
        spans=layout.spans[:, None],
        steps=steps,
        first=layout.first,
        start=start,
        rotary=rotary,
        hidden=shared["hidden"],
        rows=shared["rows"],
        shared=shared,
    )
    shared["like"] = edit.again(steps, rotary, {})
    return edit


def check_reach(call: Call, rotary: Rotary) -> None:
    """Raises ReattendError where a site does not see the whole sequence at the positions that it has."""
    where = call.site.name if call.site else "this call"
    if call.key_start or (rotary.window is not None and call.total > rotary.window):
        raise ReattendError(
            f"{where} has a sliding window of {rotary.window or call.num_keys} tokens and the sequence {call.total}: segments can "
            f"only be rearranged while the window covers all of it"
        )
    if rotary.limit is not None and call.total > rotary.limit:
        raise ReattendError(
            f"{where} changes its rotary frequencies beyond {rotary.limit} tokens, and the sequence has {call.total}: shorten it"
        )


def _checked(call: Call, layout: Layout, rotary: Rotary, start: int) -> dict:
    """What all layers of a pass share, after a look at whether the pass can be rearranged."""
    tokens = call.tokens
    assert tokens is not None
    real = (layout.lengths > 0).any(dim=1)
    begin, end = int(layout.spans[real, 0, 0].min()), int(layout.end.max())
    if start < end and (start > begin or call.total < end):
        raise ReattendError(
            f"the segments (tokens {begin} to {end}) must be in one forward pass, this one has tokens {start} to {call.total}: pass "
            f"the prompt as a whole, without prefill_chunk_size"
        )
    if start < end and rotary.positions is not None:
        for row in real.nonzero()[:, 0].tolist():
            low, high = int(layout.spans[row, 0, 0]) - start, int(layout.end[row]) - start
            ids = rotary.positions[row if rotary.positions.shape[0] > 1 else 0, low:high]
            if bool((ids.diff() != 1).any()):
                raise ReattendError(f"position_ids of prompt {row} must count up by one over its segments")
    key = ("rows", tokens.prompt_length, call.query.device)
    if key not in layout.held:
        padding = tokens.positions("padding", 0, tokens.prompt_length)
        late = padding & (torch.arange(tokens.prompt_length) >= layout.first[:, None])
        layout.held[key] = (
            late.to(call.query.device) if bool(late.any()) else None,
            None if bool(real.all()) else real[:, None].to(call.query.device),
        )
    late, rows = layout.held[key]
    hidden = None if late is None else pad(late, (0, call.num_keys - late.shape[1]))
    return {"hidden": hidden, "inside": start < end, "rows": rows, "held": layout.held, "reached": {}}


def _prompt_steps(call: Call, layout: Layout, rotary: Rotary, positions: Tensor, start: int, order: Order) -> Tensor:
    """Steps [B, H, Tq, m + 1] of a pass that holds the segments; remembers their keys without positions, [B, Hkv, m, longest, D]."""
    assert call.site is not None
    m, longest = layout.spans.shape[1], int(layout.lengths.max())
    shape = (call.batch, call.num_heads, call.num_queries, m + 1)
    steps = torch.zeros(shape, dtype=torch.int32, device=call.query.device)
    if order == "prompt":
        return steps
    dtype = statistics_dtype(call.key)
    kept = call.key.new_zeros(call.batch, call.key.shape[1], m, longest, call.key.shape[3], dtype=dtype)
    for rows in alike(layout):
        spans = [(a, b) for a, b in layout.spans[rows[0]].tolist() if b > a]
        if not spans:
            continue
        begin, end = spans[0][0], spans[-1][1]
        pick = slice(None) if len(rows) == call.batch else torch.tensor(rows, device=call.query.device)
        at = positions if positions.shape[0] == 1 else positions[pick]
        keys = rotary.turn(call.key[pick, :, begin:end].to(dtype), -at[:, None, begin - start : end - start])
        low = (begin if len(spans) > 2 else end) - start  # of two segments each has only one other: nothing to rank
        query = rotary.turn(call.query[pick, :, low:].to(dtype), -at[:, None, low:])
        lengths = [b - a for a, b in spans]
        own = [(a - start - low, b - start - low) if len(spans) > 2 else (0, 0) for a, b in spans]
        scores = segment_scores(query, keys, lengths, own, call.scaling, call.softcap)
        sizes = layout.sizes(longest, scores.device, scores.dtype)
        long, following = (sizes[name][rows[0], 0, 0, : len(spans)] for name in ("lengths", "following"))
        found = segment_steps(scores, spans, long, following, start, order, call.num_queries)
        steps[pick, :, :, : found.shape[-1]] = found
        for j, part in enumerate(keys.split(lengths, dim=2)):
            kept[pick, :, j, : part.shape[2]] = part
    call.memory["keys", call.site.name] = kept
    return steps


def _later_steps(call: Call, layout: Layout, rotary: Rotary, positions: Tensor, order: Order, shared: dict) -> Tensor:
    """Steps [B, H, Tq, m + 1] of rows after the segments, from the keys that were remembered."""
    assert call.site is not None
    if order == "prompt":
        m = layout.spans.shape[1]
        return torch.zeros(call.batch, call.num_heads, call.num_queries, m + 1, dtype=torch.int32, device=call.query.device)
    keys = call.memory.get(("keys", call.site.name))
    if keys is None or keys.shape[0] != call.batch:
        raise ReattendError(
            f"{call.site.name}: the segments were read before this session began; start it before the prompt is read"
        )
    sizes = layout.sizes(keys.shape[3], call.query.device, keys.dtype)
    back = shared.get(id(rotary.frequencies))
    if back is None:  # layers share their angles, or come in two kinds
        back = shared[id(rotary.frequencies)] = rotary.trigonometry(-positions[:, None], keys)
    query = rotary.turned(call.query, *back)
    scores = grouped_matmul(query * call.scaling, keys.flatten(2, 3)).unflatten(3, keys.shape[2:4])
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    if sizes["empty"] is not None:
        scores = scores.masked_fill(sizes["empty"], float("-inf"))
    importance = scores.logsumexp(dim=-1) - sizes["log"]
    return pad(moves(importance, sizes["lengths"], order) - sizes["following"], (1, 0)).int()


def alike(layout: Layout) -> list[list[int]]:
    """Batch rows with the same segments at the same places, together."""
    found: dict[str, list[int]] = {}
    for row, (spans, first) in enumerate(zip(layout.spans.tolist(), layout.first.tolist(), strict=True)):
        found.setdefault(f"{spans} {first}", []).append(row)
    return list(found.values())


def segment_steps(
    scores: Tensor, spans: list[tuple[int, int]], lengths: Tensor, following: Tensor, start: int, order: Order, rows: int
) -> Tensor:
    """Int32 [B, H, rows, m + 1]: the steps of `Rearrange` for batch rows of one layout.

    scores [B, H, n, m]: `segment_scores` of the query rows from the first segment on (n = 0 without them). start: absolute position
    of query row 0. lengths, following [m] as in `Layout`, where and as the scores are.
    """
    m = len(spans)
    batch, heads, known, _ = scores.shape
    steps = torch.zeros(batch, heads, rows, m + 1, dtype=torch.int32, device=scores.device)
    offset = rows - known  # the query row that the first row of scores stands for
    for i, (a, b) in enumerate(spans):
        low, high = a - start, b - start
        if high <= 0:
            continue
        if m > 2:
            mass = scores[:, :, low - offset : high - offset].softmax(dim=-1).sum(dim=2) / lengths
        else:
            mass = scores.new_zeros(batch, heads, m)
        mass[..., i] = float("inf")
        steps[:, :, low:high, 0] = following[i]
        steps[:, :, low:high, 1:] = (following[i] + moves(mass, lengths, order) - following)[:, :, None]
    after = max(0, spans[-1][1] - start)
    importance = scores[:, :, after - offset :] - lengths.log()
    steps[:, :, after:, 1:] = moves(importance, lengths, order) - following
    return steps
