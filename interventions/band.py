"""Sliding windows with sinks, computed on the columns they keep: O(n * (sinks + window)) work and memory."""

from __future__ import annotations

import torch
from torch import Tensor

from .edits import Band, Operands
from .kernels import attend, visible_rows

BLOCK = 256


def attend_band(x: Operands, band: Band, bias: Tensor | None, scale: float) -> Tensor:
    """Output [B, H, Tq, Dv] of attention restricted to the band. bias [B or 1, H or 1, Tk]: key biases on top."""
    num_queries, num_keys = x.query.shape[2], x.key.shape[2]
    offset = num_keys - num_queries if x.offset is None else x.offset
    device = x.query.device
    pieces = []
    for start in range(0, num_queries, BLOCK):
        stop = min(start + BLOCK, num_queries)
        index = torch.arange(start, stop, device=device)
        columns = _columns(band, index + offset, num_keys, x.is_causal, x.appended, device)
        keep = band.keep(index + offset, columns)
        if x.appended:
            keep = keep | (columns >= num_keys - x.appended)
        visible = visible_rows(x.mask, x.is_causal, index, num_queries, num_keys)
        if visible is not None:
            visible = visible if visible.shape[3] == 1 else visible[..., columns]
            kept = keep & visible
            # rows that the band would empty keep what they could see
            keep = torch.where(kept.any(dim=-1, keepdim=True), kept, visible)
        row_bias = torch.zeros((), dtype=torch.float32, device=device)
        if x.mask is not None and x.mask.dtype != torch.bool:
            additive = x.mask if x.mask.shape[2] == 1 else x.mask[:, :, index]
            row_bias = row_bias + additive[..., columns].float()
        if bias is not None:
            row_bias = row_bias + bias[:, :, None, columns]
        mask = row_bias.masked_fill(~keep, float("-inf")).to(x.query.dtype) if row_bias.dim() else keep
        pieces.append(attend(x.query[:, :, start:stop], x.key[:, :, columns], x.value[:, :, columns], mask, False, scale)[0])
    return torch.cat(pieces, dim=2) if len(pieces) > 1 else pieces[0]


def _columns(band: Band, places: Tensor, num_keys: int, is_causal: bool, appended: int, device: torch.device) -> Tensor:
    """Long [C]: columns that some row of the block may keep, in ascending order."""
    low, high = int(places[0]), int(places[-1])
    last = min(high + 1 if is_causal else num_keys, num_keys)
    sinks = band.sinks + (0 if band.first is None else int(band.first.max()))
    dense = band.dense_after is not None and high >= band.dense_after
    start = 0 if dense else max(0, low - band.window + 1)
    parts = [torch.arange(start, last, device=device)]
    if start > 0:
        parts.insert(0, torch.arange(min(sinks, start), device=device))
    if appended and last < num_keys:
        parts.append(torch.arange(max(last, num_keys - appended), num_keys, device=device))
    return torch.cat(parts) if len(parts) > 1 else parts[0]
