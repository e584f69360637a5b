"""The guide door: further branches of the conditional rows in a denoiser's batch, and what comes of their predictions.

With branches p_g of scales w_g the prediction of every conditional row becomes eps_c + sum w_g (eps_c - p_g), and the
unconditional row of the same sample gets the same shift, so that a pipeline's own eps_u + s (eps_c - eps_u) ends as
eps_u + s (eps_c - eps_u) + sum w_g (eps_c - p_g). Where the two halves are separate calls, the shift is remembered from the
conditional one. What a pipeline derives from the conditional prediction alone (guidance_rescale, the norms of Lumina 2 and
QwenImage) sees it shifted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...interventions import Clock, ReattendError, UnsupportedError
from ..actions import Action, Rank, RootCall
from ..handles import Handles, Holder
from ..host import Host
from ..plan import Facts, Plan, Step
from ..trackers.denoising_run import Run

# Arguments that are shared by all rows, whatever their first dimension happens to be.
SHARED = {"img_ids", "txt_ids", "image_rotary_emb", "ip_adapter_masks"}
# Arguments that hold several rows per sample (AnimateDiff: one text per frame).
FOLDED = {"encoder_hidden_states", "encoder_attention_mask", "image_embeds", "ip_hidden_states"}
# Lists with one entry per sample that are not tensors.
PER_SAMPLE = {"img_shapes", "txt_seq_lens"}


@dataclass
class Guide(Step):
    """One more denoiser branch per conditional row, in the same batch, with the edits that name its rows.

    prediction' = prediction + scale * (conditional - branch), added to both halves under classifier-free guidance, so that the
    pipeline's own formula gives eps_u + s (eps_c - eps_u) + scale (eps_c - branch). Interventions find the branch's rows in
    `call.clock` under `name`. start, stop: the part of the schedule it acts in, start <= step / steps < stop. conditional: the branch's rows
    count as conditional rows too, so that what recipes do to the prompt's rows they do to them.
    Raises ReattendError for a name that is taken or a part that is empty.
    """

    name: str
    scale: float
    start: float = 0.0
    stop: float = 1.0
    conditional: bool = True

    def __post_init__(self) -> None:
        if not self.name or self.name in ("conditional", "unconditional"):
            raise ReattendError(f"a guide's name must not be empty, 'conditional' or 'unconditional', got {self.name!r}")
        if not math.isfinite(self.scale):
            raise ReattendError(f"guide {self.name!r}: scale must be a finite number, got {self.scale}")
        if not 0 <= self.start < self.stop <= 1:
            raise ReattendError(f"guide {self.name!r}: 0 <= start < stop <= 1 must hold, got {self.start} and {self.stop}")

    def check(self, facts: Facts) -> str:
        if not facts.denoisers:
            return f"guide {self.name!r} needs a denoiser; this model has none"
        if isinstance(facts.model, nn.Module) and (self.start, self.stop) != (0, 1):
            return (
                f"guide {self.name!r} acts from {self.start} to {self.stop} of the schedule, but a bare denoiser has none: apply the recipe "
                "to the pipeline, or leave start at 0 and stop at 1"
            )
        return ""

    def beside(self, plan: Plan, others: Sequence[tuple[Plan, Step]]) -> str:
        if any(isinstance(other, Guide) and other is not self and other.name == self.name for _, other in others):
            return f"two guides are called {self.name!r}: attach one recipe with both settings, or one at a time"
        return ""

    def install(self, host: Host, session: Holder, plan: Plan) -> Handles:
        handles = session.handles()
        handles.act(Action(Rank.ROWS, _branch_off, _come_together, certain=f"guide {self.name!r}" if self.scale else ""))
        return handles


@dataclass
class Guided:
    """A denoiser pass that guides take part in. rows [n]: its conditional rows; grown: whether branches were added."""

    clock: Clock
    guides: Sequence[Guide]
    batch: int
    run: Run
    grown: bool = False
    rows: list[int] = field(default_factory=list)


def _branch_off(call: RootCall) -> None:
    """Before a pass, once for all guides: adds their rows to its batch, or remembers that the other half is to be shifted."""
    if Guided in call.kept:
        return
    call.kept[Guided] = None
    guides, branches, run = active_guides(call), call.clock.branches, call.run
    if guides and not branches:
        raise UnsupportedError(
            f"guide {guides[0].name!r}: which rows of this batch of {type(call.root).__name__} are conditional is not known; "
            "say it around the call: with reattend.rows(...)"
        )
    if guides and getattr(call.pipeline, "do_perturbed_attention_guidance", False):
        raise UnsupportedError(
            f"guide {guides[0].name!r}: {type(call.pipeline).__name__} puts a perturbed part of its own into the batch and counts "
            "rows to find it, so there can be no others: call it with pag_scale=0, or use the pipeline without PAG"
        )
    if guides and "conditional" in branches and bool(branches["conditional"].any()):
        if run.unshifted:
            raise ReattendError(
                f"guide {guides[0].name!r}: the unconditional half of this step was called before the conditional one, so it "
                "missed its share of the guidance: call the conditional half first"
            )
        guided = call.kept[Guided] = Guided(call.clock, guides, len(branches["conditional"]), run)
        args, kwargs, call.clock = grow(call.args, call.kwargs, call.names, guided)
        call.replace(args, kwargs)
    elif run.delta is not None and list(branches) == ["unconditional"]:
        call.kept[Guided] = Guided(call.clock, [], len(branches["unconditional"]), run)
    elif guides and list(branches) == ["unconditional"]:
        run.unshifted = True


def _come_together(call: RootCall) -> None:
    """After it: takes the branches out of the output again, once for all guides."""
    guided = call.kept.pop(Guided, None)
    if guided is not None:
        call.output = settle(call.output, guided)


def active_guides(call: RootCall) -> list[Guide]:
    """The guides at work at this step. Raises ReattendError where a part of the schedule is asked for that is not known."""
    clock, chosen = call.clock, []
    steps = [step for session in call.sessions for plan in session.plans for step in plan.steps]
    for guide in (step for step in steps if isinstance(step, Guide) and step.scale):
        if (guide.start, guide.stop) != (0, 1):
            if clock.steps is None:
                raise ReattendError(f"guide {guide.name!r}: the number of steps is not known, so start must be 0 and stop 1")
            if not guide.start <= clock.step / clock.steps < guide.stop:
                continue
        if any(other.name == guide.name for other in chosen):
            raise ReattendError(f"two guides are called {guide.name!r}: attach one at a time")
        chosen.append(guide)
    return chosen


def grow(args: tuple, kwargs: Mapping[str, Any], names: Sequence[str], guided: Guided) -> tuple[tuple, dict[str, Any], Clock]:
    """The pass's arguments with a copy of the conditional rows per guide at the end, and its clock with the branches named."""
    conditional = guided.clock.branches["conditional"]
    guided.rows = conditional.nonzero()[:, 0].tolist()
    guided.grown = True
    copies = guided.rows * len(guided.guides)

    def more(value: Any, name: str) -> Any:
        return _grown(value, name, guided.batch, copies)

    args = tuple(more(value, names[i] if i < len(names) else "") for i, value in enumerate(args))
    kwargs = {name: more(value, name) for name, value in kwargs.items()}
    added = len(copies)
    # a branch's rows are the prompt's: what a recipe does to conditional rows it does to them too, unless its guide says otherwise
    prompted = conditional.new_tensor([guide.conditional for guide in guided.guides]).repeat_interleave(len(guided.rows))
    branches = {
        name: torch.cat([rows, prompted if name == "conditional" else torch.zeros_like(prompted)])
        for name, rows in guided.clock.branches.items()
    }
    for i, guide in enumerate(guided.guides):
        rows = conditional.new_zeros(guided.batch + added)
        start = guided.batch + i * len(guided.rows)
        rows[start : start + len(guided.rows)] = True
        branches[guide.name] = rows
    source = torch.tensor([*range(guided.batch), *copies], device=conditional.device)
    return args, kwargs, replace(guided.clock, branches=branches, source=source)


