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
        return self.turned(x, *self.trigonometry(steps, x)).to(x.dtype)

    def trigonometry(self, steps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin) [..., F] of the angles of steps [...], on the device of `like` and in the dtype in which it is turned."""
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        angles = steps.to(like.device, dtype)[..., None] * self.frequencies.to(like.device, dtype)
        return angles.cos(), angles.sin()

    def turned(self, x: Tensor, cos: Tensor, sin: Tensor, out: Tensor | None = None) -> Tensor:
        """`turn` by angles whose cos and sin are known, in their dtype; into `out` where that is given."""
        x = x.to(cos.dtype)
        stop = self.start + 2 * self.frequencies.shape[0]
        if out is None:
            shape = torch.broadcast_shapes(x.shape[:-1], cos.shape[:-1])
            out = x.new_empty(*shape, x.shape[-1])
        (a, b), (new_a, new_b) = (self._pairs(t[..., self.start : stop]) for t in (x, out))
        if x.requires_grad:  # autograd takes no `out`
            turned = [a * cos - b * sin, b * cos + a * sin]
            part = torch.stack(turned, dim=-1).flatten(-2) if self.interleaved else torch.cat(turned, dim=-1)
            rest = x.expand(out.shape)
            return out.copy_(torch.cat([rest[..., : self.start], part, rest[..., stop:]], dim=-1))
        if stop - self.start < x.shape[-1]:
            out.copy_(x)
        # two passes for each half, and no temporaries
        torch.mul(a, cos, out=new_a).addcmul_(b, sin, value=-1)
        torch.mul(b, cos, out=new_b).addcmul_(a, sin)
        return out

    def _pairs(self, part: Tensor) -> tuple[Tensor, Tensor]:
        if self.interleaved:
            return part[..., 0::2], part[..., 1::2]
        half = part.shape[-1] // 2
        return part[..., :half], part[..., half:]
