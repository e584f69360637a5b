"""Segments of a prompt: passages that adjoin and can change places, found by text or range, and prompts put together from them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...interventions import ReattendError, ReattendWarning, TokenMap
from .spans import BEGIN_EARLIER, Passages, per_row, tokenizer_of
from .transcript import Transcript

SHOWN = 60


def role_of(name: str, index: int) -> str:
    return f"{name}.{index}"


def add_segments(tokens: TokenMap, ids: Tensor | None, step: Passages, read: Callable[[], list[Transcript] | None]) -> None:
    """Makes the segments roles of the map. `read` as in `add_spans`.

    Raises ReattendError: as `add_spans`, and for segments that share a token, have different tokens between them or tokens inside that
    the attention mask hides.
    """
    real = ~tokens.roles["padding"]
    real[:, : tokens.virtual] = False
    places = [row.nonzero()[:, 0].tolist() for row in real]
    given: Sequence[list[Any]]
    if step.ranges is not None:
        given = per_row(step.ranges, tokens.batch, ids, "ranges")
        found = [sorted(row) for row in given]
    else:
        given = per_row(step.texts or [], tokens.batch, ids, "texts")
        rows = None if ids is None else read()
        if rows is None:
            missing = "input_ids instead of inputs_embeds" if ids is None else "reattend.apply(model, ..., tokenizer=tokenizer)"
            raise ReattendError(f"segments are found by their text, which needs {missing}; or give their token ranges")
        found = [_find(row, texts, index, tokens.unread) for index, (row, texts) in enumerate(zip(rows, given, strict=True))]
    spans = []
    for index, (row, place) in enumerate(zip(found, places, strict=True)):
        row = _checked(row, len(place), index)
        if ids is not None:
            row = _adjoined(row, [int(ids[index, p]) for p in place], index)
        _unbroken(row, place, index)
        spans.append([[place[i] for i in range(start, stop)] for start, stop in row])
    for k in range(max(map(len, spans), default=0)):
        role = torch.zeros(tokens.batch, tokens.prompt_length, dtype=torch.bool)
        for index, row in enumerate(spans):
            if k < len(row):
                role[index, row[k]] = True
        tokens.roles[role_of(step.name, k)] = role


def _find(row: Transcript, texts: list[str], index: int, unread: int = 0) -> list[tuple[int, int]]:
    """Token ranges of the texts, counted from the first real token. Longer texts first, so that one may stand inside another."""
    taken: list[tuple[int, int]] = []
    for text in sorted(set(texts), key=len, reverse=True):
        places, start = [], row.text.find(text)
        while start >= 0:
            stop = start + len(text)
            if all(stop <= a or start >= b for a, b in taken):
                places.append((start, stop))
            start = row.text.find(text, start + 1)
        wanted = texts.count(text)
        if len(places) != wanted:
            if unread:
                raise ReattendError(
                    f"the segments of prompt {index} cannot be told: {unread} tokens of it stand in a cache that was filled when this "
                    f"session did not look: {BEGIN_EARLIER}"
                )
            shown = text if len(text) <= SHOWN else text[:SHOWN] + "..."
            raise ReattendError(
                f"segment {shown!r} stands {len(places)} times in prompt {index} and {wanted} times in the list of its segments: "
                f"list what stands there, or give token ranges"
            )
        taken += places
    found, borders = [], set()
    for start, stop in sorted(taken):
        inside = [i for i, (a, b) in enumerate(row.offsets) if a < stop and b > start]
        found.append((inside[0], inside[-1] + 1))
        borders.add((row.text[row.offsets[inside[0]][0] : start], row.text[stop : row.offsets[inside[-1]][1]]))
    if len(borders) > 1:
        warnings.warn(
            f"the borders of the segments of prompt {index} are tokenised differently, so their order may still matter a little: begin "
            f"and end all of them in the same way, or put the prompt together with reattend.hooks.tokens.segments.joined",
            ReattendWarning,
            stacklevel=2,
        )
    return found


def _checked(row: list[tuple[int, int]], length: int, index: int) -> list[tuple[int, int]]:
    for start, stop in row:
        if stop > length:
            raise ReattendError(
                f"range ({start}, {stop}) ends beyond prompt {index}, which has {length} tokens without padding"
            )
    for (a, b), (c, d) in zip(row, row[1:]):
        if c < b:
            raise ReattendError(
                f"segments ({a}, {b}) and ({c}, {d}) of prompt {index} share a token: put them together from tokens with "
                f"reattend.hooks.tokens.segments.joined, or part them by a line break"
            )
    return row


def _unbroken(row: list[tuple[int, int]], place: list[int], index: int) -> None:
    if not row:
        return
    inside = place[row[0][0] : row[-1][1]]
    gap = next((a + 1 for a, b in zip(inside, inside[1:]) if b != a + 1), None)
    if gap is not None:
        raise ReattendError(
            f"attention_mask hides token {gap} of prompt {index}, which stands inside its segments: segments can only change places as "
            f"a whole, so leave hidden tokens out of them"
        )


def _adjoined(row: list[tuple[int, int]], ids: list[int], index: int) -> list[tuple[int, int]]:
    """The segments with the tokens between them: a part that stands before each one, and a part that follows each one."""
    if len(row) < 2:
        return row
    first, last = row[0][0], row[-1][1]
    gaps = [ids[b:c] for (_, b), (c, _) in zip(row, row[1:])]
    size = len(gaps[0])
    if any(gap != gaps[0] for gap in gaps):
        raise ReattendError(
            f"between the segments of prompt {index} stand different tokens: mark segments that adjoin (with their headings), or part "
            f"all of them by the same text"
        )
    for lead in range(size, -1, -1):
        tail = size - lead
        before, after = ids[max(0, first - lead) : first], ids[last : last + tail]
        if before == gaps[0][tail:] and after == gaps[0][:tail] and first > lead and last + tail < len(ids):
            return [(a - lead, b + tail) for a, b in row]
    if size:
        raise ReattendError(
            f"what parts the segments of prompt {index} stands neither before the first nor after the last of them, so they "
            f"cannot change places: begin or end each segment in the same way, and mark it with that"
        )
    side = "before its first segment" if first < 1 else "after its last segment"
    raise ReattendError(f"prompt {index} has no token {side}: segments need text on both sides (an instruction, a question)")


def joined(tokenizer: Any, before: str, segments: Sequence[str], after: str) -> tuple[dict[str, Tensor], list[tuple[int, int]]]:
    """A prompt whose segments keep their tokens in every order: each part is tokenised by itself. (model inputs, token ranges).

    Joint tokenisation may melt the last token of a segment with the first of the next one.
    """
    tokenizer = tokenizer_of(tokenizer)
    ids = list(tokenizer(before)["input_ids"])
    ranges = []
    for text in segments:
        own = tokenizer(text, add_special_tokens=False)["input_ids"]
        ranges.append((len(ids), len(ids) + len(own)))
        ids += own
    ids += tokenizer(after, add_special_tokens=False)["input_ids"]
    row = torch.tensor([ids])
    return {"input_ids": row, "attention_mask": torch.ones_like(row)}, ranges
