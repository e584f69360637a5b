"""`Keep`: only the pairs of a pattern stay. A pattern is a tensor of all pairs, or a form that costs what it keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ReattendError
from .base import Columns, Rows, Shape, as_columns, batch_rows, column_mask, key_heads, lead, repeat_heads
from .scores import ScoreEdit


class Pattern:
    """Pairs of query rows and key columns that stay."""

    def fit(self, shape: Shape) -> None:
        """Raises ReattendError where the pattern is made for another call."""

    @property
    def heads(self) -> int:
        """For how many heads it has lists of its own; 1 where heads share everything."""
        return 1

    def at_heads(self, index: Sequence[int]) -> Pattern:
        """The same pattern with these of its lists."""
        return self

    def at_batch(self, index: Tensor) -> Pattern:
        """The same pattern for these rows of the batch."""
        raise NotImplementedError

    def pairs(self, rows: Rows, num_keys: int) -> Tensor:
        """Bool [B or 1, heads or 1, R, num_keys]: the pairs that stay, of the rows of a chunk with the call's own columns."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Blocks(Pattern):
    """Block sparsity: the pair of row i and column j stays iff keep[.., (i - start) // size, (j - start) // size].

    keep: bool [B or 1, H or Hkv or 1, nq, nk] (or without its first axes), nq and nk as many blocks as cover the call's rows and columns
    from `start` on. size: of a block, one number or (rows, columns). start: the row and column where the blocks begin; rows before it
    see everything, columns before it are always kept. dense_columns: bool [Tk] or [B, Tk] or indices of columns that are always kept;
    dense_rows: bool [Tq] or [B, Tq], rows that see everything.
    """

    keep: Tensor
    size: int | tuple[int, int]
    dense_columns: Columns | None = None
    dense_rows: Tensor | None = None
    start: int | tuple[int, int] = 0

    def __post_init__(self) -> None:
        if self.keep.dtype != torch.bool:
            raise ReattendError("keep of Blocks must be a bool tensor [batch, heads, query blocks, key blocks]")
        object.__setattr__(self, "keep", lead(self.keep, 2, "keep of Blocks"))
        for name, least in (("size", 1), ("start", 0)):
            pair = getattr(self, name)
            pair = (pair, pair) if isinstance(pair, int) else tuple(pair)
            if len(pair) != 2 or min(pair) < least:
                raise ReattendError(f"{name} of Blocks must be {least} or more, one number or (rows, columns), got {pair}")
            object.__setattr__(self, name, pair)
        if self.dense_columns is not None:
            columns = as_columns("dense_columns", self.dense_columns)
            if columns.dtype == torch.bool and columns.dim() > 2:
                raise ReattendError("dense_columns must be bool [keys] or [batch, keys], or a list of column indices")
            object.__setattr__(self, "dense_columns", columns)
        if self.dense_rows is not None:
            if self.dense_rows.dtype != torch.bool or self.dense_rows.dim() not in (1, 2):
                raise ReattendError("dense_rows must be a bool tensor [queries] or [batch, queries]")
            object.__setattr__(self, "dense_rows", self.dense_rows.view(-1, self.dense_rows.shape[-1]))

    @property
    def sizes(self) -> tuple[int, int]:
        return self.size  # type: ignore[return-value]

    @property
    def starts(self) -> tuple[int, int]:
        return self.start  # type: ignore[return-value]

    def cover(self, queries: int, keys: int | None) -> None:
        """Raises ReattendError where the blocks do not cover these query rows and keys."""
        for axis, tokens, what in ((0, queries, "query rows"), (1, keys, "keys")):
            if tokens is None:
                continue
            wanted = -(-max(0, tokens - self.starts[axis]) // self.sizes[axis])
            if self.keep.shape[2 + axis] != wanted:
                raise ReattendError(
                    f"blocks of {self.sizes[axis]} from {self.starts[axis]} on cover {tokens} {what} with {wanted} blocks, but keep has "
                    f"{self.keep.shape[2 + axis]}; its shape is {list(self.keep.shape)}"
                )

    def fit(self, shape: Shape) -> None:
        self.cover(shape.queries, shape.keys)
        if self.dense_rows is not None and self.dense_rows.shape[1] not in (1, shape.queries):
            raise ReattendError(f"dense_rows has {self.dense_rows.shape[1]} query rows, this call has {shape.queries}")
        for name in ("keep", "dense_rows", "dense_columns"):
            value = getattr(self, name)
            if value is not None and value.dtype == torch.bool and value.dim() > 1 and value.shape[0] not in (1, shape.batch):
                raise ReattendError(f"{name} has values for {value.shape[0]} batch rows, this call has {shape.batch}")
        if shape.keys is not None:
            self.always(shape.keys)

    @property
    def heads(self) -> int:
        return self.keep.shape[1]

    def at_heads(self, index: Sequence[int]) -> Blocks:
        return dataclasses.replace(self, keep=self.keep[:, list(index)])

    def at_batch(self, index: Tensor) -> Blocks:
        columns = self.dense_columns
        if isinstance(columns, Tensor) and columns.dtype == torch.bool and columns.dim() == 2:
            columns = batch_rows(columns, index)
        rows = None if self.dense_rows is None else batch_rows(self.dense_rows, index)
        return dataclasses.replace(self, keep=batch_rows(self.keep, index), dense_columns=columns, dense_rows=rows)

    def always(self, num_keys: int) -> Tensor | None:
        """Bool [B or 1, num_keys]: the columns of `dense_columns`; None where there are none."""
        if self.dense_columns is None:
            return None
        return column_mask(self.dense_columns, num_keys, self.keep.device).view(-1, num_keys)

    def pairs(self, rows: Rows, num_keys: int) -> Tensor:
        self.cover(rows.query.shape[2], num_keys)
        column = torch.arange(num_keys, device=rows.index.device)
        own, block = ((x - a).clamp_min(0) // n for x, a, n in zip((rows.index, column), self.starts, self.sizes))
        kept = self.keep[:, :, own][..., block] if self.keep.numel() else self.keep.new_zeros(1, 1, 1, 1)
        kept = kept | (rows.index < self.starts[0])[:, None] | (column < self.starts[1])
        always = self.always(num_keys)
        if always is not None:
            kept = kept | always[:, None, None]
        if self.dense_rows is not None:
            dense = self.dense_rows if self.dense_rows.shape[1] == 1 else self.dense_rows[:, rows.index]
            kept = kept | dense[:, None, :, None]
        return kept


@dataclass(frozen=True, eq=False)
class Chosen(Pattern):
    """The same columns for every row, other ones for each head: what decode steps read of a long cache.

    index: long [B or 1, H or Hkv or 1, m] (or without its first axes), each column once. valid: bool of the same shape, False where a
    place of `index` is not used (heads or batch rows with fewer columns); None = all are.
    """

    index: Tensor
    valid: Tensor | None = None

    def __post_init__(self) -> None:
        if self.index.dtype != torch.long:
            raise ReattendError("index of Chosen must be a long tensor [batch, key heads, columns]")
        if self.valid is not None and (self.valid.dtype != torch.bool or self.valid.shape != self.index.shape):
            raise ReattendError(f"valid of Chosen must be bool {list(self.index.shape)}, as index")
        for name in ("index", "valid"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, lead(value, 1, f"{name} of Chosen"))

    def fit(self, shape: Shape) -> None:
        if self.index.shape[0] not in (1, shape.batch):
            raise ReattendError(f"index of Chosen is for {self.index.shape[0]} batch rows, this call has {shape.batch}")
        if shape.keys is None or not self.index.numel() or self.index.device.type != "cpu":
            return
        least, most = (int(x) for x in self.index.aminmax())
        if least < 0 or most >= shape.keys:
            raise ReattendError(f"column {least if least < 0 else most} is outside the {shape.keys} keys of the call")

    @property
    def heads(self) -> int:
        return self.index.shape[1]

    def at_heads(self, index: Sequence[int]) -> Chosen:
        return Chosen(self.index[:, list(index)], None if self.valid is None else self.valid[:, list(index)])

    def at_batch(self, index: Tensor) -> Chosen:
        valid = None if self.valid is None else batch_rows(self.valid, index)
        return Chosen(batch_rows(self.index, index), valid)

    def pairs(self, rows: Rows, num_keys: int) -> Tensor:
        # unused places write into a column of their own, which is dropped
        index = self.index if self.valid is None else self.index.masked_fill(~self.valid, num_keys)
        kept = torch.zeros(*index.shape[:2], num_keys + 1, dtype=torch.bool, device=index.device)
        return kept.scatter_(2, index, True)[:, :, None, :num_keys]


@dataclass(frozen=True, eq=False, kw_only=True)
class Keep(ScoreEdit):
    """S = -inf but for the pairs of `pattern`. Rows left without any key keep theirs.

    pattern: a bool tensor [..., Tq, Tk] (True = keep), a Band, Blocks, or Chosen columns.
    """

    pattern: Tensor | Pattern
    broadcast = {"pattern": 2}
    per_row = ("pattern",)
    per_column = ("pattern",)
    batched = ("pattern",)
    reads_operands = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.pattern, Tensor) and self.pattern.dtype != torch.bool:
            raise ReattendError("pattern must be a bool tensor [..., queries, keys], a Band, Blocks or Chosen columns")
        if self.heads is not None and self._lists not in (1, len(self.heads)):
            raise ReattendError(
                f"pattern has lists for {self._lists} heads, but the edit names {len(self.heads)} (heads={list(self.heads)}): give "
                f"{len(self.heads)}, or 1 for all of them"
            )

    @property
    def _lists(self) -> int:
        return self.pattern.heads if isinstance(self.pattern, Pattern) else 1

    def _has_head_axis(self) -> bool:
        return self._lists > 1 or super()._has_head_axis()

    def _is_per_key_head(self, kv_heads: int) -> bool:
        return self._lists == kv_heads

    def _check_shapes(self, shape: Shape) -> None:
        super()._check_shapes(shape)
        if isinstance(self.pattern, Pattern):
            wanted = (1, shape.heads, shape.kv_heads) if self.heads is None else (1, len(self.heads))
            if self._lists not in wanted:
                raise ReattendError(
                    f"pattern of Keep has lists for {self._lists} heads, this call has {shape.heads} heads on {shape.kv_heads} key heads"
                )
            self.pattern.fit(shape)

    def _cut(self, positions: Sequence[int]) -> Keep:
        new = super()._cut(positions)
        if self._lists > 1:
            assert isinstance(self.pattern, Pattern)
            heads, kv_heads = getattr(self, "_call_heads", (0, 0))
            own = key_heads(positions, heads // kv_heads) if self._lists == kv_heads else list(positions)
            object.__setattr__(new, "pattern", self.pattern.at_heads(own))
        return new

    def on_scores(self, scores: Tensor, rows: Rows) -> Tensor:
        if isinstance(self.pattern, Pattern):
            keep = self.pattern.pairs(rows, scores.shape[3] - rows.appended)
            keep = keep if keep.shape[1] == 1 else repeat_heads(keep, scores.shape[1])
        else:
            keep = self.pattern if self.pattern.shape[2] == 1 else self.pattern[:, :, rows.index]
        keep = torch.nn.functional.pad(keep, (0, rows.appended), value=True)
        kept = scores.masked_fill(~keep, float("-inf"))
        emptied = (kept == float("-inf")).all(dim=-1, keepdim=True)
        return torch.where(emptied, scores, kept)
