"""What a denoising run's scheduler holds and gives: its `step`, followed while sessions last, and the scale of the denoiser's input.

`step` is replaced on the instance, with its signature (pipelines ask it for eta and generator), and with it how the instance is copied
and pickled, so that copies have the class's own `step`.
"""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...interventions import Clock, ReattendError
from .denoising_run import Run
from .in_flight import lifecycle

# what is set on a scheduler while it is followed
SET = ("step", "__reduce_ex__")

_followed: dict[int, Followed] = {}


class Evaluation:
    """One evaluation of a scheduler's step: from the first denoiser call after a `step` to the next `step`, in one thread.

    seen: the latents as the denoiser's input has them; found: as they were recovered from that; latents: those that count, which `step`
    gets if they are others.
    at_end: (owner, function) pairs, called with what `step` returned once the step is complete; what one returns (not None) is returned
    instead.
    """

    def __init__(self, run: Run, clock: Clock, seen: Tensor, found: Tensor, who: str) -> None:
        self.run, self.clock, self.seen, self.found, self.who = run, clock, seen, found, who
        self.latents = found
        self.at_end: list[tuple[object, Callable[[Tensor], Tensor | None]]] = []

    @property
    def changed(self) -> bool:
        return self.latents is not self.found

    @property
    def moved(self) -> Tensor:
        """Bool [B, 1, ...]: the rows whose latents are others than were found."""
        rows = (self.latents != self.found).flatten(1).any(dim=1)
        return rows.view(-1, *[1] * (self.found.dim() - 1))

    def sample(self, given: Any) -> Any:
        """The sample for `step`. Raises ReattendError where the pipeline gives it other latents than those that were recovered."""
        found = self.found
        same = isinstance(given, Tensor) and given.shape == found.shape
        # looked at once a run: it waits for the device
        if same and Evaluation not in self.run.kept:
            wide, coarse = given.float(), torch.finfo(found.dtype).bits < 32
            near = 1e-3 if not coarse else 2e-2
            same = bool(((wide - found.to(wide)).abs() <= near * (1 + wide.abs().max())).all())
            self.run.kept[Evaluation] = same
        if not same:
            shape = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
            raise ReattendError(
                f"{self.who}: the latents {shape} that its scheduler steps from are not those {tuple(found.shape)} in the denoiser's "
                "input, so they cannot be read or changed"
            )
        if not self.changed:
            return given
        if given.dtype == found.dtype:
            return torch.where(self.moved, self.latents, given)
        # the denoiser sees fewer digits than the scheduler holds
        return given + (self.latents.to(given.dtype) - found.to(given.dtype))


class Followed:
    """A scheduler whose `step` is followed, and for whom."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.owners: list[object] = []
        self.local = threading.local()
        self.before = {name: vars(scheduler)[name] for name in SET if name in vars(scheduler)}
        self.original = scheduler.step
        self.signature = inspect.signature(self.original)

        @functools.wraps(self.original)
        def step(*args: Any, **kwargs: Any) -> Any:
            return self._step(args, kwargs)

        def reduced(protocol: int) -> Any:
            # object's own, of a stand-in without what was set here
            bare: Any = object.__new__(type(scheduler))
            bare.__dict__.update({name: value for name, value in vars(scheduler).items() if name not in SET} | self.before)
            return bare.__reduce_ex__(protocol)

        self.set = {"step": step, "__reduce_ex__": reduced}

    def put_on(self) -> None:
        vars(self.scheduler).update(self.set)

    def take_off(self) -> None:
        """Safe to call twice; what somebody else has set in the meantime stays."""
        held = vars(self.scheduler)
        for name in SET:
            if held.get(name) is self.set[name]:
                if name in self.before:
                    held[name] = self.before[name]
                else:
                    del held[name]

    # -- its evaluations -----------------------------------------------------------------------------------------------

    def under_way(self, run: Run) -> Evaluation | None:
        """The evaluation that a denoiser call of this thread belongs to; None where a new one begins.

        Raises ReattendError where changed latents of an earlier step have not reached `step`.
        """
        one: Evaluation | None = getattr(self.local, "evaluation", None)
        if one is None or one.run is not run:
            return None
        if run.step == one.clock.step:
            return one
        raise ReattendError(
            f"{one.who}: the latents of step {one.clock.step} never came to the `step` of {type(self.scheduler).__name__}: a loop "
            "that uses another scheduler than its pipeline's (or a copy of it) cannot be followed"
        )

    def begin(self, run: Run, clock: Clock, seen: Tensor, found: Tensor, who: str) -> Evaluation:
        self.local.evaluation = Evaluation(run, clock, seen, found, who)
        return self.local.evaluation

    def _step(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        one, self.local.evaluation = getattr(self.local, "evaluation", None), None
        if one is None or not self.owners:
            return self.original(*args, **kwargs)
        given = self.signature.bind(*args, **kwargs)
        given.arguments["sample"] = one.sample(given.arguments.get("sample"))
        output = self.original(*given.args, **given.kwargs)
        first = output[0] if isinstance(output, tuple) else output.prev_sample
        new = first
        for owner, look in one.at_end if complete(self.scheduler) else ():
            wanted = look(new) if owner in self.owners else None
            new = new if wanted is None else wanted
        self.local.last = new
        if new is first:
            return output
        if isinstance(output, tuple):
            return (new, *output[1:])
        changed = copy.copy(output)
        changed["prev_sample"] = changed.prev_sample = new
        return changed

    @property
    def last(self) -> Tensor | None:
        """What `step` returned last in this thread."""
        return getattr(self.local, "last", None)


def follow(scheduler: Any, owner: object) -> Followed:
    """Follows a scheduler's `step` for somebody, until `unfollow`."""
    known = _followed.get(id(scheduler))
    if known is not None and owner in known.owners and vars(scheduler).get("step") is known.set["step"]:
        return known
    with lifecycle:
        known = _followed.setdefault(id(scheduler), known or Followed(scheduler))
        # known before it is put on: an interrupt in between must not lose it
        if owner not in known.owners:
            known.owners.append(owner)
        if "step" not in vars(scheduler) or known.before.get("step") is vars(scheduler)["step"]:
            known.put_on()
    return known


