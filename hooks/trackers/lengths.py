"""How long caches are whose length an accelerator holds (static caches): it is asked for once or twice per prompt, not at every step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

from .caches import cache_length


@dataclass
class _Counted:
    """counter, version: the tensor that counts, and what torch says of how often it was written to. right: whether the length that was
    reckoned after a pass has been found to be the true one before the next."""

    counter: Tensor
    version: int
    length: int
    right: bool

    def holds_for(self, counter: Tensor) -> bool:
        return self.counter is counter and self.version == counter._version


class Lengths:
    """What is known of the caches of one model after each of its passes."""

    def __init__(self) -> None:
        self.known: WeakKeyDictionary[Any, _Counted] = WeakKeyDictionary()

    def of(self, cache: Any) -> int:
        """Tokens already in a cache. Raises ReattendError as `cache_length`."""
        counter = _counter(cache)
        if counter is None:
            return cache_length(cache)
        known = self.known.get(cache)
        unchanged = known is not None and known.holds_for(counter)
        if known is not None and unchanged and known.right:
            return known.length
        length = int(counter)
        if known is not None:
            known.right = unchanged and known.length == length
        return length

    def note(self, cache: Any, length: int) -> None:
        """A pass is over, after which the cache holds so many tokens."""
        counter = _counter(cache)
        if counter is not None:
            before = self.known.get(cache)
            right = before is not None and before.counter is counter and before.right
            self.known[cache] = _Counted(counter, counter._version, length, right)


def _counter(cache: Any) -> Tensor | None:
    """The tensor on an accelerator that holds a cache's length; None where it can be told without asking, or not told when it changes."""
    length = cache.get_seq_length() if hasattr(cache, "get_seq_length") else None
    return length if isinstance(length, Tensor) and length.device.type != "cpu" and not length.is_inference() else None
