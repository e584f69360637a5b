"""Sessions: recipes attached to one model, for every caller or for one thread or task, and removed without a trace.

Sessions of one model share its hooks (see `attachment`) and come and go in any order.
"""

from __future__ import annotations

import itertools
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..interventions import Call, Edit, ReattendError, ReattendWarning, Site
from .attachment import enter, forget, leave
from .doors.branch import steps_of
from .doors.lookahead import reader_of
from .doors.probe import readers_of
from .module_hooks import Hooks
from .passes import Forward
from .plan import Branch, Capture, Edits, Exit, Guide, Lookahead, Observe, Plan, Probe, Project, ReadProjection, Spans
from .sites.table import require_supported

if TYPE_CHECKING:
    from .attachment import Attachment

_numbers = itertools.count()
# a session that is over keeps no part of its model: this makes its plans anew, for the same model
Again = Callable[[Any], Sequence[Plan]]


class Mark:
    """Stands for a session in the contexts that it is active in, where it must not keep the session or its model alive."""

    open = True


class Session:
    """Recipes at work on one model. A context manager and a handle: `with apply(...) as session:` or `session.remove()`.

    stats: {recipe label: {site name: how often its edits were applied}}. A recipe that never acted although the model ran
    warns (ReattendWarning) when the session ends.
    """

    def __init__(
        self, model: Any, plans: Sequence[Plan], *, isolated: bool = False, tokenizer: Any = None, again: Again | None = None
    ) -> None:
        self._model, self.plans, self.isolated = model, list(plans), isolated
        self._again = again
        self.attachment: Attachment | None = None
        self._last_model: weakref.ref[Any] | None = None
        self.mark = Mark()
        # sessions act in the order of these numbers, also where they are of several models that share modules
        self.number = -1
        self.tokenizer = tokenizer
        self.counts: dict[str, Counter[str]] = {}
        self.forwards = 0
        self.active = self.ended = False
        self._sites: dict[int, Site] = {}
        # of all modules that it acts at, nested steps too, and those of which one computes attention in every pass over tokens
        self.modules: set[int] = set()
        self.decoder_modules: set[int] = set()
        self._acts: dict[int, list[tuple[Plan, Edits]]] = {}
        self._captures: dict[int, list[tuple[Plan, Capture]]] = {}
        self.probes: list[tuple[Plan, Probe, Session]] = []
        self.branches: list[tuple[Plan, Branch, Session]] = []
        self.lookaheads: list[tuple[Plan, Lookahead, Session]] = []
        self.guides: list[tuple[Plan, Guide]] = []
        self.spans: list[Spans] = []
        self.handles = Hooks()
        self._prepare()

    def _prepare(self) -> None:
        for plan in self.plans:
            for step in plan.steps:
                if isinstance(step, (Edits, Observe, Capture, Project, ReadProjection, Exit)):
                    require_supported(step.sites)
                    if not len(step.sites):
                        raise ReattendError(f"recipe {plan.recipe!r} selects no attention site of this model")
                if isinstance(step, Edits):
                    step.label = step.label or plan.recipe
                    self.counts.setdefault(step.label, Counter())
                    for site in step.sites:
                        self._sites[id(step.sites.module(site))] = site
                        self._acts.setdefault(id(step.sites.module(site)), []).append((plan, step))
                elif isinstance(step, Capture):
                    for site in step.sites:
                        self._sites[id(step.sites.module(site))] = site
                        self._captures.setdefault(id(step.sites.module(site)), []).append((plan, step))
                elif isinstance(step, (Project, Exit)):
                    step.label = step.label or plan.recipe
                    self.counts.setdefault(step.label, Counter())
                elif isinstance(step, Guide):
                    self.guides.append((plan, step))
                elif isinstance(step, Probe):
                    self.probes.append((plan, step, readers_of(self, plan, step)))
                elif isinstance(step, Branch):
                    step.label = step.label or plan.recipe
                    self.counts.setdefault(step.label, Counter())
                    self.branches.append((plan, step, steps_of(self, plan, step)))
                elif isinstance(step, Lookahead):
                    step.label = step.label or plan.recipe
                    self.counts.setdefault(step.label, Counter())
                    self.lookaheads.append((plan, step, reader_of(self, plan, step)))
                elif isinstance(step, Spans):
                    self.spans.append(step)

        self.modules = {id(step.sites.module(site)) for _, step in self.act_steps() for site in step.sites}
        self.decoder_modules = {
            key for key, site in self._sites.items() if site.route == "attention_interface" and site.stack == "decoder"
        }

    # -- lifecycle ---------------------------------------------------------------------------------------------------

    def attach(self) -> Session:
        """Starts the session; already called by `apply`. One that has ended starts again, as long as its model is there."""
        if self.active:
            return self
        if self.ended:
            self._remember()
        elif self.number >= 0:
            raise ReattendError(
                "this session has been removed, but a forward pass that began under it is still under way: begin it again when that is "
                "over, or apply the recipe anew"
            )
        try:
            self.number = next(_numbers)
            enter(self)
            self.active = True
            return self
        except BaseException:
            # nobody has this session yet who could end it
            leave(self)
            raise

    def remove(self) -> None:
        """Ends the session and restores the model; safe to call twice. Warns about recipes that never acted.

        A forward pass that another thread has under way goes on as it began; what it needs is taken away when it is over.
        """
        if not self.active:
            return
        over = leave(self)
        # last: after an interrupt above, a second call does the rest
        self.active = False
        for label, counter in self.counts.items():
            if over and self.forwards and not counter:
                warnings.warn(
                    f"recipe {label!r} never acted in {self.forwards} forward passes: no call met its conditions",
                    ReattendWarning,
                    2,
                )

    def reset(self) -> None:
        """Forgets all that is believed about the sequences this session has read: their tokens, how long their prompts are, and what
        its recipes have learned from them. The next pass starts anew; what a cache holds by then counts as not read."""
        forget(self)

    @property
    def model(self) -> Any:
        """The model or pipeline; None where it has died after the session."""
        return self._model if self._last_model is None else self._last_model()

    def _remember(self) -> None:
        """Takes up the model again after the session had let go of it. Raises ReattendError where that cannot be."""
        model = self.model
        if model is None or self._again is None:
            gone = "its model is gone" if model is None else "its plans are not known any more"
            raise ReattendError(f"this session has ended and {gone}: apply the recipe again")
        self._model, self._last_model, self.mark, self.spans = model, None, Mark(), []
        self.plans = list(self._again(model))
        self._prepare()
        self.ended = False

    def forget(self) -> None:
        """Lets go of the model and all that belongs to it, but for what has been counted; for a session that is over."""
        self.ended = True
        for inner in self.nested:
            inner.forget()
        if self._last_model is None:
            self._last_model = _weak(self._model)
        self._model = None
        # passages that the user named are no part of the model
        self.plans, self.probes, self.branches, self.lookaheads, self.guides = [], [], [], [], []
        self._acts, self._captures, self._sites = {}, {}, {}

    def __enter__(self) -> Session:
        return self.attach()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ReattendWarning)
                self.remove()
        else:
            self.remove()

    @property
    def stats(self) -> dict[str, dict[str, int]]:
        return {label: dict(counter) for label, counter in self.counts.items()}

    @property
    def applied(self) -> int:
        """How often edits were applied, over all recipes and sites."""
        return sum(sum(c.values()) for c in self.counts.values())

    # -- what happens at a call --------------------------------------------------------------------------------------

    def act_steps(self) -> list[tuple[Plan, Edits | Capture]]:
        """The steps for which calls have to be intercepted."""
        own = [(plan, step) for plan in self.plans for step in plan.steps if isinstance(step, (Edits, Capture))]
        return [*own, *(item for inner in self.nested for item in inner.act_steps())]

    @property
    def nested(self) -> list[Session]:
        """The steps of probes, branches and trials, which act in passes of their own."""
        return [inner for _, _, inner in (*self.probes, *self.branches, *self.lookaheads)]

    def acts_at(self, module: nn.Module) -> bool:
        return id(module) in self._sites

    def site_at(self, module: nn.Module) -> Site:
        """The site of a module that this session acts at, by the name that it has in this session's model."""
        return self._sites[id(module)]

    def captures_at(self, module: nn.Module) -> list[tuple[Plan, Capture]]:
        return self._captures.get(id(module), [])

    def edits(self, module: nn.Module, call: Call, forward: Forward) -> list[Edit]:
        """The edits of this session's recipes for one call, in the order of the recipes."""
        result: list[Edit] = []
        for plan, act in self._acts.get(id(module), ()):
            call.memory = forward.memory(plan.memory_key)
            wanted = act.intervention(call)
            if wanted is None:
                continue
            new = [wanted] if isinstance(wanted, Edit) else list(wanted)
            if any(not e.is_identity for e in new):
                assert call.site is not None
                self.counts[act.label][call.site.name] += 1
            result += new
            call.edits += new
        return result


