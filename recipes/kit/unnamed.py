"""What a session says of a recipe that was given no text: why it never acted, and that nobody reads the pipeline's negative prompt."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from ...hooks.actions import Action, Rank, RootCall
from ...hooks.handles import Handles, Holder
from ...hooks.host import Host
from ...hooks.plan import Facts, Plan, Step
from ...hooks.prompts.second_text import running_call
from ...hooks.trackers.combination import combination_of
from ...interventions import ReattendWarning


@dataclass
class Unnamed(Step):
    """A recipe has no text of its own. argument: what names one. acts: whether the recipe does something without."""

    argument: str
    acts: bool

    def check(self, facts: Facts) -> str:
        return ""

    def install(self, host: Host, session: Holder, plan: Plan) -> Handles:
        handles = session.handles()
        said: list[bool] = []
        if not self.acts:
            session.counter(plan.recipe, idle=f"it was given no text: name one as {self.argument}")

        def look(call: RootCall) -> None:
            if call.clock.step == 0 and not said and _unread(call):
                said.append(True)
                warnings.warn(
                    f"recipe {plan.recipe!r}: this call of {type(call.pipeline).__name__} does no guidance, so nobody reads its "
                    f"negative_prompt, this recipe neither: name the text as {self.argument} of the recipe",
                    ReattendWarning,
                    2,
                )

        handles.act(Action(Rank.ARGUMENTS, look))
        return handles


def _unread(call: RootCall) -> bool:
    """Whether a call of a pipeline has a negative prompt, and is known to do no guidance."""
    given: Any = None if call.pipeline is None else running_call(call.pipeline).get("negative_prompt")
    if not given or given == [""] or "unconditional" in call.clock.branches:
        return False
    combination = combination_of(call.pipeline)
    return combination is not None and combination.scale == 1
