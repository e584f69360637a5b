"""The ways of a decode step without a map of its weights: the kernel with one additive row, or with the columns of a window alone.

What was found for edits that all layers share is kept with them: the next layer with a call of the same sizes takes it at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..call import Call
from ..edits import Band, Edit, Keep
from ..edits.base import heads_mask, versions
from .bands import newest
from .decode_row import Added, DecodeRow, decode_row, facts_of, is_shared, takes
from .kernels import attend, pack_row
from .tasks import Task, plain

ROW, WINDOW = "one additive row", "newest window"
# a call with its edits -> its output
Run = Callable[[Call, Sequence[Edit]], Tensor]


def is_row(task: Task) -> bool:
    call = task.call
    if not task.few or call.softcap is not None or call.sinks is not None or not task.edits:
        return False
    facts = facts_of(call)
    if not all(takes(edit, facts) for edit in task.edits):
        return False
    # beside a mask, the way of windows asks whether a row is left without a column: an accelerator is not asked
    return not (_reads_less(task) and (call.query.device.type == "cpu" or is_newest(task)))


def _reads_less(task: Task) -> bool:
    """Whether all heads read through one window that is so small that its columns are better taken out of the cache."""
    edit = task.edits[0]
    if len(task.edits) > 1 or not isinstance(edit, Keep) or edit.heads is not None or edit.rows is not None:
        return False
    band = edit.pattern
    return isinstance(band, Band) and 2 * (band.sinks + band.window) < task.call.num_keys


def is_newest(task: Task) -> bool:
    """Whether the one row of a call sees the first columns and the last ones, so that no mask is needed."""
    call = task.call
    if call.num_queries > 1 or call.mask is not None or call.softcap is not None or call.sinks is not None or not task.edits:
        return False
    band = getattr(task.edits[0], "pattern", None)
    return _reads_less(task) and band.first is None and band.dense_after is None  # type: ignore[union-attr]


def through_window(call: Call, band: Band) -> Tensor:
    """A step of decoding through a window."""
    return _attended(call.query, *newest(call.key, call.value, band), None, call)


def find_newest(task: Task) -> Band:
    band: Band = task.edits[0].pattern  # type: ignore[attr-defined]
    keep_known(task, WINDOW, lambda call, _: through_window(call, band), True)
    return band


def find(task: Task) -> DecodeRow | None:
    row = decode_row(facts_of(task.call), task.edits)
    if row is not None:
        keep_known(task, ROW, under(row), row.added is not None)
        if row.added is not None and is_shared(task.edits):
            # layers whose edit names other heads: all that differs is what they leave alone
            task.edits[0].of_any_heads["known"] = sizes_of(task.call), task.call.num_keys, row.added
    return row


def keep_known(task: Task, name: str, run: Run, of_keys: bool) -> None:
    """Keeps with the first edit what the table and the checks of edits have found, by all that they go by."""
    keys = task.call.num_keys if of_keys else None
    found = sizes_of(task.call), keys, tuple(task.edits[1:]), versions(task.edits), name, run
    object.__setattr__(task.edits[0], "_known", found)


def known(call: Call, edits: Sequence[Edit]) -> Run | None:
    """What was last found for these very edits in a call of the same sizes, counted in `call.ways`; None where a gradient is wanted."""
    if torch.is_grad_enabled():
        return None
    own = edits[0].__dict__
    found = own.get("_known")
    if found is None:
        return _on_other_heads(call, edits[0]) if len(edits) == 1 and "_of_any_heads" in own else None
    sizes, keys, others, state, name, run = found
    if len(edits) != len(others) + 1 or sizes != sizes_of(call) or (keys is not None and keys != call.key.shape[2]):
        return None
    if others and any(a is not b for a, b in zip(edits[1:], others, strict=True)):
        return None
    if state is not None and state != versions(edits):  # None: nothing is kept of what the edits hold
        return None
    if call.ways is not None:
        call.ways[name] += 1
    return run


def _on_other_heads(call: Call, edit: Edit) -> Run | None:
    """What was found for the same edit on other heads."""
    found, heads = edit.of_any_heads.get("known"), edit.heads
    if found is None or heads is None:
        return None
    sizes, keys, added = found
    if sizes != sizes_of(call) or keys != call.key.shape[2]:
        return None
    named = _pairs(tuple(heads), call.query.shape[1], call.query.device)
    if named is None:
        return None
    if call.ways is not None:
        call.ways[ROW] += 1
    return lambda call, _: torch.where(named, _row_alone(call, added), plain(call))


@functools.lru_cache(maxsize=1024)
def _pairs(heads: tuple[int, ...], count: int, device: torch.device) -> Tensor | None:
    """Bool [1, count, 1, 1]: these heads; None where there are no such heads."""
    return None if not heads or max(heads) >= count else heads_mask(heads, count, device)[:, :, None, None]


def _row_alone(call: Call, added: Added) -> Tensor:
    mask = added.row if call.mask is None else added.beside(call.mask)
    return _attended(call.query, call.key, call.value, mask, call)


def sizes_of(call: Call) -> tuple:
    query = call.query
    where = query.dtype, query.device, call.mask is None, call.softcap is None, call.sinks is None
    return query.shape, call.key.shape[1], where


def run(task: Task, row: DecodeRow) -> Tensor:
    return under(row)(task.call, task.edits)


def under(row: DecodeRow) -> Run:
    """Attention under a row, for all calls of its sizes."""
    added, changed = row.added, row.added is not None or row.sharpness is not None
    if added is not None and row.gain is None and row.sharpness is None and row.named is None:
        return lambda call, _: _row_alone(call, added)
    gain, sharpness = (None if factor is None else factor[:, :, None, None] for factor in (row.gain, row.sharpness))
    # what no edit names has a gain of exactly 1
    named = row.named[:, :, None, None] if changed and row.named is not None else None

    def attended(call: Call, _: object) -> Tensor:
        query = call.query
        if not changed:
            output = plain(call)
        else:
            mask = call.mask if added is None else added.row if call.mask is None else added.beside(call.mask)
            own = query if sharpness is None else (query * sharpness).to(query.dtype)
            output = _attended(own, call.key, call.value, mask, call)
        if gain is not None:
            output = (output * gain).to(query.dtype)
        return output if named is None else torch.where(named, output, plain(call))

    return attended


def _attended(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, call: Call) -> Tensor:
    if query.shape[2] > 1 or torch.is_grad_enabled():
        return attend(query, key, value, mask, call.is_causal, call.scaling)[0]
    packed = pack_row(query, key, mask)
    if packed is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=call.scale)
    output = F.scaled_dot_product_attention(packed[0], key, value, attn_mask=packed[1], scale=call.scale)
    return output.reshape(*query.shape[:3], value.shape[3])
