"""The capture door: what the edited attention of chosen sites looks like, call by call or at the end of a pass, with a gradient on request.

Gives: `reader(call, edits)` at every call of the sites, with the edits of all sessions; `at_end(kept, output)` once the pass is over, with the
calls it had (their q, k and v, and what the site's attention gave) and the output of the model. What is read of a call without its matrix:
`row_weights`, `column_weights`, `column_sums`, `row_maxima`, `block_sums`, `weighted` (a vector times it) and `weights_gradient`, all in
`interventions`. With `grad` these have the gradient of the pass: a loss on them, or on the logits, can be differentiated with respect to
them, to the calls' q, k, v and outputs, to an input or to the latents. Passes with a gradient are a user's own, `Probe(grad=True)` and
`AtStep.predict`, `look` and `gradient` of Latents. `Recording` (`reattend.capture`) is made of it.

Costs: what the reader computes (rows are read in chunks, never the whole matrix; with a gradient each chunk is computed once more on the way
back). `at_end` keeps q, k, v and the output of its sites until the pass ends: per site tokens x heads x head size, four times.

Refuses: with `grad`, models with quantised parameters and passes of a session that have no gradient to give; the gradient of weights where
outputs were edited. The model's outputs stay bit-identical.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...interventions import Call, Edit, ReattendError, weights_gradient
from ..handles import Handles, Holder, Reader
from ..host import Host
from ..passes import Forward
from ..plan import Facts, Plan, Step, sites_misfit
from ..sites.quantised import without_gradient
from ..sites.table import SiteTable


@dataclass
class Kept:
    """One call of a site, as it was: its q, k, v (call), its edits, and output [B, H, Tq, Dv], what its attention gave."""

    call: Call
    edits: Sequence[Edit]
    output: Tensor | None = None

    def weights_gradient(self, gradient: Tensor, rows: Tensor | None = None) -> Tensor:
        """[B, H, R, Tk]: a loss's gradient with respect to the weights, from that with respect to `output`."""
        return weights_gradient(self.call, self.edits, gradient, rows)


# {site name: its calls in a pass, in their order}, and the model's output; None where a pass stopped before its end
AtEnd = Callable[[Mapping[str, Sequence[Kept]], object], None]


@dataclass
class Capture(Step):
    """Read-only: reader(call, edits) at every call of `sites`, with the edits of all sessions; the outputs stay bit-identical.

    at_end(kept, output): after each pass of the model's root, with all calls that it had at these sites; also after an encoder that runs
    outside of one (generate computes features of images beforehand), with the encoder's output. grad: both have the gradient of the pass.
    Raises ReattendError for a step with neither.
    """

    sites: SiteTable
    reader: Callable[[Call, Sequence[Edit]], None] | None = None
    at_end: AtEnd | None = None
    grad: bool = False

    at_calls = True
    reads = True

    def __post_init__(self) -> None:
        if self.reader is None and self.at_end is None:
            raise ReattendError("Capture needs a reader, or at_end, which is called once a pass is over")

    def check(self, facts: Facts) -> str:
        reason = sites_misfit(self.sites)
        if reason or not self.grad:
            return reason
        return without_gradient([*facts.denoisers, *([] if facts.root is None else [facts.root])])

    def install(self, host: Host, session: Holder, plan: Plan) -> Handles:
        handles = session.handles()
        for site in self.sites:
            module = self.sites.module(site)
            handles.read(site, module, self._at(module, plan))
        return handles

    def _at(self, module: nn.Module, plan: Plan) -> Reader:
        def read(call: Call, edits: list[Edit], forward: Forward) -> None:
            call.memory = forward.memory(plan.memory_key)
            if self.grad and forward.probe is None and not torch.is_grad_enabled():
                raise ReattendError(
                    f"{plan.recipe}: the pass has no gradient: run the model inside torch.enable_grad(), or read in Probe(grad=True) or a "
                    "further pass of Latents"
                )
            # the pass of a door's own says itself whether it has gradients
            with torch.set_grad_enabled((self.grad or forward.probe is not None) and torch.is_grad_enabled()):
                if self.reader is not None:
                    self.reader(call, edits)
                if self.at_end is not None:
                    self._keep(call, edits, forward, module)
            if forward.probe is not None and self.at_end is None:
                forward.probe.read(self, module)

        return read

    def _keep(self, call: Call, edits: list[Edit], forward: Forward, module: nn.Module) -> None:
        calls = forward.kept.get(id(self))
        if calls is None:
            calls = forward.kept[id(self)] = {}
            forward.endings.append(lambda output: self._end(forward, output))
        one = Kept(call, list(edits))
        assert call.site is not None
        calls.setdefault(call.site.name, []).append(one)

        def gave(output: Tensor) -> None:
            one.output = output
            if forward.probe is not None:
                forward.probe.read(self, module)

        call.then.append(gave)

    def _end(self, forward: Forward, output: object) -> None:
        assert self.at_end is not None
        calls = forward.kept.pop(id(self))
        with torch.set_grad_enabled((self.grad or forward.probe is not None) and torch.is_grad_enabled()):
            self.at_end(calls, output)
