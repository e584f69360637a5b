"""A row of token ids as text, with the characters that every token stands for. Shared by spans and chat roles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

Offsets = list[tuple[int, int]]
UNFINISHED = "\ufffd"  # what decoders write for the bytes of a character that is not complete yet


@dataclass(frozen=True)
class Transcript:
    """One row's prompt: its text, and per real token its position in the row and its characters [start, stop)."""

    text: str
    positions: list[int]
    offsets: Offsets

    def overlapping(self, start: int, stop: int) -> list[int]:
        """Positions of the tokens that share at least one character with text[start:stop]."""
        return [p for p, (a, b) in zip(self.positions, self.offsets) if a < stop and b > start]


def transcripts(ids: Tensor, padding: Tensor, tokenizer: Any) -> list[Transcript]:
    """One Transcript per row of ids [B, T]; padding [B, T] bool is left out. Equal rows (beams) are read once."""
    known: dict[tuple[int, ...], tuple[str, Offsets]] = {}
    result = []
    for row, hidden in zip(ids.tolist(), padding.tolist()):
        positions = [i for i, skip in enumerate(hidden) if not skip]
        real = tuple(row[i] for i in positions)
        if real not in known:
            known[real] = read(list(real), tokenizer)
        result.append(Transcript(known[real][0], positions, known[real][1]))
    return result


def read(ids: list[int], tokenizer: Any) -> tuple[str, Offsets]:
    """Text of the ids and [start, stop) of each. Negative ids (tokens that are not known) are one unreadable character each."""
    text, offsets, start = "", [], 0
    for i in range(len(ids) + 1):
        if i < len(ids) and ids[i] >= 0:
            continue
        if i > start:
            piece, inside = _read_known(ids[start:i], tokenizer)
            offsets += [(a + len(text), b + len(text)) for a, b in inside]
            text += piece
        if i < len(ids):
            offsets.append((len(text), len(text) + 1))
            text += UNFINISHED
        start = i + 1
    return text, offsets


def _read_known(ids: list[int], tokenizer: Any) -> tuple[str, Offsets]:
    text = _decode(ids, tokenizer)
    if getattr(tokenizer, "is_fast", False):
        again = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        if list(again["input_ids"]) == ids:
            return text, [(int(a), int(b)) for a, b in again["offset_mapping"]]
    return _grow(ids, tokenizer)


def _grow(ids: list[int], tokenizer: Any) -> tuple[str, Offsets]:
    """Text and offsets by decoding ever longer pieces: for ids that the tokenizer would split in another way, or a slow tokenizer.

    Each step decodes from the token before, because decoders treat the first token of a text in a special way (a leading space).
    Tokens that only together make a character share its range.
    """
    text: str = ""
    offsets: Offsets = []
    context = done = 0
    for i in range(len(ids)):
        before = _decode(ids[context:done], tokenizer)
        now = _decode(ids[context : i + 1], tokenizer)
        if now.endswith(UNFINISHED) and i + 1 < len(ids):
            continue
        new = now[len(before) :]
        offsets += [(len(text), len(text) + len(new))] * (i + 1 - done)
        text += new
        context, done = done, i + 1
    return text, offsets


def _decode(ids: list[int], tokenizer: Any) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
