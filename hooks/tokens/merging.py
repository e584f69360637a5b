"""What the tokens are that go on after a merge: how many each stands for, where it was, and what became of those that were there first."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...interventions import Clock, KeyBias, Site, TokenMap
from ...interventions.families.merging import Regroup, taken

# log of the size of a filler, which nobody sees
UNSEEN = -1e4


@dataclass
class Passing:
    """What passes a merge: hidden [B, T, width] of the tokens, in their order there.

    tokens: their roles, or why they are not known. size [B, T], position [B, T] long: how many of the first tokens each
    stands for, and which of them it is (-1: no single one). site, clock, memory as in a Call.
    """

    hidden: Tensor
    site: Site
    clock: Clock
    tokens: TokenMap
    size: Tensor
    position: Tensor
    memory: dict[Any, Any]


@dataclass(eq=False)
class MergedTokens:
    """size [B, K]: how many of the first tokens each one stands for, 0 for fillers in rows that keep fewer. position [B, K] long: which of
    the first ones it is, -1 for one that stands in no single place. where [B, N] long: the token that each of the first ones is part of
    now, -1 for one that has left. tokens: their roles, "merged" among them; no grid. gone [B, N, width]: the states in which those that
    left did so, where somebody asks for them."""

    size: Tensor
    position: Tensor
    where: Tensor
    tokens: TokenMap
    gone: Tensor | None = None
    uneven: bool = False

    @classmethod
    def first(cls, tokens: TokenMap | None, batch: int, length: int, device: torch.device) -> MergedTokens:
        """Before any merge. tokens: their map; None where it is not known what they are."""
        places = torch.arange(length, device=device).expand(batch, -1)
        if tokens is None or (tokens.batch, tokens.length) != (batch, length):
            tokens = TokenMap(batch, length, length, unknown="it is not known what the tokens were before they were merged")
        return cls(torch.ones(batch, length, device=device), places, places, tokens)

    def after(self, regroup: Regroup, states: Tensor | None = None) -> MergedTokens:
        """After one more merge. states [B, K, width]: those of the tokens before it, where it shall be known how the first ones left."""
        index, old = regroup.index, self.tokens
        size = regroup.sizes(self.size)
        position = taken(self.position, index.clamp_min(0)).masked_fill(index < 0, -1)
        roles = {role: taken(marked, index.clamp_min(0)) & (index >= 0).to(marked.device) for role, marked in old.roles.items()}
        filler = size == 0
        several = size > 1 if regroup.groups is not None else torch.zeros_like(filler)
        roles["merged"] = several | ((index < 0) & ~filler)
        roles["padding"] = roles.get("padding", torch.zeros_like(filler)) & ~filler | filler
        tokens = TokenMap(len(index), index.shape[1], index.shape[1], roles, unknown=old.unknown)
        if regroup.groups is None:
            return MergedTokens(size, position, self.where, tokens)  # repeated around a module, which takes them back itself
        where = taken(regroup.groups, self.where.clamp_min(0)).masked_fill(self.where < 0, -1)
        gone = self.gone
        if states is not None:
            left = ((where < 0) & (self.where >= 0))[..., None]
            whole = taken(states, self.where.clamp_min(0))
            gone = whole if gone is None else torch.where(left, whole, gone)
        return MergedTokens(size, position, where, tokens, gone, self.uneven or regroup.uneven)

    def whole(self, states: Tensor) -> Tensor:
        """[B, K, width] -> [B, N, width]: each of the first tokens with the state of the one that it is part of, or in which it left."""
        return Regroup(self.position, self.where).undo(states, self.gone)

    @property
    def members(self) -> Tensor:
        """[B, K] long: the first of the first tokens that are part of each one; for fillers the last of all."""
        batch, length = self.where.shape
        places = torch.arange(length, device=self.where.device).expand(batch, -1)
        places = places.masked_fill(self.where < 0, length - 1)
        last = places.new_full(self.position.shape, length - 1)
        return last.scatter_reduce(1, self.where.clamp_min(0), places, "amin")

    def short(self, states: Tensor) -> Tensor:
        """The way back: [B, N, width] -> [B, K, width], each token from the first of those that are part of it."""
        return taken(states, self.members)

    @functools.cached_property
    def by_size(self) -> KeyBias:
        """The log of its size added to the scores of each column; fillers are hidden."""
        return KeyBias(bias=self.size.log().clamp_min(UNSEEN)[:, None])

    @functools.cached_property
    def fillers(self) -> KeyBias:
        """What hides fillers alone."""
        return KeyBias(bias=self.size.clamp_max(1).log().clamp_min(UNSEEN)[:, None])
