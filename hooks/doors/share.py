"""The share door: queries, keys, values or outputs of other rows, of an earlier step or of a reference run.

Gives: at chosen sites of a denoiser an intervention is handed what other rows of the batch, the same site at an earlier step of the run, or
the same site and step in the session's first run hold there, for each of its own rows: keys and values as the site computed them (after
norms and RoPE), on the call's device and in its dtype, and the numbers of the rows they come from. Its edits say what becomes of them:
appended (`AppendKV`, with its own visibility), in place (`ReplaceKV`), beside (`Second`), or outputs taken over (`TakeOutput`, `Instead`).
Rows of a half or of a guide's branch are given rows of their own part; an index map says which.

Costs: nothing is kept for rows of the same batch. A kept step holds rows x heads x tokens x head size numbers per tensor named and site:
earlier steps as many as asked for (one) and the step under way, a reference run all of its steps. `Share.bytes` counts them at any
moment, `offload` holds them in main memory. They are detached, and gone with the run or, a reference, with the session.

Refuses: models without a denoiser, denoisers that attend for each sample alone (Mochi), tensors that no call has, rows of which nobody
knows the half, an index map that does not fit, a run with other steps than its reference, and parts of the batch that were not kept.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ...interventions import Call, Clock, Edit, ReattendError
from ..actions import RootCall
from ..handles import Handles, Holder
from ..host import Host
from ..passes import Forward
from ..plan import Facts, Plan, Step, edits_of, sites_misfit
from ..sites.families import family_of
from ..sites.table import SiteTable
from ..trackers.parts import parts_of
from .context import Context

NAMES = ("query", "key", "value", "output")
UNKNOWN = "which rows of this batch are conditional is not known: say it around the call: with reattend.rows(...)"


@dataclass
class Shared:
    """What a call is given, for each of its B rows: query [B, H, Tq', D], key [B, Hkv, m, D], value [B, Hkv, m, Dv], output
    [B, H, Tq', Dv]; None for what was not asked for. rows long [B]: the rows of this very call that they are of (None where they come
    from another step or run). step: the step that they are of.
    """

    step: int
    rows: Tensor | None = None
    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    output: Tensor | None = None


class _Run:
    """Stands for one denoising run in what is kept of it. passed: the steps that it has come to, kept or not."""

    def __init__(self, steps: int | None) -> None:
        self.steps, self.passed = steps, set[int]()

    @property
    def whole(self) -> bool:
        """Whether it has come to its last step."""
        return len(self.passed) >= (self.steps or 0)


# {step: {(site, number of its call): {part of the batch: {name: tensor}}}}
_Steps = dict[int, dict[tuple[str, int], dict[str, dict[str, Tensor]]]]


class _Kept:
    """What is kept for one session, by run; it goes with the session, and a run's share with the run."""

    def __init__(self) -> None:
        self.runs: weakref.WeakKeyDictionary[_Run, _Steps] = weakref.WeakKeyDictionary()
        self.reference: _Run | None = None

    def of(self, forward: Forward, key: object) -> _Run:
        """The run under way; one whose reference was left before its last step is the reference itself."""
        memory = forward.memory(key)
        run = memory.get(_Run)
        if run is None:
            run = memory[_Run] = _Run(forward.clock.steps)
            self.runs[run] = {}
            if self.reference is None or not self.reference.whole:
                self.reference = run
        run.passed.add(forward.clock.step)
        return run

    @property
    def bytes(self) -> int:
        tensors = (
            t
            for steps in self.runs.values()
            for s in steps.values()
            for p in s.values()
            for n in p.values()
            for t in n.values()
        )
        return sum(t.numel() * t.element_size() for t in tensors)


@dataclass
class Share(Step):
    """At every call of `sites`: use(call, Shared) -> edits, with the tensors named in `keep` of other rows.

    of: "batch" (other rows of the call itself), "step" (this site at an earlier step of the run: the newest of the last `steps` that were
    kept) or "run" (this site and step in the first run of the session, which is itself left as it is). when: of which steps something is
    kept, default all; at: at which calls something is kept and given, default all. Where nothing is kept, `use` is not asked. part: the
    half or branch whose rows are given; default each row's own (of a guide's branch that was not kept: the conditional half). rows(n) -> n
    numbers: which of its rows each of the n rows of a part is given; default the same place, or the only one. role: of which tokens
    ("image", "text", "all"). `keep` may name "query", "key", "value" and "output" ("output" not with "batch":
    `TakeOutput(batch=shared.rows)` takes it over). offload: kept in main memory. label names it in the session's counters. Raises
    ReattendError for other names and for numbers out of range.
    """

    sites: SiteTable
    use: Callable[[Call, Shared], Edit | Sequence[Edit] | None]
    of: Literal["batch", "step", "run"] = "batch"
    keep: Sequence[str] = ("key", "value")
    rows: Callable[[int], Sequence[int]] | None = None
    part: str = ""
    role: str = "all"
    steps: int = 1
    when: Callable[[Clock], bool] | None = None
    at: Callable[[Call], bool] | None = None
    offload: bool = False
    label: str = ""
    _kept: Callable[[], _Kept | None] = field(default=lambda: None, init=False, repr=False)
    _parts: tuple[Clock, int, dict[str, Tensor]] | None = field(default=None, init=False, repr=False)

    at_calls = True

    def __post_init__(self) -> None:
        if self.of not in ("batch", "step", "run"):
            raise ReattendError(f'of must be "batch", "step" or "run", got {self.of!r}')
        known = NAMES[:3] if self.of == "batch" else NAMES
        if isinstance(self.keep, str) or not self.keep or any(name not in known for name in self.keep):
            raise ReattendError(f"keep must name some of {', '.join(known)}, got {self.keep!r}")
        if self.steps < 1:
            raise ReattendError(f"steps must be 1 or more, got {self.steps}")

    @property
    def bytes(self) -> int:
        """How many bytes are kept just now."""
        kept = self._kept()
        return 0 if kept is None else kept.bytes

    def beside(self, plan: Plan, others: Sequence[tuple[Plan, Step]]) -> str:
        """Queries and keys are kept for the weights that they make, over a text that others must not have made longer."""
        own = {id(module) for _, module in self.where} if {"query", "key"} <= set(self.keep) else set()
        for other, step in others if own else ():
            if isinstance(step, Context) and step.place == "after":
                hit = next((site.name for site, module in step.where if id(module) in own), None)
                if hit is not None:
                    return (
                        f"recipe {plan.recipe!r} takes weights over the whole text at {hit}, where recipe {other.recipe!r} has a text of its "
                        "own after the prompt: use one of the two"
                    )
        return ""

    def check(self, facts: Facts) -> str:
        if not facts.denoisers:
            return "its step Share needs the rows of a denoiser's batch; this model has no denoiser"
        strange = next((s for s in self.sites if not s.stack.startswith("denoiser")), None)
        if strange is not None:
            return f"its step Share acts at a denoiser's sites, and {strange.name} is none of them"
        single = next((type(d).__name__ for d in facts.denoisers if family_of(d).per_sample), "")
        if single and self.of == "batch":
            return f"its step Share needs all rows in one call, and {single} attends for each sample alone"
        return sites_misfit(self.sites)

    def install(self, host: Host, session: Holder, plan: Plan) -> Handles:
        counter, handles = session.counter(self.label or plan.recipe), session.handles()
        kept, key = _Kept(), (plan.memory_key, object())
        self._kept = weakref.ref(kept)

        def edit(call: Call, forward: Forward) -> Sequence[Edit]:
            run = kept.of(forward, key)
            call.memory = forward.memory(plan.memory_key)
            shared = self._shared(call, kept, run) if self.at is None or self.at(call) else None
            if shared is None:
                return ()
            edits = edits_of(self.use(call, shared))
            if edits:
                assert call.site is not None
                counter[call.site.name] += 1
            return edits

        def read(call: Call, edits: list[Edit], forward: Forward) -> None:
            run = kept.of(forward, key)
            call.memory = forward.memory(plan.memory_key)
            wanted = (self.when is None or self.when(call.clock)) and (self.at is None or self.at(call))
            if wanted and (self.of == "step" or run is kept.reference):
                self._keep(call, kept.runs[run])

        for site in self.sites:
            module = self.sites.module(site)
            handles.edit(site, module, edit)
            if self.of != "batch":
                handles.read(site, module, read)
        return handles

    def ready(self, call: RootCall) -> str:
        if not call.clock.branches:
            return f"its step Share: {UNKNOWN}"
        kept = self._kept()
        first = None if kept is None else kept.reference
        if self.of == "run" and first is not None and first.steps and first.whole and first.steps != call.clock.steps:
            return f"the reference run had {first.steps} steps, this one has {call.clock.steps}: give both runs as many steps"
        return ""

    # -- keeping -------------------------------------------------------------------------------------------------------

    def _keep(self, call: Call, steps: _Steps) -> None:
        """Keeps what was asked for of a call; its output when it is there."""
        assert call.site is not None
        here = steps.setdefault(call.clock.step, {}).setdefault((call.site.name, call.number), {})
        if self.of == "step":
            # the second evaluation of a step is given what the first one was
            for old in [step for step in steps if step < call.clock.step - self.steps]:
                del steps[old]
        parts = self._rows_of(call)

        def note(name: str, tensor: Tensor) -> None:
            for part, rows in parts.items():
                here.setdefault(part, {})[name] = self._stored(tensor[rows.to(tensor.device)])

        for name in self.keep:
            if name == "output":
                call.then.append(lambda output: note("output", self._tokens(call, "output", output)))
            else:
                note(name, self._tokens(call, name, getattr(call, name)))

    def _stored(self, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        if tensor.is_inference():
            with torch.inference_mode(False):
                tensor = tensor.clone()  # it may be used where gradients are taken
        return tensor.cpu() if self.offload else tensor

    def _tokens(self, call: Call, name: str, tensor: Tensor) -> Tensor:
        """The tokens of the role, as many in every row."""
        if self.role == "all":
            return tensor
        chosen = call.columns(self.role) if name in ("key", "value") else call.query_rows(self.role)
        counts = chosen.sum(dim=1)
        if bool((counts != counts[0]).any()):
            raise ReattendError(
                f"rows of this batch have {counts.tolist()} {self.role!r} tokens: what they share has to be as long in all"
            )
        places = chosen.nonzero()[:, 1].view(len(chosen), -1)
        return tensor.gather(2, places[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3]))

    # -- giving --------------------------------------------------------------------------------------------------------

    def _rows_of(self, call: Call) -> dict[str, Tensor]:
        """The parts of a call's batch, found once in a pass."""
        last = self._parts
        if last is None or last[0] is not call.clock or last[1] != call.batch:
            last = self._parts = (call.clock, call.batch, parts_of(call.clock, call.batch))
        if not last[2]:
            raise ReattendError(UNKNOWN)
        return last[2]

    def _shared(self, call: Call, kept: _Kept, run: _Run) -> Shared | None:
        """What a call is given; None where there is nothing yet."""
        assert call.site is not None
        parts, step, device = self._rows_of(call), call.clock.step, call.query.device
        place = call.site.name, call.number
        if self.of == "batch":
            if self.part and self.part not in parts:
                return None
            source = torch.empty(call.batch, dtype=torch.long)
            for name, rows in parts.items():
                theirs = parts[self.part or name]
                source[rows] = theirs[self._index(name, len(rows), len(theirs))]
            source = source.to(device)
            found = {name: self._tokens(call, name, getattr(call, name))[source] for name in self.keep}
            return Shared(step, source, **found)
        if self.of == "run":
            if run is kept.reference or kept.reference is None:
                return None
            of_step = kept.runs[kept.reference].get(step, {})
            if not of_step and self.when is not None and step in kept.reference.passed:
                return None  # a step that was not to be kept
            store = of_step.get(place)
            if store is None:
                raise ReattendError(
                    f"the reference run kept nothing of {call.site.name} at step {step}: give both runs the same steps"
                )
        else:
            steps = kept.runs[run]
            earlier = [s for s in steps if step - self.steps <= s < step and place in steps[s]]
            if not earlier:
                return None
            step = max(earlier)
            store = steps[step][place]
        order = torch.cat(list(parts.values()))
        found = {}
        for name in self.keep:
            pieces = [self._taken(store, part, name, len(rows), call) for part, rows in parts.items()]
            if len({piece.shape[1:] for piece in pieces}) > 1:
                raise ReattendError(f"what was kept of {call.site.name} is not as long in all parts of the batch")
            found[name] = torch.cat(pieces)[order.argsort().to(device)]
        return Shared(step, None, **found)

    def _taken(self, store: dict[str, dict[str, Tensor]], part: str, name: str, count: int, call: Call) -> Tensor:
        own = self.part or part
        if own not in store and own not in ("unconditional", ""):
            own = "conditional"  # a guide's branch, whose rows were copied from these
        if own not in store:
            raise ReattendError(
                f"nothing was kept of {own or 'rows of neither half'} rows, kept are: {', '.join(map(repr, store))}"
            )
        tensor = store[own][name].to(call.query.device, call.query.dtype)
        return tensor[self._index(part, count, len(tensor)).to(tensor.device)]

    def _index(self, part: str, count: int, kept: int) -> Tensor:
        """Long [count]: which of the kept rows of its part each row is given."""
        if self.rows is None:
            if kept not in (1, count):
                raise ReattendError(
                    f"{part or 'neither'}: {count} rows cannot be given {kept} kept ones: say which by rows=..."
                )
            return torch.arange(count) if kept == count else torch.zeros(count, dtype=torch.long)
        index: Any = torch.as_tensor(self.rows(count), dtype=torch.long)
        if index.shape != (count,) or bool((index < 0).any()) or bool((index >= kept).any()):
            raise ReattendError(f"rows({count}) must be {count} numbers from 0 to {kept - 1}, got {index.tolist()}")
        return index
