"""The guide door: further branches of the conditional rows in a denoiser's batch, and what comes of their predictions.

With branches p_g of scales w_g the prediction of every conditional row becomes eps_c + sum w_g (eps_c - p_g), and the
unconditional row of the same sample gets the same shift, so that a pipeline's own eps_u + s (eps_c - eps_u) ends as
eps_u + s (eps_c - eps_u) + sum w_g (eps_c - p_g). Where the two halves are separate calls, the shift is remembered from the
conditional one. What a pipeline derives from the conditional prediction alone (guidance_rescale, the norms of Lumina 2 and
QwenImage) sees it shifted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...interventions import Clock, ReattendError, UnsupportedError
from ..plan import Guide

if TYPE_CHECKING:
    from ..session import Session
    from ..trackers.denoising_run import Run

# Arguments that are shared by all rows, whatever their first dimension happens to be.
SHARED = {"img_ids", "txt_ids", "image_rotary_emb", "ip_adapter_masks"}
# Arguments that hold several rows per sample (AnimateDiff: one text per frame).
FOLDED = {"encoder_hidden_states", "encoder_attention_mask", "image_embeds", "ip_hidden_states"}
# Lists with one entry per sample that are not tensors.
PER_SAMPLE = {"img_shapes", "txt_seq_lens"}


@dataclass
class Guided:
    """A denoiser pass that guides take part in. rows [n]: its conditional rows; grown: whether branches were added."""

    clock: Clock
    guides: Sequence[Guide]
    batch: int
    run: Run
    grown: bool = False
    rows: list[int] = field(default_factory=list)


def active_guides(sessions: Sequence[Session], clock: Clock) -> list[Guide]:
    """The guides at work at this step. Raises ReattendError where a part of the schedule is asked for that is not known."""
    chosen = []
    for guide in (guide for session in sessions for _, guide in session.guides):
        if guide.scale == 0:
            continue
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
    # a branch's rows are the prompt's, so what a recipe does to conditional rows it does to them too
    branches = {
        name: torch.cat([rows, rows.new_full((added,), name == "conditional")]) for name, rows in guided.clock.branches.items()
    }
    for i, guide in enumerate(guided.guides):
        rows = conditional.new_zeros(guided.batch + added)
        start = guided.batch + i * len(guided.rows)
        rows[start : start + len(guided.rows)] = True
        branches[guide.name] = rows
    return args, kwargs, replace(guided.clock, branches=branches)


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
