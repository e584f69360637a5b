"""Fewer tokens from many: which of them stay, which become part of others, and the way back. For methods that merge or drop tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ReattendError


@dataclass(frozen=True, eq=False)
class Regroup:
    """How K new tokens come from N old ones, in each row of a batch.

    index [B, K] long: the old token that each new one is, or whose place it takes; -1 for one that stands in no single place (or, where no
    old token is part of it, for a filler in a row that keeps fewer). groups [B, N] long: the new token that each old one is part of, -1
    for one that leaves; None: new tokens are copies of the old ones of `index`, of which each has at least one, and go back as their mean.
    weights [B, N]: the factor with which each old token is added to its new one; None: a new token is the old one of `index`.
    uneven: rows keep different numbers of tokens, so that there are fillers. Raises ReattendError for shapes that do not go together.
    """

    index: Tensor
    groups: Tensor | None = None
    weights: Tensor | None = None
    uneven: bool = False

    def __post_init__(self) -> None:
        shapes = {name: tuple(t.shape) for name, t in vars(self).items() if isinstance(t, Tensor)}
        alike = self.groups is not None or self.weights is None
        for name in ("groups", "weights"):
            other = shapes.get(name, shapes.get("groups"))
            alike = alike and (
                other is None or len(other) == 2 and other[0] == shapes["index"][0] and other == shapes["groups"]
            )
        if len(shapes["index"]) != 2 or not shapes["index"][1] or not alike:
            raise ReattendError(f"a regrouping takes index [B, K], and groups and weights [B, N] or groups alone; got {shapes}")

    @classmethod
    def keep(cls, index: Tensor, length: int) -> Regroup:
        """The tokens of index [B, K] stay, in that order; the others of `length` leave."""
        groups = torch.full((index.shape[0], length), -1, device=index.device)
        return cls(index, groups.scatter(1, index, torch.arange(index.shape[1], device=index.device).expand_as(index)))

    @property
    def count(self) -> int:
        return self.index.shape[1]

    def merge(self, tokens: Tensor) -> Tensor:
        """[B, N, ...] -> [B, K, ...]."""
        if self.weights is None or self.groups is None:
            return taken(tokens, self.index.clamp_min(0))
        factor = self.weights.masked_fill(self.groups < 0, 0).to(tokens.dtype)
        matrix = factor.new_zeros(len(tokens), self.count, tokens.shape[1])
        matrix.scatter_(1, self.groups.clamp_min(0)[:, None], factor[:, None])
        return (matrix @ tokens.flatten(2)).unflatten(2, tokens.shape[2:])

    def undo(self, tokens: Tensor, gone: Tensor | None = None) -> Tensor:
        """[B, K, ...] -> [B, N, ...]: each old token gets what became of its new one; one that left what `gone` [B, N, ...] has, or 0."""
        if self.groups is None:
            shape = [*self.index.shape, *[1] * (tokens.dim() - 2)]
            places = self.index.view(shape).expand_as(tokens)
            length = int(self.index.max()) + 1
            total = tokens.new_zeros(len(tokens), length, *tokens.shape[2:]).scatter_add(1, places, tokens)
            copies = tokens.new_zeros(len(tokens), length).scatter_add(1, self.index, tokens.new_ones(self.index.shape))
            return total / copies.view(*copies.shape, *[1] * (tokens.dim() - 2))
        left = (self.groups < 0).view(*self.groups.shape, *[1] * (tokens.dim() - 2))
        back = taken(tokens, self.groups.clamp_min(0))
        return back.masked_fill(left, 0) if gone is None else torch.where(left, gone, back)

    def sizes(self, size: Tensor) -> Tensor:
        """[B, N] -> [B, K]: how many tokens each new one stands for, given how many each old one did; 0 for fillers."""
        if self.groups is None:
            return taken(size, self.index)
        counted = size.masked_fill(self.groups < 0, 0)
        return size.new_zeros(len(size), self.count).scatter_add(1, self.groups.clamp_min(0), counted)


def taken(tokens: Tensor, index: Tensor) -> Tensor:
    """The tokens index [B, K] of [B, N, ...]: [B, K, ...]."""
    index = index.to(tokens.device)
    return tokens.gather(1, index.view(*index.shape, *[1] * (tokens.dim() - 2)).expand(*index.shape, *tokens.shape[2:]))


def into_nearest(metric: Tensor, sources: Tensor, targets: Tensor, count: int | Tensor, size: Tensor | None = None) -> Regroup:
    """The sources that are most like a target become part of the nearest one, as its mean weighted by size (token merging, ToMe).

    metric [B, N, D]: what is compared, by cosine. sources, targets [n], [m] long: positions of the two sets; tokens in neither (a class
    token) stay. count: how many sources are merged in each row, a number or [B] long; rows that keep fewer get fillers. size [B, N]: how
    many tokens each stands for, None = 1. In the new order come those in neither set, the rest of the sources, the targets.
    """
    batch, length, device = *metric.shape[:2], metric.device
    unit = torch.nn.functional.normalize(metric.float(), dim=-1)
    likeness = unit[:, sources] @ unit[:, targets].transpose(1, 2)
    if size is not None:  # fillers are like nothing
        nobody = size == 0
        likeness = likeness.masked_fill(nobody[:, sources, None] | nobody[:, None, targets], -2.0)
    best, nearest = likeness.max(dim=2)
    counts = torch.as_tensor(count, device=device).expand(batch)
    rank = best.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    merged = rank < counts[:, None]
    outside = torch.ones(length, dtype=torch.bool)
    outside[sources.cpu()] = outside[targets.cpu()] = False
    rest = outside.nonzero()[:, 0].to(device)
    # the others in their order, then fillers
    stay = (~merged).sum(dim=1)
    most = int(stay.max()) if isinstance(count, Tensor) else max(0, len(sources) - count)
    order = merged.to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
    filler = torch.arange(most, device=device) >= stay[:, None]
    staying = sources.to(device)[order].masked_fill(filler, -1)
    index = torch.cat([rest.expand(batch, -1), staying, targets.to(device).expand(batch, -1)], dim=1)
    groups = torch.zeros(batch, length, dtype=torch.long, device=device)
    groups[:, rest] = torch.arange(len(rest), device=device)
    groups[:, sources] = len(rest) + torch.where(merged, nearest + most, (~merged).cumsum(dim=1) - 1)
    groups[:, targets] = torch.arange(len(targets), device=device) + len(rest) + most
    own = torch.ones(batch, length, device=device) if size is None else size.float()
    total = taken(Regroup(index, groups).sizes(own), groups).clamp_min(1e-6)
    return Regroup(index, groups, own / total, uneven=isinstance(count, Tensor) and batch > 1)
