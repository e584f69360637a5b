"""Knows where a denoising run stands - step, timestep, which batch rows are conditional - for each denoiser and ControlNet of a model.

A forward pre-hook and an always-called forward hook on each of them. Pipelines tell a step only by the timestep among the arguments,
so a step is a change of it; a run begins when the scheduler was given new timesteps, or, without a pipeline, when the timestep turns
back (`denoising_run`). Which rows are conditional is the running pipeline's to say, or the user's (`guidance_rows`).
State is kept per thread, and apart for each pipeline, so that one may run inside another one's callback.
"""

from __future__ import annotations

import contextlib
import copy
import threading
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ...interventions import Clock, ReattendError, ReattendWarning, UnsupportedError
from ..actions import RootCall
from ..host import Host
from ..module_hooks import Hooks
from ..passes import Running as Probing
from ..routes.compiled import inside, run_compiled, run_uncompiled
from ..routes.sdpa import clear_marks
from ..sites.denoisers import controlnet_in, denoiser_in, unwrapped
from ..sites.discovery import original_of
from ..sites.inputs import hidden_in, timestep_in
from ..tokens.denoisers import DenoiserForward, read_forward
from ..tokens.states import parameters_of
from .denoising_run import First, Run, Running, advance, running_pipeline
from .guidance_rows import branches_of, conditioning, halves_differ, layout_of_pipeline, said_rows, same
from .in_flight import backward_task
from .pipelines import IN_TURN, Layout, guidance_of, repeats

# the predictions of diffusers' guiders; the others are of weakened passes
PREDICTIONS = {"pred_cond": "conditional", "pred_uncond": "unconditional"}


