"""Subspaces of keys that a question makes relevant, and projections onto them (SEKA and AdaSEKA, arXiv 2603.01281).

Keys of the same tokens are collected in two texts, without and with a question about them. The left singular vectors of their cross
covariance say along which directions they move together; projections take the leading ones, or all but the leading ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import ReattendError

Rule = Literal["weighted_top_k", "all_weighted", "top_k_uniform"]


@dataclass
class Subspaces:
    """vectors [..., D, D]: left singular vectors in columns, strongest first; values [..., D]: their singular values."""

    vectors: Tensor
    values: Tensor

    def leading(self, share: float) -> Tensor:
        """Long [...]: how many singular values it takes to reach `share` of their sum, D at most."""
        parts = self.values.cumsum(dim=-1) / self.values.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        return (1 + (parts < share).sum(dim=-1)).clamp(max=self.values.shape[-1])

    def onto(self, share: float) -> Tensor:
        """Projections [..., D, D] onto the leading vectors that hold `share` of the singular values' sum."""
        return self._project(self._places() < self.leading(share)[..., None])

    def beside(self, share: float) -> Tensor:
        """Projections [..., D, D] onto all other vectors."""
        return self._project(self._places() >= self.leading(share)[..., None])

    def _places(self) -> Tensor:
        return torch.arange(self.values.shape[-1], device=self.values.device)

    def _project(self, chosen: Tensor) -> Tensor:
        part = self.vectors * chosen[..., None, :]
        return part @ part.transpose(-1, -2)


class PairedKeys:
    """Sums over tokens of one site's keys in two texts: what is needed for their subspaces, without keeping the keys."""

    def __init__(self) -> None:
        self.count = 0
        self._product: Tensor | float = 0.0
        self._sum: Tensor | float = 0.0

    def add(self, key: Tensor, other: Tensor) -> None:
        """key, other [Hkv, N, D]: the same tokens in the first and in the second text."""
        one, two = key.double(), other.double()
        self.count += key.shape[1]
        self._product = self._product + one.transpose(1, 2) @ two
        self._sum = self._sum + one.sum(dim=1)

    def subspaces(self) -> Subspaces:
        """Subspaces [Hkv, D, D] of the (uncentred) cross covariance; each vector points to the side on which the keys lie in the mean.

        Raises ReattendError where no keys were added.
        """
        if not isinstance(self._product, Tensor) or not isinstance(self._sum, Tensor):
            raise ReattendError("no keys were collected")
        vectors, values, _ = torch.linalg.svd((self._product / self.count).float())
        side = (self._sum.float()[:, None, :] @ vectors)[:, 0]
        return Subspaces(vectors * torch.where(side < 0, -1.0, 1.0)[:, None, :], values)


class KeyDistance:
    """How far apart the keys of the same tokens are in two texts, per head, in the two ways of SEKA's paper and code."""

    def __init__(self) -> None:
        self.count = 0
        self._squares: Tensor | float = 0.0
        self._norms: Tensor | float = 0.0

    def add(self, key: Tensor, other: Tensor) -> None:
        """key, other [Hkv, N, D]."""
        lengths = torch.linalg.vector_norm(other.double() - key.double(), dim=-1)
        self.count += key.shape[1]
        self._squares = self._squares + lengths.square().sum(dim=1)
        self._norms = self._norms + lengths.sum(dim=1)

    def code(self) -> Tensor:
        """Float64 [Hkv]: Frobenius norm of all differences over their number; it shrinks as tokens are added."""
        return torch.as_tensor(self._squares).sqrt() / max(1, self.count)

    def paper(self) -> Tensor:
        """Float64 [Hkv]: mean norm of a token's difference."""
        return torch.as_tensor(self._norms) / max(1, self.count)


def expert_weights(query: Tensor, experts: Subspaces, top: int | None, rule: Rule = "weighted_top_k") -> Tensor:
    """How much each of M experts counts for a query: [..., M], signed, the largest in size about 1.

    query [..., D]; experts' vectors [M, ..., D, D] and values [M, ..., D]. With u_k, s_k the leading `top` of an expert (None: all):
    weighted_top_k sums (q.u_k) s_k, all_weighted does so for all k, top_k_uniform is the mean of q.u_k. An expert that is NaN
    (nothing was learned for this head) counts 0.
    """
    width = query.shape[-1]
    top = width if top is None or rule == "all_weighted" else min(top, width)
    along = (query[..., None, :] @ experts.vectors[..., :top])[..., 0, :]
    score = along.mean(dim=-1) if rule == "top_k_uniform" else (along * experts.values[..., :top]).sum(dim=-1)
    score = score.nan_to_num(0.0)
    return (score / (score.abs().amax(dim=0, keepdim=True) + 1e-8)).movedim(0, -1)


def mixed_projection(weights: Tensor, experts: Subspaces, top: int | None) -> Tensor:
    """[..., D, D] = sum over experts of weight * (projection onto its leading `top` vectors); weights [..., M]. NaN experts are left out."""
    top = experts.values.shape[-1] if top is None else top
    leading = experts.vectors[..., :top].nan_to_num(0.0)
    return (weights.movedim(-1, 0)[..., None, None] * (leading @ leading.transpose(-1, -2))).sum(dim=0)


def group_query(query: Tensor, kv_heads: int) -> Tensor:
    """Unit-norm mean query of the heads that share a key head: [B, H, D] -> float32 [B, Hkv, D]."""
    mean = query.float().unflatten(1, (kv_heads, -1)).mean(dim=2)
    return torch.nn.functional.normalize(mean, dim=-1)
