"""Weakened attention for guidance branches: targets that follow from a row's own weights, so that no `Mix` states them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..edits import Rows
from ..edits.base import check_number
from ..edits.weights import TINY, WeightEdit


@dataclass(frozen=True, eq=False, kw_only=True)
class MixOwnAnd(WeightEdit):
    """A = (1 - s) A + s A_kept, where a row of A_kept sees its own token and `columns` only. columns: bool [..., Tk]; s in [0, 1].

    Rows whose kept weights vanish stay as they are.
    """

    columns: Tensor
    strength: float
    broadcast = {"columns": 1}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("strength", self.strength, 0, 1)

    @property
    def is_identity(self) -> bool:
        return super().is_identity or self.strength == 0

    def on_weights(self, weights: Tensor, rows: Rows) -> Tensor:
        own = torch.arange(weights.shape[3], device=weights.device) == rows.own[:, None]
        kept = torch.where(rows.columns(self.columns) | own, weights, 0)
        total = kept.sum(dim=-1, keepdim=True)
        share = weights.sum(dim=-1, keepdim=True) / total.clamp_min(TINY)
        return torch.where(total > TINY, (1 - self.strength) * weights + self.strength * share * kept, weights)


@dataclass(frozen=True, eq=False, kw_only=True)
class Soften(WeightEdit):
    """A = (1 - s) A + s softmax(S / temperature), from A alone: softmax(S / t) is A^(1/t), renormalised. s in [0, 1]."""

    temperature: float
    strength: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("strength", self.strength, 0, 1)
        check_number("temperature", self.temperature, 1e-3, 1e3)

    @property
    def is_identity(self) -> bool:
        return super().is_identity or self.strength == 0 or self.temperature == 1

    def on_weights(self, weights: Tensor, rows: Rows) -> Tensor:
        # a root has no slope at 0: columns without weight stay out of it
        some = weights > 0
        share = torch.where(some, weights, 1) / weights.amax(dim=-1, keepdim=True).clamp_min(TINY)
        powered = torch.where(some, share ** (1 / self.temperature), 0)
        share = weights.sum(dim=-1, keepdim=True) / powered.sum(dim=-1, keepdim=True).clamp_min(TINY)
        return (1 - self.strength) * weights + self.strength * share * powered
