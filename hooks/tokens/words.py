"""Words of a denoiser's prompt: the columns of its text that hold them, read on every text encoder's own tokens."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ...interventions import ReattendError
from .text_columns import BEGINNINGS, Stream
from .transcript import Transcript, read

Word = str | tuple[str, int]
Occurrence = int | Literal["all"] | None
SHOWN = 160


@dataclass(frozen=True)
class Text:
    """One row of a text as one text encoder reads it. begins: where the prompt begins in it."""

    stream: Stream
    transcript: Transcript
    begins: int
    tokenizer: Any

    @classmethod
    def of(cls, stream: Stream, tokenizer: Any) -> Text:
        text, offsets = read(stream.ids, tokenizer)
        begins = max((text.rfind(mark) + len(mark) for mark in BEGINNINGS if mark in text), default=0)
        return cls(stream, Transcript(text, stream.columns, offsets), begins, tokenizer)

    @property
    def start(self) -> set[int]:
        return set(self.stream.starts)

    @property
    def end(self) -> set[int]:
        return set(self.stream.ends)

    @property
    def words(self) -> set[int]:
        """Columns of the prompt's own tokens: no start, no end and nothing after it, nothing that the tokenizer calls special."""
        special = set(getattr(self.tokenizer, "all_special_ids", ()))
        found: set[int] = set()
        for id, column, (start, _) in zip(self.stream.ids, self.stream.columns, self.transcript.offsets, strict=True):
            if start >= self.begins and found and column in self.stream.ends and not self.stream.starts[1:]:
                break
            if start >= self.begins and id not in special:
                found.add(column)
        return found

    def shown(self) -> str:
        text = self.tokenizer.decode(self.stream.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
        return text[:SHOWN] + ("..." if len(text) > SHOWN else "")

    def places(self, word: str) -> list[set[int]]:
        """The columns of each occurrence of a word or passage, in the order of the prompt."""
        wanted = _lower(self._as_read(word))
        text = _lower(self.transcript.text)
        found: list[set[int]] = []
        start = text.find(wanted, self.begins) if wanted else -1
        while start >= 0:
            stop = start + len(wanted)
            if not (joined(text, start) or joined(text, stop)):
                found.append(set(self.transcript.overlapping(start, stop)))
            start = text.find(wanted, start + 1)
        return found

    def _as_read(self, word: str) -> str:
        """A word as the tokenizer would give it back; "" where it has no tokens for it."""
        ids = list(self.tokenizer(word, add_special_tokens=False)["input_ids"])
        if set(ids) & set(getattr(self.tokenizer, "all_special_ids", ())):
            return ""
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False).strip()


def texts_read(streams: Sequence[Stream], tokenizers: Mapping[str, Any]) -> list[Text]:
    """One row of a text as each text encoder reads it."""
    return [Text.of(stream, tokenizers[stream.encoder]) for stream in streams]


def columns_of(
    word: Word, occurrence: Occurrence, texts: Sequence[Text], prompt: int, needed: bool = True, hint: str = ""
) -> set[int]:
    """The columns of a word in all encoders' texts; none where it is missing and not needed. Raises ReattendError where it is missing (with
    the hint) or ambiguous, or where two encoders that share columns have it at different ones."""
    name, which = (word, occurrence) if isinstance(word, str) else word
    places = [text.places(name) for text in texts]
    counts = {len(each) for each in places if each}
    most = max(counts, default=0)
    if not most and not needed:
        return set()
    if not most:
        parts = [part.strip() for part in name.split(",")]
        if not hint and len(parts) > 1 and all(part and any(text.places(part) for text in texts) for part in parts):
            hint = f"several words are a list of them, [{', '.join(parts)}]"
        texts_shown = " and ".join(dict.fromkeys(repr(text.shown()) for text in texts))
        raise ReattendError(
            f"{name!r} is not in prompt {prompt}, which its text encoders read as {texts_shown}{hint and f': {hint}'}"
        )
    if which is None and most > 1:
        raise ReattendError(
            f'{name!r} occurs {most} times in prompt {prompt}: give occurrence="all", 0 for the first, 1 for the second, or a longer passage'
        )
    if isinstance(which, int) and not -most <= which < most:
        raise ReattendError(f"occurrence={which}, but {name!r} occurs {most} times in prompt {prompt} (counted from 0)")
    if isinstance(which, int) and which < 0 and len(counts) > 1:
        raise ReattendError(
            f"occurrence={which}, but the text encoders read {name!r} {sorted(counts)} times in prompt {prompt}: count from the first, 0"
        )
    chosen: list[set[int]] = []
    for each in places:
        if which != "all" and each:
            index = which or 0
            each = [each[index]] if index < len(each) else []
        chosen.append(set().union(*each))
    _agree(name, texts, chosen, prompt)
    return set().union(*chosen)


def _agree(word: str, texts: Sequence[Text], chosen: Sequence[set[int]], prompt: int) -> None:
    """Two encoders that write side by side into the same columns must have the word at the same ones."""
    for i, (one, mine) in enumerate(zip(texts, chosen, strict=True)):
        for other, theirs in list(zip(texts, chosen, strict=True))[:i]:
            shared = one.stream.touched & other.stream.touched
            if mine & shared != theirs & shared:
                raise ReattendError(
                    f"{word!r} stands in columns {sorted(theirs)} of what {other.stream.encoder} reads of prompt {prompt} and in "
                    f"{sorted(mine)} of what {one.stream.encoder} reads, and the two share their columns: give both the same text"
                )


def _lower(text: str) -> str:
    """Lower case, where that changes no positions."""
    lowered = text.lower()
    return lowered if len(lowered) == len(text) else text


def joined(text: str, at: int) -> bool:
    """Whether the characters before and at a position belong to one word; scripts that are written without spaces have no words."""
    return 0 < at < len(text) and all(
        c.isalnum() and unicodedata.east_asian_width(c) not in "WF" for c in text[at - 1 : at + 1]
    )
