"""CHAIR (Rohrbach et al. 2018, arXiv 1809.02156): which objects a caption mentions that are not in the picture.

A vocabulary maps words to canonical objects; several words may mean one object. Always report recall and length with the two rates: a
model that says less hallucinates less.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .sums import Sums, ratio


def words_of(text: str) -> list[str]:
    """Lower-cased words and punctuation marks, hyphens and apostrophes kept inside words."""
    return re.findall(r"\w+(?:[-'’]\w+)*|[^\w\s]", text.lower())


@dataclass(frozen=True)
class Vocabulary:
    """What counts as an object in a text.

    synonyms: word or two-word phrase -> object. pairs: two-word phrase -> the word or phrase that stands for it ("baby giraffe" ->
    "giraffe", "hot dog" -> "hot dog"), so that its parts do not count. without: {word: other word}: the first is dropped from texts that
    hold the second (a toilet's seat is no chair). singular: a function that brings a word to its dictionary form, if you have one.
    """

    synonyms: Mapping[str, str]
    pairs: Mapping[str, str] = field(default_factory=dict)
    without: Mapping[str, str] = field(default_factory=lambda: {"seat": "toilet"})
    singular: Callable[[str], str] | None = None

    @classmethod
    def of(cls, groups: Iterable[Sequence[str]], pairs: Mapping[str, str] | None = None, **options: Any) -> Vocabulary:
        """From groups of synonyms, the object's own name first. Phrases of two words stand for themselves unless `pairs` says otherwise."""
        synonyms = {word: group[0] for group in groups for word in group}
        phrases = {word: word for word in synonyms if word.count(" ") == 1}
        return cls(synonyms, {**phrases, **(pairs or {})}, **options)

    def words(self, caption: str) -> list[str]:
        """A caption's words, known phrases as one; their number is the caption's length."""
        words = words_of(caption)
        if self.singular is not None:
            words = [self.singular(word) for word in words]
        merged, place = [], 0
        while place < len(words):
            phrase = self.pairs.get(" ".join(words[place : place + 2])) if place + 1 < len(words) else None
            merged.append(phrase or words[place])
            place += 2 if phrase else 1
        return merged

    def mentions(self, caption: str) -> list[str]:
        """The objects that a caption mentions, in order and with repeats."""
        words = self.words(caption)
        present = set(words)
        return [self.synonyms[w] for w in words if w in self.synonyms and self.without.get(w) not in present]


def chair_counts(mentions: Sequence[str], truth: Iterable[str], words: int = 0) -> dict[str, float]:
    """What one caption adds. mentions: as `Vocabulary.mentions` finds them; truth: objects in the picture; words: the caption's length."""
    there, said = set(truth), set(mentions)
    wrong = [name for name in mentions if name not in there]
    return {
        "captions": 1,
        "captions_wrong": float(bool(wrong)),
        "mentions": len(mentions),
        "mentions_wrong": len(wrong),
        "said": len(said),
        "there": len(there),
        "found": len(said & there),
        "words": words,
    }


def chair_metrics(sums: Mapping[str, Any]) -> dict[str, Any]:
    """chair_i, chair_s, recall, precision, f1 and length (mean words) from summed `chair_counts`; a zero denominator gives 0."""
    recall, precision = ratio(sums["found"], sums["there"]), ratio(sums["found"], sums["said"])
    return {
        "chair_i": ratio(sums["mentions_wrong"], sums["mentions"]),
        "chair_s": ratio(sums["captions_wrong"], sums["captions"]),
        "recall": recall,
        "precision": precision,
        "f1": ratio(2 * precision * recall, precision + recall),
        "length": ratio(sums["words"], sums["captions"]),
    }


def chair(captions: Sequence[str], truths: Sequence[Iterable[str]], vocabulary: Vocabulary) -> dict[str, float]:
    """Metrics of captions. truths: the objects of each caption's picture (for COCO: instances and objects of reference captions)."""
    counts = (
        chair_counts(vocabulary.mentions(caption), truth, len(vocabulary.words(caption)))
        for caption, truth in zip(captions, truths, strict=True)
    )
    return {name: float(value) for name, value in chair_metrics(Sums.of(counts)).items()}
