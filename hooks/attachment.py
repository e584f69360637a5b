"""The hooks of one model: made with its first session, shared by all, taken away with its last.

Sessions come and go in any order in between.
"""

from __future__ import annotations

import contextvars
import threading
from typing import TYPE_CHECKING, Any

from torch import nn

from ..interventions import ReattendError, Site, UnsupportedError
from .branch import branch_misfit
from .discovery import components, pretrained_root, sites, unwrapped_model
from .plan import Exit, Observe, Project, ReadProjection
from .sequence import SequenceTracker
from .site_table import SiteTable
from .token_exit import exit_conflict, install_exit

if TYPE_CHECKING:
    from .session import Session

_isolated: contextvars.ContextVar[tuple[Session, ...]] = contextvars.ContextVar("reattend_sessions", default=())
_attachments: dict[int, Attachment] = {}
_lock = threading.RLock()


class Attachment:
    """The hooks of one model, shared by its sessions."""

    def __init__(self, model: Any) -> None:
        from .denoise import DenoiserDoor
        from .interface_route import InterfaceRoute
        from .sdpa_route import SdpaRoute

        self.model = model
        self.key = key_module(model)
        self.table: SiteTable = sites(model)
        self.site_of: dict[int, Site] = {id(self.table.module(s)): s for s in self.table}
        self.sessions: list[Session] = []
        self.tracker = SequenceTracker(self)
        self.routes = [InterfaceRoute(self), SdpaRoute(self)]
        self.denoiser = DenoiserDoor(self)

    def add(self, session: Session) -> None:
        first = not self.sessions
        for _, step in session.act_steps():
            self.site_of.update({id(step.sites.module(site)): site for site in step.sites})
        if session.probes and self.tracker.root is None:
            raise ReattendError("a probe needs a model that reads tokens: a denoiser has no prompt to be run beforehand")
        fusing = [plan for plan, *_ in (*session.branches, *session.lookaheads)]
        misfit = branch_misfit(self.tracker.root) if fusing else ""
        if misfit:
            raise UnsupportedError(f"recipe {fusing[0].recipe!r} does not fit this model: {misfit}")
        # of isolated sessions it shows in each pass which of them run together
        conflict = exit_conflict([session, *(s for s in self.sessions if not (session.isolated and s.isolated))])
        if conflict:
            raise UnsupportedError(conflict)
        try:
            if first:
                self.tracker.install()
            self.denoiser.install(session)
            for route in self.routes:
                route.install(session)
            self._install_taps(session)
        except BaseException:
            self._drop_taps(session)
            if first:
                self.uninstall()
                _attachments.pop(id(self.key), None)
            raise
        self.sessions = [*self.sessions, session]

    def discard(self, session: Session) -> None:
        self.sessions = [s for s in self.sessions if s is not session]
        self._drop_taps(session)
        if not self.sessions:
            self.uninstall()
            _attachments.pop(id(self.key), None)

    def uninstall(self) -> None:
        for route in self.routes:
            route.uninstall()
        self.denoiser.uninstall()
        self.tracker.uninstall()

    def active(self) -> list[Session]:
        """Sessions that the current thread or task runs under, in the order of their start."""
        if not self.sessions:
            return []
        probe = self.tracker.probing()
        if probe is not None:
            return [probe.session]
        mine = _isolated.get()
        return [s for s in self.sessions if not s.isolated or s in mine]

    def _install_taps(self, session: Session) -> None:
        from .positions import install_positions
        from .taps import install_observation, install_projection

        if session.branches or session.lookaheads:
            session.handles += install_positions(self)
        for inner in session.nested:
            self._install_taps(inner)
        for plan in session.plans:
            for step in plan.steps:
                if isinstance(step, Observe):
                    session.handles += install_observation(self, session, plan, step)
                elif isinstance(step, (Project, ReadProjection)):
                    session.handles += install_projection(self, session, plan, step)
                elif isinstance(step, Exit):
                    session.handles += install_exit(self, session, plan, step)

    def _drop_taps(self, session: Session) -> None:
        for inner in session.nested:
            self._drop_taps(inner)
        while session.handles:
            session.handles.pop().remove()


def key_module(model: Any) -> Any:
    """The object whose identity stands for a model: the first pretrained model inside, or the pipeline's first component."""
    inner = unwrapped_model(model)
    if not isinstance(inner, nn.Module):
        parts = components(model)
        for name in ("transformer", "unet"):
            if name in parts:
                return parts[name]
        return next(iter(parts.values()))
    return pretrained_root(inner)


def enter(session: Session) -> None:
    """Puts a session to work on its model; the model's first one installs the hooks."""
    with _lock:
        attachment_of(session.model).add(session)
    if session.isolated:
        _isolated.set((*_isolated.get(), session))


def leave(session: Session) -> None:
    """Takes a session off its model, and with the last one the hooks."""
    if session.isolated:
        _isolated.set(tuple(s for s in _isolated.get() if s is not session))
    with _lock:
        attachment = _attachments.get(id(key_module(session.model)))
        if attachment is not None:
            attachment.discard(session)


def running(model: Any) -> list[Session]:
    """The sessions that act on a model just now, in the order of their start."""
    attachment = _attachments.get(id(key_module(model)))
    return [] if attachment is None else attachment.active()


def attachment_of(model: Any) -> Attachment:
    key = key_module(model)
    attachment = _attachments.get(id(key))
    if attachment is None:
        attachment = Attachment(model)
        _attachments[id(key)] = attachment
    return attachment
