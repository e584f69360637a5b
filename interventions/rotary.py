"""Rotary positions of one site: what `call.rotary` gives, so that q and k of a call can be turned to other positions.

RoPE turns the pairs of dimensions of q and k by angles that grow with a token's position, and a score depends only on the distance
between the two. Turning by `s` more positions is therefore one more rotation, whatever the position was, and turning back by the
position itself gives q and k without any.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Rotary:
    """frequencies [F]: radians per position of each pair of dimensions. interleaved: pairs are neighbours (2i, 2i + 1), else (i, i + F).

    start: first of the 2 F dimensions that are turned; the others carry no position. scaling: the factor that RoPE puts on q and on k
    (YaRN); turning keeps it. positions [B or 1, Tq]: position ids of the call's queries, None where the model did not tell them.
    window: how many recent keys a row of this site sees, None for all. limit: the length beyond which the model changes its
    frequencies (longrope), None where it never does.
    """

    frequencies: Tensor
    interleaved: bool = False
    start: int = 0
    scaling: float = 1.0
    positions: Tensor | None = None
    window: int | None = None
    limit: int | None = None

    def turn(self, x: Tensor, steps: Tensor) -> Tensor:
        """x [..., D] as it would be `steps` positions further on (back where negative); steps broadcast to x.shape[:-1].

        Worked out in float32 (float64 for float64), returned in x's dtype. The result takes the larger of both shapes.
        """
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        angles = steps.to(dtype)[..., None] * self.frequencies.to(x.device, dtype)
        cos, sin = angles.cos(), angles.sin()
        stop = self.start + 2 * self.frequencies.shape[0]
        part = (x if stop - self.start == x.shape[-1] else x[..., self.start : stop]).to(dtype)
        if self.interleaved:
            a, b = part[..., 0::2], part[..., 1::2]
            turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
        else:
            a, b = part.chunk(2, dim=-1)
            turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
        turned = turned.to(x.dtype)
        if turned.shape[-1] == x.shape[-1]:
            return turned
        rest = x.expand(*turned.shape[:-1], x.shape[-1])
        return torch.cat([rest[..., : self.start], turned, rest[..., stop:]], dim=-1)
