"""Calibration: which columns draw attention, measured over all rows without ever holding the n x n matrix.

The weights of a chunk of rows are exp(S - lse) with the log-sum-exp of the fused kernel. A causal chunk is computed only on the
columns that it can see, and is reduced to one sum per column before the next one starts: O(chunk * n) memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from ..call import Call
from ..edits.base import heads_index
from ..engine.reading import untouched_heads
from ..engine.statistics import Chunk, chunks
from ..engine.statistics import column_statistics as sums_and_counts
from ..errors import ReattendError


@dataclass
class ColumnStatistics:
    """What rows gave to columns, at absolute positions.

    sums [B, heads, n]: weights. counts [B, 1 or heads, n]: rows that see the column. rows: the absolute position
    after the last row counted. Sums and counts are kept apart so that the chunks of a prefill add up.
    """

    sums: Tensor
    counts: Tensor
    rows: int

    @property
    def means(self) -> Tensor:
        """[B, heads, n]: mean weight over the rows that see the column; 0 where none does."""
        return self.sums / self.counts.clamp_min(1)

    def plus(self, later: ColumnStatistics) -> ColumnStatistics:
        """The statistics of both sets of rows."""
        n = max(self.sums.shape[2], later.sums.shape[2])

        def both(a: Tensor, b: Tensor) -> Tensor:
            return pad(a, (0, n - a.shape[2])) + pad(b, (0, n - b.shape[2]))

        return ColumnStatistics(both(self.sums, later.sums), both(self.counts, later.counts), later.rows)


def column_statistics(call: Call, heads: Sequence[int]) -> ColumnStatistics:
    """Sums and counts of the untouched weights of these heads per key column, over the call's real prompt rows.

    Rows of padding, and rows of tokens that assisted decoding has only drafted, are left out; columns of padding get sum 0 and count 0.
    heads: as for `weight_chunks`.
    """
    counted = None if call.tokens is None else call.query_rows("prompt")
    query, key, lse, mask = _constants(call, heads)
    sums, counts = sums_and_counts(query, key, lse, mask, call.is_causal, call.scaling, call.softcap, counted)
    if call.tokens is not None:
        padding = call.columns("padding")[:, None]
        sums, counts = sums.masked_fill(padding, 0), counts.masked_fill(padding, 0)
    before = call.key_start
    return ColumnStatistics(pad(sums, (before, 0)), pad(counts, (before, 0)), call.total)


def weight_chunks(call: Call, heads: Sequence[int]) -> Iterator[Chunk]:
    """The untouched weights of these heads, some rows at a time. Raises ReattendError for a head that the call does not have.

    heads: in ascending order. Their output and log-sum-exp stay on the call, so that editing them costs no second kernel. The weights
    are constants: they carry no gradient.
    """
    yield from chunks(*_constants(call, heads), call.is_causal, call.scaling, call.softcap)


def _constants(call: Call, heads: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(query, key, log-sum-exp, mask) of these heads, without gradients."""
    heads = list(heads)
    if not heads or min(heads) < 0 or max(heads) >= call.num_heads:
        raise ReattendError(f"heads must name heads 0 to {call.num_heads - 1} of this attention, got {heads}")
    if heads != sorted(set(heads)):
        raise ReattendError(f"heads must be distinct and in ascending order, got {heads}")
    x, lse = untouched_heads(call, heads)
    return x.query.detach(), x.key.detach(), lse.detach(), None if x.mask is None else x.mask.detach()


def hidden_sinks(
    statistics: ColumnStatistics,
    threshold: float | Tensor,
    first: Tensor | None = None,
    exempt_first_over: bool = False,
    min_rows: int = 1,
) -> Tensor:
    """Bool [B, heads, n]: columns whose mean weight is over the threshold, except the useful sink at the start of each sequence.

    threshold: a number, or [B, 1, 1]. first: bool [B, n], each sequence's first real token (None: column 0). exempt_first_over:
    spare the first column over the threshold instead, whichever it is. min_rows: columns that fewer rows see are never sinks.
    """
    over = (statistics.means > threshold) & (statistics.counts >= min_rows)
    if exempt_first_over:
        return over & (over.cumsum(dim=2) > 1)
    if first is None:
        over[..., 0] = False
        return over
    return over & ~first[:, None]


@dataclass
class KnownSinks:
    """What a prompt taught about some heads of one site. heads: those with a sink. sinks: bool [B, heads, n], absolute positions;
    end: the position after the last of them.
    """

    statistics: ColumnStatistics
    heads: list[int]
    sinks: Tensor
    end: int
    # what steps of an answer keep for the next one
    kept: dict[str, Any] = field(default_factory=dict, repr=False)

    def columns(self, call: Call) -> Tensor:
        """The sinks as key columns [B, heads, Tk] of a call. Tokens that came later are none."""
        part = self.sinks[..., call.key_start : call.key_start + call.num_keys]
        return pad(part, (0, call.num_keys - part.shape[2]))


def learn_sinks(
    call: Call,
    heads: Sequence[int],
    known: KnownSinks | None = None,
    *,
    threshold: float,
    alpha: float | None = None,
    exempt_first_over: bool = False,
    min_rows: int = 1,
) -> KnownSinks:
    """Hidden sinks of these heads after this part of a prompt. known: what earlier parts taught; dropped where this part starts over.

    alpha: the threshold is alpha / the number of the row's real prompt tokens instead. The rest is that of `hidden_sinks`.
    """
    found = column_statistics(call, heads)
    if known is not None and known.statistics.rows <= call.total - call.num_queries:
        found = known.statistics.plus(found)
    length, device = found.sums.shape[2], found.sums.device
    first = None if call.tokens is None else call.tokens.positions("bos", 0, length, device)
    limit: float | Tensor = threshold
    if alpha is not None:
        if call.tokens is None:
            limit = alpha / length
        else:
            limit = alpha / call.tokens.positions("prompt", 0, length, device).sum(dim=1).clamp_min(1)[:, None, None]
    sinks = hidden_sinks(found, limit, first, exempt_first_over, min_rows)
    held = sinks.any(dim=0).cpu()  # what the device is asked, once
    keep = held.any(dim=1).nonzero()[:, 0].tolist()
    end = int(held.any(dim=0).nonzero()[-1]) + 1 if keep else 0
    if len(keep) < sinks.shape[1]:
        sinks = sinks.index_select(1, heads_index(tuple(keep), device)) if keep else sinks[:, :0]
    return KnownSinks(found, [list(heads)[i] for i in keep], sinks, end)
