"""Scores of self-attention that another pass has computed for the places of a thing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..edits import Rows
from ..edits.scores import ScoreEdit


@dataclass(frozen=True, eq=False, kw_only=True)
class Correlate(ScoreEdit):
    """S[:, columns] = Z, then S[columns, :] = Z^T, with Z = scale query key^T of another pass, where the pair is visible.

    query [..., Tq, D]: that pass's queries; key [..., m, D]: its keys of the thing; columns long [..., m]: where the thing is in this call,
    whose queries are keys too. Z is made for the rows of a chunk alone, never as a whole.
    """

    query: Tensor
    key: Tensor
    columns: Tensor
    broadcast = {"query": 2, "key": 2}
    indices = {"columns": 1}
    per_row = ("query",)
    reads_operands = False

    @property
    def is_identity(self) -> bool:
        return super().is_identity or not self.columns.numel()

    def on_scores(self, scores: Tensor, rows: Rows) -> Tensor:
        query, key, columns = self.query.to(scores.dtype), self.key.to(scores.dtype), self.columns
        batch, heads, count, _ = scores.shape
        across = rows.scale * query[:, :, rows.index] @ key.transpose(2, 3)
        places = columns[:, :, None].expand(batch, heads, count, -1)
        new = scores.scatter(3, places, across.expand(batch, heads, -1, -1))
        # [B or 1, heads or 1, R, m]: which of the thing's tokens each row of the chunk is
        which = rows.own[:, None] == columns[:, :, None]
        down = rows.scale * (which.to(scores.dtype) @ key) @ query.transpose(2, 3)
        # the keys of the queries, which are all keys where nothing is cached
        own = slice(rows.offset, (rows.offset or 0) + query.shape[2])
        new[..., own] = torch.where(which.any(dim=3, keepdim=True), down, new[..., own])
        return torch.where(scores == float("-inf"), scores, new)
