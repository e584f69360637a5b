"""Which words of a question say what to look for: by part of speech where spaCy is installed, else all but function words."""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Callable
from typing import Any

from ...interventions import ReattendError

SPACY_MODEL = "en_core_web_sm"
INFORMATIVE = ("NOUN", "PROPN", "VERB", "ADJ", "ADV", "NUM")

# Ours: English words that carry grammar and little content, roughly the closed classes (pronouns, articles, prepositions,
# conjunctions, auxiliaries, particles), with the question words.
_LISTED = """
a an the this that these those such same other another each every either neither both all any some no none
i you he she it we they me him her us them my your his its our their mine yours hers ours theirs
myself yourself himself herself itself ourselves themselves ones someone somebody something anyone anybody anything
everyone everybody everything nobody nothing there here
who whom whose which what when where why how whether if whatever whichever whoever
of in on at by for from to into onto with without within about above below over under up down out off through during before
after between among against toward towards across along around near as than like per via
and or but nor so yet because although though while unless until since
am is are was were be been being do does did done doing have has had having will would shall should can could may might must
isn't aren't wasn't weren't don't doesn't didn't haven't hasn't hadn't won't wouldn't shouldn't can't cannot couldn't
what's where's who's how's it's that's there's i'm you're we're they're i've you've let's let
not n't s t please yes ok okay
"""
FUNCTION_WORDS = frozenset(_LISTED.split())
WORD = re.compile(r"\w+(?:['\u2019]\w+)*")


def chooser(mode: str) -> Callable[[str], list[tuple[int, int]]] | None:
    """words(text) -> [start, stop) of the words that count; None = all of them.

    Raises ReattendError for mode "spacy" where spaCy or its English model is missing.
    """
    if mode == "all":
        return None
    if mode == "spacy" and not has_spacy():
        raise ReattendError(
            f'words="spacy" needs `pip install spacy` and `python -m spacy download {SPACY_MODEL}`; words="content" does without'
        )
    return tagged_words if mode != "content" and has_spacy() else content_words


def content_words(text: str) -> list[tuple[int, int]]:
    """Words that are not in FUNCTION_WORDS."""
    return [m.span() for m in WORD.finditer(text) if m.group().lower().replace("\u2019", "'") not in FUNCTION_WORDS]


def tagged_words(text: str) -> list[tuple[int, int]]:
    """Nouns, names, verbs, adjectives, adverbs and numbers, as spaCy tags them."""
    return [(t.idx, t.idx + len(t.text)) for t in _tagger()(text) if t.pos_ in INFORMATIVE]


def has_spacy() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("spacy", SPACY_MODEL))


@functools.cache
def _tagger() -> Any:
    return importlib.import_module("spacy").load(SPACY_MODEL, disable=["parser", "ner", "lemmatizer"])
