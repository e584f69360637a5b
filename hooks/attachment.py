"""The hooks of one model: made with its first session, shared by all, taken away with its last.

Sessions come and go in any order in between.
"""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Sequence
from threading import get_ident
from typing import Any, Protocol

import torch
from torch import nn

from ..interventions import ReattendError, Site
from .passes import Forward
from .plan import Facts
from .protocols import Steered
from .routes.compiled import inside, run_compiled, run_uncompiled
from .routes.interface import InterfaceRoute
from .routes.linear import LinearRoute
from .routes.sdpa import SdpaRoute
from .sites.denoisers import denoiser_in
from .sites.discovery import components, original_of, pretrained_root, sites, unwrapped_model
from .sites.encoders import STACKS as ENCODER_STACKS
from .sites.table import SiteTable
from .steering import Acting
from .trackers.denoise import DenoiseTracker
from .trackers.encode import EncodeTracker
from .trackers.in_flight import InFlight, backward_task, lifecycle
from .trackers.recomputed import Moment, Recomputed
from .trackers.sequence import SequenceTracker

_isolated: contextvars.ContextVar[tuple[Any, ...]] = contextvars.ContextVar("reattend_sessions", default=())
_attachments: dict[int, Attachment] = {}


class Attached(Steered, Protocol):
    """A session, as its model's hooks know it."""

    attachment: Attachment | None
    table: SiteTable | None

    def check(self, facts: Facts, beside: Sequence[Any]) -> None: ...

    def install(self, host: Attachment) -> None: ...

    def uninstall(self) -> None: ...


class Attachment:
    """The hooks of one model, shared by its sessions."""

    def __init__(self, model: Any, key: Any, table: SiteTable | None) -> None:
        self.model = model
        self.key = key
        self.table: SiteTable = sites(model) if table is None else table
        # called at most once in a pass, unlike encoders; a second call may belong to no pass at all
        self.once = {id(self.table.module(s)) for s in self.table if s.stack.startswith(("decoder", "denoiser"))}
        self.rotary: dict[int, nn.Module | None] = {}
        self.sessions: list[Attached] = []
        self.in_flight = InFlight()
        # the sessions of the last pass, and what they do at modules: passes under the same ones share it
        self._acting: tuple[list[Steered], dict[int, Acting]] = ([], {})
        self.recomputed = Recomputed(self)
        self.tracker = SequenceTracker(self)
        self.denoiser = DenoiseTracker(self)
        self.encoder = EncodeTracker(self)
        # the trackers of passes that come before the model's own, as far as they follow anything here
        self.before_tokens: list[DenoiseTracker | EncodeTracker] = []
        self.interface = InterfaceRoute(self)
        self.routes = [self.interface, SdpaRoute(self), LinearRoute(self)]

    # -- sessions come and go ------------------------------------------------------------------------------------------

    def add(self, session: Attached) -> None:
        """Puts a session to work. Where this raises, `discard` takes away what is there of it."""
        parts = components(session.model)
        if session.table is None:
            # a wrapper's sites and those of the model inside have other names
            same = original_of(session.model) is original_of(self.model)
            session.table = self.table if same else sites(session.model)
        denoisers = [denoiser for part in parts.values() if (denoiser := denoiser_in(part)) is not None]
        facts = Facts(session.model, session.table, self.tracker.root, denoisers)
        # of isolated sessions it shows in each pass which of them run together
        session.check(facts, [s for s in self.sessions if not (session.isolated and s.isolated)])
        self.in_flight.sweep()
        self.tracker.install()
        self.denoiser.install(parts, [plan.recipe for plan in session.plans])
        # passes that began before there were hooks are left alone
        self.in_flight.note_running(self._roots())
        session.install(self)
        if any(site.stack.partition(".")[0] in ENCODER_STACKS for site in _touched(session)):
            self.encoder.install(parts.values())
        followed = [(self.denoiser, self.denoiser.roots()), (self.encoder, self.encoder.handles)]
        self.before_tokens = [tracker for tracker, what in followed if what]
        for route in self.routes:
            route.install(session)
        if session.hooked and inside(parts.values()):
            run_uncompiled(session, "the model", session.hooked)
        elif session.prompt_hooked and inside(parts.values(), steps=False):
            run_uncompiled(session, "the model", session.prompt_hooked)
        self.sessions = [*self.sessions, session]

    def discard(self, session: Attached) -> bool:
        """Takes a session away; safe to call twice. True if all of it is gone, False if passes that began under it go on."""
        self.sessions = [s for s in self.sessions if s is not session]
        self.in_flight.when_over(lambda one: session in one.sessions, functools.partial(self._let_go, session))
        if not self.sessions:
            self.in_flight.when_over(lambda one: True, self._close)
        return session.ended

    def _let_go(self, session: Attached) -> None:
        self._acting = ([], {})
        session.uninstall()
        self.interface.leave(session)
        run_compiled(session)
        session.forget()

    def _close(self) -> None:
        """Takes the hooks away, unless another session has begun in the meantime."""
        if self.sessions:
            return
        for route in self.routes:
            route.uninstall()
        self.denoiser.uninstall()
        self.encoder.uninstall()
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

    def begin(self) -> list[Steered]:
        """Notes that a pass of one of the model's roots begins, and the sessions that it runs under to its end.

        Raises UnsupportedError where the user has switched to a kernel that cannot be edited.
        """
        sessions = self.active()
        begun = self.in_flight.begin(sessions)
        if sessions:
            if self._acting[0] != sessions:
                self._acting = (sessions, {})
            begun.acting = self._acting[1]
            self.interface.follow(sessions)
        return sessions

    def land(self, output: Any) -> None:
        """Notes that it is over; output: None after an error. Raises ReattendError where attention did not come through us."""
        landed = self.in_flight.land()
        if landed is not None and landed.sessions and output is not None:
            self.interface.check(landed)

    def active(self, module: nn.Module | None = None) -> list[Steered]:
        """Sessions that the current thread or task runs under, in the order of their start: in a pass those that it began with.

        module: one whose attention is about to be computed. Raises ReattendError where backward computes it anew in a way that cannot be
        followed.
        """
        # every layer of every step of decoding asks: one pass of a model alone is told by a few looks
        if backward_task() != -1 and (moment := self._computed_anew(module)) is not None:
            return list(moment.sessions)
        here = self.in_flight.here()
        probe = self.tracker.probing() or self.denoiser.probing()
        if probe is not None:
            sessions = [probe.session]
        else:
            if here is not None and module is not None:
                key = id(module)
                if key in here.seen or key not in self.once:
                    here = self.in_flight.checked()
                if here is not None:
                    here.seen.add(key)
            sessions = self._outside() if here is None else list(here.sessions)
        if module is not None and sessions and (torch.is_grad_enabled() or (here is not None and here.differentiable)):
            self.recomputed.note(sessions, self.current)
        return sessions

    def in_step(self, module: nn.Module) -> tuple[Acting, Forward] | None:
        """What sessions do at a module, and the pass under way, where a pass of the model that reads tokens comes to it for the first time
        and nobody wants gradients: what every layer of every step of decoding asks. None where it takes `active` and `current` to tell.
        """
        if self.before_tokens or torch.is_grad_enabled() or backward_task() != -1:
            return None
        mine, key = self.in_flight.by_thread.get(get_ident()), id(module)
        if not mine or key not in self.once:
            return None
        here, forward = mine[-1], self.tracker.last()
        doubtful = here.over or here.before or here.differentiable or key in here.seen
        if doubtful or forward is None or forward.probe is not None:
            return None
        here.seen.add(key)
        acting = here.acting.get(key)
        if acting is None:
            places = (session.at(module) for session in here.sessions)
            acting = here.acting[key] = [(place, self) for place in places if place is not None]
        return acting, forward

    def _outside(self) -> list[Steered]:
        """The sessions of this thread or task outside of all passes."""
        if not self.sessions:
            return []
        mine = _isolated.get()
        return [s for s in self.sessions if not s.isolated or s.mark in mine]

    def _computed_anew(self, module: nn.Module | None = None) -> Moment | None:
        """What is known of the part that backward computes anew in this thread; None where none is, or a whole pass of it has begun."""
        task = backward_task()
        if task == -1:
            return None
        here = self.in_flight.here()
        if here is not None and here.task == task:
            return None
        moment = self.recomputed.moment()
        if moment is None and module is not None and self.sessions:
            raise ReattendError(
                f"backward computes attention of {type(module).__name__} anew, and not by torch.utils.checkpoint: which pass it belongs to "
                "is not known, so it cannot be edited as it was; use torch's gradient checkpointing, or none, under a session"
            )
        return moment

    def current(self) -> Forward:
        """The pass under way in this thread: of a denoiser, of an encoder before the model's own, or of the model that reads tokens; where
        backward computes a part anew, that of the part."""
        if backward_task() != -1 and (moment := self._computed_anew()) is not None and moment.again is not None:
            return moment.again
        for tracker in self.before_tokens:
            forward = tracker.current()
            if forward is not None:
                return forward
        return self.tracker.current()


