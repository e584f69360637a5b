"""Edits of the weights A = softmax(S). Rows that an edit would empty keep their weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ReattendError
from .base import Columns, Edit, Rows, as_columns, check_number, repeat_heads

TINY = 1e-30


@dataclass(frozen=True, eq=False, kw_only=True)
class WeightEdit(Edit):
    level = "weights"

    def on_weights(self, weights: Tensor, rows: Rows) -> Tensor:
        """weights [B, H, R, Tk] -> the same shape."""
        raise NotImplementedError

    @property
    def one_factor(self) -> Columns | None:
        """The columns whose weights the edit multiplies by one factor in each row, all others by one other factor, so that rows keep
        their sum; None where it does something else. What has them says in `rescaled` by how much.
        """
        return None

    def rescaled(self, mass: Tensor, whole: float | Tensor, rows: Rows) -> tuple[float | Tensor, Tensor, Tensor]:
        """(what the columns' weights get beyond the others' factor, the others' factor, its denominator).

        mass, whole [B, H, R, 1]: weight on the columns of `one_factor`, and the row's sum. A denominator near 0 says that the others
        hold too little for rounding to be small.
        """
        raise NotImplementedError


def _factor(value: float | Tensor) -> float | Tensor:
    return value[..., None] if isinstance(value, Tensor) else value


@dataclass(frozen=True, eq=False, kw_only=True)
class Gain(WeightEdit):
    """A[:, columns] *= factor; then rows get back their old sum over `renormalise`: "row", a column set, or None (they do not).

    With a column set, the freed (or missing) weight is spread over that set in proportion to its weights. A factor below 0 takes the
    columns' values away; rows whose sum it turns to 0 or below have none to be scaled by and keep their weights, but for None, where only
    rows with no weight left at all keep them. columns: bool [..., Tk] or indices. factor: number or broadcastable to [B, heads, Tq].
    """

    columns: Columns
    factor: float | Tensor
    renormalise: str | Columns | None = "row"
    broadcast = {"columns": 1, "factor": 1, "renormalise": 1}
    per_row = ("factor",)
    reads_operands = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", as_columns("columns", self.columns))
        if isinstance(self.renormalise, str):
            if self.renormalise != "row":
                raise ReattendError(f'renormalise must be "row", a column set or None, got {self.renormalise!r}')
        elif self.renormalise is not None:
            object.__setattr__(self, "renormalise", as_columns("renormalise", self.renormalise))
        super().__post_init__()
        check_number("factor", self.factor)

    @property
    def is_identity(self) -> bool:
        return super().is_identity or (not isinstance(self.factor, Tensor) and self.factor == 1)

    @property
    def one_factor(self) -> Columns | None:
        return self.columns if isinstance(self.renormalise, str) else None

    def rescaled(self, mass: Tensor, whole: float | Tensor, rows: Rows) -> tuple[float | Tensor, Tensor, Tensor]:
        return _grown(at_rows(_factor(self.factor), rows), mass, whole)

    def on_weights(self, weights: Tensor, rows: Rows) -> Tensor:
        chosen = rows.columns(self.columns)
        before = weights.sum(dim=-1, keepdim=True)
        gained = torch.where(chosen, weights * at_rows(_factor(self.factor), rows), weights)
        total = gained.sum(dim=-1, keepdim=True)
        if self.renormalise is None:
            return torch.where(gained.abs().sum(dim=-1, keepdim=True) > TINY, gained, weights)
        if isinstance(self.renormalise, str):
            return torch.where(total > TINY, gained * (before / total.clamp_min(TINY)), weights)
        spread = rows.columns(self.renormalise)
        inside = (gained * spread).sum(dim=-1, keepdim=True)
        target = inside + before - total
        scaled = torch.where(spread, gained * (target / inside.clamp_min(TINY)), gained)
        return torch.where((inside > TINY) & (target >= 0), scaled, weights)


@dataclass(frozen=True, eq=False, kw_only=True)
class Lift(WeightEdit):
    """Rows that give `columns` less than `share` of their weight give them more: A[:, columns] *= g, then rows get back their old sum.

    With p the columns' part of the row's sum, g = share / p, so that p becomes share / (share + 1 - p); exact: the odds of share over
    those of p, so that p becomes share. 1 <= g <= largest. Rows with p >= share, p < least or p = 0 stay as they are, bit for bit.
    columns: bool [..., Tk] or indices. share in [0, 1), number or tensor broadcastable to [B, heads, Tq].
    """

    columns: Columns
    share: float | Tensor
    exact: bool = False
    largest: float = 100.0
    least: float = 0.0
    broadcast = {"columns": 1, "share": 1}
    per_row = ("share",)
    reads_operands = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", as_columns("columns", self.columns))
        super().__post_init__()
        check_number("share", self.share, 0, 1 - 1e-6)
        check_number("largest", self.largest, 1)
        check_number("least", self.least, 0, 1)

    @property
    def is_identity(self) -> bool:
        return super().is_identity or (not isinstance(self.share, Tensor) and self.share == 0) or self.largest == 1

    @property
    def one_factor(self) -> Columns | None:
        return self.columns

    def rescaled(self, mass: Tensor, whole: float | Tensor, rows: Rows) -> tuple[float | Tensor, Tensor, Tensor]:
        return _grown(1 + self.growth(mass, whole, rows), mass, whole)

    def growth(self, mass: Tensor, whole: float | Tensor, rows: Rows | None = None) -> Tensor:
        """g - 1 of each row, from the weight on the columns and the row's sum, both [B, H, R, 1]. rows: where `share` is a tensor."""
        share = self.share if rows is None else at_rows(_factor(self.share), rows)
        held = mass.clamp_min(TINY)
        factor = (whole - mass) * (share / (1 - share)) / held if self.exact else share * whole / held
        growth = factor.clamp(1, self.largest) - 1
        return growth if not self.least else growth * (mass >= self.least * whole)

    def on_weights(self, weights: Tensor, rows: Rows) -> Tensor:
        size = rows.key.shape[2], rows.appended, weights.device, weights.dtype
        chosen = self.remember_size("chosen", size, lambda: rows.columns(self.columns).to(weights.dtype))
        before = weights.sum(dim=-1, keepdim=True)
        mass = (weights * chosen).sum(dim=-1, keepdim=True)
        growth = self.growth(mass, before, rows)
        scale = before / torch.addcmul(before, growth, mass).clamp_min(TINY)
        # growth 0, or nothing on the columns, multiplies by exactly 1
        return weights * torch.addcmul(scale, scale * growth, chosen)


@dataclass(frozen=True, eq=False, kw_only=True)
class Transfer(WeightEdit):
    """Takes `strength` of the weight on `source` columns and gives it to `target` (None: all others), "proportional" or "even".

    Even shares go to the target columns that the row can see. Rows with nothing to give to (no weight, or no visible column,
    on target) are left alone. source, target: disjoint column sets; strength in [0, 1], number or broadcastable to [B, heads, Tq].
    """

    source: Columns
    target: Columns | None = None
    strength: float | Tensor = 1.0
    how: str = "proportional"
    broadcast = {"source": 1, "target": 1, "strength": 1}
    per_row = ("strength",)
    reads_operands = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "source", as_columns("source", self.source))
        object.__setattr__(self, "target", None if self.target is None else as_columns("target", self.target))
        super().__post_init__()
        check_number("strength", self.strength, 0, 1)
        if self.how not in ("proportional", "even"):
            raise ReattendError(f'how must be "proportional" or "even", got {self.how!r}')

    @property
    def is_identity(self) -> bool:
        return super().is_identity or (not isinstance(self.strength, Tensor) and self.strength == 0)

    @property
    def one_factor(self) -> Columns | None:
        return self.source if self.target is None and self.how == "proportional" else None

    def rescaled(self, mass: Tensor, whole: float | Tensor, rows: Rows) -> tuple[float | Tensor, Tensor, Tensor]:
        strength = 1 - self.strength
        factor = at_rows(_factor(strength), rows)
        others = whole - mass
        scale = 1 + (1 - factor) * mass / others.clamp_min(TINY)
        return factor - scale, scale, others

    def _sets(self, rows: Rows) -> tuple[Tensor, Tensor]:
        source = rows.columns(self.source)
        return source, ~source if self.target is None else rows.columns(self.target) & ~source

    def on_weights(self, weights: Tensor, rows: Rows) -> Tensor:
        source, target = self.remember_size(
            "sets", (rows.key.shape[2], rows.appended, rows.key.device), lambda: self._sets(rows)
        )
        share = source * at_rows(_factor(self.strength), rows)
        taken = weights * share
        budget = taken.sum(dim=-1, keepdim=True)
        if self.how == "even":
            target = target if rows.visible is None else target & rows.visible
            room = target.sum(dim=-1, keepdim=True).to(weights.dtype)
            return torch.where(room > TINY, weights - taken + target * (budget / room.clamp_min(1)), weights)
        room = (weights * target).sum(dim=-1, keepdim=True)
        grown = torch.where(target, 1 + budget / room.clamp_min(TINY), 1 - share)
        return torch.where(room > TINY, weights * grown, weights)


