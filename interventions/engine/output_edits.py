"""Edits of outputs alone, where heads have outputs and values but no weights that could be edited: linear attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import Tensor

from ..call import Call
from ..edits import Edit, OutputEdit, Rows
from ..edits.base import heads_index
from ..errors import ReattendError
from .reference_executor import at_chosen, check_edits
from .tasks import all_rows

NAME = "outputs"


def edited_output(call: Call, output: Tensor, edits: Sequence[Edit]) -> Tensor:
    """output [B, H, T, Dv] of a call whose values are true and whose query and key are not, after its edits.

    Heads, batch rows and query rows that no edit names keep their bits. Raises ReattendError for an edit of anything but outputs.
    """
    rows = Rows(all_rows(call.query), None, call.query, call.key, call.value, call.scaling, 0, 0, None, False)
    for edit in check_edits(call, list(edits)):
        if not isinstance(edit, OutputEdit):
            where = "this call" if call.site is None else call.site.name
            raise ReattendError(
                f"{where}: {type(edit).__name__} changes {edit.level}, and linear attention has none: only edits of outputs (MixValue, "
                "HeadGain, HeadMix) can be served here"
            )
        if edit.heads is None:
            output = at_chosen(edit, rows, edit.on_output(output, rows), output).to(output.dtype)
            continue
        index = heads_index(tuple(edit.heads), output.device)
        operands = {name: getattr(rows, name).index_select(1, index) for name in ("query", "key", "value")}
        own, old = dataclasses.replace(rows, **operands), output.index_select(1, index)
        new = at_chosen(edit, own, edit.on_output(old, own), old)
        output = output.index_copy(1, index, new.to(output.dtype))
    if call.ways is not None:
        call.ways[NAME] += 1
    return output
