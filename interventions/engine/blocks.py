"""Block sparsity and chosen columns: the keys and values that stay are gathered, and the fused kernel runs over them alone.

Time and memory follow what is kept: each block of query rows meets the columns of its own lists, with a mask of just these pairs, where one
is needed at all. Rows that are left without any of their columns are computed over all that they see.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from ..edits import Blocks, Chosen, Keep, Operands
from ..edits.base import repeat_heads
from .biases import mask_of_rows
from .kernels import attend, needs_gradient, rows_per_chunk
from .tasks import FEW_ROWS, Group, all_rows

# Lists of different lengths are padded to the longest; where less than this share of the places would be used, each list runs alone.
LEAST_USED = 0.8


def is_gathered(group: Group) -> bool:
    edits = group.scores
    if group.weights or len(edits) != 1 or group.call.softcap is not None or group.sinks is not None:
        return False
    return isinstance(edits[0], Keep) and isinstance(edits[0].pattern, (Blocks, Chosen))


def run(group: Group, _: object) -> Tensor:
    keep, bias, scale = group.scores[0], group.bias(), group.call.scaling
    assert isinstance(keep, Keep)
    others = None if keep.rows is None else ~keep.rows
    if isinstance(keep.pattern, Blocks):
        return attend_blocks(group.x, keep.pattern, bias, scale, others)
    assert isinstance(keep.pattern, Chosen)
    output = attend_chosen(group.x, keep.pattern, bias, scale)
    return output if others is None else see_all(group.x, output, others[:, None], bias, scale)


def attend_chosen(x: Operands, chosen: Chosen, bias: Tensor | None, scale: float) -> Tensor:
    """Output [B, H, Tq, Dv] over the chosen columns alone. bias [B or 1, H or 1, Tk]: key biases on top."""
    columns, valid = chosen.index, chosen.valid
    if valid is not None:
        columns, valid = columns.masked_fill(~valid, 0), valid[:, :, None]
    if x.appended:
        tail = torch.arange(x.key.shape[2] - x.appended, x.key.shape[2], device=columns.device)
        columns = torch.cat([columns, tail.expand(*columns.shape[:2], -1)], dim=2)
        valid = None if valid is None else torch.nn.functional.pad(valid, (0, x.appended), value=True)
    output, emptied = _over(x, 0, x.query.shape[2], columns, valid, x.is_causal, bias, scale)
    return output if emptied is None else see_all(x, output, emptied, bias, scale)


def attend_blocks(x: Operands, blocks: Blocks, bias: Tensor | None, scale: float, dense_rows: Tensor | None = None) -> Tensor:
    """Output [B, H, Tq, Dv] over the blocks that stay. bias: as in `attend_chosen`. dense_rows [B or 1, Tq]: further rows that see all."""
    queries, keys = x.query.shape[2], x.key.shape[2] - x.appended
    batch, heads, device = x.query.shape[0], x.query.shape[1], x.query.device
    blocks.cover(queries, keys)
    (begin, _), (size, _) = blocks.starts, blocks.sizes
    lists, always = _Lists.of(blocks, x), _always(blocks, x)
    pieces = [x.query.new_zeros(batch, heads, begin, x.value.shape[3])]
    flags = [torch.ones(1, 1, begin, dtype=torch.bool, device=device)]
    for i in range(blocks.keep.shape[2]):
        low, high = begin + i * size, min(begin + (i + 1) * size, queries)
        piece, emptied = _block_row(x, lists, i, (low, high), always, bias, scale)
        pieces.append(piece)
        flags.append(torch.zeros(1, 1, high - low, dtype=torch.bool, device=device) if emptied is None else emptied)
    output = torch.cat(pieces, dim=2)
    sight = torch.zeros(1, 1, queries, dtype=torch.bool, device=device)
    for rows in (blocks.dense_rows, dense_rows):
        sight = sight if rows is None else sight | rows[:, None]
    wide = [repeat_heads(flag, heads).expand(batch, -1, -1) for flag in flags]
    return see_all(x, output, sight | torch.cat(wide, dim=2), bias, scale)


@dataclass
class _Lists:
    """The key blocks that each block of query rows keeps, of each list (head, batch row) its own.

    keep [b, g, nq, nk]: without what lies after a block's rows in a causal call. counts [b, g, nq] long. most, least: of the lists of
    each block of rows; used: which share of padded places its lists fill; newest: the last key block that any of them keeps.
    """

    blocks: Blocks
    keep: Tensor
    counts: Tensor
    most: list[int]
    least: list[int]
    used: list[float]
    newest: list[int]

    @classmethod
    def of(cls, blocks: Blocks, x: Operands) -> _Lists:
        keep = blocks.keep
        if x.is_causal:
            rows, columns = (torch.arange(n, device=keep.device) for n in keep.shape[2:])
            last = blocks.starts[0] + (rows + 1) * blocks.sizes[0] - 1 + x.key.shape[2] - x.query.shape[2]
            keep = keep & (blocks.starts[1] + columns * blocks.sizes[1] <= last[:, None])
        counts = keep.sum(dim=-1)
        number = torch.arange(1, keep.shape[3] + 1, device=keep.device)
        newest = (keep.flatten(0, 1).any(dim=0) * number).amax(dim=-1) if keep.shape[3] else counts.new_zeros(keep.shape[2])
        each = counts.flatten(0, 1)
        facts = torch.stack([each.amax(dim=0), each.amin(dim=0), each.sum(dim=0), newest]).tolist()  # the values are read once
        used = [total / max(1, most * each.shape[0]) for most, total in zip(facts[0], facts[2])]
        return cls(blocks, keep, counts, facts[0], facts[1], used, [n - 1 for n in facts[3]])

    def columns(
        self, i: int, keys: int, batch: slice = slice(None), heads: slice = slice(None)
    ) -> tuple[Tensor, Tensor | None]:
        """(columns long [b, g, m], bool [b, g, 1, m] where some place is not used) that the lists keep for block i of the rows."""
        (_, begin), (_, size) = self.blocks.starts, self.blocks.sizes
        keep, counts = self.keep[batch, heads, i], self.counts[batch, heads, i]
        alone = counts.numel() == 1
        most = int(counts) if alone else self.most[i]
        if alone:
            kept = keep[0, 0].nonzero()[:, 0].view(1, 1, -1)
        else:
            kept = keep.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :most]
        columns = (begin + kept[..., None] * size + torch.arange(size, device=keep.device)).flatten(2)
        valid = None
        if not alone and self.least[i] < most:
            places = torch.arange(most, device=keep.device) < counts[..., None]
            valid = places.repeat_interleave(size, dim=2)
        if begin + (self.newest[i] + 1) * size > keys:
            inside = columns < keys
            columns, valid = columns.clamp_max(keys - 1), inside if valid is None else valid & inside
        return columns, None if valid is None else valid[:, :, None]


def _always(blocks: Blocks, x: Operands) -> Tensor | None:
    """Bool [B or 1, Tk]: the columns that every row keeps, whatever its blocks; None where there are none."""
    always, begin = blocks.always(x.key.shape[2] - x.appended), blocks.starts[1]
    if always is None and not begin and not x.appended:
        return None
    if always is None:
        always = torch.zeros(1, x.key.shape[2] - x.appended, dtype=torch.bool, device=x.key.device)
    place = torch.arange(always.shape[1], device=always.device)
    return torch.nn.functional.pad(always | (place < begin), (0, x.appended), value=True)


def _block_row(
    x: Operands, lists: _Lists, i: int, span: tuple[int, int], always: Tensor | None, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor | None]:
    """(output [B, H, R, Dv] of the query rows of block i, `emptied` as `_over` gives it)."""
    keys = x.key.shape[2] - x.appended
    batch, groups = lists.keep.shape[:2]
    heads, kv = x.query.shape[1], x.key.shape[1]
    later = lists.blocks.starts[1] + (lists.newest[i] + 1) * lists.blocks.sizes[1] - 1
    causal = x.is_causal and (always is not None or later > span[0] + x.key.shape[2] - x.query.shape[2])
    if lists.used[i] >= LEAST_USED or batch * groups == 1:
        columns, valid = _join(always, *lists.columns(i, keys))
        return _over(x, *span, columns, valid, causal, bias, scale)
    rows = []
    for b in range(batch):
        own = slice(b, b + 1) if batch > 1 else slice(None)
        parts = []
        for g in range(groups):
            at, shared = _span(g, groups, heads), _span(g, groups, kv)
            mask = x.mask if x.mask is None else x.mask[own if x.mask.shape[0] > 1 else slice(None)]
            mask = mask if mask is None or mask.shape[1] == 1 else mask[:, at]
            part = dataclasses.replace(x, query=x.query[own, at], key=x.key[own, shared], value=x.value[own, shared], mask=mask)
            added = bias if bias is None or bias.shape[0] == 1 else bias[own]
            added = added if added is None or added.shape[1] == 1 else added[:, at]
            held = always if always is None or always.shape[0] == 1 else always[own]
            columns, valid = _join(held, *lists.columns(i, keys, slice(b, b + 1), slice(g, g + 1)))
            piece, emptied = _over(part, *span, columns, valid, causal, added, scale)
            if emptied is None:
                emptied = torch.zeros(1, 1, piece.shape[2], dtype=torch.bool, device=piece.device)
            parts.append((piece, emptied.expand(piece.shape[0], piece.shape[1], -1)))
        rows.append(tuple(torch.cat(found, dim=1) for found in zip(*parts)))
    pieces, flags = (torch.cat(found, dim=0) for found in zip(*rows))
    return pieces, flags


def _span(g: int, groups: int, heads: int) -> slice:
    """Those of some heads that list g of `groups` belongs to."""
    first = g * heads // groups
    return slice(first, max(first + 1, (g + 1) * heads // groups))


def _join(always: Tensor | None, columns: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Columns of lists after those that every row keeps, which the lists then do not count again."""
    if always is None:
        return columns, valid
    first = always.any(dim=0).nonzero()[:, 0]
    batch, groups = max(columns.shape[0], always.shape[0]), columns.shape[1]
    columns = columns.expand(batch, -1, -1)
    again = always.expand(batch, -1)[:, None].expand(-1, groups, -1).gather(2, columns)[:, :, None]
    new = ~again if valid is None else valid & ~again
    held = always[:, None, None, first].expand(batch, groups, -1, -1)
    return torch.cat([first.expand(batch, groups, -1), columns], dim=2), torch.cat([held, new], dim=3)


