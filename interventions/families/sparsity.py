"""Sparse reading of long contexts: which blocks of keys a query likes, judged by their mean keys, and the columns that stay with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..call import Call
from ..edits import Chosen, Keep, Pattern, Rows
from ..engine.kernels import visible_rows


@dataclass(frozen=True)
class Budget:
    """What a row of a long context reads: its first `sinks` tokens, the `blocks` best blocks of `size` tokens, and at least `local` last ones.

    Blocks follow the sinks one after the other; the tokens after the last whole block that is not local are read with these.
    """

    sinks: int
    local: int
    blocks: int
    size: int

    @property
    def everything(self) -> int:
        """Sequences up to this length are read whole."""
        return -(-(self.sinks + self.local + self.blocks * self.size) // self.size) * self.size

    @property
    def most(self) -> int:
        """The most columns that any row reads."""
        return max(self.everything, self.sinks + self.blocks * self.size + self.local + self.size - 1)


@dataclass(frozen=True, eq=False)
class LastRows(Pattern):
    """Pairs of the last rows of a call, `keep` bool [B, H or Hkv or 1, R, Tk]; rows before them see everything."""

    keep: Tensor

    @property
    def heads(self) -> int:
        return self.keep.shape[1]

    def at_heads(self, index: Sequence[int]) -> LastRows:
        return LastRows(self.keep[:, list(index)])

    def at_batch(self, index: Tensor) -> LastRows:
        return LastRows(self.keep[index])

    def pairs(self, rows: Rows, num_keys: int) -> Tensor:
        own = rows.index - (rows.query.shape[2] - self.keep.shape[2])
        return self.keep[:, :, own.clamp_min(0)] | (own < 0)[:, None]


class BlockMeans:
    """Mean keys of the blocks of a growing cache: those that are new since the last step are read, no others."""

    def __init__(self, start: int, size: int) -> None:
        self.start, self.size, self.known = start, size, 0
        self.stored: Tensor | None = None

    def upto(self, key: Tensor, count: int) -> Tensor:
        """[B, Hkv, count, D] of the first `count` blocks of key [B, Hkv, n, D]."""
        stored = self.stored
        if stored is None or stored.shape[0] != key.shape[0] or stored.device != key.device:
            stored, self.known = key.new_empty(*key.shape[:2], 0, key.shape[3]), 0
        if stored.shape[2] < count:
            wider = key.new_empty(*key.shape[:2], 2 * count + 64, key.shape[3])
            wider[:, :, : self.known] = stored[:, :, : self.known]
            stored = wider
        if self.known < count:
            low, high = (self.start + blocks * self.size for blocks in (self.known, count))
            stored[:, :, self.known : count] = key[:, :, low:high].unflatten(2, (-1, self.size)).mean(dim=3)
            self.known = count
        self.stored = stored
        return stored[:, :, :count]

    def move(self, index: Tensor) -> None:
        """Rows go where those of the cache go."""
        if self.stored is not None:
            self.stored = self.stored.index_select(0, index.to(self.stored.device))

    def crop(self, length: int) -> BlockMeans:
        """What holds of the first `length` tokens."""
        self.known = min(self.known, max(0, length - self.start) // self.size)
        return self


def block_scores(query: Tensor, means: Tensor) -> Tensor:
    """[B, Hkv, R, n]: mean query of the heads that share a key head times mean key. query [B, H, R, D], means [B, Hkv, n, D]."""
    group = query.unflatten(1, (means.shape[1], -1)).float().mean(dim=2)
    return group @ means.float().transpose(2, 3)


def best_blocks(call: Call, budget: Budget, rows: int, means: BlockMeans | None = None) -> Keep | None:
    """Only the budget's columns for the last `rows` query rows, other blocks for each key head; None where all are read whole.

    Columns are counted among those that a row sees, so padding and what a window has left are no part of it. means: where blocks do not
    move from step to step, their means are kept here.
    """
    if rows == 0 or call.num_keys <= budget.everything:
        return None
    if call.mask is None and call.num_queries == 1:
        count = (call.num_keys - budget.local - budget.sinks) // budget.size
        known = means if means is not None and not call.key_start else BlockMeans(budget.sinks, budget.size)
        best = block_scores(call.query, known.upto(call.key, count))[:, :, 0].topk(budget.blocks, dim=-1).indices
        place = torch.arange(budget.size, device=best.device)
        inside = (budget.sinks + best[..., None] * budget.size + place).flatten(2)
        first = torch.arange(budget.sinks, device=best.device)
        last = torch.arange(budget.sinks + count * budget.size, call.num_keys, device=best.device)
        ends = torch.cat([first, last]).expand(*best.shape[:2], -1)
        return Keep(pattern=Chosen(torch.cat([inside, ends], dim=2)))
    keep = _kept(call, budget, rows)
    if call.num_queries > 1:
        return Keep(pattern=LastRows(keep), rows=torch.arange(call.num_queries, device=keep.device) >= call.num_queries - rows)
    chosen = keep[:, :, 0].to(torch.uint8).topk(min(budget.most, call.num_keys), dim=-1)
    return Keep(pattern=Chosen(chosen.indices, chosen.values > 0))


def _kept(call: Call, budget: Budget, rows: int) -> Tensor:
    """Bool [B, Hkv, rows, Tk]: what the last rows read, each of the columns that it sees."""
    index = torch.arange(call.num_queries - rows, call.num_queries, device=call.query.device)
    seen = visible_rows(call.mask, call.is_causal, index, call.num_queries, call.num_keys)
    assert seen is not None
    seen = seen[:, :1].expand(call.batch, 1, rows, call.num_keys)
    place = seen.long().cumsum(dim=-1) - 1
    total = seen.sum(dim=-1, keepdim=True)
    count = ((total - budget.local - budget.sinks) // budget.size).clamp_min(0)
    block = (place - budget.sinks).clamp_min(0) // budget.size
    dynamic = seen & (place >= budget.sinks) & (block < count)
    # the mean of a block's scores is the score of its mean key
    scores = block_scores(call.query[:, :, index], call.key) * dynamic
    most = -(-call.num_keys // budget.size) + 1
    sums = scores.new_zeros(*scores.shape[:3], most).scatter_add(3, block.expand_as(scores), scores)
    sums = sums.masked_fill(torch.arange(most, device=sums.device) >= count, float("-inf"))
    best = torch.zeros_like(sums, dtype=torch.bool)
    best = best.scatter(3, sums.topk(min(budget.blocks, most), dim=-1).indices, True)
    whole = total <= budget.everything
    return seen & (whole | ~dynamic | best.gather(3, block.expand_as(scores)))
