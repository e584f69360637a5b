"""What comes of the predictions of guides' branches: each guide's shift, and where it is put under classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...interventions import Clock, ReattendError, UnsupportedError
from .combination import Combination
from .denoising_run import Run

# so much of s - 1, in units of a number format's rounding, is too little to divide a shift by
ROUNDING, LEAST = 16, 0.01


@dataclass(frozen=True)
class Predictions:
    """What a guide's formula gets of one step, in float32 at least and without learned variances.

    conditional: [n, ...] the conditional rows of the pass. branch: [n, ...] those of this guide's branch; branches: of all guides at work, by
    name, in the same order. unconditional: [n, ...], or None where there is no such half, or where it is computed in a later call of
    which nothing is certain. scale: the guide's own at this step. guidance: the s of the pipeline's u + s (c - u); 1 without
    classifier-free guidance, None where it is not known.
    """

    conditional: Tensor
    branch: Tensor
    branches: Mapping[str, Tensor]
    unconditional: Tensor | None
    scale: float
    guidance: float | None
    clock: Clock


Formula = Callable[[Predictions], Tensor]


@dataclass
class Part:
    """One guide's share of a pass: its branch is a copy of these rows. formula None: what its rows predict is dropped.

    note: what takes the size of its shift, as a part of the conditional prediction's.
    """

    name: str
    rows: list[int]
    scale: float
    formula: Formula | None
    at: int = 0
    note: Callable[[Tensor], None] | None = None


@dataclass
class Shift:
    """What the conditional pass of a step of a run leaves for the unconditional one: the shift, or, where that takes all of it, the pass."""

    step: int
    delta: Tensor | None = None
    late: GuidedPass | None = None


@dataclass
class GuidedPass:
    """A denoiser pass that guides take part in. batch: the caller's rows; halves: those of each half, in order.

    variance: the second half of the output's channels is a learned variance, which no guide shifts.
    """

    clock: Clock
    parts: list[Part]
    batch: int
    halves: Mapping[str, list[int]]
    run: Run
    combination: Combination | None = None
    variance: bool = False
    conditional: Tensor | None = None
    branches: dict[str, Tensor] = field(default_factory=dict)

    def whole(self, dtype: torch.dtype) -> bool:
        """Whether the unconditional half takes all of the shift: what is made of the conditional one then is made of the true one.

        Not where s is about 1: dividing by s - 1 would make rounding show.
        """
        near = max(LEAST, ROUNDING * torch.finfo(dtype).eps)
        return self.combination is not None and abs(self.combination.scale - 1) >= near

    def shift(self, unconditional: Tensor | None) -> Tensor | None:
        """The sum of the guides' shifts; None where no guide has one. Raises ReattendError for a formula that returns something else."""
        total: Tensor | None = None
        guidance = None if self.combination is None else self.combination.scale
        for part in self.parts:
            if part.formula is None:
                continue
            assert self.conditional is not None
            seen = Predictions(
                self.conditional, self.branches[part.name], self.branches, unconditional, part.scale, guidance, self.clock
            )
            tensors = [self.conditional, *self.branches.values(), *([] if unconditional is None else [unconditional])]
            versions = [_version(tensor) for tensor in tensors]
            own = part.formula(seen)
            if [_version(tensor) for tensor in tensors] != versions:
                raise ReattendError(
                    f"guide {part.name!r}: its formula changed a prediction in place, which other guides read too; return a new tensor instead"
                )
            if not isinstance(own, Tensor) or own.shape != self.conditional.shape:
                got = tuple(own.shape) if isinstance(own, Tensor) else type(own).__name__
                raise ReattendError(
                    f"guide {part.name!r}: its formula must return the shift of the conditional rows, a tensor "
                    f"{tuple(self.conditional.shape)}, got {got}"
                )
            if part.note is not None:
                part.note(_share(own, self.conditional))
            total = own if total is None else total + own
        return total


