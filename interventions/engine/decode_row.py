"""Edits of a decode step as ONE additive row: what biases, factors and windows come to where a call has one query row, or rows alike.

A factor on columns whose rows get back their sum is the logarithm of that factor, added to their scores; a window hides all other columns,
and so does a transfer of all that its columns hold to all others. (One of a part is no row: by how much the others grow differs by row.)
The row and a factor per head follow from the edits and the sizes of a call alone, so that layers with the same edits share them, and a
step costs a layer no further operation than its own kernel with a mask. A factor on queries stands beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..call import Call
from ..edits import Band, Edit, Gain, HeadGain, Keep, ScaleQuery, ScoreEdit, Transfer, WeightEdit
from ..edits.base import column_mask, heads_index, heads_mask, kept_few, versions
from .tasks import group_heads

# What columns get that lose all their weight: beside others it is exactly 0, and rows that hold nothing else keep what they hold. Of
# several such edits each earlier one weighs twice as much, so that a later one cannot bring back what it took.
EMPTYING = -120.0
# What columns outside a window get: below what such edits give, and with biases beside it below what any of these may add. Rows that see
# nothing inside keep what they see, as exactly as the sums are.
OUTSIDE, OUTSIDE_BIASES = -1e3, -3e4


class Facts(NamedTuple):
    """What a row depends on besides its edits: the sizes of a call, the dtype of its query, its device."""

    batch: int
    heads: int
    queries: int
    keys: int
    dtype: torch.dtype
    device: torch.device

    @property
    def statistics(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32


class Added:
    """A bias [B or 1, H or 1, Tk] as kernels take it, with the masks of calls."""

    def __init__(self, bias: Tensor, dtype: torch.dtype) -> None:
        self.bias = bias
        self.row = bias[:, :, None].to(dtype)
        # the last mask of a call, its version, and both together: layers are given the same one
        self._last: tuple[tuple[Tensor, int, Tensor], ...] = ()

    def beside(self, mask: Tensor | None) -> Tensor:
        """[B or 1, H or 1, Tq or 1, Tk] in the query's dtype; mask as in `Call`."""
        if mask is None:
            return self.row
        if self.bias.requires_grad or mask.is_inference():
            return self._join(mask)
        version = mask._version
        for other, at, joined in self._last:
            if other is mask and at == version:
                return joined
        joined = self._join(mask)
        if not joined.requires_grad:
            # of the last two: layers of two kinds take turns with their masks
            self._last = (*self._last[-1:], (mask, version, joined))
        return joined

    def _join(self, mask: Tensor) -> Tensor:
        if mask.dtype == torch.bool:
            return torch.where(mask, self.row, float("-inf"))
        return (self.bias[:, :, None] + mask).to(self.row.dtype)


@dataclass(frozen=True, slots=True, eq=False)
class DecodeRow:
    """What edits come to in a call of few rows.

    bias: added to the scores of all rows, [B or 1, H or 1, Tk] in statistics dtype; None for nothing. gain, sharpness: factors on outputs and
    on queries, [B or 1, H or 1]. named: bool [B or 1, H or 1], the batch rows and heads that an edit names, None for all: the others keep
    the untouched output, whatever bias says of them. added: `bias` for kernels.
    """

    bias: Tensor | None = None
    gain: Tensor | None = None
    named: Tensor | None = None
    added: Added | None = None
    sharpness: Tensor | None = None


NOTHING = DecodeRow()


def facts_of(call: Call) -> Facts:
    query = call.query
    batch, heads, queries, _ = query.shape
    return Facts(batch, heads, queries, call.key.shape[2], query.dtype, query.device)


def takes(edit: Edit, facts: Facts) -> bool:
    """Whether an edit is a bias per key, a factor on columns or heads, or a window, the same for all rows; its values are not read."""
    if edit.rows is not None and facts.queries > 1 and edit.rows.shape[1] > 1:
        return False
    if isinstance(edit, ScoreEdit):
        window = isinstance(edit, Keep) and isinstance(edit.pattern, Band) and facts.queries == 1
        return window or edit.per_key is not None
    if isinstance(edit, Gain):
        factor = edit.factor
        # below 0 it takes values away, which no bias can
        if isinstance(factor, Tensor):
            alike = factor.shape[2] == 1 or facts.queries == 1
            # a logarithm has no gradient at 0
            positive = alike and facts.device.type == "cpu" and not edit._needs_gradient()
        else:
            positive = factor >= 0
        return positive and edit.one_factor is not None
    if isinstance(edit, Transfer):
        return edit.one_factor is not None and not isinstance(edit.strength, Tensor) and edit.strength == 1
    if isinstance(edit, ScaleQuery):
        return not isinstance(edit.factor, Tensor) or edit.factor.shape[2] == 1 or facts.queries == 1
    return isinstance(edit, HeadGain)


def decode_row(facts: Facts, edits: Sequence[Edit]) -> DecodeRow | None:
    """The row of edits all of which it `takes`; None where their values are none that a row can stand for.

    Made once for edits that layers share. Raises ReattendError for columns beyond the keys.
    """
    edit = edits[0]
    if all(isinstance(edit, (HeadGain, ScaleQuery)) for edit in edits):
        facts = facts._replace(keys=0)  # the same however long a cache has grown
    if edit.heads is not None and is_shared(edits):
        # one bias for whatever heads: layers that share it but for their heads share its row
        whole = _kept(edit.of_any_heads.setdefault("rows", {}), facts, edits, lambda: _row(facts, edits, None))
        return whole and replace(whole, named=heads_mask(edit.heads, facts.heads, facts.device))
    store = edits[0].remember("decode rows", dict)
    key = facts, versions(edits[1:]), *edits[1:]
    return _kept(store, key, edits, lambda: _row(facts, edits, named_pairs(facts, edits)))


