"""Weakened attention for guidance branches: targets that follow from a row's own weights, so that no `Mix` states them, and blurred queries."""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..edits import OperandEdit, Operands, Rows
from ..edits.base import Shape, check_number, repeat_heads
from ..edits.weights import TINY, WeightEdit
from ..errors import ReattendError


@dataclass(frozen=True, eq=False, kw_only=True)
class MixOwnAnd(WeightEdit):
    """A = (1 - s) A + s A_kept, where a row of A_kept sees its own token and `columns` only. columns: bool [..., Tk]; s in [0, 1].

    Where all kept weights round to 0 they are the softmax of the kept scores, without edits of scores and soft-capping; rows that see
    nothing of it stay as they are.
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
        if weights.device.type != "cpu" or bool((total <= TINY).any()):
            kept = torch.where(total > TINY, kept, _softmax(rows, rows.columns(self.columns) | own, weights))
            total = kept.sum(dim=-1, keepdim=True)
        share = weights.sum(dim=-1, keepdim=True) / total.clamp_min(TINY)
        return torch.where(total > TINY, (1 - self.strength) * weights + self.strength * share * kept, weights)


def _softmax(rows: Rows, kept: Tensor, weights: Tensor) -> Tensor:
    """Softmax [B, H, R, Tk] of the scores of these columns alone; all 0 where a row sees none of them."""
    query, key = rows.query[:, :, rows.index], repeat_heads(rows.key, weights.shape[1])
    scores = rows.scale * query.to(weights.dtype) @ key.transpose(2, 3).to(weights.dtype)
    if rows.mask is not None and rows.mask.dtype != torch.bool:
        scores = scores + (rows.mask if rows.mask.shape[2] == 1 else rows.mask[:, :, rows.index])
    kept = kept if rows.visible is None else kept & rows.visible
    return scores.masked_fill(~kept, float("-inf")).softmax(dim=-1).nan_to_num(0.0)


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


@dataclass(frozen=True, eq=False, kw_only=True)
class BlurQuery(OperandEdit):
    """q = G q over a raster of query rows, so S = G S: each row's scores become a Gaussian mean of its neighbours'.

    grid [height, width] long: the query rows of the raster, the same in every batch row. sigma: the Gaussian's width in places of the
    raster, cut off at 3 sigma and at half a side, edges reflected; 0 = no change, inf = every query becomes the mean of the raster's.
    """

    grid: Tensor
    sigma: float
    # as a long tensor it is shared by all batch rows and heads
    broadcast = {"grid": 2}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sigma != math.inf:
            check_number("sigma", self.sigma, 0)
        if self.grid.dtype != torch.long or self.grid.dim() != 2 or not self.grid.numel():
            raise ReattendError(
                f"grid must be a long tensor [height, width] of query rows, got {self.grid.dtype} {list(self.grid.shape)}"
            )

    @property
    def is_identity(self) -> bool:
        return super().is_identity or all(_reach(self.sigma, size) == 0 for size in self.grid.shape)

    def _check_shapes(self, shape: Shape) -> None:
        super()._check_shapes(shape)
        grid = self.grid
        if grid.device.type == "cpu" and not 0 <= int(grid.min()) <= int(grid.max()) < shape.queries:
            raise ReattendError(f"grid names query row {int(grid.max())}, the call has rows 0 to {shape.queries - 1}")

    def on_operands(self, x: Operands) -> Operands:
        query = blurred(x.query, self.grid, self.sigma)
        if self.rows is not None:
            query = torch.where(self.rows[:, None, :, None], query, x.query)
        return dataclasses.replace(x, query=query)


def blurred(query: Tensor, grid: Tensor, sigma: float) -> Tensor:
    """query [B, H, Tq, D] with the rows of a raster grid [height, width] blurred over it, or of each frame of [frames, height, width]."""
    index = grid.flatten().to(query.device)
    places = query[:, :, index].to(torch.promote_types(query.dtype, torch.float32)).unflatten(2, (-1, *grid.shape[-2:]))
    for axis, size in ((3, grid.shape[-2]), (4, grid.shape[-1])):
        mean = blur_matrix(sigma, size).to(places)
        places = (mean @ places.transpose(axis, -2)).transpose(axis, -2)
    return query.index_copy(2, index, places.flatten(2, 4).to(query.dtype))


@functools.lru_cache(maxsize=64)
def blur_matrix(sigma: float, size: int) -> Tensor:
    """G [size, size]: places of a line as Gaussian means of their neighbours, edges reflected; sigma inf: the mean of all."""
    if sigma == math.inf:
        return torch.full((size, size), 1 / size)
    reach = _reach(sigma, size)
    if reach == 0:
        return torch.eye(size)
    weights = (-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2).exp()
    reflected = torch.nn.functional.pad(torch.eye(size)[None], (reach, reach), mode="reflect")[0]
    return (reflected.unfold(1, 2 * reach + 1, 1) @ (weights / weights.sum())).T.contiguous()


def _reach(sigma: float, size: int) -> int:
    """How many places the Gaussian sees to either side: ceil(6 sigma) in all, made odd, and what can be reflected at an edge."""
    return size // 2 if sigma == math.inf else min(math.ceil(6 * sigma) // 2, size // 2)
