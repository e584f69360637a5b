"""Knows which pass of an encoder is under way: its images or texts, and with that its tokens.

A forward pre-hook and an always-called forward hook on every encoder of the model, put on with the first session that acts at one of
its layers. Encoders run inside a pass of the model or, under `generate` and for features alone, before it: such a pass counts as one
of its own, whose facts live as long as it does.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from types import FrameType
from typing import Any

from torch import nn

from ..host import Host
from ..module_hooks import Hooks
from ..passes import OUTSIDE, Forward
from ..sites.encoders import towers
from ..tokens.encoders import EncoderPass, read_pass
from ..tokens.states import parameters_of
from .in_flight import module_call, on_stack


@dataclass(eq=False)
class Entered:
    """A pass of an encoder under way. own: it belongs to no pass of the model; outer: the encoder in whose pass it runs."""

    module: nn.Module
    forward: Forward
    frame: FrameType | None
    own: bool
    outer: EncoderPass | None


class EncodeTracker:
    """The hooks on the encoders of one model."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.handles = Hooks()
        self.stacks: dict[int, str] = {}
        self.local = threading.local()

    def install(self, parts: Iterable[nn.Module]) -> None:
        if self.handles:
            return
        for stack, module in (pair for part in parts for pair in towers(part)):
            self.stacks[id(module)] = stack
            # the hook that ends passes first: none may begin that cannot end
            self.handles.after(module, self._leave)
            self.handles.before(module, self._enter, kwargs=True)

    def uninstall(self) -> None:
        self.handles.remove()
        self.stacks = {}
        self.local = threading.local()

    def current(self) -> Forward | None:
        """The pass of an encoder in this thread that belongs to no pass of the model."""
        entered = self._entered()
        return entered[-1].forward if entered and entered[-1].own else None

    def _entered(self) -> list[Entered]:
        """The passes under way in this thread; interrupted ones, which run no hook, are forgotten here."""
        entered: list[Entered] = getattr(self.local, "entered", [])
        while entered and (frame := entered[-1].frame) is not None and not on_stack(frame, inspect.currentframe()):
            self._end(entered.pop())
        return entered

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        entered = self._entered()
        # a pass of the model that was interrupted ran no hook, and is not what this one belongs to
        self.host.in_flight.checked()
        around = entered[-1].forward if entered and entered[-1].own else self.host.tracker.under_way()
        own = around is None
        if own:
            self.host.begin()
        forward = Forward(OUTSIDE) if around is None else around
        if not hasattr(self.local, "entered"):
            self.local.entered = entered
        entered.append(Entered(module, forward, module_call(), own, forward.encoder))
        given = {**dict(zip(parameters_of(module), args, strict=False)), **kwargs}
        forward.encoder = read_pass(self.stacks[id(module)], module, given)

    def _leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        entered: list[Entered] = getattr(self.local, "entered", [])
        if entered and entered[-1].module is module:
            done = entered.pop()
            self._end(done)
            if done.own:
                try:
                    if output is not None:
                        done.forward.end(output)
                finally:
                    self.host.in_flight.land()

    @staticmethod
    def _end(done: Entered) -> None:
        done.forward.encoder, done.frame = done.outer, None
