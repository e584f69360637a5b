"""Edits of the scores S = scale * Q K^T + mask, before the softmax."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ReattendError
from .base import Columns, Edit, Rows, Shape, as_columns, check_number

# Scores that far below a row's maximum are zero weights in every dtype; the bound keeps huge biases finite in half precision.
LARGEST_BIAS = 1e4


@dataclass(frozen=True, eq=False, kw_only=True)
class ScoreEdit(Edit):
    level = "scores"

    def on_scores(self, scores: Tensor, rows: Rows) -> Tensor:
        """scores [B, H, R, Tk] with masked pairs at -inf -> the same shape."""
        raise NotImplementedError

    @property
    def per_key(self) -> Tensor | None:
        """[B or 1, heads or 1, Tk]: what the edit adds to each column, whatever row and score; None where it does something else."""
        return None


@dataclass(frozen=True, eq=False, kw_only=True)
class KeyBias(ScoreEdit):
    """S[:, j] += bias[j]. A factor m on a token's weight, rows renormalised, is bias = log m. bias [..., Tk], |bias| <= 1e4."""

    bias: Tensor
    broadcast = {"bias": 1}
    per_column = ("bias",)
    reads_operands = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("bias", self.bias, -LARGEST_BIAS, LARGEST_BIAS)

    @property
    def per_key(self) -> Tensor | None:
        return self.bias

    def on_scores(self, scores: Tensor, rows: Rows) -> Tensor:
        return scores + rows.padded(self.bias)[:, :, None, :].to(scores.dtype)


@dataclass(frozen=True, eq=False, kw_only=True)
class ScoreGain(ScoreEdit):
    """S[:, j] += factor[j] * |S[:, j]|: positive scores grow, negative ones shrink towards 0. factor [..., Tk], 0 <= factor <= 100."""

    factor: Tensor
    broadcast = {"factor": 1}
    per_column = ("factor",)
    reads_operands = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("factor", self.factor, 0, 100)

    def on_scores(self, scores: Tensor, rows: Rows) -> Tensor:
        # hidden pairs are at -inf and have to stay there, whether they get a factor or not
        size = scores.abs().clamp_max_(torch.finfo(scores.dtype).max / 1e3)
        return torch.addcmul(scores, rows.padded(self.factor)[:, :, None, :].to(scores.dtype), size)


@dataclass(frozen=True, eq=False, kw_only=True)
class PairBias(ScoreEdit):
    """S += bias. bias [..., Tq, Tk], |bias| <= 1e4."""

    bias: Tensor
    broadcast = {"bias": 2}
    per_row = ("bias",)
    per_column = ("bias",)
    reads_operands = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("bias", self.bias, -LARGEST_BIAS, LARGEST_BIAS)

    def on_scores(self, scores: Tensor, rows: Rows) -> Tensor:
        bias = self.bias if self.bias.shape[2] == 1 else self.bias[:, :, rows.index]
        return scores + rows.padded(bias).to(scores.dtype)


@dataclass(frozen=True, eq=False, kw_only=True)
class LowRankBias(ScoreEdit):
    """S += U V^T. U [..., Tq, r], V [..., Tk, r]: a bias of rank r in O((Tq + Tk) r) memory, folded into r more dimensions of q and k.

    A mask with r patterns of rows is one: U one-hot of the row's pattern times -B, V = 1 where that pattern forbids (B = 1024: weights
    of exactly 0). Pairs with a factor 0 keep their scores.
    """

    U: Tensor
    V: Tensor
    broadcast = {"U": 2, "V": 2}
    per_row = ("U",)
    reads_operands = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.U.shape[3] != self.V.shape[3]:
            raise ReattendError(f"U and V must have the same rank, got {self.U.shape[3]} and {self.V.shape[3]}")
        for name in ("U", "V"):
            check_number(name, getattr(self, name), -LARGEST_BIAS, LARGEST_BIAS)

    def _check_shapes(self, shape: Shape) -> None:
        super()._check_shapes(shape)
        if shape.keys is not None and self.V.shape[2] != shape.keys:
            raise ReattendError(f"V of LowRankBias has values for {self.V.shape[2]} keys, this call has {shape.keys}")

    @property
    def is_identity(self) -> bool:
        return super().is_identity or self.U.shape[3] == 0

    def on_scores(self, scores: Tensor, rows: Rows) -> Tensor:
        factors = self.U if self.U.shape[2] == 1 else self.U[:, :, rows.index]
        bias = factors.to(scores.dtype) @ self.V.to(scores.dtype).transpose(2, 3)
        return scores + rows.padded(bias)


@dataclass(frozen=True, eq=False, kw_only=True)
class SetScores(ScoreEdit):
    """S[:, j] = scores[:, j] for j in `columns` (None: all), where the pair is visible; of several on one pair the later wins.

    scores: number or [..., Tq, Tk] (either 1 where shared), |score| <= 1e4; columns: bool [..., Tk] or indices.
    """

    scores: float | Tensor
    columns: Columns | None = None
    broadcast = {"scores": 2, "columns": 1}
    per_row = ("scores",)
    per_column = ("scores", "columns")
    reads_operands = False

    def __post_init__(self) -> None:
        if self.columns is not None:
            object.__setattr__(self, "columns", as_columns("columns", self.columns))
        super().__post_init__()
        check_number("scores", self.scores, -LARGEST_BIAS, LARGEST_BIAS)

    def on_scores(self, scores: Tensor, rows: Rows) -> Tensor:
        new = self.scores
        if isinstance(new, Tensor):
            new = new if new.shape[2] == 1 else new[:, :, rows.index]
            new = (new if new.shape[3] == 1 else rows.padded(new)).to(scores.dtype)
        own = torch.ones(1, 1, rows.key.shape[2] - rows.appended, dtype=torch.bool, device=scores.device)
        chosen = rows.columns(own if self.columns is None else self.columns) & (scores > float("-inf"))
        return torch.where(chosen, new, scores)
