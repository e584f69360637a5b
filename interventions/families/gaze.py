"""Gaze shifts: where attention on the image rises while a question is read, and a row of attention refocused on those places.

The map needs the question's rows and the image's columns only: rows are computed a few at a time, with the denominators of whole rows,
and are reduced to one sum per head and column before the next ones.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..call import Call, TokenMap
from ..edits import Rows
from ..engine.batch import call_at
from ..engine.kernels import rows_per_chunk
from ..engine.reading import row_weights
from ..errors import ReattendError

# Room for this many further tokens is kept when column groups are widened for a growing cache.
SPARE_COLUMNS = 256
# A saliency map whose values differ by less than this share of the largest one is constant: the rest is rounding.
SAME = 1e-6


def image_columns(tokens: TokenMap) -> Tensor:
    """Bool [B, prompt] on the CPU: image tokens without separators (newline features between rows), as far as grids are known."""
    image = tokens.positions("image", 0, tokens.prompt_length)
    placed = torch.zeros_like(image)
    for grid in tokens.grids:
        index = grid.index.flatten()
        placed[grid.row, index[index < tokens.prompt_length]] = True
    placed &= image
    # a run of image tokens without any grid is an image whose layout could not be told: it stays whole
    starts = image & ~pad(image, (1, 0))[:, :-1]
    run = starts.long().cumsum(dim=1)
    known = torch.zeros(image.shape[0], image.shape[1] + 1, dtype=torch.long).scatter_add_(1, run, placed.long()) > 0
    return torch.where(known.gather(1, run), placed, image)


@dataclass
class Shift:
    """What the rows of a prompt taught at one site, at absolute positions.

    sums [B, H, n]: positive changes of the weights, summed over rows. last [B, H, n]: weights of the last row on the columns.
    rows: the absolute position after that row.
    """

    sums: Tensor
    last: Tensor
    rows: int

    @property
    def total(self) -> Tensor:
        """[B, H]: the change over all columns."""
        return self.sums.sum(dim=-1)

    def emptied(self) -> Shift:
        """The same without the sums: for a new question that follows on these rows."""
        return Shift(torch.zeros_like(self.sums), self.last, self.rows)


def positive_shift(call: Call, rows: Tensor, columns: Tensor, known: Shift | None = None) -> Shift:
    """Sum over rows i of max(A[i] - A[i - 1], 0) on the columns, from the call's untouched weights.

    rows: bool [B, Tq], the rows i. columns: bool [B, n], absolute positions. known: what the earlier part of a prompt taught; it is
    added to, unless this part starts over. Cost: the named rows, the rows before them and the last row, over all keys.
    """
    start, stop = call.total - call.num_queries, call.total
    first, keys = call.key_start, call.num_keys
    here = pad(columns[:, first : first + keys], (0, max(0, keys - max(0, columns.shape[1] - first))))
    if known is not None and known.rows != start:
        known = None
    like = torch.zeros(call.batch, call.num_heads, first + keys, device=call.query.device)
    sums, last = like.clone(), like.clone()
    for row in range(call.batch):
        index = here[row].nonzero()[:, 0].to(call.query.device)
        if not index.numel():
            continue
        one = call_at(call, torch.tensor([row], device=call.query.device), call.original or _no_output)
        chosen = rows[row].cpu().nonzero()[:, 0]
        before = None if known is None else _widened(known.last[row : row + 1], first + keys)[0, :, index + first]
        step = rows_per_chunk(1, call.num_heads, keys, call.query.device)
        for part in chosen.split(step) if chosen.numel() else ():
            # each row and the one before it, every row once
            needed = torch.cat([part - 1, part]).unique()
            maps = row_weights(one, [], needed[needed >= 0].to(index.device))[0][:, :, index].to(sums.dtype)
            if len(needed) > maps.shape[1]:
                earlier = torch.zeros_like(maps[:, 0]) if before is None else before
                maps = torch.cat([earlier[:, None], maps], dim=1)
            place = torch.searchsorted(needed, part).to(index.device)
            sums[row, :, index + first] += (maps[:, place] - maps[:, place - 1]).clamp_min_(0).sum(dim=1)
        final = torch.tensor([call.num_queries - 1], device=call.query.device)
        last[row, :, index + first] = row_weights(one, [], final)[0, :, 0][:, index].to(sums.dtype)
    if known is not None:
        sums = sums + _widened(known.sums, first + keys)
    return Shift(sums, last, stop)


def _no_output() -> Tensor:
    raise ReattendError("weights are read here, there is no output")


def _widened(x: Tensor, width: int) -> Tensor:
    return pad(x, (0, max(0, width - x.shape[-1])))[..., :width]


def top_heads(mass: Tensor, count: int, dim: int) -> Tensor:
    """1 on the `count` heads with the largest mass, 0 elsewhere; the shape and dtype of mass."""
    return torch.zeros_like(mass).scatter_(dim, mass.topk(count, dim=dim).indices, 1.0)


def saliency_map(shifts: Sequence[Shift], image: Tensor, share: float = 0.5, clip: float = 3.0) -> Tensor:
    """[B, n] in [0, 1] on the image columns, 0 elsewhere: the mean shift of the `share` of heads that shift most, over all layers.

    image: bool [B, n]. Values are clipped to mean +- clip standard deviations and stretched to [0, 1] per row of the batch, all of its
    images together. A constant map is 0 everywhere.
    """
    n = image.shape[1]
    raw = torch.zeros(image.shape, device=image.device)
    for shift in shifts:
        count = int(share * shift.sums.shape[1])
        chosen = top_heads(shift.total, count, 1)
        raw = raw + (_widened(shift.sums, n).to(raw) * chosen[..., None].to(raw)).sum(dim=1) / max(1, count)
    raw = raw * image
    size = image.sum(dim=1, keepdim=True)
    mean = raw.sum(dim=1, keepdim=True) / size.clamp_min(1)
    spread = (((raw - mean) * image).square().sum(dim=1, keepdim=True) / (size - 1).clamp_min(1)).sqrt()
    raw = raw.clamp(mean - clip * spread, mean + clip * spread)
    low = raw.masked_fill(~image, float("inf")).amin(dim=1, keepdim=True)
    high = raw.masked_fill(~image, float("-inf")).amax(dim=1, keepdim=True)
    width = high - low
    varied = (size > 1) & (width > SAME * high.abs())
    return torch.where(varied & image, (raw - low) / width, 0.0)


@dataclass(eq=False)
class Focus:
    """What `refocus` needs of a prompt: learned at prefill, read at every step.

    groups [B, 4, n]: question, image, growth of the image (factor - 1), all; rows of the batch that are left alone have none of the
    first three. acting: bool [B] on the CPU. end: the position after the last image token that has a factor.
    """

    groups: Tensor
    acting: Tensor
    end: int
    stored: dict[tuple[torch.device, torch.dtype], Tensor] = field(default_factory=dict)

    @functools.cached_property
    def rows(self) -> Tensor | None:
        """Bool [B, 1] beside the groups: the rows of the batch that are changed at decode; None for all."""
        return None if bool(self.acting.all()) else self.acting[:, None].to(self.groups.device)

    @classmethod
    def of(cls, saliency: Tensor, image: Tensor, question: Tensor, alpha: float) -> Focus:
        """saliency [B, n] in [0, 1]; image and question: bool [B, n]. The factor is exp(alpha * saliency)."""
        acting = (saliency > 0).any(dim=1, keepdim=True)
        image, question = image & acting, question & acting
        growth = torch.expm1(alpha * saliency) * image
        groups = torch.stack([question.to(growth), image.to(growth), growth, torch.ones_like(growth)], dim=1)
        places = image.any(dim=0).nonzero()
        return cls(groups, acting[:, 0].cpu(), int(places[-1]) + 1 if len(places) else 0)

    def columns(self, start: int, stop: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Groups [B, 4, stop - start] of the absolute columns start..stop-1; later tokens are in the last group alone."""
        known = self.stored.get((device, dtype))
        if known is None or stop > known.shape[2]:
            room = stop + SPARE_COLUMNS - self.groups.shape[2]
            later = pad(torch.ones_like(self.groups[:, :1, :1]).expand(-1, 1, room), (0, 0, 3, 0))
            known = torch.cat([self.groups, later], dim=2).to(device, dtype)
            self.stored[device, dtype] = known
        return known[:, :, start:stop]


