"""The latents door: read or change what the scheduler holds before a step's first denoiser call, and what the step returned.

Gives: `before(AtStep)` gets the latents of a step as the scheduler holds them, before the denoiser first runs on them; a tensor that it
returns takes their place, for the denoiser, its ControlNets and the scheduler's `step`. `after(AtStep)` gets what the step returned, the last
one too, and may say what it returns instead. `predict` is a further pass of the denoiser with the arguments of the call under way: other
latents, another timestep or text, with a gradient if asked for; `look` is the same as far as the last site that `steps` read. No recipe's
edits act in these passes, only `steps`.

Costs: nothing is kept; the input is scaled back and compared once a step. A change under a ControlNet costs one more pass of that. `predict`
costs a pass of the rows it runs, with a gradient about three, and the memory of what the backward pass needs; `look` ends at the last site.

Refuses: a bare denoiser (the latents are the scheduler's); `steps` that change whole passes (guides, second texts, latents); latents that
cannot be recovered from the denoiser's input (channels or tokens of other things that cannot be told apart, a `step` that is given others,
a scheduler that the pipeline does not know); a ControlNet in guess mode; `predict` while a cache of diffusers is on, and a gradient through
quantised parameters. A change acts at a step's first evaluation: where a scheduler would drop it (the second evaluations of Heun, KDPM2 and
PNDM), at the next call that keeps it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...interventions import Clock, Memory, ReattendError, Site, UnsupportedError
from ..actions import Action, Rank, RootCall
from ..handles import Handles, Holder
from ..host import Host
from ..plan import Facts, Plan, Step
from ..prompts.further_pass import Companions
from ..prompts.latents_call import LatentsCall
from ..protocols import Steered
from ..sites.denoisers import denoiser_in
from ..sites.discovery import components, original_of
from ..tokens.latents import place_of
from ..trackers.scheduler import Evaluation, Followed, drops, follow, unfollow

Change = Callable[["AtStep"], Tensor | None]


@dataclass
class AtStep:
    """A step of a denoising run. latents [B, ...]: what the scheduler holds, one per image; clock: of the call under way (its branches name
    rows of the denoiser's batch); memory: the recipe's own store of this run; scheduler: the one that steps; pipeline: whose call this is, for
    its other parts (a VAE)."""

    latents: Tensor
    clock: Clock
    memory: Memory
    scheduler: Any
    pipeline: Any = None
    _pass: Callable[..., Any] | None = None

    def predict(
        self, latents: Tensor, *, timestep: Any = None, text: str | Mapping[str, Any] | None = None, grad: bool = False
    ) -> Tensor:
        """What the denoiser predicts for other latents [B, ...] of this step, with the arguments of the call under way.

        timestep: another of the scheduler's. text: None, all rows of the call; "conditional" or "unconditional", the rows of that half; or
        arguments by name (encoder_hidden_states, pooled_projections, ...) that take the place of the conditional rows'. grad: with a
        gradient. Raises ReattendError for what the call cannot serve.
        """
        return self._run(latents, timestep, text, grad, False, None)

    def look(
        self,
        latents: Tensor,
        *,
        timestep: Any = None,
        text: str | Mapping[str, Any] | None = None,
        grad: bool = False,
        until: Sequence[Site] | None = None,
    ) -> None:
        """The same pass for the door's `steps` alone: it ends once they have read their last site, or the last of those in `until`."""
        self._run(latents, timestep, text, grad, True, until)

    def gradient(self, loss: Callable[[Tensor], Tensor], latents: Tensor) -> tuple[Tensor, Tensor]:
        """(loss, its gradient with respect to the latents): of a function that runs passes with grad=True on the latents it is given.

        The gradient is 0 where the loss depends on no latents. Raises ReattendError for a loss that is not one number.
        """
        with torch.inference_mode(False), torch.enable_grad():
            x = latents.detach().clone().requires_grad_()
            value = loss(x)
            if not isinstance(value, Tensor) or value.numel() != 1:
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ReattendError(f"a loss is a tensor of one number, got {got}")
            if not value.requires_grad:
                return value, torch.zeros_like(latents)
            (slope,) = torch.autograd.grad(value, x, allow_unused=True)
        return value.detach(), torch.zeros_like(latents) if slope is None else slope

    def _run(self, latents: Tensor, timestep: Any, text: Any, grad: bool, *more: Any) -> Any:
        if self._pass is None:
            raise ReattendError("there is no call of the denoiser under way after a step: predict before it")
        if not grad and isinstance(latents, Tensor) and latents.requires_grad:
            raise ReattendError(
                "these latents want a gradient, which this pass has only with grad=True: say so, or detach() them"
            )
        return self._pass(latents, timestep, text, grad, *more)


@dataclass
class Latents(Step):
    """before(AtStep), after(AtStep) -> other latents of the same shape, or None to leave them; steps: what reads or edits further passes."""

    before: Change | None = None
    after: Change | None = None
    steps: Sequence[Step] = field(default_factory=list)

    def check(self, facts: Facts) -> str:
        if not facts.denoisers:
            return "its step Latents needs a denoiser; this model has none"
        model = original_of(facts.model)
        if isinstance(model, nn.Module):
            return "its step Latents needs the scheduler, which holds the latents: apply the recipe to the pipeline"
        step = getattr(getattr(model, "scheduler", None), "step", None)
        if step is None or "sample" not in inspect.signature(step).parameters:
            return f"the scheduler of {type(model).__name__} has no `step` that is given latents"
        return next((reason for reason in (one.check(facts) for one in self.steps) if reason), "")

    def install(self, host: Host, session: Holder, plan: Plan) -> Handles:
        handles = session.handles()
        readers = session.nest(handles, Plan(plan.recipe, list(self.steps), plan.memory_key))
        if any(action.rank != Rank.FACTS and (action.before or action.after) for action in readers.actions):
            raise UnsupportedError(
                f"recipe {plan.recipe!r} does not fit this model: the steps of its Latents change whole passes, as guides, second texts and "
                "latents do, but further passes have only steps that read or edit at sites: let the others stand in the plan itself"
            )
        own = _Installed(self, host, session, plan, readers, handles)
        # what ends it first
        handles.at_end(lambda: unfollow(handles))
        follow(original_of(session.model).scheduler, handles)
        for part in components(session.model).values():
            if ".controlnet" in type(part).__module__ and denoiser_in(part) is None:
                handles.before(part, own.companion, kwargs=True)
                handles.after(part, own.companions.end)
        handles.act(Action(Rank.LATENTS, before=own.begin))
        return handles


class _Installed:
    """The door at work in one session."""

    def __init__(self, step: Latents, host: Host, session: Holder, plan: Plan, readers: Steered, handles: Handles) -> None:
        self.step, self.host, self.session, self.plan = step, host, session, plan
        self.readers, self.handles = readers, handles
        self.companions = Companions()

    def companion(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.session in self.host.active():
            self.companions.begin(module, args, kwargs)

    def begin(self, call: RootCall) -> None:
        """Before every call of the denoiser: takes part in the evaluation that it belongs to."""
        pipeline = original_of(self.session.model) if call.pipeline is None else call.pipeline
        who = f"{self.plan.recipe} on {type(pipeline).__name__}"
        denoiser = denoiser_in(call.root)
        assert denoiser is not None
        place = call.clock.unknown or place_of(denoiser, call.given, call.clock.branches)
        if isinstance(place, str):
            raise ReattendError(f"{who}: the latents cannot be recovered from the denoiser's input: {place}")
        scheduler = getattr(pipeline, "scheduler", None)
        if scheduler is None:
            raise ReattendError(f"{who}: the latents cannot be recovered: it has no scheduler")
        followed = follow(scheduler, self.handles)
        at = LatentsCall(
            self.host, self.readers, self.step.steps, self.companions, call, denoiser, place, followed, pipeline, who
        )
        at.note()
        one = followed.under_way(call.run)
        if one is None:
            with torch.inference_mode(False):
                one = followed.begin(call.run, call.clock, *at.recovered(), who)
        elif one.changed and Evaluation not in call.kept:
            # the other half of guidance, in a call of its own
            at.put(one)
        call.kept[Evaluation] = True
        if all(owner is not self.handles for owner, _ in one.at_end):
            self._evaluate(at, one, followed)

    def _evaluate(self, at: LatentsCall, one: Evaluation, followed: Followed) -> None:
        """A new evaluation: changes its latents, for all the steps that have waited for it."""
        run, clock = at.call.run, at.call.clock
        one.at_end.append((self.handles, lambda sample: self._ask(self.step.after, sample, clock, at, None)))
        if self.step.before is None:
            return
        waiting: list[Clock] = run.kept.setdefault((Latents, id(self)), [])
        begun = run.kept.setdefault((Clock, id(self)), [])
        if clock.step not in begun:
            begun[:] = [clock.step]
            waiting.append(clock)
        if drops(followed.scheduler):
            return
        before = one.latents
        while waiting:
            new = self._ask(self.step.before, one.latents, waiting.pop(0), at, at.further)
            one.latents = one.latents if new is None else new
        if one.latents is not before:
            at.put(one)

    def _ask(
        self, function: Change | None, latents: Tensor, clock: Clock, at: LatentsCall, further: Callable[..., Any] | None
    ) -> Tensor | None:
        """What the recipe wants instead of these latents; None where it leaves them."""
        if function is None:
            return None
        memory = at.call.run.memory.setdefault(self.plan.memory_key, Memory(since=0))
        with torch.inference_mode(False), torch.no_grad():
            # its own: what it does to them in place is a change too
            given = latents.clone()
            untouched = given._version
            new = function(AtStep(given, clock, memory, at.followed.scheduler, at.pipeline, further))
        if (new is None or new is given) and given._version == untouched:
            return None
        new = given if new is None else new
        if not isinstance(new, Tensor) or new.shape != given.shape or not new.is_floating_point():
            found = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
            raise ReattendError(f"{at.who}: new latents must be a tensor of shape {tuple(given.shape)}, got {found}")
        self.session.counter(self.plan.recipe)["latents"] += 1
        return new.detach().to(given)
