"""Knows where a denoising run stands - step, timestep, which batch rows are conditional - for each denoiser of a model.

A forward pre-hook and an always-called forward hook on every denoiser of the model. Pipelines tell a step only by the `timestep`
argument, so a step is a change of it; a run begins when the scheduler was given new timesteps, or, without a pipeline, when the
timestep turns back (`denoising_run`). Which rows are conditional is the running pipeline's to say, or the user's (`guidance_rows`).
State is kept per thread, and apart for each pipeline, so that one may run inside another one's callback.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ...interventions import Clock, ReattendError, ReattendWarning
from ..actions import RootCall
from ..host import Host
from ..module_hooks import Hooks
from ..passes import Running as Probing
from ..routes.compiled import inside, run_compiled, run_uncompiled
from ..routes.sdpa import clear_marks
from ..sites.denoisers import denoiser_in
from ..sites.discovery import original_of
from ..sites.families import family_of
from ..tokens.denoisers import DenoiserForward, read_forward
from .denoising_run import First, Run, Running, advance, running_pipeline, timestep_of
from .guidance_rows import Layout, branches_of, conditioning, halves_differ, layout_of_pipeline, parts_equal, said_rows, same


class DenoiseTracker:
    """The hooks on the denoisers of one model, and on its other components, where they only clear what an interrupt left behind."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.handles = Hooks()
        self.parameters: dict[type, list[str]] = {}
        self.local = threading.local()
        self.warned: set[str] = set()

    # -- lifecycle ---------------------------------------------------------------------------------------------------

    def install(self, parts: Mapping[str, nn.Module]) -> None:
        """Follows these components of a model, if a denoiser is among them."""
        denoisers = [root for root in parts.values() if denoiser_in(root) is not None]
        if not denoisers:
            return
        if inside(denoisers):
            run_uncompiled(self, "the denoiser")
        known = {id(root) for root in self.roots()}
        for root in parts.values():
            if id(root) in known:
                continue
            # the hook that ends passes first: none may begin that cannot end
            if denoiser_in(root) is None:
                self.handles.after(root, self._landed)
                self.handles.before(root, self._elsewhere)
            else:
                self.handles.after(root, self._leave)
                self.handles.before(root, self._enter, kwargs=True)

    def uninstall(self) -> None:
        self.handles.remove()
        self.local = threading.local()
        self.warned = set()
        run_compiled(self)

    def roots(self) -> list[nn.Module]:
        """The modules whose passes are followed: the denoisers and the other components of their pipelines."""
        return [hook.module for hook in self.handles.all if not hook.after]

    def current(self) -> DenoiserForward | None:
        """The denoiser pass under way in this thread."""
        return getattr(self.local, "forward", None)

    # -- passes of a door's own --------------------------------------------------------------------------------------

    def probing(self) -> Probing | None:
        """The pass of a door's own that is under way in this thread."""
        aside = getattr(self.local, "aside", None)
        return None if aside is None else aside[0]

    @contextlib.contextmanager
    def aside(self, running: Probing, clock: Clock, run: Run) -> Iterator[None]:
        """Inside, passes of denoisers are a door's own: with this clock, no action before or after them, and no step of the run's.

        What they do at their end is the door's to say: `running.ended`.
        """
        outer = getattr(self.local, "aside", None), self.current()
        self.local.aside = running, clock, run
        try:
            yield
        finally:
            self.local.aside, self.local.forward = outer

    # -- hooks -------------------------------------------------------------------------------------------------------

    def _elsewhere(self, module: nn.Module, args: tuple) -> None:
        if self.probing() is not None:
            return
        clear_marks()
        self.local.forward = None
        self.host.begin()

    def _landed(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self.probing() is None:
            self.host.land(output)

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        aside, denoiser = getattr(self.local, "aside", None), denoiser_in(module)
        if aside is not None:
            if denoiser is not None:
                running, clock, run = aside
                given = {**dict(zip(self._names(type(denoiser)), args, strict=False)), **kwargs}
                self.local.forward = read_forward(denoiser, given, clock, run.memory, run.maps)
                self.local.forward.probe = running
                running.forwards.append(self.local.forward)
            return None
        # a denoiser never runs inside an attention module: marks that are still there belong to an interrupted pass
        clear_marks()
        self.local.forward = self.local.call = None
        sessions = self.host.begin()
        if not sessions or denoiser is None:
            return None
        call = RootCall(module, args, kwargs, self._names(type(denoiser)), sessions)
        call.given = {**dict(zip(call.names, args, strict=False)), **kwargs}
        pipelines = [original_of(s.model) for s in sessions if not isinstance(s.model, nn.Module)]
        running = running_pipeline(denoiser, pipelines)
        run = call.run = self._advance(call.given, running, pipelines)
        call.pipeline = None if running is None else running.pipeline
        hidden = call.given.get("hidden_states", call.given.get("sample"))
        branches: dict[str, Tensor] = {}
        if isinstance(hidden, Tensor):
            certain = next((action.certain for action in call.actions if action.certain), "")
            branches = branches_of(self._layout(run, call.given, hidden, running, denoiser, certain), hidden)
        call.clock = Clock("denoise", max(run.step, 0), run.steps, run.timestep, branches)

        def read() -> DenoiserForward:
            forward = read_forward(denoiser, call.given, call.clock, run.memory, run.maps)
            forward.asked = run.asked
            self.local.forward = forward
            return forward

        changed = call.enter(read)
        if call.actions:
            self.local.call = call
        return changed

    def _leave(self, module: nn.Module, args: tuple, output: Any) -> Any:
        if self.probing() is not None:
            return None
        call, forward = getattr(self.local, "call", None), self.current()
        self.local.forward = self.local.call = None
        self.host.land(output)
        if forward is not None and output is not None:
            forward.end(output)
        return None if call is None or output is None else call.leave(output)

    # -- where the run stands ------------------------------------------------------------------------------------------

    def _names(self, kind: type) -> list[str]:
        """Names of the positional parameters of a denoiser's forward."""
        if kind not in self.parameters:
            self.parameters[kind] = list(inspect.signature(kind.forward).parameters)[1:]  # type: ignore[attr-defined]
        return self.parameters[kind]

    def _advance(self, given: Mapping[str, Any], running: Running | None, pipelines: Sequence[Any]) -> Run:
        """This thread's run of the running pipeline, or of a loop of the user's own, moved on by a step where one begins."""
        if not hasattr(self.local, "runs"):
            self.local.runs, self.local.loop = weakref.WeakKeyDictionary(), None
        runs = self.local.runs
        if running is None:
            schedulers = [getattr(pipeline, "scheduler", None) for pipeline in pipelines]
            run = self.local.loop = advance(self.local.loop, timestep_of(given), None, schedulers)
        else:
            run = runs[running.pipeline] = advance(runs.get(running.pipeline), timestep_of(given), running, ())
        return run

    def _layout(
        self,
        run: Run,
        given: Mapping[str, Any],
        hidden: Tensor,
        running: Running | None,
        denoiser: nn.Module,
        certain: str,
    ) -> Layout | None:
        """The names of the equal parts of the batch, in order; None where they are not known."""
        said = said_rows(hidden.shape[0])
        if said is not None:
            run.first = run.first or First(hidden, conditioning(given), said, True)
            return said
        if running is None:
            return self._assumed(run, given, hidden, certain)
        if given.get("skip_layers"):
            return ("",)  # the pipeline's own weakened pass
        if running.modular or family_of(denoiser).separate_calls:
            run.first = run.first or First(hidden, {"text": given.get("encoder_hidden_states")}, ("conditional",), False)
            if not same({"text": given.get("encoder_hidden_states")}, run.first.conditioning):
                return ("unconditional",)
            weakened = running.modular and running.guider is not None and running.guider._count_prepared > 1
            return ("",) if weakened else ("conditional",)
        key = (hidden.shape[0], running.guides)
        if key not in run.layouts:
            run.layouts[key] = layout_of_pipeline(running.pipeline, running.guides, hidden, given)
        return run.layouts[key]

    def _assumed(self, run: Run, given: Mapping[str, Any], hidden: Tensor, certain: str) -> Layout:
        """The layout of a call in a loop of the user's own, where nobody says it: see docs/usage.md, "A loop of your own"."""
        made_from = conditioning(given)
        if parts_equal(hidden, 2) and halves_differ(made_from):
            layout: Layout = ("unconditional", "conditional")
            self._say(
                "a batch holds the same latents twice with different texts, and no pipeline runs it: taken as the two halves of "
                'classifier-free guidance, the negative prompt first. Say what it is: with reattend.rows("unconditional", '
                '"conditional"), or reattend.rows("conditional") if all of it is'
            )
        else:
            layout = ("conditional",)
        first = run.first
        if first is None:
            before = run.layouts.setdefault(hidden.shape[0], layout)
            if before != layout and certain:
                raise ReattendError(
                    f"{certain}: this batch was taken as {before} at the step before and looks like {layout} now; say what "
                    "it is around each call: with reattend.rows(...)"
                )
            run.first = First(hidden, made_from, layout, False)
            return layout
        if same(made_from, first.conditioning, look=True):
            return first.layout if hidden.shape[0] == first.hidden.shape[0] else layout
        if layout != ("conditional",) or len(first.layout) != 1 or not same(hidden, first.hidden, look=True):
            return layout
        # the same latents with another text: the other half of classifier-free guidance, in a call of its own
        if first.said:
            return ("conditional",) if first.layout == ("unconditional",) else ("unconditional",)
        if certain:
            raise ReattendError(
                f"{certain}: this step's latents came before, with another text, and no pipeline runs this loop: which "
                'call is the conditional one is not known. Call it first, inside `with reattend.rows("conditional"):`, and the other '
                'one inside `with reattend.rows("unconditional"):`'
            )
        self._say(
            "the denoiser was called twice with the same latents and different texts, and no pipeline runs it: the first call of a "
            'step is taken as the conditional one. Say it for each call: with reattend.rows("conditional"), '
            'reattend.rows("unconditional")'
        )
        return ("unconditional",)

    def _say(self, warning: str) -> None:
        """Warns once while there are sessions on this model."""
        if warning not in self.warned:
            self.warned.add(warning)
            warnings.warn(warning, ReattendWarning, stacklevel=2)
