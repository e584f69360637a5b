"""The pattern of a sliding window with sinks."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import ReattendError
from .base import Rows, batch_rows
from .keep import Pattern

T = TypeVar("T")
# So many things that follow from a band are kept with it.
KEPT = 32


@dataclass(frozen=True)
class Band(Pattern):
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

    def at_batch(self, index: Tensor) -> Band:
        places = {name: getattr(self, name) for name in ("first", "dense_after", "dense_until")}
        return dataclasses.replace(self, **{n: batch_rows(p, index) for n, p in places.items() if isinstance(p, Tensor)})

    def pairs(self, rows: Rows, num_keys: int) -> Tensor:
        return self.keep(rows.own, torch.arange(num_keys, device=rows.index.device))

    def keep(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Bool [B or 1, 1, ..., R, C] for row positions [..., R] and column positions [..., C], both as key columns of the call."""
        rows, columns = rows[..., :, None], columns[..., None, :]
        near = (rows - columns < self.window)[None]
        dense = self.dense_rows(rows)
        near = near if dense is None else near | dense
        first = 0 if self.first is None else self._per_row("first", rows)
        return (near | (columns[None] - first < self.sinks))[:, None]

    def dense_rows(self, rows: Tensor) -> Tensor | None:
        """Bool [B or 1, ...]: which of the row positions [...] see everything; None where none can."""
        if self.dense_after is None:
            return None
        dense = rows[None] >= self._per_row("dense_after", rows)
        return dense if self.dense_until is None else dense & (rows[None] < self._per_row("dense_until", rows))

    def _per_row(self, name: str, rows: Tensor) -> int | Tensor:
        """A position, or [B, 1, ...] of them beside rows [1, ...]."""
        place = getattr(self, name)
        return self.on(rows.device, name).view(-1, *[1] * rows.dim()) if isinstance(place, Tensor) else place

    def on(self, device: torch.device, name: str, there: Tensor | None = None) -> Tensor:
        """A tensor of the band on a device, sent once; there: that tensor, where it is known already, to be sent never."""
        place = getattr(self, name)
        if place.device == device:
            return place
        if there is not None:
            self.remember((name, device), lambda: there)
        return self.remember((name, device), lambda: place.to(device))

    def remember(self, key: tuple, make: Callable[[], T], of: Tensor | None = None) -> T:
        """What `make` gives, made once for each key: layers share a band, and each of them asks. of: what it holds for; it is kept for the
        last two, because layers of two kinds take turns with their masks, until that or places of the band are changed in place."""
        counted = (x for x in (of, self.first, self.dense_after, self.dense_until) if isinstance(x, Tensor))
        version = tuple(x._version for x in counted if not x.is_inference())
        held = [one for one in self._held.get(key, []) if one[1] == version or one[0] is not of]
        for mask, _, known in held:
            if mask is of:
                return known
        if len(self._held) >= KEPT:
            self._held.clear()  # a band that lives longer than a pass meets other sizes and masks in each
        with torch.inference_mode(False):  # kept longer than the pass that makes it
            found = make()
        self._held[key] = [*held[-1:], (of, version, found)]
        return found

    @functools.cached_property
    def _held(self) -> dict[tuple, list[tuple[Tensor | None, tuple[int, ...], Any]]]:
        return {}

    def has_dense(self, low: int, high: int) -> bool:
        """Whether some row of positions low..high sees everything in some sequence."""
        if self.dense_after is None:
            return False
        after = self.dense_after if isinstance(self.dense_after, int) else int(self.dense_after.min())
        until = high + 1 if self.dense_until is None else self.dense_until
        return high >= after and low < (until if isinstance(until, int) else int(until.max()))
