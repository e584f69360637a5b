"""Attention to a text that is told which places of the picture its tokens belong to: how far it is from that, and an edit that makes it so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..edits import Rows
from ..edits.base import check_number
from ..edits.weights import TINY, WeightEdit

SMALL = 1e-12
# a random order of so many things
Draw = Callable[[int], Tensor]


@dataclass(frozen=True, eq=False, kw_only=True)
class Redistribute(WeightEdit):
    """A'[i, j] = T_i for the columns j of `columns` that belong to row i and 0 for its others of them, T_i the sum of A[i] over all of these
    columns; then rows get back their old sum, and A = (1 - strength) A + strength A'.

    columns: bool [..., Tk]; belongs: bool [..., Tq, Tk], which is read at `columns` alone. Rows that keep no weight stay as they are.
    """

    columns: Tensor
    belongs: Tensor
    strength: float = 1.0
    broadcast = {"columns": 1, "belongs": 2}
    per_row = ("belongs",)
    per_column = ("belongs",)
    reads_operands = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("strength", self.strength, 0, 1)

    @property
    def is_identity(self) -> bool:
        return super().is_identity or self.strength == 0

    def on_weights(self, weights: Tensor, rows: Rows) -> Tensor:
        columns = rows.columns(self.columns)
        belongs = self.belongs if self.belongs.shape[2] == 1 else self.belongs[:, :, rows.index]
        mass = torch.where(columns, weights, 0).sum(dim=-1, keepdim=True)
        new = torch.where(columns, mass * rows.padded(belongs), weights)
        total, kept = weights.sum(dim=-1, keepdim=True), new.sum(dim=-1, keepdim=True)
        new = new * (total / kept.clamp_min(TINY))
        return torch.where(kept > TINY, torch.lerp(weights, new, self.strength), weights)


def selected(map: Tensor, places: Tensor, topk: float, dropout: float, draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
    """(what is taken inside [r], the r largest values outside, the places taken) of a map [n]; places: bool [n], those inside.

    Of the k largest values inside, k = topk of the places, r = dropout of these are taken, the first of draw(k); both are at least 1.
    """
    count = max(1, int(topk * int(places.sum())))
    taken = max(1, round(count * dropout))
    best = (map * places).topk(count).indices
    chosen = best[draw(count)[:taken].to(best.device)]
    return (map * places)[chosen], (map * ~places).topk(taken).values, chosen


def share_outside(inside: Tensor, outside: Tensor) -> Tensor:
    """The share of the sum of both that is outside."""
    there = inside.sum()
    return 1 - there / (there + outside.sum()).clamp_min(SMALL)
