"""The reuse door: at chosen steps of a denoising run blocks are not computed, and give what they gave at an earlier step.

Gives: for chosen blocks (neighbours together as one run) the change that they made to their streams at the last step that computed them,
added to what enters them now, or their output as it was; for chosen attention modules their output. Kept apart for each layout of branches
(the conditional and the unconditional call, guide rows) and for each run of a pipeline; a pass that finds nothing of its own kind and shape
is computed. Steps that compute are bit for bit the model's.

Costs: at steps that reuse, one addition per run of blocks in the place of all that is in them; at steps that compute, one subtraction
per block. Kept is one tensor per stream for each run of blocks, or one per attention module, for each layout of branches: in bf16 a run
of blocks of 118,800 tokens of width 3,072 keeps 0.73 GB. No gradient goes into what was kept.

Refuses: a model without a denoiser; a module that another step or session skips too; diffusers' own caches (`enable_cache`), by their
name; gradient checkpointing, which would compute a block once more without its knowing of which step; blocks whose code does not show which
of their outputs is the image's; passes of which nobody says which rows are conditional.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from ...interventions import Clock, ReattendError, Site, UnsupportedError
from ..actions import Action, Rank, RootCall
from ..handles import Handles, Holder
from ..host import Host
from ..passes import Forward
from ..plan import Facts, Plan, Step
from ..sites.denoisers import denoiser_in
from ..sites.discovery import components, layer_module
from ..sites.step_caches import step_cache
from ..sites.table import SiteTable
from ..trackers.kept_blocks import Keeping, KeptPass, reused, shapes_of, tensors


@dataclass
class Moment:
    """A pass that reaches a run of blocks (or an attention module). site: its first one. kept: the step of which something is kept for
    these branches, None where nothing is, so that the pass is computed whatever is said."""

    site: Site
    clock: Clock
    kept: int | None


@dataclass
class Reuse(Step):
    """when(Moment) -> whether this pass uses what was kept; asked once per pass and run of blocks.

    at: the blocks that hold `sites`, or their attention modules, each for itself. keep: of blocks the "change" that they make to their
    streams, or their "output"; of attention modules always the output. label: its name in the session's counters, which count the
    modules that did not run. Raises ReattendError for other values.
    """

    sites: SiteTable
    when: Callable[[Moment], bool]
    at: Literal["layer", "attention"] = "layer"
    keep: Literal["change", "output"] = "change"
    label: str = ""
    # the modules that do not run, each with the first of its sites: known once the model is
    skipped: dict[nn.Module, Site] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        if self.at not in ("layer", "attention") or self.keep not in ("change", "output"):
            raise ReattendError(
                f'Reuse takes at="layer" or "attention" and keep="change" or "output", got at={self.at!r:.40}, keep={self.keep!r:.40}'
            )

    def check(self, facts: Facts) -> str:
        if not facts.denoisers:
            return "Reuse uses again what an earlier step of a denoising run gave, and this model has no denoiser"
        if not len(self.sites):
            return self.sites.missing or "its plan selects no attention site of this model"
        outside = next((site.name for site in self.sites if not site.stack.startswith("denoiser")), "")
        if outside:
            return f"Reuse acts in a denoiser, and {outside} is in none"
        try:
            self.skipped = {module: site for run in self._runs(facts.model) for module, site in run}
        except UnsupportedError as error:
            return str(error)
        return next((reason for denoiser in facts.denoisers if (reason := _cached(denoiser))), "")

    def beside(self, plan: Plan, others: Sequence[tuple[Plan, Step]]) -> str:
        for other_plan, other in others:
            if not isinstance(other, Reuse) or other is self:
                continue
            for module, site in self.skipped.items():
                if any(part in other.skipped for part in module.modules()):
                    return (
                        f"recipes {plan.recipe!r} and {other_plan.recipe!r} both skip what is at {site.name}: what one keeps the other would "
                        "not have computed; attach one at a time"
                    )
        return ""

    def ready(self, call: RootCall) -> str:
        if torch.is_grad_enabled() and getattr(call.root, "is_gradient_checkpointing", False):
            return (
                "Reuse skips blocks, and gradient checkpointing computes them once more, without its knowing of which step: call "
                "disable_gradient_checkpointing() on the denoiser, or run it under torch.no_grad()"
            )
        return _cached(call.root)

    def _runs(self, model: Any) -> list[list[tuple[nn.Module, Site]]]:
        """The blocks in runs of neighbours in one list of layers, or single attention modules, each with the first of its sites."""
        if self.at == "attention":
            return [[(self.sites.module(site), site)] for site in self.sites]
        blocks: dict[nn.Module, Site] = {}
        for site in self.sites:
            blocks.setdefault(layer_module(model, site.name), site)
        runs: list[list[tuple[nn.Module, Site]]] = []
        for module, after in _neighbours(model, list(blocks)):
            if after:
                runs[-1].append((module, blocks[module]))
            else:
                runs.append([(module, blocks[module])])
        return runs

    def install(self, host: Host, session: Holder, plan: Plan) -> Handles:
        handles = session.handles()
        session.counter(self.label or plan.recipe)
        for modules in self._runs(session.model):
            run = Run(self, host, session, plan, modules)
            for index, (module, _) in enumerate(modules):
                handles.around(module, partial(run.forward, index))
        handles.act(Action(Rank.REUSE, certain="Reuse"))
        return handles


def _cached(root: nn.Module) -> str:
    denoiser = denoiser_in(root)
    cache = "" if denoiser is None else step_cache(denoiser)
    if not cache:
        return ""
    return (
        f"Reuse skips blocks of {type(denoiser).__name__}, and {cache} of diffusers skips them too: call disable_cache() on the denoiser "
        "(or remove the hooks of the cache) first"
    )


def _neighbours(model: Any, blocks: list[nn.Module]) -> list[tuple[nn.Module, bool]]:
    """The blocks in the order of their lists, each with whether the one before it in its list comes before it here."""
    wanted: set[nn.Module] = set(blocks)
    found: list[tuple[nn.Module, bool]] = []
    for part in components(model).values():
        for stack in part.modules():
            layers = list(stack) if isinstance(stack, nn.ModuleList) else []
            for before, layer in zip([None, *layers], layers, strict=False):
                if layer in wanted:
                    wanted.discard(layer)
                    found.append((layer, before is not None and bool(found) and found[-1][0] is before))
    return found


@dataclass(eq=False)
class UnderWay:
    """A pass at a run of blocks: what it uses, or what it fills in."""

    forward: Forward
    kept: KeptPass | None
    keeping: Keeping


class Run:
    """Blocks that follow on one another, or one attention module, and what is kept of them."""

    def __init__(self, step: Reuse, host: Host, session: Holder, plan: Plan, modules: list[tuple[nn.Module, Site]]) -> None:
        self.step, self.host, self.session, self.plan, self.modules = step, host, session, plan, modules
        self.change = step.at == "layer" and step.keep == "change"
        self.local = threading.local()

    def forward(self, index: int, before: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """In the place of a module's forward."""
        facts = self.host.current() if self.session in self.host.active() else None
        if facts is None or facts.clock.phase != "denoise":
            return before(*args, **kwargs)
        module, site = self.modules[index]
        given = tensors(module, args, kwargs)
        way = getattr(self.local, "way", None)
        if index == 0 or way is None or way.forward is not facts:
            way = self.local.way = self._begin(facts, shapes_of(given))
        last = index == len(self.modules) - 1
        if last:
            self.local.way = None
        if way.kept is not None:
            self.session.counter(self.step.label or self.plan.recipe)[site.name] += 1
            return reused(way.kept, index, given, change=self.change)
        output = before(*args, **kwargs)
        way.keeping.computed(index, module, given, output, alone=self.step.at == "attention")
        if last and len(way.keeping.kept.names) == len(self.modules):
            # complete: a pass that was interrupted keeps nothing
            self._store(facts)[branches_of(facts.clock)] = way.keeping.kept
        return output

    def _store(self, facts: Forward) -> dict[Any, KeptPass]:
        return facts.memory(self.plan.memory_key).setdefault(self, {})

    def _begin(self, facts: Forward, shapes: dict[str, tuple]) -> UnderWay:
        clock, site = facts.clock, self.modules[0][1]
        if not clock.branches:
            raise UnsupportedError(
                f"Reuse: which rows are conditional at {site.name} is not known; say it around the call: with reattend.rows(...)"
            )
        kept = self._store(facts).get(branches_of(clock))
        if kept is not None and kept.shapes != shapes:
            kept = None
        asked = self.step.when(Moment(site, clock, None if kept is None else kept.step))
        return UnderWay(facts, kept if asked else None, Keeping(clock.step, change=self.change))


def branches_of(clock: Clock) -> tuple:
    """What is kept apart: which rows of the batch are of which branch."""
    return tuple((name, tuple(rows.tolist())) for name, rows in sorted(clock.branches.items()))
