"""The observe door: read-only taps on a layer's input.

Gives: the hidden state [B, T, width] that enters the layer of each selected site, detached, with clock, tokens and memory.

Costs: one Python call per layer and pass; nothing is copied or kept.

Refuses: sites that cannot be intercepted, and a layer that is called without hidden states.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ...interventions import Clock, Site, TokenMap, UnsupportedError
from ..handles import Handles, Holder
from ..host import Host
from ..plan import Facts, Plan, Step, sites_misfit
from ..sites.discovery import layer_module
from ..sites.table import SiteTable
from ..tokens.states import tokens_of


@dataclass
class Observation:
    """What a tap sees: hidden [B, T, width] entering the layer of `site`; clock, tokens and memory as in a Call."""

    hidden: Tensor
    site: Site
    clock: Clock
    tokens: TokenMap | None
    memory: dict[Any, Any]


@dataclass
class Observe(Step):
    """Read-only: tap(Observation) before the layer that holds each of `sites` runs."""

    sites: SiteTable
    tap: Callable[[Observation], None]

    reads = True

    def check(self, facts: Facts) -> str:
        return sites_misfit(self.sites)

    def install(self, host: Host, session: Holder, plan: Plan) -> Handles:
        handles = session.handles()
        for site in self.sites:
            handles.before(layer_module(session.model, site.name), self._at(site, host, session, plan), kwargs=True)
        return handles

    def _at(self, site: Site, host: Host, session: Holder, plan: Plan) -> Callable[..., None]:
        def tap(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if session not in host.active():
                return
            hidden = args[0] if args else kwargs.get("hidden_states")
            if not isinstance(hidden, Tensor):
                raise UnsupportedError(
                    f"the layer of {site.name} is called without hidden_states, so its input cannot be observed"
                )
            forward = host.current()
            tokens = tokens_of(forward, site, self.sites.module(site), hidden.flatten(1, -2))  # SAM's are pictures
            self.tap(Observation(hidden.detach(), site, forward.clock, tokens, forward.memory(plan.memory_key)))
            if forward.probe is not None:
                forward.probe.read(self, self.sites.module(site))

        return tap
