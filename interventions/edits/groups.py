"""`Grouped`: rows that see other columns than the rest, each kind of row with an attention of its own over just these."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import ReattendError
from .base import Edit, Rows, Shape
from .outputs import OutputEdit
from .scores import KeyBias
from .weights import TINY, WeightEdit


class _Part(NamedTuple):
    """One attention: its group, and its batch rows, query rows and columns, all long."""

    group: int
    batch: Tensor
    queries: Tensor
    keys: Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class Grouped(OutputEdit):
    """O_i = sum_g shares[i, g] O_ig, with O_ig the attention of row i over the columns of group g alone: softmax(scale q_i K_g^T) V_g.

    Beside edits of scores or weights it is one of weights itself, before the others of these: A'_ij = sum_g shares[i, g] A_ij / (sum of
    A_i over group g) for j in g, with A the weights under the scores as edited. Edits of outputs act after it, whichever was given first.

    shares [.., Tq, G]: rows with 0 are not computed in that group; a row without any share keeps its output where it is not named, and is 0
    where it is. columns bool [.., Tk, G]. All heads share both. A mask of any pairs is one, with a group for each distinct pattern of its
    rows and shares 1: no [Tq, Tk] is made, and what a mask would hide costs nothing.
    """

    shares: Tensor
    columns: Tensor
    broadcast = {"shares": 2, "columns": 2}
    per_row = ("shares",)
    replaces = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.columns.dtype != torch.bool or not self.shares.is_floating_point():
            raise ReattendError(
                "Grouped needs shares as numbers [batch, queries, groups] and columns as bool [batch, keys, groups]"
            )
        if self.shares.shape[3] != self.columns.shape[3]:
            raise ReattendError(f"shares are for {self.shares.shape[3]} groups, columns for {self.columns.shape[3]}")
        if self.shares.shape[1] != 1 or self.columns.shape[1] != 1:
            raise ReattendError("all heads share the groups of Grouped: shares and columns have no axis of heads")

    def _check_shapes(self, shape: Shape) -> None:
        super()._check_shapes(shape)
        if self.shares.shape[2] != shape.queries:
            raise ReattendError(f"shares of Grouped are for {self.shares.shape[2]} query rows, this call has {shape.queries}")
        if shape.keys is not None and self.columns.shape[2] != shape.keys:
            raise ReattendError(f"columns of Grouped are for {self.columns.shape[2]} keys, this call has {shape.keys}")

    def meets(self, other: Edit) -> bool:
        """Whether another edit changes scores or weights of rows that this one names, or their output before it."""
        if other is self or other.level == "operands" or isinstance(other, Grouped):
            return False
        if self.heads is not None and other.heads is not None and set(self.heads).isdisjoint(other.heads):
            return False
        if self.rows is None or (other.rows is None and not isinstance(other, KeyBias)):
            return True
        # a bias that is 0 there changes nothing
        key = other.rows if other.rows is not None else other
        return self.remember(("meets", key), lambda: self._meets(other))

    def _meets(self, other: Edit) -> bool:
        assert self.rows is not None
        if other.rows is not None:
            return bool((self.rows & other.rows.to(self.rows.device)).any())
        assert isinstance(other, KeyBias)
        changed = (other.bias != 0).flatten(1).any(dim=1).to(self.rows.device)
        return bool((self.rows & changed[:, None]).any())

    def as_weights(self) -> GroupedWeights:
        """The same as an edit of weights."""
        given = {"heads": self.heads, "rows": self.rows, "shares": self.shares, "columns": self.columns}
        return self.remember("as weights", lambda: GroupedWeights(**given))

    def parts(self, batch: int) -> list[_Part]:
        """The attentions that it is made of; batch rows with the same groups go together."""
        return self.remember(("parts", batch), lambda: self._parts(batch))

    def _parts(self, batch: int) -> list[_Part]:
        device, found = self.shares.device, []
        shares, columns = (t[:, 0].detach().cpu().expand(batch, -1, -1) for t in (self.shares, self.columns))
        for group in range(shares.shape[2]):
            alike: dict[tuple[bytes, bytes], list[int]] = {}
            for row in range(batch):
                used, seen = shares[row, :, group] != 0, columns[row, :, group]
                if bool(used.any()):
                    if not bool(seen.any()):
                        raise ReattendError(f"rows of Grouped have a share of group {group}, which has no columns")
                    alike.setdefault((used.numpy().tobytes(), seen.numpy().tobytes()), []).append(row)
            for rows in alike.values():
                queries, keys = ((t[rows[0], :, group] != 0).nonzero()[:, 0] for t in (shares, columns))
                found.append(_Part(group, *(t.to(device) for t in (torch.tensor(rows), queries, keys))))
        return found

    def on_output(self, output: Tensor, rows: Rows) -> Tensor:
        query, (batch, heads, count) = rows.query, rows.query.shape[:3]
        if self.columns.shape[2] != rows.key.shape[2] - rows.appended:
            raise ReattendError(f"columns of Grouped are for {self.columns.shape[2]} keys, this call has {rows.key.shape[2]}")
        found = output.new_zeros(batch, heads, count, output.shape[3])
        for part in self.parts(batch):
            at = slice(None) if len(part.batch) == batch else part.batch
            q, k, v = (_taken(t[at], i) for t, i in ((query, part.queries), (rows.key, part.keys), (rows.value, part.keys)))
            mask, alive = _seen(rows, at, part)
            own = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, scale=rows.scale, enable_gqa=k.shape[1] != q.shape[1]
            )
            own = own if alive is None else own.where(alive, 0.0)
            place = part.batch[:, None], part.queries[None]
            share = self.shares[:, 0, :, part.group].expand(batch, -1)[place]
            own = own.to(output.dtype) * share[:, None, :, None].to(output.dtype)
            found.transpose(1, 2).index_put_(place, own.transpose(1, 2), accumulate=True)
        return found if rows.index.numel() == count else found[:, :, rows.index]


@dataclass(frozen=True, eq=False, kw_only=True)
class GroupedWeights(WeightEdit):
    """`Grouped` as an edit of weights: what it is beside others, which it has to leave something to act on."""

    shares: Tensor
    columns: Tensor
    broadcast = {"shares": 2, "columns": 2}
    per_row = ("shares",)
    reads_operands = False

    def on_weights(self, weights: Tensor, rows: Rows) -> Tensor:
        found = torch.zeros_like(weights)
        for group in range(self.shares.shape[3]):
            own = weights * rows.padded(self.columns[..., group]).to(weights)[:, :, None]
            share = self.shares[:, :, rows.index, group, None].to(weights)
            found = found + share * own / own.sum(dim=-1, keepdim=True).clamp_min(TINY)
        return found


def grouped_as_weights(edits: Sequence[Edit], chosen: Callable[[Grouped], bool] = lambda edit: True) -> list[Edit]:
    """The edits of one call, `Grouped` as an edit of weights and first of these: whoever reads weights sees them so."""
    first = [edit for edit in edits if isinstance(edit, Grouped) and chosen(edit)]
    return [*(edit.as_weights() for edit in first), *(edit for edit in edits if edit not in first)] if first else list(edits)


def grouped_beside_others(edits: Sequence[Edit]) -> list[Edit]:
    """The same where others act on its rows, and as it is where none do."""
    return grouped_as_weights(edits, lambda edit: any(map(edit.meets, _before(edit, edits))))


def _before(edit: Edit, edits: Sequence[Edit]) -> list[Edit]:
    """Those that would act before an edit of outputs."""
    place = [other is edit for other in edits].index(True)
    return [other for n, other in enumerate(edits) if other.level in ("scores", "weights") or n < place]


def _taken(tensor: Tensor, index: Tensor) -> Tensor:
    return tensor if len(index) == tensor.shape[2] else tensor[:, :, index]


def _seen(rows: Rows, at: slice | Tensor, part: _Part) -> tuple[Tensor | None, Tensor | None]:
    """(the call's own mask for an attention, bool [.., queries, 1] of rows that see any of its columns), None where all is seen."""
    mask, causal = rows.mask, None
    if rows.is_causal:
        if rows.offset is None:
            raise ReattendError(
                "PoolKV has merged the columns of this call, so which of them a row of Grouped sees is not known"
            )
        causal = (part.keys <= part.queries[:, None] + rows.offset)[None, None]
    if mask is not None:
        mask = mask if mask.shape[0] == 1 else mask[at]
        mask = (mask if mask.shape[2] == 1 else mask[:, :, part.queries])[..., part.keys]
        if causal is not None:
            mask = mask & causal if mask.dtype == torch.bool else mask.masked_fill(~causal, float("-inf"))
    else:
        mask = causal
    if mask is None:
        return None, None
    alive = (mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2).any(dim=-1, keepdim=True)
    return mask | ~alive if mask.dtype == torch.bool else mask.masked_fill(~alive, 0.0), alive
