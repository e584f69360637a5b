"""The guide door: further branches of a denoiser's batch, with edits, prompt, formula and scale of their own.

Gives: each branch is a copy of the conditional rows at the end of the batch, found by edits in `clock.branches` under its name,
with `clock.source` saying which row each was copied from, and with arguments of its own where it has a prompt of its own. What
a pipeline makes of its two halves, u + s (c - u), ends with the shifts of all guides added: without a formula scale * (c -
branch), else what the formula returns of the predictions of one step. Under classifier-free guidance the unconditional half
takes all of it, u' = u - shift / (s - 1), also where it is computed in a later call, so that what a pipeline makes of the
conditional prediction (guidance_rescale, norms) is made of the true one; s is read from the pipeline that runs. Both halves
take the shift where s is not known (a loop of your own) or so near 1 that rounding would show, and the conditional one takes
shift / s where it comes second. Learned variances are left as they are.

Costs: as many further rows per step as there are conditional ones, for each guide (under classifier-free guidance in one batch
1.5 times the denoiser's time); nothing at steps where its scale is 0 or outside start and stop. Between the two calls of one
step the predictions of the branches are kept.

Refuses: a model without a denoiser; a part of the schedule on a bare denoiser, or in which no step of a run lies; a batch of
which nobody says which rows are conditional; arguments of which it is not known whether they have an entry for each row; a
second text that is longer or shorter than the rows'; a cache of diffusers' (`enable_cache`), which keeps what it computed for
the rows of another step; a pipeline with a perturbed part of its own; two guides of one name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...interventions import Clock, ReattendError, UnsupportedError
from ..actions import Action, Rank, RootCall
from ..handles import Handles, Holder
from ..host import Host
from ..plan import Facts, Plan, Step
from ..prompts.copied_rows import Copies, grown
from ..sites.denoisers import denoiser_in, learned_variance
from ..sites.inputs import hidden_in
from ..sites.step_caches import step_cache
from ..trackers.combination import combination_of
from ..trackers.guided_pass import Formula, GuidedPass, Part, Predictions, settle
from ..trackers.part_of_schedule import holds_no_step, lies_in

Arguments = Mapping[str, Any]
# a guide at work, its scale, and what takes the size of its shift
Found = tuple["Guide", float, Callable[[Tensor], None]]


def away(seen: Predictions) -> Tensor:
    """The formula of perturbed-attention guidance: scale * (conditional - branch)."""
    return seen.scale * (seen.conditional - seen.branch)


@dataclass
class Guide(Step):
    """One more branch of a denoiser's batch, and what becomes of its prediction.

    name: what its rows are called in `call.clock.branches`. scale: a number, or what gives one for the clock of a step (timestep,
    step / steps); at 0 the branch is not computed. start, stop: the part of the schedule it acts in, start <= step / steps < stop.
    formula(Predictions) -> Tensor: the shift of the pipeline's guided prediction; None: the branch runs and its output is dropped, for
    edits that read its rows. arguments: arguments of the denoiser that are others in its rows, {name: tensor} with groups such as
    added_cond_kwargs by name again, or what gives these for a RootCall: one row per row of the branch, or fewer of which each stands
    for the same number, in the shape of the call's own. of: the rows that are copied, "conditional", or "all" for a branch that is dropped.
    conditional: its rows count as rows of the half that they were copied from, so that what recipes do to the prompt's rows they do to
    them. Raises ReattendError for a name that is taken, a part that is empty, a scale that is no number, or a formula for all rows.
    """

    name: str
    scale: float | Callable[[Clock], float] = 1.0
    start: float = 0.0
    stop: float = 1.0
    conditional: bool = True
    formula: Formula | None = field(default=away)
    arguments: Arguments | Callable[[RootCall], Arguments] | None = None
    of: str = "conditional"

    def __post_init__(self) -> None:
        if not self.name or self.name in ("conditional", "unconditional"):
            raise ReattendError(f"a guide's name must not be empty, 'conditional' or 'unconditional', got {self.name!r}")
        if not callable(self.scale) and (not isinstance(self.scale, (int, float)) or not math.isfinite(self.scale)):
            raise ReattendError(f"guide {self.name!r}: scale must be a finite number, got {self.scale!r:.60}")
        if not 0 <= self.start < self.stop <= 1:
            raise ReattendError(f"guide {self.name!r}: 0 <= start < stop <= 1 must hold, got {self.start} and {self.stop}")
        if self.of not in ("conditional", "all"):
            raise ReattendError(f"guide {self.name!r}: of must be 'conditional' or 'all', got {self.of!r}")
        if self.of == "all" and self.formula is not None:
            raise ReattendError(
                f"guide {self.name!r}: a branch of all rows has no formula: pass formula=None, or of='conditional'"
            )

    @property
    def acts(self) -> bool:
        """Whether it may do something at some step."""
        return callable(self.scale) or self.scale != 0

    def check(self, facts: Facts) -> str:
        if not facts.denoisers:
            return f"guide {self.name!r} needs a denoiser; this model has none"
        if isinstance(facts.model, nn.Module) and (self.start, self.stop) != (0, 1):
            return (
                f"guide {self.name!r} acts from {self.start} to {self.stop} of the schedule, but a bare denoiser has none: apply the recipe "
                "to the pipeline, or leave start at 0 and stop at 1"
            )
        return next((reason for denoiser in facts.denoisers if (reason := self._cached(denoiser))), "")

    def ready(self, call: RootCall) -> str:
        return self._cached(call.root) or (
            holds_no_step(call.clock, self.start, self.stop, f"guide {self.name!r}") if self.acts else ""
        )

    def beside(self, plan: Plan, others: Sequence[tuple[Plan, Step]]) -> str:
        if any(isinstance(other, Guide) and other is not self and other.name == self.name for _, other in others):
            return f"two guides are called {self.name!r}: attach one recipe with both settings, or one at a time"
        return ""

    def install(self, host: Host, session: Holder, plan: Plan) -> Handles:
        handles = session.handles()
        certain = f"guide {self.name!r}" if self.acts and self.of == "conditional" else ""
        handles.act(Action(Rank.ROWS, _branch_off, _come_together, certain=certain))
        return handles

    def scale_at(self, clock: Clock) -> float:
        """Its scale at a step, 0 outside its part of the schedule. Raises ReattendError where that part or the scale is not known."""
        if not self.acts:
            return 0.0
        if not lies_in(clock, self.start, self.stop, f"guide {self.name!r}"):
            return 0.0
        scale = self.scale(clock) if callable(self.scale) else self.scale
        if not isinstance(scale, (int, float)) or not math.isfinite(scale):
            raise ReattendError(
                f"guide {self.name!r}: its scale must give a finite number for a clock, got {scale!r} at step {clock.step}"
            )
        return float(scale)

    def own_arguments(self, call: RootCall) -> Arguments:
        """The arguments that are others in its rows."""
        given = self.arguments(call) if callable(self.arguments) else self.arguments
        if given is not None and not isinstance(given, Mapping):
            raise ReattendError(f"guide {self.name!r}: its arguments must be tensors by name, got {type(given).__name__}")
        return {} if given is None else given

    def _cached(self, root: nn.Module, *, deep: bool = True) -> str:
        denoiser = denoiser_in(root)
        cache = "" if denoiser is None or not self.acts else step_cache(denoiser, deep=deep)
        if not cache:
            return ""
        return (
            f"guide {self.name!r} adds rows to the batch of {type(denoiser).__name__}, but {cache} gives its blocks what was computed for "
            "the rows of another step: call disable_cache() on the denoiser (or remove the hooks of the cache) first"
        )


def _branch_off(call: RootCall) -> None:
    """Before a pass, once for all guides: adds their rows to its batch, or remembers that the other half is to be shifted."""
    if GuidedPass in call.kept:
        return
    call.kept[GuidedPass] = None
    run, branches = call.run, call.clock.branches
    # all of the pass is a branch of somebody else's already (a modular pipeline's guider's), and the step's shifts belong to its other passes
    branch = bool(branches.keys() - {"conditional", "unconditional"})
    if run.shift is not None and run.shift.step != run.step:
        _missed(call)
    found = [one for one in active_guides(call) if not branch or one[0].formula is None]
    hidden = hidden_in(call.given)
    if found:
        _serves(call, [guide for guide, *_ in found], hidden)
    # looked at once, before the pass: on an accelerator afterwards it would wait for the pass to end
    halves = {half: _rows(branches.get(half)) for half in ("conditional", "unconditional")}
    conditional, unconditional = halves.values()
    if any(guide.of == "conditional" for guide, *_ in found):
        if run.unshifted and conditional and any(guide.formula for guide, *_ in found):
            _second(call, found[0][0])
        elif unconditional and not conditional:
            run.unshifted = run.shift is None
    late = run.shift is not None and bool(unconditional)
    if isinstance(hidden, Tensor) and (found or late):
        _add_rows(call, found, len(hidden), halves, late)


def _add_rows(call: RootCall, found: Sequence[Found], batch: int, halves: Mapping[str, list[int]], late: bool) -> None:
    """Puts the branches' rows at the end of the batch. late: the pass is to be shifted, even if it gets none."""
    parts, copies, at = [], [], batch
    for guide, scale, note in found:
        rows = halves["conditional"] if guide.of == "conditional" else list(range(batch))
        if rows:
            parts.append(Part(guide.name, rows, scale, guide.formula, at, note))
            copies.append(Copies(guide.name, rows, guide.own_arguments(call)))
            at += len(rows)
    if not parts and not late:
        return
    denoiser = denoiser_in(call.root)
    assert denoiser is not None
    variance = learned_variance(denoiser, getattr(call.pipeline, "scheduler", None))
    combination = combination_of(call.pipeline) if any(part.formula is not None for part in parts) else None
    call.kept[GuidedPass] = GuidedPass(call.clock, parts, batch, halves, call.run, combination, variance)
    if parts:
        call.replace(*grown(type(denoiser).__name__, call.args, call.kwargs, call.names, batch, copies))
        counted = {guide.name: guide.conditional for guide, *_ in found}
        device = next((rows.device for rows in call.clock.branches.values()), torch.device("cpu"))
        call.clock = _named(call.clock, batch, [(part, counted[part.name]) for part in parts], device)


