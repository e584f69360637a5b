"""An edit that gives rows the weights of another attention, column by column: from a query and keys of its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ReattendError
from .base import Rows, Shape, repeat_heads
from .weights import WeightEdit


@dataclass(frozen=True, eq=False, kw_only=True)
class TakeWeights(WeightEdit):
    """A'[:, columns] = A2[:, columns] T + A[:, columns] u: rows take the weights A2 = softmax(scale Q2 K2^T + mask) of another attention.

    query [B or 1, H, Tq, D] and key [B or 1, Hkv, Tk, D] of that one, which has as many rows and columns as the call; mask: bool (True =
    visible) or additive, [..., Tq or 1, Tk]. columns long [m]; transfer T [B or 1, m, m]: how much of the weight on the column of its row
    goes to the column of its column (None: each to itself); own u [B or 1, m]: how much of the row's own weights these columns keep (None:
    nothing). others: A2 on the columns that are not named, which keep their own weights without it. Rows of A' need not sum to 1.
    """

    query: Tensor
    key: Tensor
    columns: Tensor
    transfer: Tensor | None = None
    own: Tensor | None = None
    others: bool = False
    mask: Tensor | None = None
    broadcast = {"query": 2, "key": 2, "mask": 2}
    per_row = ("query", "mask")
    per_key_head = ("key",)
    batched = ("transfer", "own")

    def __post_init__(self) -> None:
        super().__post_init__()
        count = self.columns.numel()
        if self.columns.dtype != torch.long or self.columns.dim() != 1:
            raise ReattendError("columns of TakeWeights must be a long tensor [m], the same in all rows")
        for name, axes in (("transfer", 2), ("own", 1)):
            given = getattr(self, name)
            if given is not None and (given.dim() != axes + 1 or any(side != count for side in given.shape[1:])):
                wanted = ", ".join(["batch", *[str(count)] * axes])
                raise ReattendError(f"{name} of TakeWeights must be [{wanted}] for the columns named, got {list(given.shape)}")

    def _check_shapes(self, shape: Shape) -> None:
        super()._check_shapes(shape)
        for name in ("transfer", "own"):
            given = getattr(self, name)
            if given is not None:
                self._check_size(name, given, 0, shape.batch, "batch rows")
        for given, wanted, what in ((self.query, shape.queries, "query rows"), (self.key, shape.keys, "keys")):
            if wanted is not None and given.shape[2] != wanted:
                raise ReattendError(
                    f"TakeWeights takes weights of {given.shape[2]} {what} for a call with {wanted}: give as many"
                )

    @property
    def is_identity(self) -> bool:
        return super().is_identity or (self.columns.numel() == 0 and not self.others)

    def on_weights(self, weights: Tensor, rows: Rows) -> Tensor:
        taken = self._taken(weights, rows)
        columns = self.columns.to(weights.device)
        moved = taken[..., columns]
        if self.transfer is not None:
            moved = moved @ self.transfer[:, None].to(moved)
        if self.own is not None:
            moved = moved + weights[..., columns] * self.own[:, None, None].to(weights)
        base = torch.nn.functional.pad(taken, (0, rows.appended)) if self.others else weights
        return base.index_copy(3, columns, moved)

    def _taken(self, weights: Tensor, rows: Rows) -> Tensor:
        """A2 [B, H, R, Tk], without columns that an edit appended."""
        query = self.query[:, :, rows.index].to(weights.dtype)
        key = repeat_heads(self.key, query.shape[1]).to(weights.dtype)
        scores = query @ key.transpose(2, 3) * rows.scale
        if self.mask is not None:
            mask = self.mask if self.mask.shape[2] == 1 else self.mask[:, :, rows.index]
            scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask.to(scores.dtype)
        return scores.softmax(dim=-1).expand(*weights.shape[:3], -1)
