"""What almost every metric is made of: counts that add up over records, and ratios of their sums."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np


class Sums(dict):
    """Counts added up over records, by name; a name that never occurred is 0. Values are floats, or arrays [resamples]."""

    def __missing__(self, name: str) -> float:
        return 0.0

    @classmethod
    def of(cls, counts: Iterable[Mapping[str, float]]) -> Sums:
        total = cls()
        for one in counts:
            for name, value in one.items():
                total[name] += float(value)
        return total


def ratio(part: Any, whole: Any) -> Any:
    """part / whole of floats or arrays, 0 where whole is 0."""
    part, whole = np.asarray(part, dtype=float), np.asarray(whole, dtype=float)
    return np.divide(part, whole, out=np.zeros(np.broadcast_shapes(part.shape, whole.shape)), where=whole != 0)
