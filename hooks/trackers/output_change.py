"""How much an intervention changes what attention gives to the image, where nobody has the prediction without it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from ...interventions import Call, Edit, fused

OUTPUT = "attention's output"


@torch.no_grad()
def output_change(call: Call, edits: Sequence[Edit], without: Sequence[Edit]) -> Tensor:
    """|with - without| / |without| of attention's output over the image's rows, of the conditional row of the batch where it is largest: a
    tensor of no dimensions. It costs two attentions. 0 where no row is conditional."""
    call = dataclasses.replace(call, original=None, original_with_lse=None, attended={}, ways=None)
    conditional = call.clock.rows("conditional", call.batch)
    if conditional is None:
        return call.query.new_zeros(())
    rows = conditional[:, None]
    if call.site is not None and call.site.kind == "joint":
        rows = rows & call.query_rows("image")
    new, old = (fused(call, list(each)).float() * rows[:, None, :, None] for each in (edits, without))
    size, whole = ((x.flatten(1).norm(dim=1)) for x in (new - old, old))
    return (size / whole.clamp_min(torch.finfo(whole.dtype).tiny)).amax()
