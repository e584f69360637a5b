"""Image tokens that a text token's context does not look at are hidden from it: focus scores from text over text to image, and the cut.

All of it works on head means and on text rows alone: [text rows, text + image tokens] per layer, never the whole matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..call import Call, TokenMap
from ..edits import Edit, Rows
from ..engine.kernels import rows_per_chunk
from ..engine.reading import row_weights
from .gaze import image_columns


@dataclass(eq=False)
class TextAndImage:
    """Which positions of a prompt are image tokens, and which are text after an image, for all rows of the batch together.

    image [I] and text [n] long: positions that are one in any row of the batch; is_image [B, I], is_text [B, n] bool: in which.
    after [B, 1] bool: the rows of the batch in which all that is generated is text after an image. length: of the prompt. All of these are
    where the model computes; on the CPU are places [I], the same as image, and marked [B, length] bool, the text. everywhere: whether all rows
    of the batch have an image.
    """

    image: Tensor
    is_image: Tensor
    text: Tensor
    is_text: Tensor
    after: Tensor
    length: int
    places: Tensor
    marked: Tensor
    everywhere: bool

    @classmethod
    def of(cls, tokens: TokenMap, device: torch.device) -> TextAndImage:
        length = tokens.prompt_length
        image = image_columns(tokens)
        every = tokens.positions("image", 0, length)
        text = (image.cumsum(dim=1) > 0) & ~every & ~tokens.positions("padding", 0, length)
        at, near = (part.any(dim=0).nonzero()[:, 0] for part in (image, text))
        return cls(
            at.to(device),
            image[:, at].to(device),
            near.to(device),
            text[:, near].to(device),
            image.any(dim=1, keepdim=True).to(device),
            length,
            at,
            text,
            bool(image.any(dim=1).all()),
        )

    @property
    def end(self) -> int:
        """The position after the last image token."""
        return int(self.places[-1]) + 1 if len(self.places) else 0

    def rows(self, start: int, stop: int) -> Tensor:
        """Bool [B, stop - start]: the text rows after an image among these positions; what is generated is text."""
        generated = self.after.expand(-1, max(0, stop - max(start, self.length)))
        return (
            torch.cat([self.marked[:, start:stop].to(generated.device), generated], dim=1) if start < self.length else generated
        )


@dataclass(eq=False)
class Inhibited:
    """Image tokens hidden from rows of one pass: index [R] long, the query rows; hidden [B, R, I] bool; at what [I] columns."""

    index: Tensor
    hidden: Tensor
    columns: Tensor

    @classmethod
    def of(cls, index: Tensor, hidden: Tensor, where: TextAndImage, key_start: int) -> Inhibited:
        """key_start: the position of a call's first column; image tokens before it have left its window."""
        left = int((where.places < key_start).sum())
        columns = where.image[left:]
        return cls(index, hidden[:, :, left:], columns - key_start if key_start else columns)

    def without(self, weights: Tensor, rows: Rows) -> Tensor:
        """Weights [B, H, R, Tk] without those of the hidden pairs; rows keep their sum, and all of their weights where nothing is left."""
        # rows of other edits may be among them: they are not looked at
        place = torch.searchsorted(self.index, rows.index).clamp_max(self.index.numel() - 1)
        part = self.hidden[:, place]
        drop = torch.zeros(weights.shape[0], part.shape[1], weights.shape[3], dtype=torch.bool, device=weights.device)
        drop[:, :, self.columns] = part
        kept = weights.masked_fill(drop[:, None], 0.0)
        total = kept.sum(dim=-1, keepdim=True)
        scale = weights.sum(dim=-1, keepdim=True) / total.clamp_min(torch.finfo(weights.dtype).tiny)
        return torch.where(total > 0, kept * scale, weights)


def focus_scores(
    call: Call, edits: Sequence[Edit], index: Tensor, known: tuple[TextAndImage, Tensor] | None, where: TextAndImage
) -> tuple[Tensor, Tensor]:
    """(F [B, R, I], what text looks at [B, n, I]) from the head-mean weights of the query rows `index` after the edits.

    F[i, j] sums over the prompt's text tokens k <= i, and over i itself, the weight of i on k times that of k on image token j. Rows are
    not normalised over text, which changes no ranking inside a row. known: what the text of an earlier pass (a chunk, the turn before)
    looks at, and the positions of that pass.
    """
    start, first = call.total - call.num_queries, call.key_start
    settled = known is not None and known[0] is where and start >= where.length
    if known is not None and settled:
        looks = known[1]  # only generated tokens: what the prompt's text looks at stays
    else:
        looks = torch.zeros(*where.is_text.shape, where.image.numel(), device=call.query.device)
    if known is not None and not settled:
        before, seen = known
        text, image = torch.isin(where.text, before.text), torch.isin(where.image, before.image)
        old = seen[:, torch.isin(before.text, where.text)][:, :, torch.isin(before.image, where.image)]
        looks[:, text.nonzero(), image.nonzero()[:, 0]] = old
    parts = []
    for part in index.split(rows_per_chunk(call.batch, call.num_heads, call.num_keys, call.query.device)):
        weights = pad(row_weights(call, edits, part).mean(dim=1).float(), (first, 0))  # on absolute positions
        at = part + start
        on_image = weights[:, :, where.image] * where.is_image[:, None]
        on_text = weights[:, :, where.text] * where.is_text[:, None]
        own = weights[:, torch.arange(len(at), device=at.device), at] * (at >= where.length)
        parts.append((on_text, own, on_image))
    if start < where.length and index.numel():
        row = torch.searchsorted(index + start, where.text).clamp_max(index.numel() - 1)
        seen = torch.cat([image for _, _, image in parts], dim=1)[:, row] * where.is_text[..., None]
        looks = torch.where((index[row] + start == where.text)[:, None], seen, looks)
    scores = [torch.baddbmm(own[..., None] * image, text, looks) for text, own, image in parts]
    return torch.cat(scores, dim=1), looks


def least_focused(scores: Tensor, at: Tensor, where: TextAndImage, share: float) -> Tensor:
    """Bool [B, R, I]: of each row's image tokens (those before it) the floor(share * count) with the least focus; ties stay."""
    there = where.is_image[:, None] & (where.image[None, None] < at[None, :, None])
    ordered = scores.masked_fill(~there, float("inf")).sort(dim=-1).values
    count = (there.sum(dim=-1, keepdim=True) * share + 1e-6).floor().long()
    limit = ordered.gather(-1, count.clamp_max(ordered.shape[-1] - 1))
    return there & (scores < limit)
