"""`Rearrange`: segments of a prompt see each other, and each query row sees them at distances of its own (PINE)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import ReattendError
from ..rotary import Rotary
from .operands import OperandEdit, Operands


@dataclass(frozen=True, eq=False, kw_only=True)
class Rearrange(OperandEdit):
    """S[i, j] = scale <R(steps[i, g(j)]) q_i, k_j> for columns j of group g; a row in one segment sees all of the others.

    spans int32 [B, m, 2] on the CPU: segments 1..m as key columns [start, stop), adjoining, in ascending order; group 0 is every
    other column. steps int32 [B, heads, Tq, m + 1]: how far each row is turned on before it meets a group (position 0 of the last
    axis: group 0); the rows of a segment share their steps, 0 for their own segment, and rows after the segments have 0 for group 0.
    Rows see what is causal, and rows of a segment the columns of all other segments too. first int32 [B] on the CPU: each sequence's
    first real column. start: the key column of query row 0. hidden bool [B, Tk]: columns of padding after `first`,
    None where there are none. The call's own mask and causality are replaced. Name it after all other edits of operands.
    """

    spans: Tensor
    steps: Tensor
    first: Tensor
    start: int
    rotary: Rotary
    hidden: Tensor | None = None
    # what follows from all but the steps, kept by the layers of a pass together; "held": what follows from spans and first, kept longer
    shared: dict[Any, Any] = field(default_factory=dict, repr=False)
    broadcast = {"spans": 2, "steps": 2, "first": 0, "hidden": 1}
    per_row = ("steps",)
    widens = True

    def __post_init__(self) -> None:
        if self.first.dim() == 1:
            object.__setattr__(self, "first", self.first[:, None])
        super().__post_init__()
        if any(x.dtype != torch.int32 for x in (self.spans, self.steps, self.first)):
            raise ReattendError("spans, steps and first must be int32")
        if self.steps.shape[-1] != self.spans.shape[2] + 1:
            raise ReattendError(
                f"steps has {self.steps.shape[-1]} groups, but there are {self.spans.shape[2]} segments and the rest"
            )

    def again(self, steps: Tensor, rotary: Rotary, shared: dict[Any, Any]) -> Rearrange:
        """The same edit with steps of the same shape, for another layer of the pass."""
        new = self._copy(steps=steps, rotary=rotary, shared=shared)
        if self.rows is None and "known" in shared:
            object.__setattr__(new, "_known", shared["known"])
        return new

    def groups(self, num_keys: int) -> Tensor:
        """Long [B, Tk] on the CPU: the group of each key column, 0 outside of the segments."""
        column = torch.arange(num_keys)
        inside = (column >= self.spans[:, 0, :, 0, None]) & (column < self.spans[:, 0, :, 1, None])  # [B, m, Tk]
        return (inside * torch.arange(1, inside.shape[1] + 1)[:, None]).sum(dim=1)

    def groups_on(self, num_keys: int, device: torch.device) -> Tensor:
        """`groups` on a device, which is given them once for all steps after the segments."""
        end = min(num_keys, int(self.spans.max()))
        return torch.nn.functional.pad(self._held(("groups", end), device, lambda: self.groups(end)), (0, num_keys - end))

    def _held(self, key: Any, device: torch.device, make: Callable[[], Tensor]) -> Tensor:
        """What follows from spans and first, on a device, kept for all passes that share them."""
        # the batch may have been cut to some of its rows
        held, key = self.shared.get("held", self.shared), (key, len(self.spans), device)
        if key not in held:
            with torch.inference_mode(False):  # kept longer than the pass that makes it
                held[key] = make().to(device)
        return held[key]

    def visible(self, rows: Tensor, num_keys: int) -> Tensor:
        """Bool [B, 1, R, Tk]: what the query rows `rows` [R] see. Rows of padding see themselves."""
        column = torch.arange(num_keys, device=rows.device)
        place = rows[:, None] + self.start
        real = column >= self._held("first", rows.device, lambda: self.first)
        if self.hidden is not None:
            real = real & ~self.hidden[:, 0].to(rows.device)
        group = self.groups_on(num_keys, rows.device)
        own = group.gather(1, (rows + self.start).expand(group.shape[0], -1))[:, :, None]
        other = (own > 0) & (group > 0)[:, None] & (own != group[:, None])
        return ((real[:, None] & ((column <= place) | other)) | (column == place))[:, None]

    def on_operands(self, x: Operands) -> Operands:
        """One block of dimensions per group: a key fills its own group's block, a query all of them, each turned in its own way."""
        if x.appended or x.offset is None:
            raise ReattendError("Rearrange needs the call's own columns: it cannot follow an edit that adds or merges columns")
        keys = x.key.shape[2]
        blocks = self.rotary.turn(x.query[:, :, :, None], self.steps)
        group = torch.nn.functional.one_hot(self.groups(keys), self.steps.shape[-1]).to(x.key.device, x.key.dtype)
        key = (x.key[:, :, :, None] * group[:, None, :, :, None]).flatten(3)
        mask = self.visible(torch.arange(x.query.shape[2], device=x.key.device), keys)
        return dataclasses.replace(x, query=blocks.flatten(3), key=key, mask=mask, is_causal=False)
