"""`ProjectKey`: fresh keys moved on the output of their projection."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import ReattendError
from .base import Edit, check_number


@dataclass(frozen=True, eq=False, kw_only=True)
class ProjectKey(Edit):
    """k += strength * P k on the key projection's output of chosen new tokens, before RoPE and cache.

    projection: [D, D], [Hkv, D, D] or [B, Hkv, D, D]. `heads` are key/value heads, `rows` the tokens of this forward pass. feature:
    None, or the function f of k' = f^-1(f(k) + strength * P f(k)), "tanh" or "elu"; sums outside f's range stop at its bounds.
    Worked out in float32; other tokens and heads stay as they are. Runs at the projection, not inside a call's attention.
    """

    projection: Tensor = field(kw_only=False)
    strength: float = 1.0
    feature: str | None = None
    level = "projection"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("strength", self.strength)
        if self.projection.dim() not in (2, 3, 4) or self.projection.shape[-1] != self.projection.shape[-2]:
            raise ReattendError("projection must be [head_dim, head_dim], [key heads, ...] or [batch, key heads, ...]")
        if self.feature not in (None, "tanh", "elu"):
            raise ReattendError(f"feature must be None, 'tanh' or 'elu', got {self.feature!r}")

    @property
    def is_identity(self) -> bool:
        return super().is_identity or self.strength == 0

    def on_key(self, key: Tensor) -> Tensor:
        """key [B, Hkv, T, D] -> the same shape and dtype."""
        for axis, what in ((-3, "key heads"), (-4, "batch rows")):
            if self.projection.dim() >= -axis and self.projection.shape[axis] not in (1, key.shape[axis]):
                raise ReattendError(
                    f"projection has {self.projection.shape[axis]} {what}, this key projection {key.shape[axis]}: give {key.shape[axis]}"
                )
        if self.heads and max(self.heads) >= key.shape[1]:
            raise ReattendError(f"head {max(self.heads)} does not exist: this key projection has heads 0 to {key.shape[1] - 1}")
        wide = key.float()
        lifted = wide if self.feature is None else _lift(wide, self.feature)
        change = self.strength * (lifted @ self.projection.to(key.device, torch.float32).transpose(-1, -2))
        new = key + change.to(key.dtype) if self.feature is None else _lower(lifted + change, self.feature).to(key.dtype)
        keep = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=key.device)
        if self.rows is not None:
            keep = keep & self.rows.to(key.device)[:, None, :, None]
        if self.heads is not None:
            named = torch.zeros(key.shape[1], dtype=torch.bool, device=key.device)
            named[list(self.heads)] = True
            keep = keep & named[None, :, None, None]
        return torch.where(keep, new, key)


# How close to its bounds an inverse is still taken: beyond, tanh and elu are flat and their inverses endless.
EDGE = 1e-4


def _lift(x: Tensor, feature: str) -> Tensor:
    return x.tanh() if feature == "tanh" else torch.nn.functional.elu(x)


def _lower(y: Tensor, feature: str) -> Tensor:
    if feature == "tanh":
        return y.clamp(-1 + EDGE, 1 - EDGE).atanh()
    return torch.where(y > 0, y, y.clamp(-1 + EDGE, 0).log1p())
