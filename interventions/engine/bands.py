"""The family of sparse masking: windows with sinks on the columns they keep, O(n * (sinks + window)) work and memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..edits import Band, Keep, KeyBias, Operands
from ..edits.scores import LARGEST_BIAS
from .kernels import attend, visible_rows
from .tasks import Group

BLOCK = 256


def hide_columns(columns: Sequence[Tensor]) -> KeyBias | None:
    """Nobody sees the columns of these sets (bool [B, Tk] each) any more; None where they are empty.

    As a key bias it costs the fused kernel nothing. Weights are exactly 0 beside any other column; a row that sees nothing else
    keeps what it sees.
    """
    if not columns:
        return None
    union = torch.stack(list(columns)).any(dim=0)
    return KeyBias(bias=union.float() * -LARGEST_BIAS) if bool(union.any()) else None


def is_band(group: Group) -> bool:
    edits = group.scores
    if group.weights or len(edits) != 1 or group.call.softcap is not None or group.sinks is not None:
        return False
    return isinstance(edits[0], Keep) and isinstance(edits[0].pattern, Band) and edits[0].rows is None


def run(group: Group, _: object) -> Tensor:
    keep = group.scores[0]
    assert isinstance(keep, Keep) and isinstance(keep.pattern, Band)
    return attend_band(group.x, keep.pattern, group.bias(), group.call.scaling)


def attend_band(x: Operands, band: Band, bias: Tensor | None, scale: float) -> Tensor:
    """Output [B, H, Tq, Dv] of attention restricted to the band. bias [B or 1, H or 1, Tk]: key biases on top."""
    num_queries, num_keys = x.query.shape[2], x.key.shape[2]
    offset = num_keys - num_queries if x.offset is None else x.offset
    device = x.query.device
    alone = num_queries == 1 and offset == num_keys - 1 and x.mask is None and bias is None and not x.appended
    if alone and band.first is None and not band.has_dense(offset, offset):
        return _newest_row(x, band, scale)
    everything = torch.arange(num_keys, device=device)
    pieces = []
    for start in range(0, num_queries, BLOCK):
        index = torch.arange(start, min(start + BLOCK, num_queries), device=device)
        columns = _columns(band, index + offset, num_keys, x.is_causal, x.appended, device)
        keep, emptied = _keep(x, band, index, offset, columns)
        if emptied:
            # some row's visible keys all lie outside the band, perhaps outside these columns: it keeps what it could see
            columns = everything
            keep, _ = _keep(x, band, index, offset, columns)
        added = _added(x, bias, index, columns)
        mask = keep if added is None else added.masked_fill(~keep, float("-inf")).to(x.query.dtype)
        query = x.query[:, :, start : start + BLOCK]
        pieces.append(attend(query, x.key[:, :, columns], x.value[:, :, columns], mask, False, scale)[0])
    return torch.cat(pieces, dim=2) if len(pieces) > 1 else pieces[0]


def _newest_row(x: Operands, band: Band, scale: float) -> Tensor:
    """A decode step: the last row keeps the sinks and the last columns, all of them, so that no mask is needed."""
    start = x.key.shape[2] - band.window
    key, value = x.key, x.value
    if start > band.sinks:
        key, value = (torch.cat([t[:, :, : band.sinks], t[:, :, start:]], dim=2) for t in (key, value))
    return attend(x.query, key, value, None, False, scale)[0]


def _keep(x: Operands, band: Band, index: Tensor, offset: int, columns: Tensor) -> tuple[Tensor, bool]:
    """(bool [B, 1 or H, R, C] pairs that stay, whether the band leaves some row without a key)."""
    keep = band.keep(index + offset, columns)
    if x.appended:
        keep = keep | (columns >= x.key.shape[2] - x.appended)
    visible = visible_rows(x.mask, x.is_causal, index, x.query.shape[2], x.key.shape[2])
    if visible is None:
        return keep, False
    visible = visible if visible.shape[3] == 1 else visible[..., columns]
    kept = keep & visible
    if x.mask is None:
        return kept, False
    alive = kept.any(dim=-1, keepdim=True)
    return torch.where(alive, kept, visible), not bool(alive.all())


def _added(x: Operands, bias: Tensor | None, index: Tensor, columns: Tensor) -> Tensor | None:
    """What is added to the scores of these rows and columns: an additive mask and key biases, float32."""
    added = None if bias is None else bias[:, :, None, columns]
    if x.mask is not None and x.mask.dtype != torch.bool:
        part = x.mask if x.mask.shape[2] == 1 else x.mask[:, :, index]
        part = (part if part.shape[3] == 1 else part[..., columns]).float()
        added = part if added is None else added + part
    return added


def _columns(band: Band, places: Tensor, num_keys: int, is_causal: bool, appended: int, device: torch.device) -> Tensor:
    """Long [C]: columns that some row of the block may keep, in ascending order."""
    low, high = int(places[0]), int(places[-1])
    last = min(high + 1 if is_causal else num_keys, num_keys)
    sinks = max(0, band.sinks + (0 if band.first is None else int(band.first.max())))
    start = 0 if band.has_dense(low, high) else max(0, low - band.window + 1)
    parts = [torch.arange(start, last, device=device)]
    if start > 0:
        parts.insert(0, torch.arange(min(sinks, start), device=device))
    if appended and last < num_keys:
        parts.append(torch.arange(max(last, num_keys - appended), num_keys, device=device))
    return torch.cat(parts) if len(parts) > 1 else parts[0]