def refocus(weights: Tensor, groups: Tensor, *, share: float = 0.5, beta: float = 1.0) -> Tensor:
    """GIFT's enhancement of single rows: the image in the heads that look at it most, the question in those that read it most.

    weights [B, H, R, Tk]; groups [B, 4, Tk] from `Focus`. In the `share` of heads with the most image weight the image is multiplied by
    its factors; with r = (their image weight after) / (before), the question is multiplied by 1 + beta (r - 1) in the `share` of heads
    with the most question weight; then rows get their old sum back. Every row chooses its own heads. Other heads stay bit for bit.
    Few operations on purpose: at decode their number is the cost.
    """
    batch, heads, rows, keys = weights.shape
    if groups.shape[0] != batch:
        raise ReattendError(f"a batch of {batch} rows, but the prompt was read with a batch of {groups.shape[0]}")
    if rows == 1:
        flat = weights[:, :, 0]
    else:
        flat, groups = weights.transpose(1, 2).flatten(0, 1), groups.repeat_interleave(rows, dim=0)
    tiny = torch.finfo(weights.dtype).tiny  # makes 0 of 0 / 0, and leaves sums below 0 as they are, which a Gain below 0 gives
    sums = flat @ groups.transpose(1, 2)
    # which of the groups a head adds to: question, nothing, growth of the image, the row as it is
    chosen = torch.zeros_like(sums)
    chosen[..., ::2].scatter_(1, sums[..., :2].topk(int(share * heads), dim=1).indices, 1.0)
    chosen[..., 3] = 1.0
    image, growth = (chosen[..., 2:3].transpose(1, 2) @ sums[..., 1:3]).unbind(dim=2)
    # how much it adds
    amount = torch.ones_like(sums[:, :1])
    amount = torch.cat([(growth * beta / (image + tiny))[..., None], amount[..., 1:].expand(-1, growth.shape[1], -1)], dim=2)
    added = chosen * amount
    total = (sums * added).sum(dim=2)
    new = flat * ((added * (sums[..., 3] / (total + tiny))[..., None]) @ groups)
    return new[:, :, None] if rows == 1 else new.unflatten(0, (batch, rows)).transpose(1, 2)