class DenoiseTracker:
    """The hooks on the denoisers and ControlNets of one model, and on its other components, where they only clear what an interrupt left.

    A ControlNet beside its denoiser knows where the run stands, but no action of a door comes before or after it: what doors change in a
    batch they change at the denoiser.
    """

    def __init__(self, host: Host) -> None:
        self.host = host
        self.handles = Hooks()
        self.local = threading.local()
        self.warned: set[str] = set()
        # ControlNets without a denoiser: their passes are the run's own
        self.alone = False

    # -- lifecycle ---------------------------------------------------------------------------------------------------

    def install(self, parts: Mapping[str, nn.Module], recipes: Sequence[str]) -> None:
        """Follows these components of a model, if a denoiser or a ControlNet is among them. recipes: of the session that it is for."""
        denoisers = [root for root in parts.values() if denoiser_in(root) is not None]
        followed = [*denoisers, *(root for root in parts.values() if controlnet_in(root) is not None)]
        if not followed:
            return
        self.alone = self.alone or not denoisers
        if inside(followed):
            run_uncompiled(self, "the denoiser", recipes)
        known = {id(root) for root in self.roots()}
        for root in parts.values():
            if id(root) in known:
                continue
            # the hook that ends passes first: none may begin that cannot end
            if root not in followed:
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
        """The modules whose passes are followed: denoisers, ControlNets and the other components of their pipelines."""
        return [hook.module for hook in self.handles.all if not hook.after]

    def current(self) -> DenoiserForward | None:
        """The pass of a denoiser or ControlNet under way in this thread."""
        return getattr(self.local, "forward", None)

    # -- passes of a door's own --------------------------------------------------------------------------------------

    def probing(self) -> Probing | None:
        """The pass of a door's own that is under way in this thread."""
        aside = getattr(self.local, "aside", None)
        return None if aside is None else aside[0]

    @contextlib.contextmanager
    def aside(self, running: Probing, clock: Clock, run: Run) -> Iterator[None]:
        """Inside, passes of denoisers are a door's own: with this clock, no step of the run's; of actions only those that add to the facts.

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
        denoiser, controlnet = denoiser_in(module), controlnet_in(module)
        aside, network = getattr(self.local, "aside", None), denoiser or controlnet
        if aside is not None:
            if network is not None:
                running, clock, run = aside
                names = parameters_of(unwrapped(module))
                given = {**dict(zip(names, args, strict=False)), **kwargs}
                self.local.forward = read_forward(network, given, clock, run.memory, run.maps)
                self.local.forward.probe = running
                running.forwards.append(self.local.forward)
                call = RootCall(module, args, kwargs, names, [running.session], given, clock, run)
                call.forward = self.local.forward
                call.add_facts()
            return None
        # a denoiser never runs inside an attention module: marks that are still there belong to an interrupted pass
        clear_marks()
        self.local.forward = self.local.call = None
        sessions = self.host.begin()
        if not sessions or network is None:
            return None
        beside = denoiser is None and not self.alone
        call = RootCall(module, args, kwargs, parameters_of(unwrapped(module)), sessions)
        call.given = {**dict(zip(call.names, args, strict=False)), **kwargs}
        self._stands(call, network, beside)
        run = call.run

        def read() -> DenoiserForward:
            forward = read_forward(network, call.given, call.clock, run.memory, run.maps)
            forward.asked = run.asked
            self.local.forward = forward
            return forward

        if beside:
            read()
            return None
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

    def _stands(self, call: RootCall, network: nn.Module, beside: bool) -> None:
        """Fills in clock, run and pipeline of a pass; those that it had, where backward computes it anew."""
        again = None if backward_task() == -1 else self.host.recomputed.moment()
        state = None if again is None else again.next_pass()
        if state is not None:
            call.clock, run, call.pipeline = state
            call.run = run.as_it_is()
            return
        pipelines = [original_of(s.model) for s in call.sessions if not isinstance(s.model, nn.Module)]
        running = running_pipeline(call.root, pipelines)
        run = call.run = self._advance(call.given, running, pipelines, beside)
        call.pipeline = None if running is None else running.pipeline
        certain = next((action.certain for action in call.actions if action.certain), "")
        # what a ControlNet's pass is made from says nothing of the denoiser's passes in its step
        seen, certain = (copy.copy(run), "") if beside else (run, certain)
        layout, unknown = self._layout(seen, call.given, running, network, certain)
        branches = branches_of(layout, hidden_in(call.given))
        call.clock = Clock("denoise", max(run.step, 0), run.steps, run.timestep, run.scheduled, branches, unknown=unknown)
        clock, pipeline = call.clock, call.pipeline
        self.host.recomputed.note_pass(call.sessions, lambda: (clock, run.as_it_is(), pipeline))

    def _advance(self, given: Mapping[str, Any], running: Running | None, pipelines: Sequence[Any], beside: bool) -> Run:
        """This thread's run of the running pipeline, or of a loop of the user's own, moved on by a step where one begins."""
        if not hasattr(self.local, "runs"):
            self.local.runs, self.local.loop = weakref.WeakKeyDictionary(), None
        runs = self.local.runs
        if running is None:
            schedulers = [getattr(pipeline, "scheduler", None) for pipeline in pipelines]
            run = self.local.loop = advance(self.local.loop, timestep_in(given), None, schedulers, beside)
        else:
            run = runs[running.pipeline] = advance(runs.get(running.pipeline), timestep_in(given), running, (), beside)
        return run

    def _layout(
        self, run: Run, given: Mapping[str, Any], running: Running | None, network: nn.Module, certain: str
    ) -> tuple[Layout | None, str]:
        """The names of the equal parts of the batch, in order, or None and why they are not known."""
        hidden, name = hidden_in(given), type(network).__name__
        if hidden is None:
            return None, f"which argument of {name} holds its latents is not known, so neither is which rows are conditional"
        said = said_rows(len(hidden))
        if said is not None:
            run.first = run.first or First(hidden, conditioning(given), said, True)
            return said, ""
        if running is None:
            return self._assumed(run, given, hidden, certain), ""
        layout = self._layout_of_pipeline(run, given, running, hidden)
        if layout is None:
            return None, (
                f"which rows of this batch of {name} are conditional is not known: the code of {type(running.pipeline).__name__} that calls "
                "it is not among the pipelines that were read, or the batch is none of its halves; say it around the call: with "
                "reattend.rows(...)"
            )
        if certain and len(layout) == 3 and layout.count("") == 1 and not running.perturbed:
            raise UnsupportedError(
                f"{certain}: {type(running.pipeline).__name__} makes three predictions, with the text, with the picture alone and with "
                "neither, and combines them by a formula of its own, which no guide knows: call it without its guidance by the picture"
            )
        return layout, ""

    def _layout_of_pipeline(
        self, run: Run, given: Mapping[str, Any], running: Running, hidden: Tensor | list[Tensor]
    ) -> Layout | None:
        if given.get("guess_mode") and not hasattr(running.pipeline, "do_perturbed_attention_guidance"):
            return ("conditional",)  # a ControlNet that sees the prompt's half alone, but for those of PAG pipelines
        if given.get("skip_layers"):
            return ("",)  # the pipeline's own weakened pass
        guidance = IN_TURN if running.modular else guidance_of(running.module)
        if guidance is None:
            return ("conditional",) if running.guides is False else None
        if guidance.guider:
            return (PREDICTIONS.get(running.prediction, ""),) if running.prediction else None
        if guidance.batch:
            key = (len(hidden), running.guides)
            if key not in run.layouts:
                run.layouts[key] = layout_of_pipeline(guidance, running.guides, running.perturbed, hidden, given)
            return run.layouts[key]
        text = {"text": given.get("encoder_hidden_states")}
        if text["text"] is None and running.guides:
            return None
        run.first = run.first or First(hidden, text, ("conditional",), False)
        if not same(text, run.first.conditioning):
            return ("unconditional",)
        weakened = running.modular and running.guider is not None and running.guider._count_prepared > 1
        return ("",) if weakened else ("conditional",)

    def _assumed(self, run: Run, given: Mapping[str, Any], hidden: Tensor | list[Tensor], certain: str) -> Layout:
        """The layout of a call in a loop of the user's own, where nobody says it: see docs/usage.md, "A loop of your own"."""
        made_from = conditioning(given)
        if repeats(hidden, 2) and halves_differ(made_from):
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
            before = run.layouts.setdefault(len(hidden), layout)
            if before != layout and certain:
                raise ReattendError(
                    f"{certain}: this batch was taken as {before} at the step before and looks like {layout} now; say what "
                    "it is around each call: with reattend.rows(...)"
                )
            run.first = First(hidden, made_from, layout, False)
            return layout
        if same(made_from, first.conditioning, look=True):
            return first.layout if len(hidden) == len(first.hidden) else layout
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
