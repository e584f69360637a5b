"""The text of one pass of a denoiser: its rows, which of them are the prompt's, and what text encoders wrote there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...interventions import ReattendError
from ..actions import RootCall
from .denoisers import DenoiserForward
from .text_columns import Encoded, Held, Stream, held_by, read_row, row_held

# under which a call keeps the lengths of what was put after its prompt, in order: second texts, and what fills up the prompt
AFTER = "columns after the prompt"
ENCODE_WITHIN = "encode the prompt while the session lasts (pipe.encode_prompt), or give columns"


@dataclass
class PassText:
    """texts: [rows, columns, width] each, whose columns run on from one to the next. frames: rows of the text for each of the batch.
    conditional: such rows of the batch; source: of each row of the batch, the one that it was copied from. held: prints of the texts.
    after: further columns after the prompt."""

    texts: list[Tensor]
    frames: int
    conditional: list[int]
    source: list[int]
    encoded: Sequence[Encoded]
    held: list[Held]
    after: int = 0

    @classmethod
    def of(cls, call: RootCall, encoded: Sequence[Encoded]) -> PassText:
        """Raises ReattendError where rows are not known, or the text has another form."""
        forward, clock = call.forward, call.clock
        assert isinstance(forward, DenoiserForward)
        if not clock.branches:
            raise ReattendError(
                "which rows of this denoiser's batch are conditional is not known; say it around the call: with reattend.rows(...)"
            )
        texts = [text for text in map(call.given.get, forward.family.text) if text is not None]
        if not texts or not all(isinstance(text, Tensor) and text.dim() == 3 and len(text) == len(texts[0]) for text in texts):
            kind = type(forward.denoiser).__name__
            raise ReattendError(f"{kind} gets its text in another form than [rows, columns, width], where words are not found")
        if len(texts[0]) % forward.batch:
            raise ReattendError(f"this denoiser gets {len(texts[0])} rows of text for a batch of {forward.batch}")
        after = sum(call.kept.get(AFTER, ()))
        if after:
            texts[-1] = texts[-1][:, :-after]
        marked = clock.branches.get("conditional")
        conditional = [] if marked is None else marked.nonzero()[:, 0].tolist()
        source = list(range(forward.batch)) if clock.source is None else clock.source.tolist()
        held = [held_by(text, encoded) for text in texts] if conditional else []
        return cls(texts, len(texts[0]) // forward.batch, conditional, source, encoded, held, after)

    @property
    def rows(self) -> int:
        return len(self.texts[0])

    @property
    def width(self) -> int:
        """All columns."""
        return sum(text.shape[1] for text in self.texts) + self.after

    @property
    def own(self) -> list[int]:
        """The conditional rows that no guide has added."""
        return [row for row in self.conditional if self.source[row] == row]

    @property
    def key(self) -> tuple:
        """The same for passes whose texts hold the same in rows of the same kind."""
        held = tuple(row_held(self.held, row * self.frames) for row in self.conditional)
        copies = () if self.encoded else tuple(self.copied(row) for row in self.conditional if self.source[row] != row)
        return self.rows, self.width, tuple(self.conditional), tuple(self.source), held, copies

    def read(self, row: int, tokenizers: Mapping[str, Any]) -> list[Stream]:
        """What each text encoder wrote into one row."""
        return read_row(self.texts, self.held, row, self.encoded, tokenizers)

    def copied(self, row: int) -> bool:
        """Whether a row of the batch has the text of the one that it was copied from."""
        first, other = row * self.frames, self.source[row] * self.frames
        return all(bool((text[first] == text[other]).all()) for text in self.texts)

    def unread(self, row: int, streams: Sequence[Stream]) -> str:
        """What an error adds where a row holds more than was seen."""
        read = len(set().union(*(stream.touched for stream in streams)))
        held = sum(int(text[row].any(dim=1).sum()) for text in self.texts)
        if read >= held:
            return ""
        return f"; only {read} of its {held} columns came from a text encoder while this session looked: {ENCODE_WITHIN}"
