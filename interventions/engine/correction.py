"""The heart of the engine: column edits as corrections of an attention output that a fused kernel has already computed.

With `o, lse` of the untouched rows, the weights of any few columns are w = exp(s_c - lse), and every edit of known columns is

    o' = sum_m coef_m o_m + (W - sum_m coef_m w_m) V_cols

where W are the columns' new weights and the components m are the untouched map (coef 1 at first) plus the maps that `Mix` and even
`Transfer`s bring in (identity, uniform). A column factor f with row renormalisation is the special case
o' = (o + sum (f - 1) w v) / (1 + sum (f - 1) w).

Nothing here needs the whole K and V or a cache layout: a server or a sharded model that hands over (o, lse, q, K_cols, V_cols)
can run the same edits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..edits import Edit, Gain, Mix, Rows, Transfer, WeightEdit
from ..edits.weights import TINY, at_rows
from .kernels import grouped_matmul, grouped_values

# A denominator below this, or a factor above LARGEST_FACTOR on the kernel's output, would amplify the kernel's rounding: such rows are unsafe.
SMALLEST_DENOMINATOR = 1e-3
LARGEST_FACTOR = {torch.float32: 8.0, torch.float64: 1e6, torch.bfloat16: 2.0, torch.float16: 2.0}


@dataclass
class ColumnSet:
    """A column set seen from the columns at hand: inside [B, H, 1, m] bool, and whether all the other columns belong to it."""

    inside: Tensor
    rest: bool


@dataclass
class Component:
    """A map on all keys: coefficient [B, H, R, 1], its output [B, H, R, Dv], its weights on the columns [B, H, R, m], its row sum."""

    coefficient: Tensor
    output: Tensor
    weights: Tensor
    total: Tensor


@dataclass
class ColumnEdit:
    """An edit restated on the columns at hand.

    target: the map that a `Mix` brings in, or the uniform map for a `Transfer` in even shares; the latter also needs `visible`
    (bool, broadcastable to [B, H, R, m]) and `count` (visible keys of each row, broadcastable to [B, H, R, 1]).
    """

    edit: Edit
    sets: dict[str, ColumnSet] = field(default_factory=dict)
    target: Component | None = None
    visible: Tensor | None = None
    count: Tensor | None = None


def column_weights(
    query: Tensor,
    key_cols: Tensor,
    lse: Tensor,
    scale: float,
    hidden: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Weights [B, H, R, m] of m columns: exp(scale * q k + bias - lse), zero where `hidden` (bool, broadcastable).

    query [B, H, R, D], key_cols [B, Hkv, m, D], lse [B, H, R], bias broadcastable to [B, H, R, m].
    """
    scores = column_scores(query.to(lse.dtype), key_cols.to(lse.dtype), scale, bias, softcap)
    weights = (scores - lse[..., None]).exp_()
    if hidden is None:
        return weights
    # backward reads what exp gave
    return weights.masked_fill(hidden, 0.0) if weights.requires_grad else weights.masked_fill_(hidden, 0.0)


def column_scores(
    query: Tensor, key_cols: Tensor, scale: float, bias: Tensor | None = None, softcap: float | None = None
) -> Tensor:
    """Scores [B, H, R, m] of m columns, in the dtype of query and key_cols."""
    scores = grouped_matmul(query * scale, key_cols)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return scores if bias is None else scores + bias


def join_columns(output: Tensor, lse: Tensor, scores: Tensor, value_cols: Tensor, edit: Transfer, rows: Rows) -> Tensor:
    """A proportional `Transfer` away from columns that the kernel was not shown: [B, H, R, Dv] in statistics dtype.

    output [B, H, R, Dv] and lse [B, H, R] are those of the row without these columns; scores [B, H, R, m] theirs, -inf where a row
    does not see one or it is not meant; value_cols [B, Hkv, m, Dv]. Nothing is subtracted, so that a column may hold the whole row.
    """
    strength = at_rows(edit.strength[..., None], rows) if isinstance(edit.strength, Tensor) else edit.strength
    lse = lse[..., None]
    whole = torch.logaddexp(lse, torch.logsumexp(scores, dim=-1, keepdim=True))
    held, others = (scores - whole).exp(), (lse - whole).exp()
    strength = strength * (others > TINY)  # a row with nothing else keeps its weights
    mass = held.sum(dim=-1, keepdim=True)
    return output.to(lse.dtype) * (others + strength * mass) + grouped_values(held * (1 - strength), value_cols.to(lse.dtype))