def _touched(session: Attached) -> list[Site]:
    """The sites that a session's steps act or look at, in whatever way."""
    return [
        *(site for site, _ in session.acted),
        *(site for plan in session.plans for step in plan.steps for site, _ in step.where),
    ]


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


def enter(session: Attached) -> None:
    """Puts a session to work on its model; the model's first one installs the hooks."""
    with lifecycle:
        key = key_module(session.model)
        # the session knows it before anybody else does, so that it can always take it away again
        session.attachment = _attachments.get(id(key)) or Attachment(session.model, key, session.table)
        _attachments[id(key)] = session.attachment
        session.attachment.add(session)
    if session.isolated:
        _isolated.set((*_open_marks(), session.mark))


def leave(session: Attached) -> bool:
    """Takes a session off its model, and with the last one the hooks; safe to call twice. False if passes under it still go on."""
    with lifecycle:
        if session.attachment is not None:
            session.attachment.discard(session)
    session.mark.open = False
    if session.isolated:
        _isolated.set(_open_marks())
    session.attachment = None
    return session.ended


def _open_marks() -> tuple[Any, ...]:
    """The marks of this context, without those of sessions that were ended elsewhere."""
    return tuple(mark for mark in _isolated.get() if mark.open)


def forget(session: Attached) -> None:
    """Drops what is known of the sequences that a session has read."""
    attachment = _attachments.get(id(key_module(session.model)))
    if attachment is not None:
        attachment.tracker.forget(session)


def running(model: Any) -> list[Steered]:
    """The sessions that act on a model just now, in the order of their start."""
    attachment = _attachments.get(id(key_module(model)))
    return [] if attachment is None else attachment.active()
