"""Over-trust: how much a column of the answer is looked at by all tokens after it, one after the other (OPERA)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..call import Call
from ..edits import Edit
from ..engine.reading import row_weights

# Constant of the official code on products of scaled weights, whose buffer there is half precision.
COLUMN_UNIT = 1e-7
LARGEST_SCORE = 65504.0
# Answers up to this length are judged by their look at the image instead.
SHORT_ANSWER = 10


def strongest_row(call: Call, edits: list[Edit] | tuple[Edit, ...] = ()) -> Tensor:
    """[B, n]: the last query row after the edits, the largest weight of any head in each column, rows made to sum to 1.

    Columns are absolute positions; those that a window has left behind are 0.
    """
    last = torch.full((1,), call.num_queries - 1, device=call.query.device)
    row = row_weights(call, list(edits), last)[:, :, 0].amax(dim=1)
    return pad(row / row.sum(dim=-1, keepdim=True), (call.key_start, 0))[:, : call.total]


@dataclass(eq=False)
class OverTrust:
    """What the rows of an answer have given to its columns: products [B, R] of scale * weight, down each column from its own row on."""

    scale: float = 50.0
    products: Tensor | None = field(default=None, repr=False)

    def extended(self, row: Tensor, start: int) -> Tensor:
        """Products [B, R + 1] with one more row [B, n], whose columns from `start` on are the answer's."""
        own = (self.scale * row[:, start:]).double()
        known = own[:, :0] if self.products is None else self.products.to(own)
        return pad(known, (0, own.shape[1] - known.shape[1]), value=1.0) * own

    def keep(self, row: Tensor, start: int) -> None:
        """The token of this row has been written."""
        self.products = self.extended(row, start)

    def move(self, index: Tensor) -> None:
        """Rows go where beams go."""
        if self.products is not None:
            self.products = self.products.index_select(0, index.to(self.products.device))


def column_scores(products: Tensor) -> Tensor:
    """[B, R] from products; the largest of a row is its over-trust score."""
    return (COLUMN_UNIT * products).clamp_max(LARGEST_SCORE)


def over_trust_penalty(products: Tensor, image: Tensor) -> Tensor:
    """[B]: minus the row's weight on the image [B] in a short answer, else the over-trust score. products [B, R], this row's included."""
    return -image.to(products) if products.shape[-1] <= SHORT_ANSWER else column_scores(products).amax(dim=-1)
