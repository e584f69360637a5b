"""RoPE of denoisers: which of the usual layouts the table has that a site is given, by trying what it makes of the site's own queries.

Nothing is read from code. A site's rotary argument is a table of cos and sin, or of complex numbers, for all tokens, the image's alone or
each stream's; pairs of dimensions lie next to each other or half a head apart. Each of these ways to read it is tried on the queries
before RoPE, and the one that gives the queries that attention sees is the site's; where none does, it is refused.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...interventions import ReattendError
from ...interventions.rotary import Turns, pairs

NAMES = ("rotary", "rope", "freqs")
# how far turned states may be off, in units of the dtype's precision and of the largest state
ROUNDINGS = 16
Table = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Layout:
    """How a rotary argument is read. doubled: every angle stands there twice. order: how the tables of two streams lie in the sequence
    (1, or -1 for the opposite). at: where tokens lie that one table does not cover, before ("last") or after it ("first")."""

    interleaved: bool
    doubled: bool
    angles: bool
    start: int
    order: int
    at: str

    def turns(self, given: Any, like: Tensor) -> Turns | None:
        """The table of states [B, H, T, D]; None where the argument cannot be read like this."""
        tables = [self._folded(table, like) for table in tables_in(given, self.angles)[:: self.order]]
        if not tables or any(table is None for table in tables):
            return None
        cos, sin = (torch.cat(parts, dim=2) for parts in zip(*(t for t in tables if t is not None), strict=True))
        missing = like.shape[2] - cos.shape[2]
        if missing < 0 or self.start + 2 * cos.shape[-1] > like.shape[-1]:
            return None
        if (missing > 0) != (self.at != "all"):
            return None
        sides = (0, 0, missing, 0) if self.at == "last" else (0, 0, 0, missing)
        pad = nn.functional.pad
        return Turns(pad(cos, sides, value=1.0), pad(sin, sides), self.interleaved, self.start)

    def _folded(self, table: Table, like: Tensor) -> Table | None:
        """(cos, sin) [B or 1, H or 1, T, F]."""
        parts = [_with_heads(part, like, whole=self.doubled) for part in table]
        if parts[0] is None or parts[1] is None or parts[0].shape[-1] % (2 if self.doubled else 1):
            return None
        cos, sin = parts[0], parts[1]
        if not self.doubled:
            return cos, sin
        # of two equal angles it is the cosine of the first and the sine of the second that some models take
        return pairs(cos, self.interleaved)[0], pairs(sin, self.interleaved)[1]


def layouts(given: Any, like: Tensor) -> Iterator[tuple[Layout, Turns]]:
    """All that can be tried on states [B, H, T, D], with the tables that they give."""
    for angles in (False, True):
        tables = tables_in(given, angles)
        if not tables:
            continue
        width = tables[0][0].shape[-1]
        orders = (1, -1) if len(tables) > 1 else (1,)
        for at, order, doubled in itertools.product(("all", "last", "first"), orders, (True, False)):
            turned = width if doubled else 2 * width
            for start, interleaved in itertools.product(dict.fromkeys((0, max(0, like.shape[-1] - turned))), (True, False)):
                layout = Layout(interleaved, doubled, angles, start, order, at)
                turns = layout.turns(given, like)
                if turns is not None:
                    yield layout, turns


def tables_in(given: Any, angles: bool) -> list[Table]:
    """The (cos, sin) tables in a rotary argument, one for each stream; none where it holds something else."""
    if isinstance(given, Tensor):
        if given.is_complex():
            return [] if angles else [(given.real, given.imag)]
        return [(given.cos(), given.sin())] if angles else []
    if not isinstance(given, (tuple, list)) or not given:
        return []
    if len(given) == 2 and all(isinstance(part, Tensor) and not part.is_complex() for part in given) and not angles:
        return [(given[0], given[1])]
    found = [tables_in(part, angles) for part in given]
    return [tables[0] for tables in found] if all(len(tables) == 1 for tables in found) else []


def _with_heads(part: Tensor, like: Tensor, *, whole: bool) -> Tensor | None:
    """A table [.., T, X] as [B or 1, H or 1, T, X]; None for one that has no place for these states."""
    batch, heads, length, dim = like.shape
    if part.dim() == 2:
        part = part[None, None]
    elif part.dim() == 3:
        by_head = part.shape[1] == heads and part.shape[0] not in (1, batch)
        part = part.transpose(0, 1)[None] if by_head else part[:, None]
    elif part.dim() == 4:
        part = part.transpose(1, 2) if part.shape[2] in (1, heads) and part.shape[1] not in (1, heads) else part
    else:
        return None
    if part.shape[-1] > dim and part.shape[1] == 1 and part.shape[-1] == heads * (dim if whole else dim // 2):
        part = part[:, 0].unflatten(-1, (heads, -1)).transpose(1, 2)
    fits = part.shape[0] in (1, batch) and part.shape[1] in (1, heads) and part.shape[2] <= length
    return part if fits else None


def read_layout(given: Any, before: Sequence[Tensor], after: Tensor) -> tuple[Layout | None, bool]:
    """(the layout that turns these states into those that attention sees, whether it is the only one).

    before: the states [B, H, T, D] of each stream. Only rows of the batch that nobody has changed in between need to agree. No layout:
    the states were not turned; for sure only if some reading of the table would have turned them. Raises ReattendError where none fits.
    """
    joined = [torch.cat(list(parts), dim=2) for parts in (before, before[::-1])] if len(before) > 1 else [before[0]]
    joined = [x for x in joined if x.shape == after.shape]
    if not joined:
        raise ReattendError(
            "whose attention is of other tokens than it projects (one call for each sample, or tokens of another module)"
        )
    readings = list(layouts(given, after))
    turned = [[_agree(turns.on(x), after) for x in joined] for _, turns in readings]
    if any(_agree(x, after) for x in joined):
        return None, not all(map(any, turned))
    fitting = [layout for (layout, _), right in zip(readings, turned, strict=True) if any(right)]
    if not fitting:
        raise ReattendError(
            "whose rotary positions are not of a kind that is known here: no reading of its table gives the queries that attention sees"
        )
    return fitting[0], len(fitting) == 1


def _agree(x: Tensor, after: Tensor) -> bool:
    """Whether some row of the batch is the same, but for rounding."""
    off = (x.float() - after.float()).abs().flatten(1).amax(dim=1)
    limit = ROUNDINGS * torch.finfo(after.dtype).eps * after.float().abs().flatten(1).amax(dim=1)
    return bool((off <= limit).any())


def rotary_argument(given: dict[str, Any]) -> Any:
    """The rotary argument of an attention module among its arguments by name; None where there is none."""
    found = [v for name, v in given.items() if v is not None and not isinstance(v, bool) and any(n in name for n in NAMES)]
    return found[0] if len(found) == 1 else found or None
