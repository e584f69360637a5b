"""Two prompts side by side: which columns of a source prompt's text go to which of an edited one's, as in prompt-to-prompt.

A mapping is (transfer [K, K], own [K]): the edited picture's weights are A_source @ transfer + A own. Columns of the same encoder are mapped
to each other; those after the prompt (padding) stay where they are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...hooks.tokens.words import Text
from ...interventions import ReattendError

Mapping = tuple[Tensor, Tensor]
KEEP, LEFT, UP = 0, 1, 2


@dataclass(frozen=True)
class Tokens:
    """What one encoder reads of a prompt. ids, columns: of its tokens with start and end, columns ascending; words: texts, each with the
    columns of its tokens; room: all columns of the encoder's text, padding too."""

    ids: Sequence[int]
    columns: Sequence[int]
    words: Sequence[tuple[str, Sequence[int]]]
    room: frozenset[int]

    @classmethod
    def of(cls, text: Text) -> Tokens:
        own, script = text.words, text.transcript
        inside = [span for column, span in zip(script.positions, script.offsets, strict=True) if column in own]
        words: list[tuple[str, list[int]]] = []
        if inside:
            start, stop = min(a for a, _ in inside), max(b for _, b in inside)
            for found in re.finditer(r"\S+", script.text[start:stop]):
                columns = [c for c in script.overlapping(start + found.start(), start + found.end()) if c in own]
                # a token may hold the end of one word and the start of the next in no encoder that is known; it belongs to the first
                columns = [c for c in columns if not words or c not in words[-1][1]]
                if columns:
                    words.append((found.group(), columns))
        return cls(text.stream.ids, text.stream.columns, words, frozenset(text.stream.touched))


def mapping(
    kind: str,
    source: Sequence[tuple[str, Tokens]],
    edited: Sequence[tuple[str, Tokens]],
    width: int,
    aligned: bool,
    prompt: str,
) -> Mapping:
    """The mapping of whole texts of `width` columns. source, edited: (name of an encoder, its tokens); prompt: how errors call the edited one.

    Raises ReattendError where the two are not read by the same encoders into the same columns, and for "replace" prompts of different
    numbers of words.
    """
    transfer, own = torch.eye(width), torch.zeros(width)
    done: set[int] = set()
    there = dict(source)
    for name, tokens in edited:
        if name not in there or there[name].room != tokens.room:
            raise ReattendError(
                f"{prompt} and the source are not read into the same columns by {name}: give both in one call, or runs, of the same length"
            )
        if tokens.room & done:
            continue  # a second encoder writes beside the first one
        done |= tokens.room
        places = sorted(tokens.room)
        transfer[:, places] = 0
        part = replaced(there[name], tokens, prompt, aligned) if kind == "replace" else refined(there[name], tokens)
        for column in places:
            for other, share in part[0].get(column, {}).items():
                transfer[other, column] = share
            own[column] = 1.0 if column in part[1] else 0.0
    return transfer, own


# {own column: {source column: share}}, and own columns that keep their own weights
_Part = tuple[dict[int, dict[int, float]], set[int]]


def replaced(source: Tokens, edited: Tokens, prompt: str, aligned: bool = False) -> _Part:
    """Words that differ take the source words' columns: one by one where they have as many tokens, else each an even share of all.

    Other columns before the last such word take those of the same tokens. After it each takes the column of its own number, as in the official
    code, although they stand elsewhere where the words before have more or fewer tokens; aligned: also there those of the same tokens.
    """
    if len(source.words) != len(edited.words):
        raise ReattendError(
            f'edit "replace" needs prompts of as many words: the source has {len(source.words)}, {prompt} has {len(edited.words)}; '
            '"refine" serves others'
        )
    swaps = [(mine, theirs) for (one, mine), (other, theirs) in zip(source.words, edited.words, strict=True) if one != other]
    room = sorted(edited.room)
    found: dict[int, dict[int, float]] = {column: {} for column in room}
    i = j = 0  # places in the source's and the edited prompt's columns
    for theirs, mine in swaps:
        while room[i] < theirs[0]:
            found[room[j]][room[i]] = 1.0
            i, j = i + 1, j + 1
        if len(theirs) == len(mine):
            for there, here in zip(theirs, mine, strict=True):
                found[here][there] = 1.0
        else:
            for here in mine:
                found[here] = dict.fromkeys(theirs, 1 / len(mine))
        i, j = i + len(theirs), j + len(mine)
    for place in range(j, len(room)):
        other = i + place - j if aligned else place
        if other < len(room):
            found[room[place]][room[other]] = 1.0
    return found, set()


def refined(source: Tokens, edited: Tokens) -> _Part:
    """Tokens that both prompts have, by global alignment, take the source's columns; those that the source has not keep their own."""
    found: dict[int, dict[int, float]] = {column: {column: 1.0} for column in edited.room}
    kept: set[int] = set()
    for place, other in enumerate(alignment(source.ids, edited.ids)):
        column = edited.columns[place]
        found[column] = {} if other is None else {source.columns[other]: 1.0}
        if other is None:
            kept.add(column)
    # what follows the prompt stays where it is
    return found, kept


def alignment(source: Sequence[int], edited: Sequence[int]) -> list[int | None]:
    """For each token of the edited prompt the source's token that it is aligned with, or None (Needleman-Wunsch: gap 0, match 1, mismatch
    -1). Of equally good alignments the one in which, read from the end, the edited prompt's tokens come without partner first."""
    score = [[0] * (len(edited) + 1) for _ in range(len(source) + 1)]
    came = [[LEFT] * (len(edited) + 1) for _ in range(len(source) + 1)]
    for i in range(1, len(source) + 1):
        came[i][0] = UP
        for j in range(1, len(edited) + 1):
            pair = score[i - 1][j - 1] + (1 if source[i - 1] == edited[j - 1] else -1)
            score[i][j] = max(score[i][j - 1], score[i - 1][j], pair)
            came[i][j] = LEFT if score[i][j] == score[i][j - 1] else UP if score[i][j] == score[i - 1][j] else KEEP
    found: list[int | None] = [None] * len(edited)
    i, j = len(source), len(edited)
    while i or j:
        step = came[i][j]
        if step == KEEP:
            i, j = i - 1, j - 1
            found[j] = i
        elif step == LEFT:
            j -= 1
        else:
            i -= 1
    return found
