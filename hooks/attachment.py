"""The hooks of one model: made with its first session, shared by all, taken away with its last.

Sessions come and go in any order in between.
"""

from __future__ import annotations

import contextvars
import functools
from typing import TYPE_CHECKING, Any

from torch import nn

from ..interventions import ReattendError, UnsupportedError
from .doors.branch import branch_misfit
from .doors.exit import exit_conflict, install_exit
from .plan import Exit, Observe, Project, ReadProjection
from .routes.compiled import inside, run_compiled, run_uncompiled
from .sites.discovery import components, pretrained_root, sites, unwrapped_model
from .sites.table import SiteTable
from .trackers.in_flight import InFlight, lifecycle
from .trackers.sequence import SequenceTracker
from .unserved import unserved

if TYPE_CHECKING:
    from .session import Mark, Session

_isolated: contextvars.ContextVar[tuple[Mark, ...]] = contextvars.ContextVar("reattend_sessions", default=())
_attachments: dict[int, Attachment] = {}


class Attachment:
    """The hooks of one model, shared by its sessions."""

    def __init__(self, model: Any) -> None:
        from .routes.interface import InterfaceRoute
        from .routes.sdpa import SdpaRoute
        from .trackers.denoise import DenoiserDoor

        self.model = model
        self.key = key_module(model)
        self.table: SiteTable = sites(model)
        # called at most once in a pass, unlike encoders; a second call may belong to no pass at all
        self.once = {id(self.table.module(s)) for s in self.table if s.stack.startswith(("decoder", "denoiser"))}
        self.sessions: list[Session] = []
        self.in_flight = InFlight()
        self.tracker = SequenceTracker(self)
        self.interface = InterfaceRoute(self)
        self.routes = [self.interface, SdpaRoute(self)]
        self.denoiser = DenoiserDoor(self)

    # -- sessions come and go ------------------------------------------------------------------------------------------

    def add(self, session: Session) -> None:
        """Puts a session to work. Where this raises, `discard` takes away what is there of it."""
        if session.probes and self.tracker.root is None:
            raise ReattendError("a probe needs a model that reads tokens: a denoiser has no prompt to be run beforehand")
        misfit = unserved(session.plans, self.tracker.root)
        if misfit:
            raise UnsupportedError(misfit)
        fusing = [plan for plan, *_ in (*session.branches, *session.lookaheads)]
        misfit = branch_misfit(self.tracker.root) if fusing else ""
        if misfit:
            raise UnsupportedError(f"recipe {fusing[0].recipe!r} does not fit this model: {misfit}")
        # of isolated sessions it shows in each pass which of them run together
        conflict = exit_conflict([session, *(s for s in self.sessions if not (session.isolated and s.isolated))])
        if conflict:
            raise UnsupportedError(conflict)
        self.in_flight.sweep()
        self.tracker.install()
        self.denoiser.install(session)
        # passes that began before there were hooks are left alone
        self.in_flight.note_running(self._roots())
        for route in self.routes:
            route.install(session)
        self._install_taps(session)
        if any(one.handles for one in (session, *session.nested)) and inside(components(session.model).values()):
            run_uncompiled(session, "the model")
        self.sessions = [*self.sessions, session]

    def discard(self, session: Session) -> bool:
        """Takes a session away; safe to call twice. True if all of it is gone, False if passes that began under it go on."""
        self.sessions = [s for s in self.sessions if s is not session]
        self.in_flight.when_over(lambda one: session in one.sessions, functools.partial(self._let_go, session))
        if not self.sessions:
            self.in_flight.when_over(lambda one: True, self._close)
        return session.ended

    def _let_go(self, session: Session) -> None:
        self._drop_taps(session)
        run_compiled(session)
        session.forget()

    def _close(self) -> None:
        """Takes the hooks away, unless another session has begun in the meantime."""
        if self.sessions:
            return
        for route in self.routes:
            route.uninstall()
        self.denoiser.uninstall()
        # a pass that began before this moment may look our name up once more
        self.in_flight.when_over(lambda one: True, self._forget)

    def _forget(self) -> None:
        if self.sessions:
            return
        self.interface.release()
        self.tracker.uninstall()
        if _attachments.get(id(self.key)) is self:
            del _attachments[id(self.key)]

    def _roots(self) -> list[nn.Module]:
        root = self.tracker.root
        return [*self.denoiser.roots(), *([] if root is None else [root])]

    # -- passes --------------------------------------------------------------------------------------------------------

    def begin(self) -> list[Session]:
        """Notes that a pass of one of the model's roots begins, and the sessions that it runs under to its end.

        Raises UnsupportedError where the user has switched to a kernel that cannot be edited.
        """
        sessions = self.active()
        self.in_flight.begin(sessions)
        if sessions:
            self.interface.follow(sessions)
        return sessions

    def land(self, output: Any) -> None:
        """Notes that it is over; output: None after an error. Raises ReattendError where attention did not come through us."""
        landed = self.in_flight.land()
        if landed is not None and landed.sessions and output is not None:
            self.interface.check(landed)

    def active(self, module: nn.Module | None = None) -> list[Session]:
        """Sessions that the current thread or task runs under, in the order of their start: in a pass those that it began with.

        module: one whose attention is about to be computed.
        """
        probe = self.tracker.probing()
        if probe is not None:
            return [probe.session]
        here = self.in_flight.here()
        if here is not None and module is not None:
            if id(module) in here.seen or id(module) not in self.once:
                here = self.in_flight.checked()
            if here is not None:
                here.seen.add(id(module))
        if here is not None:
            return here.sessions
        if not self.sessions:
            return []
        mine = _isolated.get()
        return [s for s in self.sessions if not s.isolated or s.mark in mine]

    def _install_taps(self, session: Session) -> None:
        from .doors.taps import install_observation, install_projection
        from .trackers.positions import install_positions

        if session.branches or session.lookaheads:
            install_positions(self, session)
        for inner in session.nested:
            self._install_taps(inner)
        for plan in session.plans:
            for step in plan.steps:
                if isinstance(step, Observe):
                    install_observation(self, session, plan, step)
                elif isinstance(step, (Project, ReadProjection)):
                    install_projection(self, session, plan, step)
                elif isinstance(step, Exit):
                    install_exit(self, session, plan, step)

    def _drop_taps(self, session: Session) -> None:
        for inner in session.nested:
            self._drop_taps(inner)
        session.handles.remove()


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
    with lifecycle:
        key = id(key_module(session.model))
        # the session knows it before anybody else does, so that it can always take it away again
        session.attachment = _attachments.get(key) or Attachment(session.model)
        _attachments[key] = session.attachment
        session.attachment.add(session)
    if session.isolated:
        _isolated.set((*_open_marks(), session.mark))


def leave(session: Session) -> bool:
    """Takes a session off its model, and with the last one the hooks; safe to call twice. False if passes under it still go on."""
    with lifecycle:
        if session.attachment is not None:
            session.attachment.discard(session)
    session.mark.open = False
    if session.isolated:
        _isolated.set(_open_marks())
    session.attachment = None
    return session.ended


def _open_marks() -> tuple[Mark, ...]:
    """The marks of this context, without those of sessions that were ended elsewhere."""
    return tuple(mark for mark in _isolated.get() if mark.open)


def forget(session: Session) -> None:
    """Drops what is known of the sequences that a session has read."""
    attachment = _attachments.get(id(key_module(session.model)))
    if attachment is not None:
        attachment.tracker.forget(session)


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
