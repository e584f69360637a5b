"""What a recipe hands to a session: a plan of steps. A step's class, what it refuses and how it installs itself is a file of `doors/`."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from ..interventions import Edit, ReattendError, Site
from .actions import RootCall
from .handles import Handles, Holder
from .host import Host
from .sites.discovery import components
from .sites.table import SiteTable


@dataclass(frozen=True)
class Facts:
    """What is known of a model when a session begins. root: the model that reads tokens; None for a denoiser or a pipeline. denoisers: without
    the wrappers of torch.compile and DataParallel."""

    model: Any
    table: SiteTable
    root: nn.Module | None
    denoisers: Sequence[nn.Module]

    @functools.cached_property
    def modules(self) -> set[int]:
        """Ids of all modules of the model or pipeline."""
        return {id(module) for part in components(self.model).values() for module in part.modules()}

    def strange(self, step: Step) -> str:
        """Why a step's sites are not this model's, or ""."""
        name = next((site.name for site, module in getattr(step, "where", ()) if id(module) not in self.modules), "")
        return (
            f"its step {type(step).__name__} names {name} of another model: take sites from this one, reattend.sites(model)"
            if name
            else ""
        )

    def without_tokens(self, need: str) -> str:
        """Why no prompt of this model can be followed, or "". need: what a step does with a prompt."""
        if _reads_tokens(self.root):
            return ""
        name = "a denoiser or a pipeline of several models" if self.root is None else type(self.root).__name__
        return f"{need}, and {name} reads no tokens that could be followed: apply it to a language or vision-language model"


def _reads_tokens(root: nn.Module | None) -> bool:
    if root is None:
        return False
    parameters = inspect.signature(type(root).forward).parameters
    named = [name for name, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    # a wrapper that takes anything (the first name is self) may pass tokens on
    return len(named) <= 1 or any(name in named for name in ("input_ids", "inputs_embeds", "decoder_input_ids"))


class Step:
    """One step of a plan, which installs itself; every door of `doors/` has its own class.

    A class of its own says what it serves by `check` and `install`; one that says nothing is refused. at_calls: its `sites` are calls of
    attention that it edits or reads. reads: a pass that is only to be read has to reach all of its `sites`.
    """

    at_calls: ClassVar[bool] = False
    reads: ClassVar[bool] = False

    @property
    def where(self) -> Iterable[tuple[Site, nn.Module]]:
        """The sites that it acts or looks at, with their modules; none for a step that has no `sites`."""
        table: SiteTable | None = getattr(self, "sites", None)
        return () if table is None else [(site, table.module(site)) for site in table]

    @property
    def held(self) -> Sequence[Step]:
        """Further steps that it holds: they are checked, asked and installed with it, as if they stood after it in the plan."""
        return ()

    def check(self, facts: Facts) -> str:
        """Why this model cannot serve the step, naming the site or argument and what would be right; "" where it can."""
        return f"no door serves a step of class {type(self).__name__}"

    def beside(self, plan: Plan, others: Sequence[tuple[Plan, Step]]) -> str:
        """Why the step cannot be at work together with these (it is among them), or ""."""
        return ""

    def install(self, host: Host, session: Holder, plan: Plan) -> Handles:
        """Puts on what the step does, through `session.handles()`, and returns that."""
        return session.handles()

    def ready(self, call: RootCall) -> str:
        """Why the step cannot serve this prompt or denoising run, or "": asked before its first layer runs, once the facts are read.

        For what nobody knows when a session begins: words, grids, second texts.
        """
        return ""


def edits_of(wanted: Any) -> list[Edit]:
    """What a user's function asks for at a call, identities left out. Raises ReattendError for what is neither an edit, edits nor None."""
    if wanted is None:
        return []
    if isinstance(wanted, Edit):
        return [] if wanted.is_identity else [wanted]
    edits = wanted
    if not isinstance(edits, (list, tuple)) or not all(isinstance(item, Edit) for item in edits):
        raise ReattendError(f"an intervention returns an edit, a list of edits or None, but this one returned {wanted!r:.80}")
    return [edit for edit in edits if not edit.is_identity]


def wrong_functions(step: Step) -> str:
    """Which of a step's fields holds no function (or no steps) although that is what its class declares, or ""."""
    for name, (what, optional) in _declared(type(step)).items():
        value = getattr(step, name, None)
        fits = (value is None and optional) or (
            callable(value)
            if what == "a function"
            else isinstance(value, (list, tuple)) and all(callable(getattr(one, "install", None)) for one in value)
        )
        if not fits:
            return f"{type(step).__name__} takes {what} as {name}, got {value!r:.80}"
    return ""


@functools.lru_cache(maxsize=256)
def _declared(cls: type) -> dict[str, tuple[str, bool]]:
    """{field: ("a function" or "a list of steps", whether it may be None)} of a step's class."""
    found: dict[str, tuple[str, bool]] = {}
    if not dataclasses.is_dataclass(cls):
        return found
    hints = typing.get_type_hints(cls)
    for field_ in dataclasses.fields(cls):
        hint = hints[field_.name]
        parts = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
        own = [part for part in parts if part is not type(None)]
        if all(typing.get_origin(part) is Callable for part in own):
            found[field_.name] = "a function", len(own) < len(parts)
        elif own == [Sequence[Step]]:
            found[field_.name] = "a list of steps", len(own) < len(parts)
    return found


def sites_misfit(table: SiteTable, outputs: bool = False) -> str:
    """Why a step cannot act or look at these sites, or "". outputs: it edits outputs alone."""
    return table.refused(outputs) if len(table) else table.missing or "its plan selects no attention site of this model"


@dataclass
class Plan:
    """The steps of one recipe on one model, with the name they are counted under. idle: why, where they never acted."""

    recipe: str
    steps: list[Step] = field(default_factory=list)
    memory_key: object = field(default_factory=object)
    idle: str = "no call met its conditions"

    @property
    def all(self) -> list[Step]:
        """Its steps, each with those that it holds after it."""
        found, todo = [], list(self.steps)
        while todo:
            found.append(todo.pop(0))
            todo = [*getattr(found[-1], "held", ()), *todo]
        return found
