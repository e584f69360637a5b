"""Sessions: recipes attached to one model, for every caller or for one thread or task, and removed without a trace.

Sessions of one model share its hooks (see `attachment`) and come and go in any order.
"""

from __future__ import annotations

import itertools
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..interventions import ReattendError, ReattendWarning, Site, UnsupportedError
from .actions import Action, RootCall
from .attachment import Attachment, enter, forget, leave
from .handles import Handles
from .plan import Facts, Plan, Step, wrong_functions
from .protocols import Place
from .sites.table import SiteTable

_numbers = itertools.count()
# A change of a prediction below this part of it shows in no picture. Ours, measured on the zoo at ten steps: softpag and seg at any layer
# and strength moved no pixel by more than one of 255 levels at 0.0001 to 0.0021, and by 7 to 9 levels somewhere from 0.0024 on (the middle
# block of shapes-sd stays at 0.0015, layer 7 reaches 1.04 and 207 levels).
VISIBLE = 2e-3
# a session that is over keeps no part of its model: this makes its plans anew, for the same model
Again = Callable[[Any], Sequence[Plan]]


class Mark:
    """Stands for a session in the contexts that it is active in, where it must not keep the session or its model alive."""

    open = True


class Session:
    """Recipes at work on one model. A context manager and a handle: `with apply(...) as session:` or `session.remove()`.

    stats: {recipe label: {site name: how often its edits were applied}}. ways: {site name: {how attention was computed there: how often}};
    a call that several sessions edit counts in the last one's. A recipe that never acted although the model ran warns (ReattendWarning)
    when the session ends, and so does one whose largest change of a prediction or of attention's output (`changes`) is below VISIBLE.
    """

    def __init__(
        self,
        model: Any,
        plans: Sequence[Plan],
        *,
        isolated: bool = False,
        tokenizer: Any = None,
        again: Again | None = None,
        table: SiteTable | None = None,
    ) -> None:
        self._model, self.plans, self.isolated = model, list(plans), isolated
        # all sites of the model, by the names that it gives them; found when the session begins
        self.table = table
        self._again = again
        self.attachment: Attachment | None = None
        self._last_model: weakref.ref[Any] | None = None
        self.mark = Mark()
        # sessions act in the order of these numbers, also where they are of several models that share modules
        self.number = -1
        self.tokenizer = tokenizer
        self.counts: dict[str, Counter[str]] = {}
        self._ways: dict[str, Counter[str]] = {}
        # by recipe and device: numbers that nobody has asked the device for
        self._changes: dict[tuple[str, torch.device], Tensor] = {}
        # by recipe: of what its changes are
        self._changed: dict[str, str] = {}
        # by recipe: why it does nothing, where it does
        self._idle = {plan.recipe: plan.idle for plan in self.plans}
        self.forwards = 0
        self.active = self.ended = False
        # the steps that mark tokens of a prompt: what the user named, which is no part of the model
        self.spans: list[Any] = []
        self._drop()

    def _drop(self) -> None:
        """Nothing is installed."""
        self._recipe = ""
        # recipes whose steps have hooks on modules, and those whose hooks have nothing to do in steps of decoding
        self.hooked: list[str] = []
        self.prompt_hooked: list[str] = []
        self.installed: list[Handles] = []
        self.actions: list[Action] = []
        # by module
        self._places: dict[int, Place] = {}
        # of all modules that it acts at, nested steps too, and those of which one computes attention in every pass over tokens
        self.modules: set[int] = set()
        self.decoder_modules: set[int] = set()

    # -- steps install themselves --------------------------------------------------------------------------------------

    @property
    def steps(self) -> list[tuple[Plan, Step]]:
        return [(plan, step) for plan in self.plans for step in plan.all]

    def check(self, facts: Facts, beside: Sequence[Session]) -> None:
        """Raises UnsupportedError for a step that this model cannot serve, or that cannot be at work with those of the others."""
        for plan, step in self.steps:
            wrong = wrong_functions(step)
            if wrong:
                raise ReattendError(f"{plan.recipe}: {wrong}")
            check = getattr(step, "check", None)
            reason = check(facts) if callable(check) else f"no door serves a step of class {type(step).__name__}"
            reason = reason or facts.strange(step)
            if reason:
                raise UnsupportedError(f"recipe {plan.recipe!r} does not fit this model: {reason}")
        together = [pair for session in (self, *beside) for pair in session.steps]
        for plan, step in together:
            reason = step.beside(plan, together)
            if reason:
                raise UnsupportedError(reason)

    def install(self, host: Attachment) -> None:
        """Lets every step install itself. Raises UnsupportedError for one that puts nothing on."""
        for plan, step in self.steps:
            self._recipe = plan.recipe
            if not step.install(host, self, plan):
                raise UnsupportedError(
                    f"recipe {plan.recipe!r} does not fit this model: its step {type(step).__name__} finds nothing here to act on"
                )
        for one in self.installed:
            self.actions += one.actions
            self.spans += one.spans
            for site, module, editor in one.editors:
                self._place(site, module).editors.append(editor)
            for site, module, reader in one.readers:
                self._place(site, module).readers.append(reader)
        self.modules = {id(module) for _, module in self.acted}
        for one in self.installed:
            if one.hooks:
                (self.prompt_hooked if one.hooks.prompts_alone else self.hooked).append(one.hooks.recipe)
        for inner in self.nested:
            self.hooked += inner.hooked
            self.prompt_hooked += inner.prompt_hooked
        self.decoder_modules = {
            key
            for key, place in self._places.items()
            if place.site.route == "attention_interface" and place.site.stack == "decoder"
        }

    def _place(self, site: Site, module: nn.Module) -> Place:
        ways = self._ways.setdefault(site.name, Counter())
        place = self._places.setdefault(id(module), Place(self.number, site, ways))
        place.site, place.ways = site, ways
        return place

    def uninstall(self) -> None:
        """Takes its hooks away; safe to call twice."""
        for one in self.installed:
            for inner in one.nested:
                inner.uninstall()
            for end in one.endings:
                end()
            one.hooks.remove()

    def handles(self) -> Handles:
        """New handles for a step, which the session knows before anything is put on."""
        self.installed.append(Handles(self._recipe))
        return self.installed[-1]

    def nest(self, handles: Handles, plan: Plan) -> Session:
        """The steps of a plan as a session of its own, for passes of a door's own; never attached by itself. It counts with this one."""
        inner = Session(self.model, [plan], isolated=self.isolated)
        inner.counts, inner._ways = self.counts, self._ways
        handles.nested.append(inner)
        inner.attachment, inner.table = self.attachment, self.table
        assert self.attachment is not None
        inner.install(self.attachment)
        return inner

    def counter(self, label: str, *, idle: str = "") -> Counter[str]:
        """The counter {site name: times} under this label. idle: why it is known to stay empty."""
        if idle:
            self._idle[label] = idle
        return self.counts.setdefault(label, Counter())

    def note(self, label: str, change: Tensor, of: str = "a prediction") -> None:
        """Notes how large a change this recipe made, as a part of what it changed: a tensor of no dimensions. The largest one stays where it
        was computed until somebody asks for `changes`. of: what that is."""
        key, change = (label, change.device), change.detach()
        self._changed[label] = of
        before = self._changes.get(key)
        self._changes[key] = change if before is None else torch.maximum(before, change)

    def idle(self, label: str) -> str:
        """Why the recipe of this label did not act, if it did not."""
        return self._idle.get(label, Plan.idle)

    @property
    def nested(self) -> list[Session]:
        """The sessions of steps that run passes of their own."""
        return [inner for one in self.installed for inner in one.nested]

    @property
    def acted(self) -> list[tuple[Site, nn.Module]]:
        """All that its steps act or look at when attention is computed, nested steps too."""
        own = [(site, module) for one in self.installed for site, module, _ in (*one.editors, *one.readers)]
        return [*own, *(pair for inner in self.nested for pair in inner.acted)]

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
                    f"recipe {label!r} never acted in {self.forwards} forward passes: {self.idle(label)}",
                    ReattendWarning,
                    2,
                )
        for label, change in self.changes.items() if over else ():
            if change < VISIBLE:
                warnings.warn(
                    f"recipe {label!r} changed nothing visible: its largest change was {change:.1e} of {self._changed[label]}, and pictures "
                    f"differ from about {VISIBLE:g} on; try other layers or heads, another text, or more strength or scale",
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
        self.ended = False

    def forget(self) -> None:
        """Lets go of the model and all that belongs to it, but for what has been counted; for a session that is over."""
        self.ended = True
        for inner in self.nested:
            inner.forget()
        if self._last_model is None:
            self._last_model = _weak(self._model)
        self._model, self.table, self.plans = None, None, []
        self._drop()

    def __enter__(self) -> Session:
        return self.attach()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ReattendWarning)
                self.remove()
        else:
            self.remove()

    def __repr__(self) -> str:
        recipes = ", ".join(repr(label) for label in dict.fromkeys([plan.recipe for plan in self.plans] or self.counts))
        model = self.model
        state = "active" if self.active else "ended" if self.ended else "not active"
        alone = ", for this thread or task alone" if self.isolated else ""
        name = "a model that is gone" if model is None else type(model).__name__
        return f"<Session of {recipes or 'nothing'} on {name}: {state}{alone}, applied {self.applied} times>"

    @property
    def stats(self) -> dict[str, dict[str, int]]:
        return {label: dict(counter) for label, counter in self.counts.items()}

    @property
    def ways(self) -> dict[str, dict[str, int]]:
        return {name: dict(counter) for name, counter in self._ways.items() if counter}

    @property
    def changes(self) -> dict[str, float]:
        """{recipe label: its largest change}: of a denoiser's prediction, as a part of it, of recipes that guide by a branch; of attention's
        output to the image, in the first pass of the session, of recipes with a second text."""
        found: dict[str, float] = {}
        for (label, _), change in self._changes.items():
            # two numbers, of which one may be nan: then the largest change is not known to be small
            found[label] = float(torch.maximum(change.cpu(), torch.tensor(found.get(label, 0.0))))
        return found

    def clear_counts(self) -> None:
        """Starts `stats`, `ways` and `changes` anew."""
        for counter in (*self.counts.values(), *self._ways.values(), self._changes):
            counter.clear()

    @property
    def applied(self) -> int:
        """How often edits were applied, over all recipes and sites."""
        return sum(sum(c.values()) for c in self.counts.values())

    def rewrite(self, inputs: Mapping[str, Any], *, images: Any = None, text: Any = None) -> dict[str, Any]:
        """The inputs of a request after all that this session's recipes change of it, for `generate` or a forward pass.

        inputs: what the model would be called with; images, text: what they were made of, for recipes that change these. Recipes that
        change no request leave it as it is. Raises ReattendError for a session that is not at work here.
        """
        if self.attachment is None or self not in self.attachment.active():
            raise ReattendError("this session is not at work here: rewrite requests inside it")
        if not isinstance(inputs, Mapping):
            raise ReattendError(f"rewrite takes the arguments of the model by name, got {type(inputs).__name__}")
        arguments, remembered = dict(inputs), []
        for change in [each for one in self.installed for each in one.requests]:
            arguments, remember = change(arguments, images, text)
            remembered.append(remember)
        for remember in remembered:
            remember(arguments)
        return arguments

    # -- what happens at a call --------------------------------------------------------------------------------------

    def at(self, module: nn.Module) -> Place | None:
        return self._places.get(id(module))

    def ready(self, call: RootCall) -> None:
        """Before the first layer of a prompt or a run. Raises ReattendError for a step that cannot serve it."""
        for plan, step in self.steps:
            reason = step.ready(call)
            if reason:
                raise ReattendError(f"{plan.recipe}: {reason}")


def _weak(model: Any) -> Any:
    try:
        return weakref.ref(model)
    except TypeError:
        return lambda: None


def attach(
    model: Any,
    plans: Sequence[Plan],
    *,
    isolated: bool = False,
    tokenizer: Any = None,
    again: Again | None = None,
    table: SiteTable | None = None,
) -> Session:
    """Starts a session of these plans on a model or pipeline. again(model): the same plans made anew, for a session that is begun a
    second time. table: all sites of the model where they are at hand, which saves finding them. Raises UnsupportedError for sites that
    cannot be intercepted.
    """
    if not isinstance(plans, (list, tuple)) or not all(isinstance(plan, Plan) for plan in plans):
        raise ReattendError(
            f'attach takes a list of plans, each with its steps: [Plan("name", [step, ...])]; got {plans!r:.80}'
        )
    return Session(model, plans, isolated=isolated, tokenizer=tokenizer, again=again, table=table).attach()