@dataclass(frozen=True, eq=False, kw_only=True)
class Mix(WeightEdit):
    """A = (1 - s) A + s T with T "identity" (each row its own token), "uniform" (over visible keys), "mean_query" (the map of the
    mean query, over visible keys), "argmax" (one-hot at the row's largest weight), or a given map [..., Tq, Tk] (made to respect
    the mask, rows normalised). strength in [0, 1]: number or broadcastable to [B, heads, Tq].
    """

    target: str | Tensor
    strength: float | Tensor
    broadcast = {"strength": 1, "target": 2}
    per_row = ("strength", "target")
    per_column = ("target",)

    NAMES = ("identity", "uniform", "mean_query", "argmax")

    def __post_init__(self) -> None:
        if isinstance(self.target, str) and self.target not in self.NAMES:
            raise ReattendError(f"target must be one of {', '.join(self.NAMES)} or a tensor, got {self.target!r}")
        super().__post_init__()
        check_number("strength", self.strength, 0, 1)
        if isinstance(self.target, Tensor):
            check_number("target", self.target, 0)

    @property
    def is_identity(self) -> bool:
        return super().is_identity or (not isinstance(self.strength, Tensor) and self.strength == 0)

    @property
    def reads_operands(self) -> bool:  # type: ignore[override]
        return self.target == "mean_query" if isinstance(self.target, str) else False

    @property
    def target_is_known(self) -> bool:
        """True where T and its output follow without the row's own weights."""
        return self.target in ("identity", "uniform", "mean_query") if isinstance(self.target, str) else False

    def map(self, weights: Tensor, rows: Rows) -> Tensor:
        """T [B, H, R, Tk] for these rows; all-zero rows mean "keep the row"."""
        num_keys = weights.shape[3]
        if self.target == "argmax":
            return torch.zeros_like(weights).scatter_(3, weights.argmax(dim=-1, keepdim=True), 1.0)
        if self.target == "identity":
            columns = torch.arange(num_keys, device=weights.device)
            return (columns[None] == rows.own[:, None]).to(weights.dtype).expand_as(weights)
        if self.target == "uniform":
            target = torch.ones_like(weights)
        elif self.target == "mean_query":
            mean = rows.query.to(weights.dtype).mean(dim=2, keepdim=True)
            key = repeat_heads(rows.key, weights.shape[1]).to(weights.dtype)
            scores = rows.scale * mean @ key.transpose(2, 3)
            target = (scores - scores.amax(dim=-1, keepdim=True)).exp().expand_as(weights)
        else:
            assert isinstance(self.target, Tensor)
            target = self.target if self.target.shape[2] == 1 else self.target[:, :, rows.index]
            target = rows.padded(target).to(weights.dtype).expand_as(weights)
        if rows.visible is not None:
            target = target * rows.visible
        return target / target.sum(dim=-1, keepdim=True).clamp_min(TINY)

    def on_weights(self, weights: Tensor, rows: Rows) -> Tensor:
        target = self.map(weights, rows)
        strength = at_rows(_factor(self.strength), rows)
        alive = (target.sum(dim=-1, keepdim=True) > 0) & (weights.sum(dim=-1, keepdim=True) > TINY)
        return torch.where(alive, (1 - strength) * weights + strength * target, weights)


