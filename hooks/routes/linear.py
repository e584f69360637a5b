"""The route for linear attention (Sana), which has no softmax and never calls torch's SDPA, but heads with outputs and values.

What can be done there is what follows from these alone: the merged heads are changed as they come to the output projection, beside the values
as they left theirs. Queries and keys are not seen: those of the call are its values, which tell sizes and nothing else.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from ...interventions import Call, ReattendError, Site
from ...interventions.engine.output_edits import edited_output
from ..host import Host
from ..passes import Forward
from ..steering import Acting, acting_at, edits_of
from ..tokens.denoisers import DenoiserForward, locate
from .marking import Marked, MarkingRoute, check_bypassed


@dataclass
class _Running:
    """A forward of a module under way in this thread."""

    module: nn.Module
    acting: Acting
    value: Tensor | None = None
    calls: int = 0


class _Marked(Marked):
    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self.local = threading.local()

    def put_on(self) -> None:
        self.hooks.after(self.module, self._end)
        self.hooks.after(self.module.to_v, self._values)
        self.hooks.before(self.module.to_out[0], self._merged)
        self.hooks.before(self.module, self._begin)

    def _begin(self, module: nn.Module, args: tuple) -> None:
        acting = acting_at(self.owners, module)
        # what an interrupt has left of another forward goes here
        self.local.running = _Running(module, acting) if acting else None

    def _values(self, module: nn.Module, args: tuple, output: Tensor | None) -> None:
        running = self._running
        if running is not None:
            running.value = output

    def _merged(self, module: nn.Module, args: tuple) -> tuple | None:
        running = self._running
        if running is None:
            return None
        running.calls += 1
        new = _edited(running, args[0])
        return None if new is None else (new, *args[1:])

    def _end(self, module: nn.Module, args: tuple, output: Any) -> None:
        running, self.local.running = self._running, None
        if running is not None and output is not None and not running.calls:
            check_bypassed(running)

    @property
    def _running(self) -> _Running | None:
        return getattr(self.local, "running", None)


def _edited(running: _Running, merged: Tensor) -> Tensor | None:
    """The merged heads [B, T, H * D] with the edits of all sessions; None where there are none."""
    (place, _), value, module = running.acting[0], running.value, running.module
    if value is None or value.shape != merged.shape:
        got = "none" if value is None else tuple(value.shape)
        raise ReattendError(
            f"{place.site.name}: linear attention gave outputs {tuple(merged.shape)} for values {got}, so that no token's own can be told"
        )
    heads = _split(value, place.site)
    call = Call(heads, heads, heads, site=place.site)

    def located(call: Call, site: Site, owner: Host) -> Forward:
        forward = owner.current()
        if isinstance(forward, DenoiserForward):
            locate(call, forward, running.calls - 1, module)
        else:
            forward.locate(call, site)
        return forward

    edits = edits_of(running.acting, call, located)
    if not edits:
        return None
    return edited_output(call, _split(merged, place.site), edits).transpose(1, 2).flatten(2)


def _split(merged: Tensor, site: Site) -> Tensor:
    """[B, T, H * D] as [B, H, T, D]."""
    assert site.num_heads is not None
    return merged.unflatten(2, (site.num_heads, -1)).transpose(1, 2)


class LinearRoute(MarkingRoute):
    name = "linear"
    mark = _Marked
    marked: ClassVar[dict[int, Marked]] = {}