def unfollow(owner: object) -> None:
    """Ends all that was followed for somebody; safe to call twice."""
    with lifecycle:
        for key, known in list(_followed.items()):
            rest = [other for other in known.owners if other is not owner]
            if not rest:
                known.take_off()
                del _followed[key]
            known.owners = rest


# -- what it does with its latents -----------------------------------------------------------------------------------------


def drops(scheduler: Any) -> bool:
    """Whether the next `step` throws its sample away and goes on from one that it kept: a second evaluation of the same step."""
    if hasattr(scheduler, "state_in_first_order"):
        return not scheduler.state_in_first_order
    counter = getattr(scheduler, "counter", None)
    if hasattr(scheduler, "cur_sample") and isinstance(counter, int):
        prk = getattr(scheduler, "prk_timesteps", ())
        if not scheduler.config.skip_prk_steps and counter < len(prk):
            return counter % 4 != 0
        return counter == 1 and len(scheduler.ets) == 1
    orders: Sequence[int] | None = getattr(scheduler, "order_list", None)
    if orders is not None and hasattr(scheduler, "sample"):
        # of a pair or triple of steps the later ones go on from where the first began
        at = scheduler.step_index or 0
        order = orders[at] if at < len(orders) else 1
        while order > 1 and scheduler.model_outputs[1 - order] is None:
            order -= 1
        return order > 1
    return False


def complete(scheduler: Any) -> bool:
    """Whether the `step` that has just run was the last evaluation of its step."""
    done = getattr(scheduler, "step_index", getattr(scheduler, "counter", None))
    if isinstance(done, int) and done >= len(scheduler.timesteps):
        return True
    return not drops(scheduler)


def scaled(scheduler: Any, latents: Tensor, timestep: Any) -> Tensor:
    """The latents as the denoiser sees them, at the step that is under way; themselves where they are not scaled.

    A scheduler whose pipeline scales its input has been asked for that already: where it has not, the pipeline does not.
    """
    scale = getattr(scheduler, "scale_model_input", None)
    if scale is None or not getattr(scheduler, "is_scale_input_called", True) or getattr(scheduler, "step_index", 0) is None:
        return latents
    return scale(latents, timestep)


def at_timestep(scheduler: Any, timestep: Any) -> Any:
    """A copy of the scheduler, at another timestep of its schedule. Raises ReattendError for one that is not there."""
    if timestep not in scheduler.timesteps.tolist():
        raise ReattendError(f"timestep must be one of the scheduler's {scheduler.timesteps.tolist()}, got {timestep}")
    other = copy.copy(scheduler)
    if hasattr(other, "scale_model_input") and getattr(other, "step_index", None) is not None:
        # where a pipeline has it begin is of no account
        other._step_index = other._begin_index = None
        other.scale_model_input(torch.ones(1), scheduler.timesteps.new_tensor(timestep))
    return other