@dataclass(frozen=True, eq=False, kw_only=True)
class WeightMap(WeightEdit):
    """A = function(A, rows) on the chosen rows, which are materialised: name as few as possible. Non-finite or negative rows are refused
    row by row (they keep their weights). function: (weights [B, heads, R, Tk], Rows) -> the same shape. It is given some of the edit's
    heads and query rows at a time: one that compares or mixes heads needs reads="heads" to get all that the edit names.
    """

    function: Callable[[Tensor, Rows], Tensor]
    reads: str = ""  # type: ignore[misc]
    splits_batch = False  # nobody knows what the function holds

    def on_weights(self, weights: Tensor, rows: Rows) -> Tensor:
        new = self.function(weights, rows)
        if new.shape != weights.shape:
            raise ReattendError(f"a WeightMap function changed the shape from {tuple(weights.shape)} to {tuple(new.shape)}")
        sound = (new >= 0).all(dim=-1, keepdim=True) & (new.sum(dim=-1, keepdim=True) < float("inf"))
        return torch.where(sound, new, weights)


def _grown(factor: float | Tensor, mass: Tensor, whole: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`rescaled` for columns times a factor, then the row back to its sum."""
    total = whole + (factor - 1) * mass
    scale = whole / total.clamp_min(TINY)
    return (factor - 1) * scale, scale, total


def at_rows(value: float | Tensor, rows: Rows) -> float | Tensor:
    """A per-row parameter [B, H, Tq, 1] cut to the rows of a chunk; numbers and row-independent tensors pass."""
    if not isinstance(value, Tensor) or value.shape[2] == 1:
        return value
    return value[:, :, rows.index]
