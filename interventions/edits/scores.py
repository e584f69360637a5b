"""Edits of the scores S = scale * Q K^T + mask, before the softmax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Edit, Rows, check_number

# Scores that far below a row's maximum are zero weights in every dtype; the bound keeps huge biases finite in half precision.
LARGEST_BIAS = 1e4


@dataclass(frozen=True, eq=False, kw_only=True)
class ScoreEdit(Edit):
    level = "scores"
    # whether it adds one number to each column, `bias` [B or 1, heads or 1, Tk], whatever the score
    adds_per_key: ClassVar[bool] = False

    def on_scores(self, scores: Tensor, rows: Rows) -> Tensor:
        """scores [B, H, R, Tk] with masked pairs at -inf -> the same shape."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False, kw_only=True)
class KeyBias(ScoreEdit):
    """S[:, j] += bias[j]. A factor m on a token's weight, rows renormalised, is bias = log m. bias [..., Tk], |bias| <= 1e4."""

    bias: Tensor
    broadcast = {"bias": 1}
    per_column = ("bias",)
    reads_operands = False
    adds_per_key = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("bias", self.bias, -LARGEST_BIAS, LARGEST_BIAS)

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