def is_shared(edits: Sequence[Edit]) -> bool:
    """Whether it is one bias for whatever heads."""
    edit = edits[0]
    return len(edits) == 1 and edit.rows is None and isinstance(edit, (ScoreEdit, WeightEdit)) and not edit._has_head_axis()


def _kept(store: dict[Any, Any], key: Any, edits: Sequence[Edit], make: Callable[[], Any]) -> Any:
    if torch.is_grad_enabled() and any(edit._needs_gradient() for edit in edits):
        return make()
    with torch.inference_mode(False), torch.no_grad():
        return kept_few(store, key, make)


def _row(facts: Facts, edits: Sequence[Edit], named: Tensor | None) -> DecodeRow | None:
    if named is not None and named.device.type == "cpu" and not bool(named.any()):
        return NOTHING
    sets = [chosen for chosen in group_heads(facts.heads, edits) if chosen]
    apart = len(sets) > 1 or any(edit.heads is not None and edit._has_head_axis() for edit in edits)
    emptying = sum(isinstance(edit, WeightEdit) for edit in edits)
    outside = OUTSIDE_BIASES if any(isinstance(edit, ScoreEdit) and edit.per_key is not None for edit in edits) else OUTSIDE
    bias = None
    factors: dict[type[Edit], Tensor] = {}
    for edit in edits:
        if isinstance(edit, (HeadGain, ScaleQuery)):
            own = _on_rows(edit, _factor(edit, facts), 1.0)
            own = own if edit.heads is None else _spread(own, edit.heads, facts.heads, 1.0)
            kind = HeadGain if isinstance(edit, HeadGain) else ScaleQuery
            factors[kind] = factors[kind] * own if kind in factors else own
            continue
        if isinstance(edit, WeightEdit):
            emptying -= 1
            own = _of_factor(edit, facts, EMPTYING * 2**emptying)
            if own is None:
                return None
        else:
            own = _of_scores(edit, facts, outside)
        own = _on_rows(edit, own, 0.0)
        own = _spread(own, edit.heads, facts.heads, 0.0) if apart and edit.heads is not None else own
        bias = own if bias is None else bias + own
    added = None if bias is None else Added(bias, facts.dtype)
    return DecodeRow(bias, factors.get(HeadGain), named, added, factors.get(ScaleQuery))


def _of_scores(edit: Edit, facts: Facts, outside: float) -> Tensor:
    assert isinstance(edit, ScoreEdit)
    if edit.per_key is not None:
        return edit.per_key.to(facts.statistics)
    assert isinstance(edit, Keep) and isinstance(edit.pattern, Band)
    columns = torch.arange(facts.keys, device=facts.device)
    return edit.pattern.keep(columns[-1:], columns)[:, :, 0].logical_not().to(facts.statistics) * outside


def _of_factor(edit: WeightEdit, facts: Facts, emptying: float) -> Tensor | None:
    """[B or 1, heads or 1, Tk]: the logarithm of what the edit's columns are multiplied by; None for factors below 0."""
    columns = edit.one_factor
    assert columns is not None and isinstance(edit, (Gain, Transfer))
    inside = column_mask(columns, facts.keys, facts.device).to(facts.statistics)
    factor = edit.factor if isinstance(edit, Gain) else 0.0
    if not isinstance(factor, Tensor):
        return inside * (math.log(factor) if factor > 0 else emptying)
    if bool((factor < 0).any()):
        return None
    log = factor.to(facts.statistics).log()
    return inside * torch.where(log > float("-inf"), log, emptying)


def _factor(edit: HeadGain | ScaleQuery, facts: Facts) -> Tensor:
    """[B or 1, heads or 1]."""
    if isinstance(edit.factor, Tensor):
        return (edit.factor if isinstance(edit, HeadGain) else edit.factor[:, :, 0]).to(facts.statistics)
    return torch.full((1, 1), edit.factor, dtype=facts.statistics, device=facts.device)


def _on_rows(edit: Edit, own: Tensor, otherwise: float) -> Tensor:
    """For batch rows that the edit does not name: `otherwise`."""
    if edit.rows is None:
        return own
    return torch.where(edit.rows[:, :1] if own.dim() == 2 else edit.rows[:, :1, None], own, otherwise)


def _spread(own: Tensor, heads: Sequence[int], count: int, otherwise: float) -> Tensor:
    """Values [B, heads or 1, ...] of some heads as those of all `count` heads."""
    whole = own.new_full((own.shape[0], count, *own.shape[2:]), otherwise)
    own = own.expand(-1, len(heads), *own.shape[2:])
    return whole.index_copy(1, heads_index(tuple(heads), own.device), own)


def named_pairs(facts: Facts, edits: Sequence[Edit]) -> Tensor | None:
    """Bool [B or 1, H or 1]: the batch rows and heads that an edit names; None for all of them.

    Where edits name rows on an accelerator, whose values are not read, they may also be all of them.
    """
    if any(edit.heads is None and edit.rows is None for edit in edits):
        return None
    named = None
    for edit in edits:
        own = None if edit.heads is None else heads_mask(edit.heads, facts.heads, facts.device)
        if edit.rows is not None:
            own = edit.rows[:, :1] if own is None else own & edit.rows[:, :1]
        assert own is not None
        named = own if named is None else named | own
    assert named is not None
    if all(edit.rows is None for edit in edits):
        return None if len({head for edit in edits for head in edit.heads or ()}) == facts.heads else named
    return None if named.device.type == "cpu" and bool(named.all()) else named
