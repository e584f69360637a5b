"""The way of accelerators for rows that are mixed with the mean of what they see: A = (1 - s) A + s / n, so that o = (1 - s) o + s mean v."""

from __future__ import annotations

import torch
from torch import Tensor

from ..edits import Mix
from ..edits.base import repeat_heads
from .columns import mean_of_visible
from .kernels import grouped_values, statistics_dtype, visible_rows
from .of_masks import of_mask
from .reference_executor import at_chosen
from .tasks import Group, all_rows


def moves_to_mean(group: Group) -> bool:
    """Whether there is nothing but such a mix, and one row or no mask: without the rows' weights that is a few launches."""
    x = group.x
    if x.query.device.type == "cpu" or group.scores or len(group.weights) != 1 or group.sinks is not None:
        return False
    if x.query.shape[2] > 1 and (x.mask is not None or x.appended):
        return False
    edit = group.weights[0]
    return isinstance(edit, Mix) and isinstance(edit.target, str) and edit.target == "uniform"


def towards_mean(group: Group, _: object) -> Tensor:
    """[B, heads, Tq, Dv]. A row that sees nothing keeps its output."""
    (mix,), x = group.weights, group.x
    assert isinstance(mix, Mix)
    rows, output = group.rows(all_rows(x.query)), group.kernel(group.bias(), False)[0]
    dtype = statistics_dtype(x.query)
    strength = mix.strength[..., None].to(dtype) if isinstance(mix.strength, Tensor) else mix.strength
    if x.mask is None:
        mean = mean_of_visible(x)
    else:
        share, sees = _shares(x.mask, rows.index, x.key.shape[2], dtype)
        wide = share.expand(x.query.shape[0], max(share.shape[1], x.value.shape[1]), -1, -1)
        mean, strength = repeat_heads(grouped_values(wide, x.value.to(dtype)), output.shape[1]), strength * sees
    return at_chosen(mix, rows, torch.lerp(output.to(dtype), mean, strength).to(output.dtype), output)


def _shares(mask: Tensor, index: Tensor, keys: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(what the mean gives to each key [b, h, 1, Tk], 1 for rows that see any, else 0 [b, h, 1, 1]); made once for a mask."""

    def make() -> tuple[Tensor, Tensor]:
        visible = visible_rows(mask, False, index, 1, keys)
        assert visible is not None
        count = visible.sum(dim=-1, keepdim=True)
        return visible.to(dtype) / count.clamp_min(1), count.clamp_max(1).to(dtype)

    return of_mask(mask, ("shares", keys, dtype), make)
