"""Passes of a denoiser of which all rows are the prompt's, and, under a guider, a branch of its own."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ...hooks import Plan
from ...hooks.actions import Action, Rank, RootCall
from ...hooks.handles import Handles, Holder
from ...hooks.host import Host
from ...hooks.plan import Facts, Step
from ...hooks.sites.inputs import hidden_in
from ...interventions import UnsupportedError


@dataclass
class WholeBatch(Step):
    """All rows of a pass are the prompt's. branch: and those of the branch of this name."""

    name: str
    branch: bool

    def check(self, facts: Facts) -> str:
        return "" if facts.denoisers else f"{self.name} needs a denoiser; this model has none"

    def install(self, host: Host, session: Holder, plan: Plan) -> Handles:
        handles = session.handles()
        handles.act(Action(Rank.LATENTS, self._named))
        return handles

    def _named(self, call: RootCall) -> None:
        hidden = hidden_in(call.given)
        if hidden is None:
            name = type(call.root).__name__
            raise UnsupportedError(f"{self.name}: {name} gets its latents as no batch, so there are no rows to act on")
        rows = torch.ones(len(hidden), dtype=torch.bool, device=hidden[0].device)
        branches = {"conditional": rows, **({self.name: rows} if self.branch else {})}
        call.clock = replace(call.clock, branches=branches, unknown="")
