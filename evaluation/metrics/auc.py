"""Area under the ROC curve of scores, as counts that add up: how often a positive item scores above a negative one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .sums import ratio

# scores in one bin count as equal; nats
BIN = 0.05
POSITIVE, NEGATIVE = "auc +", "auc -"


def auc_counts(score: float, positive: bool) -> dict[str, float]:
    """What one item adds."""
    return {f"{POSITIVE}{round(score / BIN)}": 1.0} if positive else {f"{NEGATIVE}{round(score / BIN)}": 1.0}


def auc_metric(sums: Mapping[str, Any]) -> Any:
    """From summed `auc_counts`: 1 where every positive item scores above every negative one, 0.5 by chance. Equal scores count half."""
    bins = sorted({int(name[len(POSITIVE) :]) for name in sums if name.startswith((POSITIVE, NEGATIVE))})
    above: Any = 0.0
    below = positive = np.asarray(0.0)  # negative items in lower bins; positive items so far
    for place in bins:
        mine, other = (np.asarray(sums[f"{side}{place}"], dtype=float) for side in (POSITIVE, NEGATIVE))
        above = above + mine * (below + other / 2)
        below, positive = below + other, positive + mine
    return ratio(above, positive * below)