def _over(
    x: Operands, low: int, high: int, columns: Tensor, valid: Tensor | None, causal: bool, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor | None]:
    """(output [B, H, R, Dv] of the query rows low..high-1 over the columns [b, g, m] of their heads, emptied).

    valid bool [b, g, 1, m]: places that count, None for all. emptied: bool [B or 1, H, g or 1, R], rows that see none of the columns and
    have got numbers of no meaning; None where there are none (an accelerator is not asked whether that is so).
    """
    query = x.query[:, :, low:high]
    batch, heads, rows, _ = query.shape
    if columns.shape[2] == 0:
        return query.new_zeros(batch, heads, rows, x.value.shape[3]), query.new_ones(1, 1, rows, dtype=torch.bool)
    keep, added = valid, None if bias is None else _at(bias[:, :, None], columns)
    if causal:
        own = torch.arange(low, high, device=columns.device) + (x.key.shape[2] - x.query.shape[2])
        earlier = columns[:, :, None] <= own[:, None]
        keep = earlier if keep is None else keep & earlier
    if x.mask is not None:
        part = _at(x.mask if x.mask.shape[2] == 1 else x.mask[:, :, low:high], columns)
        seen = part if part.dtype == torch.bool else part > torch.finfo(part.dtype).min / 2
        keep = seen if keep is None else _and(keep, seen)
        if part.dtype != torch.bool:
            added = part.float() if added is None else torch.add(*_alike(added, part.float()))
    emptied = None
    if keep is not None:
        alive = keep.any(dim=-1)
        if alive.device.type != "cpu" or not bool(alive.all()):
            keep, emptied = keep | ~alive[..., None], ~alive.expand(*alive.shape[:2], rows)
    mask = keep
    if added is not None:
        if keep is not None:
            added, keep = _alike(added, keep)
            added = added.masked_fill(~keep, float("-inf"))
        mask = added.to(query.dtype)
    if columns.shape[0] * columns.shape[1] == 1:
        key, value = (t.index_select(2, columns[0, 0]) for t in (x.key, x.value))
        return attend(query, key, value, mask, False, scale)[0], emptied
    groups = x.key.shape[1] if columns.shape[1] == 1 else columns.shape[1]
    key, value = (_take(t, columns.expand(batch, groups, -1)).flatten(0, 1)[:, None] for t in (x.key, x.value))
    query = query.reshape(batch * groups, heads // groups, rows, -1)
    if mask is not None:
        own = mask.shape[1] if mask.shape[1] > 1 else groups
        mask = mask.expand(batch, own, -1, -1).reshape(batch * groups, own // groups, *mask.shape[2:])
    return attend(query, key, value, mask, False, scale)[0].reshape(batch, heads, rows, -1), emptied


def _alike(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both with as many heads, each list repeated for the heads that share it."""
    heads = max(a.shape[1], b.shape[1])
    return tuple(t if t.shape[1] in (1, heads) else repeat_heads(t, heads) for t in (a, b))  # type: ignore[return-value]


def _and(a: Tensor, b: Tensor) -> Tensor:
    a, b = _alike(a, b)
    return a & b


def _at(values: Tensor, columns: Tensor) -> Tensor:
    """values [b, h, r, Tk] (1 where shared) at the columns [b, g, m] of each head: [b, h or g, r, m]."""
    if values.shape[3] == 1:
        return values
    if columns.shape[0] * columns.shape[1] == 1:
        return values.index_select(3, columns[0, 0])
    batch, heads = (max(a, b) for a, b in zip(values.shape[:2], columns.shape[:2]))
    columns = columns if columns.shape[1] == 1 else repeat_heads(columns, heads)
    rows = values.shape[2]
    return values.expand(batch, heads, -1, -1).gather(3, columns[:, :, None].expand(batch, heads, rows, -1))


def _take(t: Tensor, columns: Tensor) -> Tensor:
    """t [B, Hkv, Tk, D] at the columns [B, g, m] of each list, g = Hkv times the lists that share a key head: [B, g, m, D].

    As rows of one table, which is several times faster than a gather along the width; no copy of t where its layout has such rows.
    """
    batch, shared, keys, dim = t.shape
    steps = t.stride()[:3]
    if t.stride(3) == 1 and not needs_gradient(t) and not any(step % dim for step in steps):
        steps = tuple(step // dim for step in steps)
        size = 1 + sum(step * (n - 1) for step, n in zip(steps, (batch, shared, keys)))
        table = t.as_strided((size, dim), (dim, 1))
    else:
        table, steps = t.reshape(-1, dim), (shared * keys, keys, 1)
    first = _first_rows(batch, columns.shape[1], shared, steps[:2], columns.device)
    index = columns if steps[2] == 1 else columns * steps[2]
    return table.index_select(0, (index + first).flatten()).view(batch, columns.shape[1], -1, dim)


@functools.lru_cache(maxsize=64)
def _first_rows(batch: int, groups: int, shared: int, steps: tuple[int, int], device: torch.device) -> Tensor:
    """[B, g, 1] long: where the rows of each list's key head begin; the same at every layer and step."""
    with torch.inference_mode(False):
        head = torch.arange(groups, device=device) * shared // groups
        return (torch.arange(batch, device=device)[:, None] * steps[0] + head * steps[1])[..., None]


def see_all(x: Operands, output: Tensor, rows: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """The output with what the rows [B or 1, H or fewer, Tq] give over everything that they see.

    Where the rows are on the CPU, the device is not asked which they are.
    """
    if x.query.shape[2] <= FEW_ROWS and rows.device.type != "cpu":
        index = all_rows(x.query)  # to work out all of them costs less than to wait for which
    else:
        index = rows.flatten(0, 1).any(dim=0).expand(x.query.shape[2]).nonzero()[:, 0]
    if not index.numel():
        return output
    index, pieces = index.to(x.query.device), []
    for part in index.split(rows_per_chunk(x.query.shape[0], x.query.shape[1], x.key.shape[2], x.query.device)):
        pieces.append(attend(x.query[:, :, part], x.key, x.value, mask_of_rows(x, bias, part), False, scale, piece=True)[0])
    flags = (rows if rows.shape[1] == 1 else repeat_heads(rows, output.shape[1])).to(index.device)
    chosen = (flags if flags.shape[2] == 1 else flags[:, :, index])[..., None]
    return output.index_copy(2, index, torch.where(chosen, torch.cat(pieces, dim=2), output[:, :, index]))
