"""The family of sparse masking: windows with sinks on the columns they keep, O(n * (sinks + window)) work and memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..edits import Band, Keep, KeyBias, Operands
from ..edits.scores import LARGEST_BIAS
from .blocks import see_all
from .kernels import FEW_ROWS, attend, chunk_values, is_accelerator, rows_per_chunk, visible_rows
from .tasks import Group

# Query rows that meet their columns at a time on a CPU.
BLOCK = 256
# On an accelerator blocks are this share of the window, in multiples of `STEP`: shorter ones meet fewer columns that their mask hides, but
# repeat more of the keys.
SHARE_OF_WINDOW = 2
STEP = 128


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
        return attend(x.query, *newest(x.key, x.value, band), None, False, scale)[0]
    if is_accelerator(device):
        if num_queries > FEW_ROWS and band.remember(
            ("looks back", offset, x.is_causal, x.appended), lambda: _looks_back(x, offset), x.mask
        ):
            return _blocks_at_once(x, band, bias, scale, offset)
        return _over_everything(x, band, bias, scale, offset)
    everything = torch.arange(num_keys, device=device)
    pieces = []
    for start in range(0, num_queries, BLOCK):
        index = torch.arange(start, min(start + BLOCK, num_queries), device=device)
        span = (start + offset, start + offset + index.numel() - 1)
        columns = _columns(band, span, num_keys, x.is_causal, x.appended, device)
        keep, alive = _keep(x, band, index, offset, columns)
        if alive is not None and not bool(alive.all()):
            # some row's visible keys all lie outside the band, perhaps outside these columns: it keeps what it could see
            columns = everything
            keep, _ = _keep(x, band, index, offset, columns)
        pieces.append(_attend(x, slice(start, start + BLOCK), index, columns, keep, bias, scale))
    return torch.cat(pieces, dim=2) if len(pieces) > 1 else pieces[0]


def newest(key: Tensor, value: Tensor, band: Band) -> tuple[Tensor, Tensor]:
    """The sinks and the last columns: what the last row keeps, all of it, so that a step of decoding needs no mask."""
    start, sinks = key.shape[2] - band.window, band.sinks
    if start <= sinks:
        return key, value
    last = key[:, :, start:], value[:, :, start:]
    if not sinks:
        return last
    return torch.cat([key[:, :, :sinks], last[0]], dim=2), torch.cat([value[:, :, :sinks], last[1]], dim=2)


def _over_everything(x: Operands, band: Band, bias: Tensor | None, scale: float, offset: int) -> Tensor:
    """Every row with all columns, of which a mask hides what the band leaves out: nothing is asked of the device."""
    num_queries, num_keys = x.query.shape[2], x.key.shape[2]
    columns, pieces = torch.arange(num_keys, device=x.query.device), []
    step = rows_per_chunk(x.query.shape[0], 1 if x.mask is None else x.mask.shape[1], num_keys, x.query.device)
    for start in range(0, num_queries, step):
        index = torch.arange(start, min(start + step, num_queries), device=x.query.device)
        keep, _ = _keep(x, band, index, offset, columns)
        pieces.append(_attend(x, slice(start, start + step), index, columns, keep, bias, scale))
    return torch.cat(pieces, dim=2) if len(pieces) > 1 else pieces[0]


def _looks_back(x: Operands, offset: int) -> bool:
    """Whether no row sees a column after its own, besides appended ones. A mask is asked."""
    if x.is_causal or x.mask is None or min(x.mask.shape[2:]) == 1:
        return x.is_causal
    return not bool(_shown(x.mask[..., : x.key.shape[2] - x.appended]).triu(offset + 1).any())


def _shown(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _blocks_at_once(x: Operands, band: Band, bias: Tensor | None, scale: float, offset: int) -> Tensor:
    """Blocks of rows that look back as a batch, each with the sinks, the columns that its window reaches and appended ones: a handful of
    operations, however long the sequence is."""
    batch, rows, num_keys = x.query.shape[0], x.query.shape[2], x.key.shape[2]
    layout, pieces = _layout(x, band, offset, max(1 if t is None else t.shape[1] for t in (x.mask, bias))), []
    for index, columns, keep in layout:
        added = None if bias is None else bias[:, :, columns][..., None, :]
        if x.mask is not None:
            part = _mask_at(x, index, columns)
            keep = keep & _shown(part)
            if part.dtype != torch.bool:
                added = part.float() if added is None else added + part.float()
        mask = keep if added is None else added.masked_fill(~keep, float("-inf")).to(x.query.dtype)
        mask = mask.transpose(1, 2).expand(batch, -1, -1, -1, -1).flatten(0, 1)
        query = x.query.transpose(1, 2)[:, index].transpose(2, 3).flatten(0, 1)
        key, value = (t.transpose(1, 2)[:, columns].transpose(2, 3).flatten(0, 1) for t in (x.key, x.value))
        output = attend(query, key, value, mask, False, scale)[0]
        pieces.append(output.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3))
    output = torch.cat(pieces, dim=2)[:, :, :rows]
    if x.mask is not None:
        # rows whose visible keys all lie outside the band keep what they could see
        emptied = band.remember(("emptied", rows, num_keys, x.appended, offset), lambda: _emptied(x, layout), x.mask)
        output = see_all(x, output, emptied, bias, scale)
    dense = band.dense_rows(torch.arange(offset, offset + rows))
    return output if dense is None else see_all(x, output, dense[:, None], bias, scale)


Part = tuple[Tensor, Tensor, Tensor]


def _mask_at(x: Operands, index: Tensor, columns: Tensor) -> Tensor:
    """The mask of blocks with rows [n, R] and columns [n, C]: [B or 1, H or 1, n, R, C]."""
    assert x.mask is not None
    return x.mask.expand(-1, -1, x.query.shape[2], x.key.shape[2])[:, :, index[..., None], columns[:, None]]


def _emptied(x: Operands, layout: list[Part]) -> Tensor:
    """Bool [B or 1, H or 1, Tq] on the CPU: rows that see something, but nothing of the band."""
    assert x.mask is not None
    left = [(keep & _shown(_mask_at(x, index, columns))).any(dim=-1).flatten(2) for index, columns, keep in layout]
    return (_shown(x.mask).any(dim=-1) & ~torch.cat(left, dim=2)[:, :, : x.query.shape[2]]).cpu()


def _layout(x: Operands, band: Band, offset: int, masks: int) -> list[Part]:
    """Blocks, some at a time: their query rows [n, R], columns [n, C], and which pairs of a causal call stay, bool [B or 1, 1, n, R, C].

    Made once for all layers that share the band. masks: how many heads have masks of their own.
    """
    batch, heads, rows, dim = x.query.shape
    num_keys, device = x.key.shape[2], x.query.device
    own = num_keys - x.appended
    sinks = min(_sinks(band), own)
    window = min(band.window, num_keys)
    size = min(rows, -(-window // (SHARE_OF_WINDOW * STEP)) * STEP)
    reach = window - 1 + size
    ends = sinks + x.appended
    reach += -(reach + ends) % 8  # kernels want rows of masks at multiples of 16 bytes
    blocks = -(-rows // size)
    held = batch * (2 * heads * dim + masks * size) * (reach + ends)
    count = -(-blocks // -(-blocks * held // chunk_values(device)))  # in parts of one size as far as can be

    def make() -> list[Part]:
        places = torch.cat([torch.arange(sinks, device=device), torch.arange(own, num_keys, device=device)])
        parts = []
        for block in torch.arange(blocks, device=device).split(count):
            index = (block[:, None] * size + torch.arange(size, device=device)).clamp_max(rows - 1)
            near = (offset - window + 1 + block[:, None] * size) + torch.arange(reach, device=device)
            inside = (near >= sinks) & (near < own)  # not one of the sinks once more, and there at all
            there = torch.nn.functional.pad(inside, (ends, 0), value=True)
            columns = torch.cat([places.expand(len(block), -1), near.clamp(0, num_keys - 1)], dim=1)
            keep = band.keep(index + offset, columns)
            keep = keep & (columns[:, None] <= (index + offset)[..., None]) | (columns >= own)[:, None]
            parts.append((index, columns, keep & there[:, None]))
        return parts

    return band.remember(("blocks", rows, num_keys, x.appended, offset, count, device), make)


def _attend(
    x: Operands, span: slice, index: Tensor, columns: Tensor, keep: Tensor, bias: Tensor | None, scale: float
) -> Tensor:
    """The rows of `span`, which are those of `index`, over these columns."""
    added = _added(x, bias, index, columns)
    mask = keep if added is None else added.masked_fill(~keep, float("-inf")).to(x.query.dtype)
    key, value = (x.key, x.value) if columns.numel() == x.key.shape[2] else (x.key[:, :, columns], x.value[:, :, columns])
    return attend(x.query[:, :, span], key, value, mask, False, scale)[0]


def _keep(x: Operands, band: Band, index: Tensor, offset: int, columns: Tensor) -> tuple[Tensor, Tensor | None]:
    """(bool [B, 1 or H, R, C] pairs that stay, bool [B, 1 or H, R, 1] rows that the band leaves a key, None where it leaves all one)."""
    keep = band.keep(index + offset, columns)
    if x.appended:
        keep = keep | (columns >= x.key.shape[2] - x.appended)
    visible = visible_rows(x.mask, x.is_causal, index, x.query.shape[2], x.key.shape[2])
    if visible is None:
        return keep, None
    visible = visible if visible.shape[3] == 1 else visible[..., columns]
    kept = keep & visible
    if x.mask is None:
        return kept, None
    alive = kept.any(dim=-1, keepdim=True)
    return torch.where(alive, kept, visible), alive


def _added(x: Operands, bias: Tensor | None, index: Tensor, columns: Tensor) -> Tensor | None:
    """What is added to the scores of these rows and columns: an additive mask and key biases, float32."""
    added = None if bias is None else bias[:, :, None, columns]
    if x.mask is not None and x.mask.dtype != torch.bool:
        part = x.mask if x.mask.shape[2] == 1 else x.mask[:, :, index]
        part = (part if part.shape[3] == 1 else part[..., columns]).float()
        added = part if added is None else added + part
    return added


def _sinks(band: Band) -> int:
    """How many of the first columns hold every sequence's sinks. Recipes say on the CPU where sequences begin."""
    return max(0, band.sinks + (0 if band.first is None else int(band.first.max())))


def _columns(band: Band, span: tuple[int, int], num_keys: int, is_causal: bool, appended: int, device: torch.device) -> Tensor:
    """Long [C]: columns that some row of the block may keep, in ascending order. span: the positions of its first and last row."""
    low, high = span
    last = min(high + 1 if is_causal else num_keys, num_keys)
    sinks = _sinks(band)
    start = 0 if band.has_dense(low, high) else max(0, low - band.window + 1)
    parts = [torch.arange(start, last, device=device)]
    if start > 0:
        parts.insert(0, torch.arange(min(sinks, start), device=device))
    if appended and last < num_keys:
        parts.append(torch.arange(max(last, num_keys - appended), num_keys, device=device))
    return torch.cat(parts) if len(parts) > 1 else parts[0]
