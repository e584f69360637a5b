"""The user's own token sets: passages found in the prompt's text, or token ranges."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from ...interventions import ReattendError, TokenMap
from .transcript import Offsets, Transcript

T = TypeVar("T")
SHOWN = 160
BEGIN_EARLIER = "begin the session before the prompt is read, or pass the whole prompt without that cache"
IN_PIECES = (
    "a prompt that is passed in pieces is known in advance under generate(prefill_chunk_size=...) alone, else pass it at once"
)


class Passages(Protocol):
    """What a step of the spans door says: which passages or ranges, and the name of their role."""

    name: str
    texts: list[list[str]] | None
    ranges: list[list[tuple[int, int]]] | None
    occurrence: int | None
    official: bool | Literal["inside"]


def add_spans(tokens: TokenMap, ids: Tensor | None, spans: Passages, read: Callable[[], list[Transcript] | None]) -> None:
    """Makes `spans.name` a role of the map. `read` gives the transcripts of all rows, or None without a tokenizer.

    Raises ReattendError: no tokenizer or no ids for passages, a passage that is missing or ambiguous, a range outside the prompt,
    or lists that do not fit the batch.
    """
    found = torch.zeros(tokens.batch, tokens.prompt_length, dtype=torch.bool)
    if spans.ranges is not None:
        real = ~tokens.roles["padding"]
        real[:, : tokens.virtual] = False
        for row, ranges in enumerate(per_row(spans.ranges, tokens.batch, ids, "ranges")):
            positions = real[row].nonzero()[:, 0]
            for start, stop in ranges:
                if stop > len(positions):
                    raise ReattendError(
                        f"range ({start}, {stop}) ends beyond prompt {row}, which has {len(positions)} tokens without padding; {IN_PIECES}"
                    )
                found[row, positions[start:stop]] = True
    if spans.texts is not None:
        if ids is None:
            raise ReattendError(
                "a passage is found by its text, but the model was called with inputs_embeds: pass input_ids or ranges"
            )
        rows = read()
        if rows is None:
            raise ReattendError(
                "a passage is found by its text, for which the tokenizer is needed: reattend.apply(model, ..., tokenizer=tokenizer)"
            )
        for row, texts in enumerate(per_row(spans.texts, tokens.batch, ids, "texts")):
            for text in texts:
                found[row, _locate(rows[row], text, spans, row, tokens)] = True
    tokens.roles[spans.name] = found


def per_row(given: Sequence[list[T]], batch: int, ids: Tensor | None, what: str) -> list[list[T]]:
    """One list for each row: given once for all, per row, or per prompt where generation has repeated the prompts (beams)."""
    times, rest = divmod(batch, len(given))
    repeated = ids is None or rest or torch.equal(ids, ids[::times].repeat_interleave(times, dim=0))
    if len(given) > 1 and (rest or not repeated):
        raise ReattendError(f"{len(given)} lists of {what} for {batch} prompts: give one list per prompt, or one list for all")
    return [given[row // times] for row in range(batch)]


def _locate(row: Transcript, text: str, spans: Passages, index: int, tokens: TokenMap) -> list[int]:
    places = _occurrences(row.text, text)
    if not places and tokens.unread:
        raise ReattendError(
            f"{text!r} is not in what was read of prompt {index}, and {tokens.unread} tokens of it stand in a cache that was filled "
            f"when this session did not look: {BEGIN_EARLIER}"
        )
    if not places:
        shown = row.text[:SHOWN] + ("..." if len(row.text) > SHOWN else "")
        hint = (
            "; for other passages in each prompt give one list per prompt"
            if tokens.batch > 1 and len(spans.texts or ()) == 1
            else ""
        )
        raise ReattendError(f"{text!r} is not in prompt {index}, which begins {shown!r}{hint}; {IN_PIECES}")
    if spans.occurrence is None and len(places) > 1:
        raise ReattendError(
            f"{text!r} occurs {len(places)} times in prompt {index}: give occurrence=0 for the first, 1 for the second, "
            f"-1 for the last, or a longer passage"
        )
    which = spans.occurrence or 0
    if not -len(places) <= which < len(places):
        raise ReattendError(f"occurrence={which}, but {text!r} occurs {len(places)} times in prompt {index} (counted from 0)")
    start = places[which]
    if spans.official == "inside":
        return [row.positions[i] for i in inside_range(row.offsets, start, len(text))]
    if spans.official:
        first, stop = official_range(row.offsets, start, len(text))
        return row.positions[first:stop]
    return row.overlapping(start, start + len(text))


def _occurrences(text: str, passage: str) -> list[int]:
    places, start = [], text.find(passage)
    while start >= 0:
        places.append(start)
        start = text.find(passage, start + 1)
    return places


def official_range(offsets: Offsets, start: int, length: int) -> tuple[int, int]:
    """Token range [first, stop) of a passage by PASTA's rule: both bounds inclusive, so a token that ends where it starts joins."""
    stop = start + length
    first = next(i for i, (a, b) in enumerate(offsets) if a <= start <= b)
    last = next(i for i, (a, b) in enumerate(offsets) if a <= stop <= b)
    return first, last + 1


def inside_range(offsets: Offsets, start: int, length: int, before: int = 1, after: int = 0) -> list[int]:
    """Tokens of a passage by SEKA's rule: those that lie inside it, `before` and `after` characters more allowed.

    A token of one character that ends where the passage starts joins; one that begins earlier and reaches into it is lost.
    """
    return [i for i, (a, b) in enumerate(offsets) if a < b and a >= start - before and b <= start + length + after]


def tokenizer_of(given: Any) -> Any:
    """The tokenizer itself, also from a processor that holds one."""
    return getattr(given, "tokenizer", given)
