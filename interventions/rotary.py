"""Rotary positions of one site: what `call.rotary` and `call.turned` give, so that q and k of a call can be turned to other positions.

RoPE turns the pairs of dimensions of q and k by angles that grow with a token's position, and a score depends only on the distance
between the two. Turning by `s` more positions is therefore one more rotation, whatever the position was, and turning back by the
position itself gives q and k without any. Language models turn by a rule (`Rotary`), denoisers by a table with a row for every token,
whose positions may be of several axes (`Turns`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Up to so many values, as a step of decoding has them, operations are counted and not what they write.
FEW_VALUES = 1 << 14


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
        if out is None and stop - self.start == x.shape[-1] and x.numel() <= FEW_VALUES and not x.requires_grad:
            a, b = self._pairs(x)
            both = torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)
            return torch.stack(both, dim=-1).flatten(-2) if self.interleaved else torch.cat(both, dim=-1)
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
        return pairs(part, self.interleaved)


def pairs(part: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """The two halves of every pair of dimensions of part [..., 2 F]."""
    if interleaved:
        return part[..., 0::2], part[..., 1::2]
    a, b = part.chunk(2, dim=-1)
    return a, b


@dataclass(frozen=True, eq=False)
class Turns:
    """How the queries or keys of one call were turned: cos, sin [B or 1, H or 1, T, F] of the angle of every token and pair of dimensions.

    interleaved, start: as in `Rotary`. Tokens that carry no position have cos 1 and sin 0. All is worked out in float32 (float64 for
    float64) and returned in the dtype that came; a table whose cos and sin are both 0 has lost what it turned.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool = True
    start: int = 0

    def off(self, x: Tensor, tokens: Tensor | None = None) -> Tensor:
        """x [B, H, n, D] as it was before it was turned; tokens [n] long: whose they are, where these are not all T."""
        cos, sin = self._of(tokens)
        return self._turned(x, cos, -sin)

    def on(self, x: Tensor, tokens: Tensor | None = None) -> Tensor:
        """x [B, H, n, D], which carries no position, turned to the places of these tokens [n] (of all T)."""
        return self._turned(x, *self._of(tokens))

    def further(self, x: Tensor, start: int, stop: int, times: float = 1) -> Tensor:
        """x [B, H, n, D], which was turned, turned on by `times` times the way from token `start` to token `stop`.

        On an image whose neighbours in a line these two are, that is `times` columns to the right. times must be whole where the
        angles between the two are more than half a turn.
        """
        (cos, sin), (back_cos, back_sin) = self._of(torch.tensor([stop])), self._of(torch.tensor([start]))
        angle = torch.atan2(sin * back_cos - cos * back_sin, cos * back_cos + sin * back_sin) * times
        return self._turned(x, angle.cos(), angle.sin())

    def _of(self, tokens: Tensor | None) -> tuple[Tensor, Tensor]:
        if tokens is None:
            return self.cos, self.sin
        tokens = tokens.to(self.cos.device)
        return self.cos[:, :, tokens], self.sin[:, :, tokens]

    def _turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        cos, sin, stop = cos.to(x.device, dtype), sin.to(x.device, dtype), self.start + 2 * cos.shape[-1]
        a, b = pairs(x[..., self.start : stop].to(dtype), self.interleaved)
        new = (a * cos - b * sin, b * cos + a * sin)
        part = (torch.stack(new, dim=-1).flatten(-2) if self.interleaved else torch.cat(new, dim=-1)).to(x.dtype)
        return part if stop - self.start == x.shape[-1] else torch.cat([x[..., : self.start], part, x[..., stop:]], dim=-1)


@dataclass(frozen=True, eq=False)
class Turned:
    """How a call's queries and keys were turned; None for those that carry no positions."""

    query: Turns | None
    key: Turns | None
