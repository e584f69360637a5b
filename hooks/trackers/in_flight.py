"""Which forward passes of a model are under way, in which threads and under which sessions, and what waits for them to end.

A pass goes on as it began: it keeps the sessions that were at work when it started, and what a session that ends has put on the model
goes when the last pass that began under it is over. A pass is over when it lands (the hook after it), or when its module call is no
longer on its thread's stack: an interrupt runs no hook, and a thread may die.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from threading import get_ident
from types import FrameType
from typing import Any

import torch
from torch import nn

from ..protocols import Steered

# held while sessions come and go, and by what waited for passes to end
lifecycle = threading.RLock()

_CALL = nn.Module.__call__.__code__
_FILE = nn.modules.module.__file__


def module_call() -> FrameType | None:
    """The frame of the module call that runs the hooks: on the stack exactly as long as the module's forward is."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename != _FILE:
        frame = frame.f_back
    return frame


def on_stack(wanted: FrameType, top: FrameType | None) -> bool:
    """Whether a frame is among those from `top` down."""
    while top is not None and top is not wanted:
        top = top.f_back
    return top is not None


# the number of the backward that runs in this thread; -1 outside of one
backward_task: Callable[[], int] = torch._C._current_graph_task_id


class Pass:
    """One forward pass under way. before: it began before there were hooks, so that nothing may tell when it lands."""

    def __init__(self, sessions: Sequence[Steered], frame: FrameType | None, thread: int, before: bool = False) -> None:
        self.sessions, self.frame, self.thread, self.before = sessions, frame, thread, before
        # ids of the modules whose attention came through us in this pass
        self.seen: set[int] = set()
        # module -> what its sessions do there, as far as somebody has asked; passes under the same sessions share it
        self.acting: dict[int, Any] = {}
        self.over = False
        # whether gradients may come back through it, and the backward that it runs in itself
        self.differentiable, self.task = torch.is_grad_enabled(), backward_task()

    def is_over(self) -> bool:
        """Looks whether its module call is still on its thread's stack."""
        if self.over:
            return True
        here = self.thread == get_ident()
        top = sys._getframe(1) if here else sys._current_frames().get(self.thread)
        frame = self.frame
        if frame is None:
            return here or top is None
        return not on_stack(frame, top)

    def end(self) -> None:
        """Forgets the frame, which keeps all that it worked on alive."""
        self.over, self.frame = True, None


class InFlight:
    """The passes of one model."""

    def __init__(self) -> None:
        self.by_thread: dict[int, list[Pass]] = {}
        self.waiting: list[tuple[list[Pass], Callable[[], None]]] = []
        self.running: list[tuple[list[Pass], Callable[[], None]]] = []
        # of the passes alone, held for a moment; what has waited runs under `lifecycle`
        self.lock = threading.RLock()

    def __len__(self) -> int:
        return sum(map(len, list(self.by_thread.values())))

    # -- beginning and landing -----------------------------------------------------------------------------------------

    def begin(self, sessions: Sequence[Steered]) -> Pass:
        """Notes that a pass of this thread begins; called by the hook before it."""
        thread = get_ident()
        self._drop_finished(thread)
        new = Pass(sessions, module_call(), thread)
        with self.lock:
            self.by_thread.setdefault(thread, []).append(new)
        if self.waiting:
            self.sweep()
        return new

    def land(self) -> Pass | None:
        """Notes that the last pass that began in this thread is over; called by the hook after it."""
        mine = self.by_thread.get(get_ident())
        if not mine:
            return None
        landed = mine.pop()
        landed.end()
        if not mine:
            with self.lock:
                self.by_thread.pop(get_ident(), None)
        if self.waiting:
            self.sweep()
        return landed

    def note_running(self, roots: Iterable[nn.Module]) -> None:
        """Notes the passes of these modules that began before they had hooks: they are left alone."""
        wanted = {id(root) for root in roots}
        for thread, top in sys._current_frames().items():
            self._drop_finished(thread)
            frame: FrameType | None = None if self.by_thread.get(thread) else top
            while frame is not None:
                if frame.f_code is _CALL and id(frame.f_locals.get("self")) in wanted:
                    with self.lock:
                        self.by_thread.setdefault(thread, []).insert(0, Pass([], frame, thread, before=True))
                    break
                frame = frame.f_back

    # -- asking --------------------------------------------------------------------------------------------------------

    def here(self) -> Pass | None:
        """The pass under way in this thread."""
        mine = self.by_thread.get(get_ident())
        while mine:
            last = mine[-1]
            if not (last.over or (last.before and last.is_over())):
                return last
            self._drop_finished(get_ident())
        return None

    def checked(self) -> Pass | None:
        """The pass under way in this thread, of which it is doubtful that it is: an interrupted one is forgotten here."""
        self._drop_finished(get_ident())
        return self.here()

    # -- waiting -------------------------------------------------------------------------------------------------------

    def when_over(self, concerned: Callable[[Pass], bool], then: Callable[[], None]) -> None:
        """Runs `then` now, or when the last of the concerned passes that are now under way is over. It must be safe to run twice."""
        for thread in list(self.by_thread):
            self._drop_finished(thread)
        passes = [one for mine in list(self.by_thread.values()) for one in list(mine) if concerned(one)]
        if not passes:
            then()
            return
        with lifecycle:
            self.waiting = [*self.waiting, (passes, then)]
        self.sweep()  # some may have landed in the meantime

    def sweep(self) -> None:
        """Runs what has waited for passes that are all over, however they ended."""
        with lifecycle:
            for item in self.waiting:
                passes, then = item
                # what runs may wait for further passes, and so come here again
                if any(item is other for other in self.running) or not all(one.is_over() for one in passes):
                    continue
                self.running.append(item)
                try:
                    then()
                    # forgotten last: after an interrupt it is run once more
                    self.waiting = [other for other in self.waiting if other is not item]
                finally:
                    self.running.remove(item)

    def _drop_finished(self, thread: int) -> None:
        """Forgets the passes of a thread that ended without landing."""
        if not self.by_thread.get(thread):
            return
        with self.lock:
            mine = self.by_thread[thread]
            for one in [one for one in mine if one.is_over()]:
                mine.remove(one)
                one.end()
