"""Edits of the scores S = scale * Q K^T + mask, before the softmax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import ReattendError
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
    reads_operands = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("bias", self.bias, -LARGEST_BIAS, LARGEST_BIAS)

    def on_scores(self, scores: Tensor, rows: Rows) -> Tensor:
        bias = self.bias if self.bias.shape[2] == 1 else self.bias[:, :, rows.index]
        return scores + rows.padded(bias).to(scores.dtype)


@dataclass(frozen=True)
class Band:
    """The pairs of a sliding window with sinks: key j of row i stays iff j < first + sinks or i - j < window (i, j absolute).

    `first` [B] long: each sequence's first real column (left padding); None = 0. `dense_after`: rows from there on see everything,
    up to `dense_until` where that is given; numbers, or long [B].
    """

    sinks: int
    window: int
    first: Tensor | None = None
    dense_after: int | Tensor | None = None
    dense_until: int | Tensor | None = None

    def __post_init__(self) -> None:
        if self.sinks < 0:
            raise ReattendError(f"sinks must be 0 or more, got {self.sinks}")
        if self.window < 1:
            raise ReattendError(f"window must be 1 or more, got {self.window}")

    def keep(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Bool [B or 1, 1, R, C] for row positions [R] and column positions [C], both as key columns of the call."""
        first = torch.zeros(1, dtype=torch.long, device=rows.device) if self.first is None else self.first.to(rows.device)
        near = (rows[:, None] - columns[None, :] < self.window)[None]
        if self.dense_after is not None:
            dense = rows[None, :] >= _per_row(self.dense_after, rows)
            if self.dense_until is not None:
                dense = dense & (rows[None, :] < _per_row(self.dense_until, rows))
            near = near | dense[..., None]
        return (near | (columns[None, None, :] < first[:, None, None] + self.sinks))[:, None]

    def has_dense(self, low: int, high: int) -> bool:
        """Whether some row of positions low..high sees everything in some sequence."""
        if self.dense_after is None:
            return False
        after = self.dense_after if isinstance(self.dense_after, int) else int(self.dense_after.min())
        until = high + 1 if self.dense_until is None else self.dense_until
        return high >= after and low < (until if isinstance(until, int) else int(until.max()))


def _per_row(place: int | Tensor, rows: Tensor) -> int | Tensor:
    """A position, or [B, 1] of them beside rows [1, R]."""
    return place[:, None].to(rows.device) if isinstance(place, Tensor) else place


@dataclass(frozen=True, eq=False, kw_only=True)
class Keep(ScoreEdit):
    """Only the pairs of `pattern` stay: a bool tensor [..., Tq, Tk] (True = keep) or a Band. Rows left without any key keep theirs."""

    pattern: Tensor | Band
    broadcast = {"pattern": 2}
    per_row = ("pattern",)
    reads_operands = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.pattern, Tensor) and self.pattern.dtype != torch.bool:
            raise ReattendError("pattern must be a bool tensor [..., queries, keys] or a Band")

    def can_split_batch(self, batch: int) -> bool:
        return isinstance(self.pattern, Tensor) and super().can_split_batch(batch)

    def on_scores(self, scores: Tensor, rows: Rows) -> Tensor:
        if isinstance(self.pattern, Band):
            keep = self.pattern.keep(rows.own, torch.arange(scores.shape[3] - rows.appended, device=scores.device))
        else:
            keep = self.pattern if self.pattern.shape[2] == 1 else self.pattern[:, :, rows.index]
        keep = torch.nn.functional.pad(keep, (0, rows.appended), value=True)
        kept = scores.masked_fill(~keep, float("-inf"))
        emptied = (kept == float("-inf")).all(dim=-1, keepdim=True)
        return torch.where(emptied, scores, kept)