def correct_factor(
    output: Tensor,
    weights: Tensor,
    value_cols: Tensor,
    edit: WeightEdit,
    chosen: Tensor,
    rows: Rows,
    total: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`correct` for the one edit that most recipes need: a factor on the chosen columns, the others scaled so that rows keep their sum.

    edit: one that has `one_factor`. chosen: bool, broadcastable to [B, H, R, m].
    """
    held = weights * chosen
    mass = held.sum(dim=-1, keepdim=True)
    beyond, scale, denominator = edit.rescaled(mass, 1.0 if total is None else total, rows)
    unsafe = (denominator < SMALLEST_DENOMINATOR) | (scale > LARGEST_FACTOR.get(output.dtype, 2.0))
    result = output.to(weights.dtype) * scale + grouped_values(held * beyond, value_cols.to(weights.dtype))
    return result, unsafe[..., 0]


def correct(
    output: Tensor, weights: Tensor, value_cols: Tensor, edits: Sequence[ColumnEdit], rows: Rows, total: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(corrected output [B, H, R, Dv] in statistics dtype, unsafe rows [B, H, R] bool).

    output [B, H, R, Dv] and weights [B, H, R, m] belong to the untouched rows (see `column_weights`); value_cols [B, Hkv, m, Dv];
    total [B, H, R, 1]: row sum over the keys, below 1 where learned sinks take a share. Unsafe rows need the materialised form.
    """
    limit = LARGEST_FACTOR.get(output.dtype, 2.0)
    state = _State(output.to(weights.dtype), weights, total)
    for item in edits:
        state.apply(item, rows)
    coefficients = state.components[0].coefficient
    unsafe = state.unsafe | (coefficients.abs() > limit)
    result = coefficients * state.components[0].output
    left = state.columns - coefficients * weights
    for component in state.components[1:]:
        result = result + component.coefficient * component.output
        left = left - component.coefficient * component.weights
    result = result + grouped_values(left, value_cols.to(left.dtype))
    return result, unsafe[..., 0]


class _State:
    """The current map: explicit weights on the columns, and components whose coefficients rule everywhere else."""

    def __init__(self, output: Tensor, weights: Tensor, total: Tensor | None) -> None:
        one = torch.ones_like(output[..., :1])
        self.columns = weights
        self.components = [Component(one, output, weights, one if total is None else total)]
        self.unsafe = torch.zeros_like(one, dtype=torch.bool)

    def rest(self) -> Tensor:
        """Weight [B, H, R, 1] on all columns that are not at hand."""
        parts = [c.coefficient * (c.total - c.weights.sum(dim=-1, keepdim=True)) for c in self.components]
        return sum(parts[1:], parts[0]).clamp_min(0.0)

    def mass(self, chosen: ColumnSet) -> Tensor:
        inside = torch.where(chosen.inside, self.columns, 0).sum(dim=-1, keepdim=True)
        return inside + self.rest() if chosen.rest else inside

    def apply(self, item: ColumnEdit, rows: Rows) -> None:
        columns, coefficients, count = self.columns, [c.coefficient for c in self.components], len(self.components)
        if isinstance(item.edit, Gain):
            self._gain(item.edit, item.sets, rows)
        elif isinstance(item.edit, Transfer):
            self._transfer(item, item.edit, rows)
        else:
            assert isinstance(item.edit, Mix) and item.target is not None
            self._mix(item.edit, item.target, rows)
        chosen = item.edit.chosen(rows)
        if chosen is not None:
            self.columns = torch.where(chosen, self.columns, columns)
            for i, component in enumerate(self.components):
                old = coefficients[i] if i < count else torch.zeros_like(component.coefficient)
                component.coefficient = torch.where(chosen, component.coefficient, old)

    def _scale_rest(self, factor: Tensor, where: Tensor) -> None:
        for i, c in enumerate(self.components):
            self.components[i] = Component(
                torch.where(where, c.coefficient * factor, c.coefficient), c.output, c.weights, c.total
            )

    def _check(self, denominator: Tensor, used: Tensor) -> None:
        self.unsafe = self.unsafe | (used & (denominator < SMALLEST_DENOMINATOR))

    def _gain(self, edit: Gain, sets: dict[str, ColumnSet], rows: Rows) -> None:
        factor = edit.factor[..., None] if isinstance(edit.factor, Tensor) else edit.factor
        factor = at_rows(factor, rows)
        chosen, rest = sets["columns"], self.rest()
        before = self.columns.sum(dim=-1, keepdim=True) + rest
        gained = torch.where(chosen.inside, self.columns * factor, self.columns)
        rest_gained = rest * factor if chosen.rest else rest
        total = gained.sum(dim=-1, keepdim=True) + rest_gained
        scale_rest = torch.ones_like(total) * factor if chosen.rest else torch.ones_like(total)
        everywhere = torch.ones_like(total, dtype=torch.bool)
        if edit.renormalise is None:
            total = gained.abs().sum(dim=-1, keepdim=True) + rest_gained.abs()
            alive = total > TINY
        elif isinstance(edit.renormalise, str):
            alive = total > TINY
            scale = before / total.clamp_min(TINY)
            gained, scale_rest = gained * scale, scale_rest * scale
        else:
            spread = sets["renormalise"]
            inside = torch.where(spread.inside, gained, 0).sum(dim=-1, keepdim=True)
            inside = inside + rest_gained if spread.rest else inside
            target = inside + before - total
            alive = (inside > TINY) & (target >= 0)
            scale = target / inside.clamp_min(TINY)
            gained = torch.where(spread.inside, gained * scale, gained)
            scale_rest = scale_rest * scale if spread.rest else scale_rest
            self._check(inside, everywhere)
            self._check(target, everywhere)
        self._check(total, everywhere)
        self.columns = torch.where(alive, gained, self.columns)
        self._scale_rest(scale_rest, alive)

    def _transfer(self, item: ColumnEdit, edit: Transfer, rows: Rows) -> None:
        strength = edit.strength[..., None] if isinstance(edit.strength, Tensor) else edit.strength
        strength = at_rows(strength, rows)
        source, target = item.sets["source"], item.sets["target"]
        keep_rest = torch.ones_like(self.unsafe, dtype=self.columns.dtype)
        if source.rest:
            keep_rest = keep_rest * (1 - strength)
        taken = torch.where(source.inside, self.columns * strength, 0)
        budget = taken.sum(dim=-1, keepdim=True)
        if source.rest:
            budget = budget + self.rest() * strength
        if edit.how == "even":
            assert item.visible is not None and item.count is not None
            inside = target.inside & item.visible
            room = inside.sum(dim=-1, keepdim=True).to(budget.dtype)
            if target.rest:
                room = room + item.count - item.visible.sum(dim=-1, keepdim=True)
            room = room.expand_as(budget)
            alive = room > 0.5
            share = budget / room.clamp_min(1)
            given = torch.where(inside, share, 0)
            self._scale_rest(keep_rest, alive)
            if target.rest:
                assert item.target is not None
                coefficient = torch.where(alive, share * item.count, 0)
                self.components.append(Component(coefficient, item.target.output, item.target.weights, item.target.total))
        else:
            room = self.mass(target)
            alive = room > TINY
            self._check(room, budget > 0)
            scale = 1 + budget / room.clamp_min(TINY)
            given = torch.where(target.inside, self.columns * (scale - 1), 0)
            self._scale_rest(keep_rest * scale if target.rest else keep_rest, alive)
        self.columns = torch.where(alive, self.columns - taken + given, self.columns)

    def _mix(self, edit: Mix, target: Component, rows: Rows) -> None:
        strength = edit.strength[..., None] if isinstance(edit.strength, Tensor) else edit.strength
        strength = at_rows(strength, rows) * torch.ones_like(target.total)
        alive = target.total > 0
        self.columns = torch.where(alive, (1 - strength) * self.columns + strength * target.weights, self.columns)
        self._scale_rest(1 - strength, alive)
        coefficient = torch.where(alive, strength, 0)
        self.components.append(Component(coefficient, target.output, target.weights, target.total))
