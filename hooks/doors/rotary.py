"""The rotary door: how a site has turned its queries and keys by position, for steps that undo, redo or change it.

Gives: at every call of its sites `call.turned` on a denoiser, the table by which this call's queries and keys were turned (several axes, one
table for each stream, image tokens alone, whatever the model does), to take the positions off, to put them or other tokens' on, or to
move tokens further along an axis; on a language model `call.rotary`, the rule of the site's RoPE. It changes nothing by itself.

Costs: a table per pass, which sites that are given the same one share, and only where a step asks for it; at the first call
of a site its queries and keys before RoPE are held until attention is computed, and every known layout is tried on them.

Refuses: sites without RoPE; at `apply` those whose projections before RoPE cannot be reached, at the first call of a run those of which no
known layout gives the queries that attention sees (matrices, tables by part of the head), and models that call attention once for each
sample (Mochi); a run after adapters have come or gone since the session began. On language models what `rotary_misfit` finds.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...interventions import Call, Edit, ReattendError, Site, UnsupportedError
from ...interventions.rotary import Turned, Turns
from ..actions import RootCall
from ..handles import Handles, Holder
from ..host import Host
from ..passes import Forward
from ..plan import Facts, Plan, Step, sites_misfit
from ..sites.denoisers import family_of, turned_by_position
from ..sites.projections import Hooked, Split, heads_of, projection_misfit
from ..sites.rotary import rotary_misfit
from ..sites.rotary_tables import Layout, read_layout, rotary_argument
from ..sites.table import SiteTable
from ..tokens.states import parameters_of

PARTS = ("query", "key")


@dataclass
class Rotary(Step):
    """At every call of `sites`: `call.turned` (denoisers) or `call.rotary` (language models) is known to the steps after it."""

    sites: SiteTable
    # what its hooks are on: known once the model is
    hooked: list[Hooked] = field(init=False, repr=False, default_factory=list)

    at_calls = True

    def check(self, facts: Facts) -> str:
        if reason := sites_misfit(self.sites):
            return reason
        plain = self.sites.where(lambda s: not s.stack.startswith("denoiser"))
        if len(plain) and (reason := rotary_misfit(plain)):
            return reason
        table = self.sites.stack("denoiser") if _on_denoisers(self.sites) else SiteTable([], {})
        for site in table:
            if not turned_by_position(table.module(site)):
                return f"{site.name} does not turn its queries and keys by position"
        name = next((type(d).__name__ for d in facts.denoisers if family_of(d).per_sample), "")
        if len(table) and name:
            return f"{name} calls attention once for each sample of a batch, with tables that are those of the whole batch"
        return projection_misfit(table, PARTS) if len(table) else ""

    def ready(self, call: RootCall) -> str:
        return next(filter(None, (one.misfit for one in self.hooked)), "")

    def install(self, host: Host, session: Holder, plan: Plan) -> Handles:
        handles, tables = session.handles(), Tables()
        self.hooked = Hooked.all_of(self.sites.stack("denoiser"), PARTS) if _on_denoisers(self.sites) else []
        for site in self.sites:
            module = self.sites.module(site)
            if not site.stack.startswith("denoiser"):
                handles.edit(site, module, _nothing)
                continue
            watch = Watch(site, host, session, tables)
            handles.before(module, watch.begin, kwargs=True)
            handles.after(module, watch.end)
            for one in self.hooked:
                if one.site is site:
                    handles.after(one.module, watch.keeping(one.which))
            handles.edit(site, module, watch.tell)
        return handles


def _on_denoisers(table: SiteTable) -> bool:
    return any(site.stack.startswith("denoiser") for site in table)


def _nothing(call: Call, forward: Forward) -> Sequence[Edit]:
    return ()


class Tables(threading.local):
    """The tables that a rotary argument was read as, for all sites of a pass: a model gives most of them the same one."""

    def __init__(self) -> None:
        self.given: Any = None
        self.of: Callable[[], Forward | None] = lambda: None
        self.known: dict[tuple[Layout, torch.Size], Turns | None] = {}

    def read(self, forward: Forward, given: Any, layout: Layout, like: Tensor) -> Turns | None:
        """The table of states like these; None where the argument cannot be read by this layout."""
        if self.given is not given or self.of() is not forward:
            self.given, self.of, self.known = given, weakref.ref(forward), {}
        key = (layout, like.shape)
        if key not in self.known:
            self.known[key] = layout.turns(given, like)
        return self.known[key]


class Watch:
    """One site: what it is given, what it projects, and by which layout its table is read, once that is known."""

    def __init__(self, site: Site, host: Host, session: Holder, tables: Tables) -> None:
        self.site, self.host, self.session, self.tables = site, host, session, tables
        self.local = threading.local()
        # {part: its layout, None where it is not turned}; a part is missing until it is known for sure
        self.known: dict[str, Layout | None] = {}

    def begin(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.session in self.host.active():
            self.local.given = rotary_argument({**dict(zip(parameters_of(module), args, strict=False)), **kwargs})
            self.local.before = {part: [] for part in PARTS if part not in self.known}

    def end(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.local.given, self.local.before = None, {}

    def keeping(self, part: str) -> Any:
        def keep(_: nn.Module, args: tuple, output: Tensor | None) -> None:
            before = getattr(self.local, "before", {})
            if output is not None and part in before:
                # some models turn in place
                before[part].append(Split(output, args, self.site, heads_of(self.site, part)).states.detach().clone())

        return keep

    def tell(self, call: Call, forward: Forward) -> Sequence[Edit]:
        given, before = getattr(self.local, "given", None), getattr(self.local, "before", {})
        states = {"query": call.query, "key": call.key}
        call.turning = lambda: Turned(
            *(self._turns(forward, part, given, before.get(part, ()), states[part]) for part in PARTS)
        )
        return ()

    def _turns(self, forward: Forward, part: str, given: Any, before: Sequence[Tensor], after: Tensor) -> Turns | None:
        """Raises UnsupportedError where the table is not understood."""
        if given is None:
            return None
        if part in self.known:
            layout = self.known[part]
        else:
            try:
                layout, only = read_layout(given, [_grouped(x, after) for x in before], after)
            except ReattendError as error:
                raise UnsupportedError(f"Rotary: {self.site.name} is a site {error}") from None
            if only:
                self.known[part] = layout
        turns = None if layout is None else self.tables.read(forward, given, layout, after)
        if layout is not None and turns is None:
            raise UnsupportedError(f"Rotary: {self.site.name} was given another kind of table than at its first call")
        return turns


def _grouped(states: Tensor, after: Tensor) -> Tensor:
    """States of key heads, repeated where attention sees them once for each query head."""
    return (
        states.repeat_interleave(after.shape[1] // states.shape[1], dim=1) if after.shape[1] % states.shape[1] == 0 else states
    )