def settle(output: Any, guided: GuidedPass) -> Any:
    """The denoiser's output without the branches' rows, shifted. Raises UnsupportedError for an output that is not a batch of rows."""
    sample = _first(output)
    expected = guided.batch + sum(len(part.rows) for part in guided.parts)
    if not isinstance(sample, Tensor) or sample.shape[0] != expected:
        found = tuple(sample.shape) if isinstance(sample, Tensor) else type(sample).__name__
        raise UnsupportedError(f"a guide added rows to the batch, {expected} in all, but the denoiser returned {found}")
    base = sample[: guided.batch].clone()
    channels = sample.shape[1] // 2 if guided.variance and sample.dim() > 3 else sample.shape[1]
    shifted = base[:, :channels]
    dtype = torch.promote_types(sample.dtype, torch.float32)
    conditional, unconditional = guided.halves["conditional"], guided.halves["unconditional"]
    if conditional:
        guided.conditional = shifted[conditional].to(dtype)
        for part in guided.parts:
            of = [part.rows.index(row) + part.at for row in conditional if row in part.rows]
            if len(of) == len(conditional):
                guided.branches[part.name] = sample[of][:, :channels].to(dtype)
    if conditional and unconditional:
        _both(shifted, guided, conditional, unconditional)
    elif conditional:
        _conditional_alone(shifted, guided, conditional)
    elif unconditional:
        _unconditional_alone(shifted, guided, unconditional)
    return _with_first(output, base, expected, guided.batch)


def _add(sample: Tensor, rows: list[int], shift: Tensor, factor: float = 1.0) -> None:
    if len(rows) != len(shift) or sample.shape[1:] != shift.shape[1:]:
        raise UnsupportedError(
            f"a guide cannot pair {len(rows)} rows of {tuple(sample.shape)} with a shift of {tuple(shift.shape)}"
        )
    sample[rows] = (sample[rows].to(shift.dtype) + factor * shift).to(sample.dtype)


def _both(sample: Tensor, guided: GuidedPass, conditional: list[int], unconditional: list[int]) -> None:
    """Both halves are rows of this pass."""
    assert guided.conditional is not None
    paired = len(conditional) == len(unconditional)
    delta = guided.shift(sample[unconditional].to(guided.conditional.dtype) if paired else None)
    if delta is None:
        return
    if guided.whole(sample.dtype):
        assert guided.combination is not None
        _add(sample, unconditional, delta, -1 / (guided.combination.scale - 1))
    else:
        _add(sample, unconditional, delta)
        _add(sample, conditional, delta)


def _conditional_alone(sample: Tensor, guided: GuidedPass, conditional: list[int]) -> None:
    """Only the conditional half is here: it takes the shift, unless the other half is certain to come and to take all of it."""
    run, known = guided.run, guided.combination
    taken = known is not None and known.take is not None
    if known is not None and known.to_come == "unconditional" and (taken or guided.whole(sample.dtype)):
        run.shift = Shift(run.step, late=guided)
        return
    delta = guided.shift(None)
    if delta is None:
        return
    if known is not None and known.take is not None:
        known.take(delta)
        return
    if run.unshifted:
        # the other half is gone: u + s (c + shift / s - u) has the shift as well
        assert known is not None
        _add(sample, conditional, delta, 1 / known.scale)
        return
    _add(sample, conditional, delta)
    if known is None or known.to_come:
        run.shift = Shift(run.step, delta)


def _unconditional_alone(sample: Tensor, guided: GuidedPass, unconditional: list[int]) -> None:
    """The other half of a step, in a call of its own."""
    shift, guided.run.shift = guided.run.shift, None
    if shift is None:
        return
    if shift.delta is not None:
        _add(sample, unconditional, shift.delta)
        return
    late = shift.late
    assert late is not None and late.conditional is not None and late.combination is not None
    half = sample[unconditional].to(late.conditional.dtype)
    if half.shape != late.conditional.shape:
        raise UnsupportedError(
            f"a guide cannot pair {len(half)} unconditional rows with {len(late.conditional)} conditional ones of the call before"
        )
    delta = late.shift(half)
    if delta is not None and late.combination.take is not None:
        late.combination.take(delta)
    elif delta is not None:
        _add(sample, unconditional, delta, -1 / (late.combination.scale - 1))


def _share(shift: Tensor, prediction: Tensor) -> Tensor:
    """|shift| / |prediction| of the row where it is largest, without asking the device for it."""
    size, whole = (x.detach().flatten(1).norm(dim=1) for x in (shift, prediction))
    return (size / whole.clamp_min(torch.finfo(whole.dtype).tiny)).amax()


def _version(tensor: Tensor) -> int:
    """Grows with every change in place; tensors of inference mode do not count theirs."""
    return 0 if tensor.is_inference() else tensor._version


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
