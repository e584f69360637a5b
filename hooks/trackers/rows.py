"""What a cache's own methods do to its rows, told to the sequence that was read into it: beams, selections, repetitions."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..passes import Sequence

# Methods of a cache that move its rows: the first two take the row that each new one comes from, the third how often rows are repeated.
MOVES = ("reorder_cache", "batch_select_indices", "batch_repeat_interleave")


class Followed:
    """Stands in for such a method on one cache."""

    def __init__(self, cache: Any, name: str) -> None:
        self.cache, self.name = weakref.ref(cache), name
        self.sequences: weakref.WeakSet[Sequence] = weakref.WeakSet()

    def __call__(self, given: Any) -> Any:
        cache = self.cache()
        result = getattr(type(cache), self.name)(cache, given)
        for sequence in self.sequences:
            sequence.move(_index(given, sequence.tokens.batch))
        return result

    def __deepcopy__(self, memo: dict) -> Followed:
        # what is known belongs to the original: a copy of the cache is a sequence of its own
        return Followed(memo.get(id(self.cache()), self.cache()), self.name)

    def __reduce__(self) -> Any:
        return getattr, (self.cache(), self.name)


def _index(given: Any, batch: int) -> Tensor:
    """[rows] long on the CPU: the row that each new row comes from."""
    if isinstance(given, int):
        return torch.arange(batch).repeat_interleave(given)
    index = torch.as_tensor(given).cpu()
    return index.nonzero()[:, 0] if index.dtype == torch.bool else index.long()


def follow(cache: Any, sequence: Sequence) -> None:
    """Lets a sequence share in what happens to the rows of its cache."""
    for name in MOVES:
        mine = vars(cache).get(name)
        if mine is None and hasattr(type(cache), name):
            mine = Followed(cache, name)
            setattr(cache, name, mine)
        if isinstance(mine, Followed):
            mine.sequences.add(sequence)


def unfollow(caches: Iterable[Any]) -> None:
    """Takes what `follow` has set off these caches."""
    for cache in caches:
        for name in MOVES:
            if isinstance(vars(cache).get(name), Followed):
                delattr(cache, name)
