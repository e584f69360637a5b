"""The edits door: interventions at calls of attention.

Gives: at every call of the selected sites a function of the call (query, key, value, mask, clock, tokens, memory) that returns edits;
the call's attention is then computed with them, exactly, in the cheapest way that is exact.

Costs: one Python call per site and pass, and what the edits cost (docs/edits.md, docs/costs.md); a call without edits runs the model's own
attention, bit for bit.

Refuses: sites whose attention cannot be intercepted, with their reason, and a plan that selects none. Linear attention is served where a
step says that it edits outputs alone; an edit of anything else is then an error at the call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...interventions import Call, Edit
from ..handles import Handles, Holder
from ..host import Host
from ..passes import Forward
from ..plan import Facts, Plan, Step, edits_of, sites_misfit
from ..sites.table import SiteTable

Intervention = Callable[[Call], "Edit | Sequence[Edit] | None"]


@dataclass
class Edits(Step):
    """At every call of `sites`: intervention(call) -> edits. `label` names it in the session's counters.

    outputs: its edits are of outputs alone (MixValue, HeadGain, HeadMix), and it looks at no more of a call than values, sizes, tokens and
    clock: linear attention (Sana), which has no weights, is served too.
    """

    sites: SiteTable
    intervention: Intervention
    label: str = ""
    outputs: bool = False

    at_calls = True

    def check(self, facts: Facts) -> str:
        return sites_misfit(self.sites, self.outputs)

    def install(self, host: Host, session: Holder, plan: Plan) -> Handles:
        counter, key = session.counter(self.label or plan.recipe), plan.memory_key

        def edit(call: Call, forward: Forward) -> Sequence[Edit]:
            call.memory = forward.memory(key)
            edits = edits_of(self.intervention(call))
            if edits:
                assert call.site is not None
                counter[call.site.name] += 1
            return edits

        handles = session.handles()
        for site in self.sites:
            handles.edit(site, self.sites.module(site), edit)
        return handles
