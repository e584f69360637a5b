"""Edits of the per-head outputs O_h = A_h V_h, before the output projection."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .base import Edit, Rows, check_number, repeat_heads
from .weights import at_rows


@dataclass(frozen=True, eq=False, kw_only=True)
class OutputEdit(Edit):
    level = "output"

    def on_output(self, output: Tensor, rows: Rows) -> Tensor:
        """output [B, H, R, Dv] -> the same shape."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False, kw_only=True)
class HeadGain(OutputEdit):
    """O_h *= factor: number or tensor broadcastable to [B, heads]."""

    factor: float | Tensor
    broadcast = {"factor": 0}

    def __post_init__(self) -> None:
        if isinstance(self.factor, Tensor) and self.factor.dim() == 1:
            object.__setattr__(self, "factor", self.factor[None])
        super().__post_init__()
        check_number("factor", self.factor)

    @property
    def is_identity(self) -> bool:
        return super().is_identity or (not isinstance(self.factor, Tensor) and self.factor == 1)

    def on_output(self, output: Tensor, rows: Rows) -> Tensor:
        factor = self.factor[..., None, None].to(output.dtype) if isinstance(self.factor, Tensor) else self.factor
        return output * factor


@dataclass(frozen=True, eq=False, kw_only=True)
class HeadMix(OutputEdit):
    """O_h = (1 - s) O_h + s t. target [heads, Dv] or [B, heads, Dv]; strength: number or broadcastable to [B, heads]."""

    target: Tensor
    strength: float | Tensor
    broadcast = {"target": 1, "strength": 0}

    def __post_init__(self) -> None:
        if isinstance(self.strength, Tensor) and self.strength.dim() == 1:
            object.__setattr__(self, "strength", self.strength[None])
        if self.target.dim() == 2:
            object.__setattr__(self, "target", self.target[None])
        super().__post_init__()
        check_number("strength", self.strength, 0, 1)

    @property
    def is_identity(self) -> bool:
        return super().is_identity or (not isinstance(self.strength, Tensor) and self.strength == 0)

    def on_output(self, output: Tensor, rows: Rows) -> Tensor:
        strength = self.strength[..., None, None].to(output.dtype) if isinstance(self.strength, Tensor) else self.strength
        return (1 - strength) * output + strength * self.target[:, :, None].to(output.dtype)


@dataclass(frozen=True, eq=False, kw_only=True)
class MixValue(OutputEdit):
    """O_i = (1 - s) O_i + s v_i: each row moves towards its own token's value. strength in [0, 1], number or [B, heads, Tq]."""

    strength: float | Tensor
    broadcast = {"strength": 1}
    per_row = ("strength",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("strength", self.strength, 0, 1)

    @property
    def is_identity(self) -> bool:
        return super().is_identity or (not isinstance(self.strength, Tensor) and self.strength == 0)

    def on_output(self, output: Tensor, rows: Rows) -> Tensor:
        own = repeat_heads(rows.value[:, :, rows.own], output.shape[1]).to(output.dtype)
        if not isinstance(self.strength, Tensor):
            return own if self.strength == 1 else output + self.strength * (own - output)
        strength = at_rows(self.strength[..., None], rows)
        assert isinstance(strength, Tensor)
        return output + strength.to(output.dtype) * (own - output)