Acting = Sequence["tuple[Session, Attachment]"]


def acting_at(owners: Sequence[Attachment], module: nn.Module) -> list[tuple[Session, Attachment]]:
    """The sessions that act at a module in this thread, in the order in which they began, each with the model it belongs to."""
    if len(owners) == 1:
        owner = owners[0]
        return [(session, owner) for session in owner.active(module) if session.acts_at(module)]
    acting = [(session, owner) for owner in owners for session in owner.active(module) if session.acts_at(module)]
    return sorted(acting, key=lambda pair: pair[0].number)


def edits_of(acting: Acting, module: nn.Module, call: Call, place: Callable[[Call, Site, Attachment], Forward]) -> list[Edit]:
    """What all sessions do to one call, identities left out; their capture steps then read the call with these edits.

    place(call, site, attachment) tells the call where it stands in a session's model: its clock, its tokens.
    """
    edits: list[Edit] = []
    at: Any = None
    for session, owner in acting:
        site = session.site_at(module)
        if at != (id(owner), site.name):
            at, call.site = (id(owner), site.name), site
            forward = place(call, site, owner)
        edits += session.edits(module, call, forward)
    edits = [edit for edit in edits if not edit.is_identity]
    for session, owner in acting:
        captures = session.captures_at(module)
        if not captures:
            continue
        site = session.site_at(module)
        if at != (id(owner), site.name):
            at, call.site = (id(owner), site.name), site
            forward = place(call, site, owner)
        for plan, step in captures:
            call.memory = forward.memory(plan.memory_key)
            # the pass of a probe says itself whether it has gradients
            with torch.set_grad_enabled(forward.probe is not None and torch.is_grad_enabled()):
                step.reader(call, edits)
            if forward.probe is not None:
                forward.probe.read(step, module)
    return edits


def _weak(model: Any) -> Any:
    try:
        return weakref.ref(model)
    except TypeError:
        return lambda: None


def attach(
    model: Any, plans: Sequence[Plan], *, isolated: bool = False, tokenizer: Any = None, again: Again | None = None
) -> Session:
    """Starts a session of these plans on a model or pipeline. again(model): the same plans made anew, for a session that is begun a
    second time. Raises UnsupportedError for sites that cannot be intercepted.
    """
    return Session(model, plans, isolated=isolated, tokenizer=tokenizer, again=again).attach()
