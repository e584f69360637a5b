"""What routes share that see attention by hooks of their own on each module: whose a mark is, and when it goes."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

from torch import nn

from ...interventions import ReattendError
from ..host import Host
from ..module_hooks import Hooks
from ..protocols import Steered
from ..sites.discovery import dispatch
from ..steering import Acting


class Marked:
    """A module that sessions edit, with its hooks and the attachments of all models that it belongs to."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.hooks = Hooks()
        self.owners: list[Host] = []

    def put_on(self) -> None:
        raise NotImplementedError

    def take_off(self) -> None:
        self.hooks.remove()


class MarkingRoute:
    """Marks the modules that sessions edit. A subclass says of which sites (`Site.route`), how, and keeps the marks of all models."""

    name: ClassVar[str]
    mark: ClassVar[type[Marked]]
    marked: ClassVar[dict[int, Marked]]

    def __init__(self, host: Host) -> None:
        self.host = host

    def install(self, session: Steered) -> None:
        for site, module in session.acted:
            if site.route != self.name:
                continue
            marked = self.marked.setdefault(id(module), self.mark(module))
            if self.host not in marked.owners:
                marked.owners = [*marked.owners, self.host]
            if not marked.hooks:
                marked.put_on()

    def uninstall(self) -> None:
        """Takes the marks away, where no other model's sessions need them; safe to call twice."""
        for key, marked in list(self.marked.items()):
            if self.host not in marked.owners:
                continue
            rest = [owner for owner in marked.owners if owner is not self.host]
            if not rest:
                marked.take_off()
                del self.marked[key]
            marked.owners = rest


class Bypassed(Protocol):
    """A module's forward that a step acts in."""

    module: nn.Module
    acting: Acting


def check_bypassed(mode: Bypassed) -> None:
    """Raises ReattendError for a module that ran without coming through its route, though a step acts there."""
    place, _ = mode.acting[0]
    name = place.site.name
    how = dispatch(mode.module)
    problem = "it no longer computes attention that can be intercepted" if how is None else how[1]
    if problem is None:
        if "forward" in vars(mode.module):
            return  # replaced on the instance: it may hand out what it computed before, as diffusers' caches do
        problem = "it did not call torch's SDPA"
    raise ReattendError(
        f"{name} ran, but its attention did not come through the session, which acts there: {problem} (was its processor or its "
        f"implementation switched inside the session?)"
    )