def _come_together(call: RootCall) -> None:
    """After it: takes the branches out of the output again, once for all guides."""
    guided = call.kept.pop(GuidedPass, None)
    if guided is not None:
        call.output = settle(call.output, guided)


def active_guides(call: RootCall) -> list[Found]:
    """The guides at work at this step, with their scales and what takes the sizes of their shifts. Raises ReattendError for two of one name."""
    found: list[Found] = []
    steps = [
        (partial(session.note, plan.recipe), step) for session in call.sessions for plan in session.plans for step in plan.all
    ]
    for note, guide in ((note, step) for note, step in steps if isinstance(step, Guide)):
        scale = guide.scale_at(call.clock)
        if scale == 0:
            continue
        if any(other.name == guide.name for other, *_ in found):
            raise ReattendError(f"two guides are called {guide.name!r}: attach one at a time")
        found.append((guide, scale, note))
    return found


def _serves(call: RootCall, guides: Sequence[Guide], hidden: Any) -> None:
    """Raises an error where this call is none that guides can add rows to."""
    first, name = guides[0], type(call.root).__name__
    if not isinstance(hidden, Tensor):
        raise UnsupportedError(f"guide {first.name!r}: {name} gets its latents as no batch, so there are no rows to add to")
    needy = next((guide for guide in guides if guide.of == "conditional"), None)
    if needy is not None and not call.clock.branches:
        raise UnsupportedError(
            f"guide {needy.name!r}: which rows of this batch of {name} are conditional is not known; "
            "say it around the call: with reattend.rows(...)"
        )
    if getattr(call.pipeline, "do_perturbed_attention_guidance", False):
        raise UnsupportedError(
            f"guide {first.name!r}: {type(call.pipeline).__name__} puts a perturbed part of its own into the batch and counts "
            "rows to find it, so there can be no others: call it with pag_scale=0, or use the pipeline without PAG"
        )
    reason = first._cached(call.root, deep=False)
    if reason:
        raise ReattendError(reason)


