"""Sessions: recipes attached to one model, for every caller or for one thread or task, and removed without a trace.

Sessions of one model share its hooks (see `attachment`) and come and go in any order.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..interventions import Call, Edit, ReattendError, ReattendWarning
from .attachment import enter, leave
from .branch import steps_of
from .lookahead import reader_of
from .plan import Act, Branch, Capture, Exit, Guide, Lookahead, Observe, Plan, Probe, Project, ReadProjection, Spans
from .probe import readers_of
from .sequence import Forward
from .site_table import require_supported


class Session:
    """Recipes at work on one model. A context manager and a handle: `with apply(...) as session:` or `session.remove()`.

    stats: {recipe label: {site name: how often its edits were applied}}. A recipe that never acted although the model ran
    warns (ReattendWarning) when the session ends.
    """

    def __init__(self, model: Any, plans: Sequence[Plan], *, isolated: bool = False, tokenizer: Any = None) -> None:
        self.model, self.plans, self.isolated = model, list(plans), isolated
        self.tokenizer = tokenizer
        self.counts: dict[str, Counter[str]] = {}
        self.forwards = 0
        self.active = False
        self._acts: dict[int, list[tuple[Plan, Act]]] = {}
        self._captures: dict[int, list[tuple[Plan, Capture]]] = {}
        self.probes: list[tuple[Plan, Probe, Session]] = []
        self.branches: list[tuple[Plan, Branch, Session]] = []
        self.lookaheads: list[tuple[Plan, Lookahead, Session]] = []
        self.guides: list[tuple[Plan, Guide]] = []
        self.spans: list[Spans] = []
        self.handles: list[Any] = []
        self._prepare()

    def _prepare(self) -> None:
        for plan in self.plans:
            for step in plan.steps:
                if isinstance(step, (Act, Observe, Capture, Project, ReadProjection, Exit)):
                    require_supported(step.sites)
                    if not len(step.sites):
                        raise ReattendError(f"recipe {plan.recipe!r} selects no attention site of this model")
                if isinstance(step, Act):
                    step.label = step.label or plan.recipe
                    self.counts.setdefault(step.label, Counter())
                    for site in step.sites:
                        self._acts.setdefault(id(step.sites.module(site)), []).append((plan, step))
                elif isinstance(step, Capture):
                    for site in step.sites:
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

    # -- lifecycle ---------------------------------------------------------------------------------------------------

    def attach(self) -> Session:
        """Starts the session; already called by `apply`."""
        if self.active:
            return self
        enter(self)
        self.active = True
        return self

    def remove(self) -> None:
        """Ends the session and restores the model; safe to call twice. Warns about recipes that never acted."""
        if not self.active:
            return
        self.active = False
        leave(self)
        for label, counter in self.counts.items():
            if self.forwards and not counter:
                warnings.warn(
                    f"recipe {label!r} never acted in {self.forwards} forward passes: no call met its conditions",
                    ReattendWarning,
                    2,
                )

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

    def act_steps(self) -> list[tuple[Plan, Act | Capture]]:
        """The steps for which calls have to be intercepted."""
        own = [(plan, step) for plan in self.plans for step in plan.steps if isinstance(step, (Act, Capture))]
        return [*own, *(item for inner in self.nested for item in inner.act_steps())]

    @property
    def nested(self) -> list[Session]:
        """The steps of probes, branches and trials, which act in passes of their own."""
        return [inner for _, _, inner in (*self.probes, *self.branches, *self.lookaheads)]

    def acts_at(self, module: nn.Module) -> bool:
        return id(module) in self._acts or id(module) in self._captures

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


def edits_of(sessions: Sequence[Session], module: nn.Module, call: Call, forward: Forward) -> list[Edit]:
    """What all sessions do to one call, identities left out; their capture steps then read the call with these edits."""
    edits = [edit for session in sessions for edit in session.edits(module, call, forward)]
    edits = [edit for edit in edits if not edit.is_identity]
    for session in sessions:
        for plan, step in session.captures_at(module):
            call.memory = forward.memory(plan.memory_key)
            # what is read in passes of our own enters the real one
            with torch.set_grad_enabled(torch.is_grad_enabled() and forward.probe is not None):
                step.reader(call, edits)
            if forward.probe is not None:
                forward.probe.read(step, module)
    return edits


def attach(model: Any, plans: Sequence[Plan], *, isolated: bool = False, tokenizer: Any = None) -> Session:
    """Starts a session of these plans on a model or pipeline. Raises UnsupportedError for sites that cannot be intercepted."""
    return Session(model, plans, isolated=isolated, tokenizer=tokenizer).attach()
