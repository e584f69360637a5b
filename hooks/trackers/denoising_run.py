"""Where a denoising run stands: which pipeline's call it belongs to, its step, and how many steps it has.

Sessions are shared by every pipeline that is made from the same components, so all of this is asked of the pipeline whose call is on
the stack, never of the one that a recipe was applied to. A loop of the user's own has no such pipeline: the schedule of the session's
pipeline is believed only as long as the timesteps that come are its timesteps.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import CodeType, FrameType
from typing import Any

from torch import Tensor, nn

from ...interventions import Memory
from ..sites.denoisers import unwrapped
from ..sites.discovery import original_of
from .pipelines import Layout


@dataclass
class Running:
    """A pipeline whose call is under way in this thread. guides: whether that call does classifier-free guidance, if known. module: where
    the code of the call stands. prediction: what its guider calls the prediction that is being made; "" without a guider."""

    pipeline: Any
    guides: bool | None
    module: str = ""
    prediction: str = ""

    @property
    def scheduler(self) -> Any:
        return getattr(self.pipeline, "scheduler", None)

    @property
    def guider(self) -> Any:
        """A modular pipeline's guider, once it was told where the run stands."""
        guider = getattr(self.pipeline, "guider", None)
        return guider if isinstance(getattr(guider, "_step", None), int) else None

    @property
    def modular(self) -> bool:
        return _is_a(self.pipeline, "ModularPipeline")

    @property
    def perturbed(self) -> bool:
        """Whether it puts a perturbed part of its own at the end of the batch."""
        return bool(getattr(self.pipeline, "do_perturbed_attention_guidance", False))


@dataclass
class First:
    """The first pass of a step: its latents, what it is made from, and what its rows are (said: by the user)."""

    hidden: Tensor | list[Tensor]
    conditioning: dict[str, Any]
    layout: Layout
    said: bool


@dataclass
class Run:
    """One denoising run of one thread. key: what changes when a step begins. new_step: this pass is the denoiser's first of its step;
    awaited: it has not come yet, only ControlNets have run. to_come: in a loop of the user's own, the timesteps from the first on;
    counted: the scheduler's, of its steps from the first on, however the denoiser is told them. shift:
    what a guide has left for the unconditional half of a step; unshifted: that half came before the conditional one.
    """

    schedule: Any = None
    steps: int | None = None
    step: int = -1
    timestep: float | None = None
    key: Any = None
    turned: float = 0.0
    to_come: list[float] | None = None
    counted: list[float] = field(default_factory=list)
    between: bool = False
    new_step: bool = True
    awaited: bool = False
    first: First | None = None
    shift: Any = None
    unshifted: bool = False
    layouts: dict[Any, Layout | None] = field(default_factory=dict)
    memory: dict[object, Memory] = field(default_factory=dict)
    maps: dict[Any, Any] = field(default_factory=dict)
    # what doors know of it, each under a key of its own
    kept: dict[object, Any] = field(default_factory=dict)
    # numbers of the sessions whose steps were asked whether they can serve this run
    asked: set[int] = field(default_factory=set)

    @property
    def scheduled(self) -> float | None:
        """The scheduler's own timestep of the step; None where the run is on no schedule that is known."""
        return self.counted[self.step] if 0 <= self.step < len(self.counted) else None

    def as_it_is(self) -> Run:
        """The same for a pass that is computed anew later: nothing that is remembered from now on shows in it."""
        memory = {key: store.fork({}) for key, store in self.memory.items()}
        return replace(self, memory=memory, layouts=dict(self.layouts), kept=dict(self.kept))


# -- the pipeline -------------------------------------------------------------------------------------------------------