def refocus_columns(focus: Focus, key_start: int, share: float, beta: float, weights: Tensor, rows: Rows) -> Tensor:
    """`refocus` on the rows of a call whose key column 0 lies at the absolute position key_start."""
    if rows.offset is None:
        raise ReattendError("image and question cannot be told apart in columns that another edit has merged")
    groups = focus.columns(key_start, key_start + weights.shape[3], weights.device, weights.dtype)
    return refocus(weights, groups, share=share, beta=beta)


def focused_rows(call: Call) -> Tensor:
    """Bool [B, Tq] on the CPU: the last real row of each prompt, and the rows after it."""
    tokens = call.tokens
    assert tokens is not None
    real = tokens.positions("prompt", 0, tokens.prompt_length)
    places = torch.arange(tokens.prompt_length)
    last = torch.where(real, places, 0).amax(dim=1, keepdim=True)
    rows = torch.arange(call.total - call.num_queries, call.total)
    return (rows >= last) & ~tokens.positions("padding", int(rows[0]), call.total)


def row_shares(call: Call, rows: Tensor, columns: Tensor) -> Tensor:
    """[B, k]: what the untouched rows (bool [B, Tq]) give to each column set (bool [B, k, Tk]), mean over these rows and all heads."""
    index = rows.any(dim=0).nonzero()[:, 0].to(call.query.device)
    weights = row_weights(call, [], index).mean(dim=1)
    chosen = rows.to(weights.device)[:, index].to(weights)
    shares = (weights @ columns.to(weights).transpose(1, 2)).mul(chosen[..., None]).sum(dim=1)
    return shares / chosen.sum(dim=1, keepdim=True).clamp_min(1)
