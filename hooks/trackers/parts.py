"""The parts of a denoiser's batch: the rows of each half and of each guide's branch, so that rows deal with rows of their own part."""

from __future__ import annotations

import torch
from torch import Tensor

from ...interventions import Clock

HALVES = ("conditional", "unconditional")


def parts_of(clock: Clock, batch: int) -> dict[str, Tensor]:
    """{name: long [n]} of a call's rows, each in one part: guides' branches by their names, then the two halves, then "" (neither).

    batch: the rows of the call, a multiple of the denoiser's where a site folds frames into them. Empty where nobody knows.
    """
    if not clock.branches:
        return {}
    left = torch.ones(batch, dtype=torch.bool)
    found: dict[str, Tensor] = {}
    for name in (*(name for name in clock.branches if name not in HALVES), *HALVES):
        rows = clock.rows(name, batch)
        if rows is not None:
            own = rows.cpu() & left
            left &= ~own
            found[name] = own.nonzero()[:, 0]
    found[""] = left.nonzero()[:, 0]
    return {name: rows for name, rows in found.items() if len(rows)}


def places_in(parts: dict[str, Tensor], batch: int) -> Tensor:
    """Long [batch]: the place of each row in its own part."""
    places = torch.zeros(batch, dtype=torch.long)
    for rows in parts.values():
        places[rows] = torch.arange(len(rows))
    return places
