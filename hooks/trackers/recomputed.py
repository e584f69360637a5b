"""Gradient checkpointing: backward computes parts of a pass anew, outside of any pass, maybe in another thread, maybe much later.

Such a part must be edited as it was: under the sessions of its pass, at the same step, with what recipes remembered when it was first
computed. That is kept on the object by which torch itself knows the part again, and goes with it.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch.utils.checkpoint

from ..passes import Forward
from ..protocols import Steered
from .in_flight import backward_task

_FILE = torch.utils.checkpoint.__file__
_NAME = "_reattend_moments"


@dataclass
class Moment:
    """What was known when a part was first computed: the facts of the pass that it is a part of, or of the whole passes inside it.

    sessions: those that were at work. forward: the facts; None for a part that holds whole passes. passes: what the tracker of these wants
    back, in the order in which they ran.
    """

    sessions: list[Steered] = field(default_factory=list)
    forward: Forward | None = None
    passes: list[Any] = field(default_factory=list)
    # the backward that computes it anew, the facts that it works on, and how many of the passes it has begun
    task: int = -1
    again: Forward | None = None
    begun: int = 0

    def start(self, task: int) -> None:
        """Everything is as it was, for every backward."""
        if self.task != task:
            self.task, self.begun = task, 0
            self.again = None if self.forward is None else self.forward.as_it_is()

    def next_pass(self) -> Any:
        """What is known of the next of the whole passes inside; None where there is none."""
        self.begun += 1
        return self.passes[self.begun - 1] if self.begun <= len(self.passes) else None


def parts() -> list[Any]:
    """The checkpointed parts that are computed, or computed anew, in this thread: torch's own objects for them, the innermost first."""
    found: list[Any] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == _FILE:
            part = _part(frame.f_code.co_name, frame.f_locals)
            if part is not None:
                found.append(part)
        frame = frame.f_back
    return found


def _part(function: str, names: dict[str, Any]) -> Any:
    if function in ("forward", "backward"):
        return names.get("ctx")  # reentrant
    if function == "unpack_hook":
        return names.get("frame")
    generator = names.get("gen") if function == "checkpoint" else None
    return None if generator is None or generator.gi_frame is None else generator.gi_frame.f_locals.get("new_frame")


class Recomputed:
    """The moments of one model's passes."""

    def __init__(self, host: Any) -> None:
        self.host = weakref.ref(host)

    def _of(self, part: Any) -> Moment | None:
        return getattr(part, _NAME, {}).get(self.host())

    def note(self, sessions: Sequence[Steered], forward: Callable[[], Forward]) -> None:
        """Keeps what is known now for the parts that are computed and of which nothing is kept yet."""
        new = [part for part in parts() if self._of(part) is None]
        if new:
            self._keep(new, Moment(list(sessions), forward().as_it_is()))

    def note_pass(self, sessions: Sequence[Steered], state: Callable[[], Any]) -> None:
        """Keeps what is known of a whole pass that begins inside such parts."""
        around = parts()
        if around:
            self._keep([part for part in around if self._of(part) is None], Moment(list(sessions)))
            moment = self._of(around[0])
            assert moment is not None
            moment.passes.append(state())

    def _keep(self, new: list[Any], moment: Moment) -> None:
        for part in new:
            if not hasattr(part, _NAME):
                setattr(part, _NAME, weakref.WeakKeyDictionary())
            getattr(part, _NAME)[self.host()] = moment

    def moment(self) -> Moment | None:
        """Of the part that backward computes anew in this thread; an empty one where no session saw it, None where it computes none."""
        found = parts()
        moment = next((moment for moment in map(self._of, found) if moment is not None), None)
        if moment is None:
            return Moment() if found else None
        moment.start(backward_task())
        return moment
