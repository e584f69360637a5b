"""What trackers, routes and doors know of a model's hooks (`attachment`), which they must not import."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor, nn

from ..interventions import Clock, TokenMap
from .passes import Forward, Running
from .protocols import Steered
from .sites.table import SiteTable
from .trackers.in_flight import InFlight
from .trackers.recomputed import Recomputed


class TokenTracker(Protocol):
    """The tracker of a model that reads tokens, for doors that run passes of their own."""

    root: nn.Module | None
    signature: inspect.Signature

    @property
    def offset_modules(self) -> list[Any]:
        """Modules that keep the offset of multimodal RoPE from one pass to the next."""
        ...

    def current(self) -> Forward: ...

    def under_way(self) -> Forward | None:
        """The forward pass of this thread; None outside of one."""
        ...

    def new_map(self, ids: Tensor | None, embeds: Tensor | None, mask: Any, given: dict[str, Any]) -> TokenMap:
        """The map of a prompt that no session has read."""
        ...

    def looking(self, running: Running, clock: Clock, memory: dict[Any, Any]) -> AbstractContextManager[Forward]:
        """Inside, a pass of the root is read by `running` and edited by nobody; outside of all other passes. memory: by plan."""
        ...

    def aside(self, forward: Forward) -> AbstractContextManager[None]:
        """Inside, passes of the root are a door's own: `forward` holds their facts, and no action comes before or after them."""
        ...


class DenoiserTracker(Protocol):
    """The tracker of denoisers, for doors that run passes of their own."""

    def aside(self, running: Running, clock: Clock, run: Any) -> AbstractContextManager[None]:
        """Inside, passes of denoisers are a door's own: with this clock, no action before or after them, and no step of the run's."""
        ...


class Host(Protocol):
    """The hooks of one model, shared by its sessions."""

    model: Any
    table: SiteTable
    in_flight: InFlight
    # what is known of parts that backward computes anew
    recomputed: Recomputed
    # what is known of the embedding modules of its rotary positions
    rotary: dict[int, nn.Module | None]

    @property
    def tracker(self) -> TokenTracker: ...

    @property
    def denoiser(self) -> DenoiserTracker: ...

    def active(self, module: nn.Module | None = None) -> list[Steered]:
        """Sessions that the current thread or task runs under; module: one whose attention is about to be computed."""
        ...

    def in_step(self, module: nn.Module) -> Any:
        """What sessions do at a module (see `steering.Acting`) and the pass under way, where that is told by a few looks; else None."""
        ...

    def current(self) -> Forward:
        """The pass under way in this thread, of a denoiser or of the model that reads tokens."""
        ...

    def begin(self) -> list[Steered]:
        """Notes that a pass of one of the model's roots begins, and returns the sessions that it runs under to its end."""
        ...

    def land(self, output: Any) -> None:
        """Notes that it is over; output: None after an error."""
        ...
