"""Knows where a denoising run stands - step, timestep, which batch rows are conditional - and opens the guide door (`guidance`).

A forward pre-hook and an always-called forward hook on every denoiser of the model. Pipelines tell a step only by the `timestep`
argument, so a step is a change of it; a run begins when the scheduler was given new timesteps, or, without a pipeline, when the
timestep turns back (`denoising_run`). Which rows are conditional is the running pipeline's to say, or the user's (`guidance_rows`).
State is kept per thread, and apart for each pipeline, so that one may run inside another one's callback.
"""

from __future__ import annotations

import inspect
import threading
import warnings
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ...interventions import Clock, ReattendError, ReattendWarning, UnsupportedError
from ..doors.guide import Guided, active_guides, grow, settle
from ..module_hooks import Hooks
from ..plan import Guide
from ..routes.compiled import inside, run_compiled, run_uncompiled
from ..routes.sdpa import clear_marks
from ..sites.denoisers import denoiser_in, family_of
from ..sites.discovery import components, original_of
from ..tokens.denoisers import DenoiserForward, read_forward
from .denoising_run import First, Run, Running, advance, running_pipeline, timestep_of
from .guidance_rows import Layout, branches_of, conditioning, halves_differ, layout_of_pipeline, parts_equal, said_rows, same

if TYPE_CHECKING:
    from ..attachment import Attachment
    from ..session import Session


class DenoiserDoor:
    """The hooks on the denoisers of one model, and on its other components, where they only clear what an interrupt left behind."""

    def __init__(self, attachment: Attachment) -> None:
        self.attachment = attachment
        self.handles = Hooks()
        self.parameters: dict[type, list[str]] = {}
        self.local = threading.local()
        self.warned: set[str] = set()

    # -- lifecycle ---------------------------------------------------------------------------------------------------

    def install(self, session: Session) -> None:
        """Raises UnsupportedError or ReattendError for a guide that this model cannot follow."""
        parts = components(session.model)
        denoisers = [root for root in parts.values() if denoiser_in(root) is not None]
        check_guides(session, [*self.attachment.active(), session], bool(denoisers))
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

    # -- hooks -------------------------------------------------------------------------------------------------------

    def _elsewhere(self, module: nn.Module, args: tuple) -> None:
        clear_marks()
        self.local.forward = None
        self.attachment.begin()

    def _landed(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.attachment.land(output)

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        # a denoiser never runs inside an attention module: marks that are still there belong to an interrupted pass
        clear_marks()
        self.local.forward = self.local.guided = None
        sessions = self.attachment.begin()
        denoiser = denoiser_in(module)
        if not sessions or denoiser is None:
            return None
        names = self._names(type(denoiser))
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        pipelines = [original_of(s.model) for s in sessions if not isinstance(s.model, nn.Module)]
        running = running_pipeline(denoiser, pipelines)
        run = self._advance(given, running, pipelines)
        hidden = given.get("hidden_states", given.get("sample"))
        branches: dict[str, Tensor] = {}
        if isinstance(hidden, Tensor):
            guide = next((guide for session in sessions for _, guide in session.guides if guide.scale), None)
            branches = branches_of(self._layout(run, given, hidden, running, denoiser, guide), hidden)
        clock = Clock("denoise", max(run.step, 0), run.steps, run.timestep, branches)
        guides = active_guides(sessions, clock)
        changed = None
        if guides and not branches:
            raise UnsupportedError(
                f"guide {guides[0].name!r}: which rows of this batch of {type(denoiser).__name__} are conditional is not known; "
                "say it around the call: with reattend.rows(...)"
            )
        if guides and running is not None and getattr(running.pipeline, "do_perturbed_attention_guidance", False):
            raise UnsupportedError(
                f"guide {guides[0].name!r}: {type(running.pipeline).__name__} puts a perturbed part of its own into the batch and counts "
                "rows to find it, so there can be no others: call it with pag_scale=0, or use the pipeline without PAG"
            )
        if guides and bool(branches["conditional"].any() if "conditional" in branches else False):
            if run.unshifted:
                raise ReattendError(
                    f"guide {guides[0].name!r}: the unconditional half of this step was called before the conditional one, so it "
                    "missed its share of the guidance: call the conditional half first"
                )
            self.local.guided = Guided(clock, guides, len(branches["conditional"]), run)
            args, kwargs, clock = grow(args, kwargs, names, self.local.guided)
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            changed = (args, kwargs)
        elif run.delta is not None and list(branches) == ["unconditional"]:
            self.local.guided = Guided(clock, [], len(branches["unconditional"]), run)
        elif guides and list(branches) == ["unconditional"]:
            run.unshifted = True
        self.local.forward = read_forward(denoiser, given, clock, run.memory, run.maps)
        for session in sessions:
            session.forwards += 1
        return changed

    def _leave(self, module: nn.Module, args: tuple, output: Any) -> Any:
        guided = getattr(self.local, "guided", None)
        self.local.forward = self.local.guided = None
        self.attachment.land(output)
        if guided is None or output is None:
            return None
        return settle(output, guided)

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
        guide: Guide | None,
    ) -> Layout | None:
        """The names of the equal parts of the batch, in order; None where they are not known."""
        said = said_rows(hidden.shape[0])
        if said is not None:
            run.first = run.first or First(hidden, conditioning(given), said, True)
            return said
        if running is None:
            return self._assumed(run, given, hidden, guide)
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

    def _assumed(self, run: Run, given: Mapping[str, Any], hidden: Tensor, guide: Guide | None) -> Layout:
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
            if before != layout and guide is not None:
                raise ReattendError(
                    f"guide {guide.name!r}: this batch was taken as {before} at the step before and looks like {layout} now; say what "
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
        if guide is not None:
            raise ReattendError(
                f"guide {guide.name!r}: this step's latents came before, with another text, and no pipeline runs this loop: which "
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
