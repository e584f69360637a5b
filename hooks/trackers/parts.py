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


def shared_out(clock: Clock, batch: int, count: int, *, alone: bool = False) -> Tensor:
    """Long [batch]: which of `count` texts, one or one per prompt, each row has; alone: -1 in rows that are not the prompt's."""
    number = torch.zeros(batch, dtype=torch.long)
    for name, rows in parts_of(clock, batch).items():
        hidden = alone and name in ("unconditional", "")
        number[rows] = torch.full((len(rows),), -1) if hidden else torch.arange(len(rows)) * count // len(rows)
    return number


def partners(clock: Clock, name: str) -> Tensor:
    """Long [B]: rows of a guide's branch and those that they were copied from name each other, any other row itself."""
    source, rows = clock.source, clock.branches[name]
    assert source is not None
    partner = torch.arange(len(rows), device=rows.device)
    own = rows.nonzero()[:, 0]
    partner[own] = source[own]
    partner[source[own]] = own
    return partner
