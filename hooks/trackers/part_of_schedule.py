"""Which steps of a run lie in a part of its schedule: step i of n lies at i / n, and a part goes from start to just before stop."""

from __future__ import annotations

from ...interventions import Clock, ReattendError


def lies_in(clock: Clock, start: float, stop: float, whose: str) -> bool:
    """Whether a step lies in the part. Raises ReattendError where the number of steps is not known and the part is not all of them."""
    if (start, stop) == (0, 1):
        return True
    if clock.steps is None:
        raise ReattendError(f"{whose}: the number of steps is not known, so start must be 0 and stop 1")
    return start <= clock.step / clock.steps < stop


def holds_no_step(clock: Clock, start: float, stop: float, whose: str) -> str:
    """What is wrong with a part in which none of a run's steps lies; "" where one does, or their number is not known."""
    steps = clock.steps
    if not steps or any(start <= step / steps < stop for step in range(steps)):
        return ""
    return (
        f"{whose} acts from {start:g} to {stop:g} of the schedule, and none of the {steps} steps of this run lies there (step i, from 0, at "
        f"i / {steps}): choose a wider or earlier part, or more steps"
    )