def _second(call: RootCall, guide: Guide) -> None:
    """Raises ReattendError where the conditional half comes second and its share of the shift is not known."""
    combination = combination_of(call.pipeline)
    if combination is None or combination.scale <= 0:
        raise ReattendError(
            f"guide {guide.name!r}: the unconditional half of this step was called before the conditional one, so it "
            "missed its share of the guidance: call the conditional half first"
        )


def _missed(call: RootCall) -> None:
    """A step is over whose unconditional half never came. Raises ReattendError where that half was to take all of the shift."""
    shift, call.run.shift = call.run.shift, None
    if shift.late is not None:
        raise ReattendError(
            f"guide {shift.late.parts[0].name!r}: the unconditional half of step {shift.step} was to come after the conditional one and never "
            "did, so its shift is lost: say what each call is: with reattend.rows(...)"
        )


def _rows(rows: Tensor | None) -> list[int]:
    return [] if rows is None else rows.nonzero()[:, 0].tolist()


def _named(clock: Clock, batch: int, added: Sequence[tuple[Part, bool]], device: torch.device) -> Clock:
    """The clock of the grown batch: branches by name, and what each row was copied from. added: parts, and whether they count as halves."""
    copies = torch.tensor([row for part, _ in added for row in part.rows], device=device)
    counted = torch.tensor([counts for part, counts in added for _ in part.rows], device=device)
    branches = {name: torch.cat([rows, rows[copies] & counted]) for name, rows in clock.branches.items()}
    for part, _ in added:
        branches[part.name] = torch.zeros(batch + len(copies), dtype=torch.bool, device=device)
        branches[part.name][part.at : part.at + len(part.rows)] = True
    return replace(clock, branches=branches, source=torch.cat([torch.arange(batch, device=device), copies]))