def _grown(value: Any, name: str, batch: int, copies: list[int]) -> Any:
    if name in SHARED:
        return value
    if isinstance(value, Tensor):
        if value.dim() == 0:
            return value
        if value.shape[0] == batch:
            return torch.cat([value, value[copies]])
        if name in FOLDED and value.shape[0] and value.shape[0] % batch == 0:
            folded = value.unflatten(0, (batch, -1))
            return torch.cat([folded, folded[copies]]).flatten(0, 1)
        return value
    if isinstance(value, dict):
        return {key: _grown(item, key if isinstance(key, str) else "", batch, copies) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        if name in PER_SAMPLE and len(value) == batch:
            return type(value)([*value, *(value[i] for i in copies)])
        return type(value)([_grown(item, name, batch, copies) for item in value])
    return value


def settle(output: Any, guided: Guided) -> Any:
    """The denoiser's output without the branches' rows, shifted. Raises UnsupportedError for an output that is not a batch of rows."""
    sample = _first(output)
    expected = guided.batch + (len(guided.rows) * len(guided.guides) if guided.grown else 0)
    if not isinstance(sample, Tensor) or sample.shape[0] != expected:
        found = tuple(sample.shape) if isinstance(sample, Tensor) else type(sample).__name__
        raise UnsupportedError(f"a guide added rows to the batch, {expected} in all, but the denoiser returned {found}")
    dtype = torch.promote_types(sample.dtype, torch.float32)
    base = sample[: guided.batch].to(dtype, copy=True)
    if guided.grown:
        conditional = base[guided.rows]
        parts = sample[guided.batch :].to(dtype).chunk(len(guided.guides))
        delta = torch.stack([g.scale * (conditional - part) for g, part in zip(guided.guides, parts, strict=True)]).sum(dim=0)
        base[guided.rows] = conditional + delta
        guided.run.delta = delta
    else:
        assert guided.run.delta is not None
        delta = guided.run.delta
    other = guided.clock.branches.get("unconditional")
    if other is not None:
        rows = other.nonzero()[:, 0].tolist()
        if delta.shape != base[rows].shape:
            raise UnsupportedError(
                f"a guide cannot pair {len(rows)} unconditional rows of {tuple(base.shape)} with a shift of {tuple(delta.shape)}"
            )
        base[rows] = base[rows] + delta
    return _with_first(output, base.to(sample.dtype), expected, guided.batch)


def _first(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output
    if isinstance(output, dict):
        return next(iter(output.values()), None)
    return output[0] if isinstance(output, (tuple, list)) and output else None


def _with_first(output: Any, first: Tensor, rows: int, batch: int) -> Any:
    """The same kind of output with another first entry; other batched entries lose the branches' rows."""

    def cut(value: Any) -> Any:
        return value[:batch] if isinstance(value, Tensor) and value.dim() and value.shape[0] == rows else value

    if isinstance(output, Tensor):
        return first
    if isinstance(output, dict):
        name, *_ = output
        return type(output)(**{key: first if key == name else cut(value) for key, value in output.items()})
    return type(output)([first, *(cut(value) for value in output[1:])])
