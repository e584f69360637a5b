"""Knows where a denoising run stands - step, timestep, which batch rows are conditional - and opens the guide door (`guidance`).

A forward pre-hook and an always-called forward hook on every denoiser of the model. Pipelines tell a step only by the `timestep`
argument, so a step is a change of it; a run begins when the scheduler was given new timesteps, or, without a pipeline, when the
timestep turns back. State is kept per thread.
"""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..interventions import Clock, ReattendError, ReattendWarning, UnsupportedError
from .denoiser_tokens import DenoiserForward, read_forward
from .diffusers_facts import denoiser_in, family_of
from .discovery import components, uncompiled
from .guidance import Guided, active_guides, grow, settle
from .plan import Guide
from .sdpa_route import clear_marks

if TYPE_CHECKING:
    from .attachment import Attachment
    from .session import Session


@dataclass
class Run:
    """One denoising run of one thread. key: what changes when a step begins. delta: the guides' shift of the conditional rows."""

    schedule: Any = None
    steps: int | None = None
    step: int = -1
    timestep: float | None = None
    key: Any = None
    turned: float = 0.0
    new_step: bool = True
    conditional: Tensor | None = None
    delta: Tensor | None = None
    layouts: dict[int, tuple[str, ...] | None] = field(default_factory=dict)
    memory: dict[object, dict[Any, Any]] = field(default_factory=dict)
    maps: dict[Any, Any] = field(default_factory=dict)