def running_pipeline(network: nn.Module, models: Sequence[Any]) -> Running | None:
    """The innermost pipeline that holds this denoiser or ControlNet and has a method on this thread's stack; None in a loop of the user's own.

    models: the sessions' own, which count as pipelines whatever their class is.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if _is_method(frame.f_code):
            names = frame.f_locals
            owner = names.get("self")
            if _is_pipeline(owner, models) and _holds(owner, network):
                # the caller's own variable is this call's; attributes may be left from another one
                said = names.get("do_classifier_free_guidance")
                if not isinstance(said, bool):
                    said = getattr(owner, "do_classifier_free_guidance", None)
                prediction = getattr(names.get("guider_state_batch"), "__guidance_identifier__", "")
                return Running(owner, None if said is None else bool(said), frame.f_globals.get("__name__", ""), prediction)
        frame = frame.f_back
    return None


def _is_method(code: CodeType) -> bool:
    return code.co_argcount > 0 and code.co_varnames[0] == "self" and code.co_filename != nn.modules.module.__file__


def _is_a(owner: Any, *names: str) -> bool:
    return any(base.__name__ in names for base in type(owner).__mro__)


def _is_pipeline(owner: Any, models: Sequence[Any]) -> bool:
    if _is_a(owner, "DiffusionPipeline", "ModularPipeline"):
        return True
    return not isinstance(owner, nn.Module) and any(original_of(owner) is model for model in models)


def _holds(owner: Any, network: nn.Module) -> bool:
    parts = [part for part in getattr(owner, "__dict__", {}).values() if isinstance(part, nn.Module)]
    return any(unwrapped(part) is unwrapped(network) for part in parts)


# -- its steps ----------------------------------------------------------------------------------------------------------


def advance(
    run: Run | None, timestep: float | None, running: Running | None, schedulers: Sequence[Any], beside: bool = False
) -> Run:
    """The run that a pass with this timestep belongs to, moved on by a step where one begins; another one than `run` if it is new.

    schedulers: those of the sessions' pipelines, for a loop that no pipeline runs. beside: the pass is a ControlNet's, after which the
    denoiser's begins the step.
    """
    own = None
    if running is not None:
        scheduler = running.scheduler
        schedule = getattr(scheduler, "timesteps", None)
        turned = 0.0 if run is None or run.timestep is None or timestep is None else timestep - run.timestep
        if run is None or schedule is not run.schedule or (schedule is None and turned * run.turned < 0):
            run = _pipeline_run(running, schedule, timestep)
        elif turned:
            run.turned = turned
        # half-precision timesteps of neighbouring steps can be equal; first-order schedulers count their own steps
        own = getattr(scheduler, "step_index", None) if getattr(scheduler, "order", 1) == 1 else None
    else:
        run = _advance_loop(run, timestep, schedulers)
    key = (timestep, own)
    begins = key != run.key and not (run.between and running is not None and not running.scheduler.state_in_first_order)
    run.new_step, run.awaited = begins or run.awaited, beside and (begins or run.awaited)
    if begins:
        run.step += 1
        run.key, run.timestep = key, timestep
        run.first, run.unshifted = None, False
    return run


def _pipeline_run(running: Running, schedule: Any, timestep: float | None) -> Run:
    guider = running.guider if running.modular else None
    if guider is not None and isinstance(guider._num_inference_steps, int):
        counted = _changes(schedule.tolist()) if isinstance(schedule, Tensor) else []
        return Run(schedule, guider._num_inference_steps, guider._step - 1, counted=counted[-guider._num_inference_steps :])
    # of a denoiser without a timestep it is not known which step this is
    if timestep is None or not isinstance(schedule, Tensor) or schedule.numel() == 0:
        return Run(schedule)
    values, used = schedule.tolist(), getattr(running.pipeline, "_num_timesteps", None)
    between = hasattr(running.scheduler, "state_in_first_order") and len(values) > 2 and len(set(values)) == len(values)
    if between:
        timestep = values[values.index(timestep) // 2 * 2] if timestep in values else timestep
        values, used = values[::2], (used + 1) // 2 if isinstance(used, int) else used
    step, counted = place(values, used, timestep)
    return Run(schedule, len(counted), step - 1, between=between, counted=counted)


def place(schedule: list[float], used: Any, timestep: float | None) -> tuple[int, list[float]]:
    """(step, the timesteps of all its steps) of a run first seen at `timestep`: img2img and refiners leave out the first part of the
    schedule, `denoising_end` the last. used: how many entries the pipeline says it uses. Some schedulers evaluate twice, so only changes
    count as steps.
    """
    count = len(schedule)
    known = isinstance(used, int) and 0 < used <= count
    first = schedule[count - used] if known else schedule[0]
    # told in thousandths, the first of them (1.0) looks like the last one of a schedule down to 1
    thousandth = timestep is not None and abs(timestep - first / 1000) < 1e-4
    at = schedule.index(timestep) if timestep in schedule and not thousandth else None
    if not known:
        start, stop = at or 0, count
    elif at is None or at >= count - used:
        start, stop = count - used, count
    else:
        start, stop = at, min(at + used, count)
    step = 0 if at is None else len(_changes(schedule[start : at + 1])) - 1
    return step, _changes(schedule[start:stop])


def _changes(values: list[float]) -> list[float]:
    return [value for i, value in enumerate(values) if i == 0 or value != values[i - 1]]


def _advance_loop(run: Run | None, timestep: float | None, schedulers: Sequence[Any]) -> Run:
    """The run of a loop of the user's own: a new one where the timestep turns back, or begins a schedule again."""
    # a scheduler that was given no number of steps yet holds all the timesteps of training
    ready = [s for s in schedulers if getattr(s, "num_inference_steps", None) is not None]
    schedules = [t for t in (getattr(s, "timesteps", None) for s in ready) if isinstance(t, Tensor) and t.numel()]
    if run is None or (run.schedule is not None and not any(run.schedule is schedule for schedule in schedules)):
        return _loop_run(timestep, schedules)
    if timestep == run.timestep or timestep is None or run.timestep is None:
        return run
    turned = timestep - run.timestep
    if run.to_come is not None and run.step + 1 < len(run.to_come) and timestep == run.to_come[run.step + 1]:
        run.turned = turned
        return run
    if turned * run.turned < 0 or (run.to_come is not None and timestep == run.to_come[0]):
        return _loop_run(timestep, schedules)
    # it goes on, by another schedule than the one that was believed
    run.turned, run.steps, run.to_come, run.schedule, run.counted = turned, None, None, None, []
    return run


def _loop_run(timestep: float | None, schedules: Sequence[Tensor]) -> Run:
    for schedule in schedules:
        # some denoisers count in thousandths, the first of which (1.0) may also be the last of the schedule
        told = [values for values in (schedule.tolist(), (schedule.float() / 1000).tolist()) if timestep in values]
        if told:
            start, values = min(((values.index(timestep), values) for values in told), key=lambda found: found[0])
            to_come = _changes(values[start:])
            return Run(schedule, len(to_come), to_come=to_come, counted=_changes(schedule[start:].tolist()))
    return Run()
