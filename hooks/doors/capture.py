"""The capture door: a reader of the edited attention of each call (what readers make of it: `recording`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ...interventions import Call, Edit
from ..handles import Handles, Holder, Reader
from ..host import Host
from ..passes import Forward
from ..plan import Facts, Plan, Step, sites_misfit
from ..sites.table import SiteTable


@dataclass
class Capture(Step):
    """Read-only: reader(call, edits) at every call of `sites`, with the edits of all sessions; the outputs stay bit-identical."""

    sites: SiteTable
    reader: Callable[[Call, Sequence[Edit]], None]

    at_calls = True

    def check(self, facts: Facts) -> str:
        return sites_misfit(self.sites)

    def install(self, host: Host, session: Holder, plan: Plan) -> Handles:
        handles = session.handles()
        for site in self.sites:
            module = self.sites.module(site)
            handles.read(site, module, self._at(module, plan))
        return handles

    def _at(self, module: nn.Module, plan: Plan) -> Reader:
        def read(call: Call, edits: list[Edit], forward: Forward) -> None:
            call.memory = forward.memory(plan.memory_key)
            # the pass of a probe says itself whether it has gradients
            with torch.set_grad_enabled(forward.probe is not None and torch.is_grad_enabled()):
                self.reader(call, edits)
            if forward.probe is not None:
                forward.probe.read(self, module)

        return read