class DenoiserDoor:
    """The hooks on the denoisers of one model, and on its other components, where they only clear what an interrupt left behind."""

    def __init__(self, attachment: Attachment) -> None:
        self.attachment = attachment
        self.handles: dict[int, list[Any]] = {}
        self.parameters: dict[type, list[str]] = {}
        self.local = threading.local()
        self.stance: Any = None

    # -- lifecycle ---------------------------------------------------------------------------------------------------

    def install(self, session: Session) -> None:
        """Raises UnsupportedError or ReattendError for a guide that this model cannot follow."""
        parts = components(session.model)
        denoisers = [root for root in parts.values() if denoiser_in(root) is not None]
        check_guides(session, [*self.attachment.active(), session], bool(denoisers))
        if not denoisers:
            return
        if self.stance is None and any(_is_compiled(root) for root in denoisers):
            # a compiled graph has no place for hooks that come and go, and would silently run without them
            warnings.warn(
                "the denoiser is compiled: compiled models run uncompiled until the session ends", ReattendWarning, stacklevel=2
            )
            self.stance = torch.compiler.set_stance("force_eager")
        for root in parts.values():
            if id(root) in self.handles:
                continue
            if denoiser_in(root) is None:
                self.handles[id(root)] = [root.register_forward_pre_hook(uncompiled(self._elsewhere))]
            else:
                self.handles[id(root)] = [
                    root.register_forward_pre_hook(uncompiled(self._enter), with_kwargs=True),
                    root.register_forward_hook(uncompiled(self._leave), with_kwargs=True, always_call=True),
                ]

    def uninstall(self) -> None:
        for handles in self.handles.values():
            for handle in handles:
                handle.remove()
        self.handles = {}
        self.local = threading.local()
        if self.stance is not None:
            self.stance.__exit__(None, None, None)
            self.stance = None

    def current(self) -> DenoiserForward | None:
        """The denoiser pass under way in this thread."""
        return getattr(self.local, "forward", None)

    # -- hooks -------------------------------------------------------------------------------------------------------

    def _elsewhere(self, module: nn.Module, args: tuple) -> None:
        clear_marks()
        self.local.forward = None

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        # a denoiser never runs inside an attention module: marks that are still there belong to an interrupted pass
        clear_marks()
        self.local.forward = self.local.guided = None
        sessions = self.attachment.active()
        denoiser = denoiser_in(module)
        if not sessions or denoiser is None:
            return None
        names = self._names(type(denoiser))
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        pipeline = next((s.model for s in sessions if not isinstance(s.model, nn.Module)), None)
        run = self._advance(given, pipeline)
        hidden = given.get("hidden_states", given.get("sample"))
        branches: dict[str, Tensor] = {}
        if isinstance(hidden, Tensor):
            branches = _branches(self._layout(run, given, hidden, pipeline, denoiser), hidden)
        clock = Clock("denoise", max(run.step, 0), run.steps, run.timestep, branches)
        guides = active_guides(sessions, clock)
        changed = None
        if guides and not branches:
            raise UnsupportedError(
                f"guide {guides[0].name!r}: which rows of this batch of {type(denoiser).__name__} are conditional is not known"
            )
        if guides and bool(branches["conditional"].any() if "conditional" in branches else False):
            self.local.guided = Guided(clock, guides, len(branches["conditional"]), run)
            args, kwargs, clock = grow(args, kwargs, names, self.local.guided)
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            changed = (args, kwargs)
        elif run.delta is not None and list(branches) == ["unconditional"]:
            self.local.guided = Guided(clock, [], len(branches["unconditional"]), run)
        self.local.forward = read_forward(denoiser, given, clock, run.memory, run.maps)
        for session in sessions:
            session.forwards += 1
        return changed

    def _leave(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        guided = getattr(self.local, "guided", None)
        self.local.forward = self.local.guided = None
        if guided is None or output is None:
            return None
        return settle(output, guided)

    # -- where the run stands ------------------------------------------------------------------------------------------

    def _names(self, kind: type) -> list[str]:
        """Names of the positional parameters of a denoiser's forward."""
        if kind not in self.parameters:
            self.parameters[kind] = list(inspect.signature(kind.forward).parameters)[1:]  # type: ignore[attr-defined]
        return self.parameters[kind]

    def _advance(self, given: Mapping[str, Any], pipeline: Any) -> Run:
        """The run that this pass belongs to, moved on by a step where the timestep has changed."""
        timestep = given.get("timestep")
        if isinstance(timestep, Tensor):
            # one value per sample, or per token with zeros for given frames
            timestep = float(timestep.max()) if timestep.numel() else None
        elif timestep is not None:
            timestep = float(timestep)
        scheduler = getattr(pipeline, "scheduler", None)
        schedule = getattr(scheduler, "timesteps", None)
        run: Run | None = getattr(self.local, "run", None)
        turned = 0.0 if run is None or run.timestep is None or timestep is None else timestep - run.timestep
        if run is None or schedule is not run.schedule or (schedule is None and turned * run.turned < 0):
            run = self.local.run = Run(schedule, _number_of_steps(pipeline, schedule))
        elif turned:
            run.turned = turned
        # half-precision timesteps of neighbouring steps can be equal; first-order schedulers count their own steps
        own = getattr(scheduler, "step_index", None) if getattr(scheduler, "order", 1) == 1 else None
        key = (timestep, own)
        run.new_step = key != run.key
        if run.new_step:
            run.step += 1
            run.key, run.timestep = key, timestep
        return run

    def _layout(
        self, run: Run, given: Mapping[str, Any], hidden: Tensor, pipeline: Any, denoiser: nn.Module
    ) -> tuple[str, ...] | None:
        """The names of the equal parts of the batch, in order; None where they are not known."""
        if pipeline is None:
            return ("conditional",)
        if given.get("skip_layers"):
            return ("",)  # the pipeline's own weakened pass
        if family_of(denoiser).separate_calls or _is_modular(pipeline):
            text = given.get("encoder_hidden_states")
            if run.new_step:
                run.conditional, run.delta = text, None
            return ("conditional",) if _same(text, run.conditional) else ("unconditional",)
        batch = hidden.shape[0]
        if batch not in run.layouts:
            run.layouts[batch] = _read_layout(pipeline, hidden, given)
        return run.layouts[batch]


def _is_compiled(root: nn.Module) -> bool:
    return hasattr(root, "_orig_mod") or any(m._compiled_call_impl is not None for m in root.modules())


def _branches(layout: tuple[str, ...] | None, hidden: Tensor) -> dict[str, Tensor]:
    """{name: bool [batch]} of a batch whose equal parts have these names ("" = neither half)."""
    if layout is None:
        return {}
    part = hidden.shape[0] // len(layout)
    return {
        name: torch.tensor([other == name for other in layout], device=hidden.device).repeat_interleave(part)
        for name in ("conditional", "unconditional")
        if name in layout
    } or {"conditional": torch.zeros(hidden.shape[0], dtype=torch.bool, device=hidden.device)}


def _read_layout(pipeline: Any, hidden: Tensor, given: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Guidance in one call repeats the latents: [negative, positive], in PAG pipelines with a perturbed part after them."""
    perturbed = bool(getattr(pipeline, "do_perturbed_attention_guidance", False))
    said = getattr(pipeline, "do_classifier_free_guidance", None)
    text = given.get("encoder_hidden_states")
    guided = bool(said)
    if said is None:
        # some pipelines keep it to themselves: the same latents twice, with different texts, are the two halves
        differs = not isinstance(text, Tensor) or not _parts_equal(text, 2)
        guided = _parts_equal(hidden, 2) and differs
    layout = (*(["unconditional"] if guided else []), "conditional", *([""] if perturbed else []))
    return layout if len(layout) == 1 or _parts_equal(hidden, len(layout)) else None


def _parts_equal(x: Tensor, parts: int) -> bool:
    if x.shape[0] % parts:
        return False
    first, *others = x.chunk(parts)
    return all(torch.equal(first, other) for other in others)


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    both = isinstance(a, Tensor) and isinstance(b, Tensor)
    return both and a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


def _is_modular(pipeline: Any) -> bool:
    return any("ModularPipeline" in base.__name__ for base in type(pipeline).__mro__)


def _number_of_steps(pipeline: Any, schedule: Any) -> int | None:
    """Steps of the run: distinct neighbours in the part of the schedule that the pipeline uses (some schedulers evaluate twice)."""
    if not isinstance(schedule, Tensor) or schedule.numel() == 0:
        return None
    used = getattr(pipeline, "_num_timesteps", None)
    part = schedule[-used:] if isinstance(used, int) and 0 < used <= schedule.numel() else schedule
    return 1 + int((part[1:] != part[:-1]).sum())


def check_guides(session: Session, sessions: list[Session], has_denoiser: bool) -> None:
    """Raises before anything runs: no denoiser, two guides of one name, or a part of a schedule that nobody will know."""
    if session.guides and not has_denoiser:
        raise UnsupportedError(f"guide {session.guides[0][1].name!r} needs a denoiser; this model has none")
    seen: set[str] = set()
    for _, guide in [pair for s in sessions for pair in s.guides]:
        if guide.name in seen:
            raise ReattendError(f"two guides are called {guide.name!r}: attach one recipe with both settings, or one at a time")
        seen.add(guide.name)
    for _, guide in session.guides:
        if isinstance(session.model, nn.Module) and not _whole(guide):
            raise ReattendError(
                f"guide {guide.name!r} acts from {guide.start} to {guide.stop} of the schedule, but a bare denoiser has none: "
                "apply the recipe to the pipeline, or leave start at 0 and stop at 1"
            )


def _whole(guide: Guide) -> bool:
    return guide.start == 0 and guide.stop == 1
