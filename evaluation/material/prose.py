"""Real prose that every Python brings along: the paragraphs of its own reference manual (pydoc_data.topics), nothing is downloaded.

The text differs a little between versions of Python; `digest()` tells which one was read.
"""

from __future__ import annotations

import functools
import hashlib
import random
import re
from collections.abc import Iterator


@functools.cache
def paragraphs() -> tuple[str, ...]:
    """Paragraphs of whole sentences; tables, listings, grammar and headings are left out."""
    from pydoc_data.topics import topics

    found = []
    for name in sorted(topics):
        for block in topics[name].split("\n\n"):
            lines = block.strip("\n").splitlines()
            # prose starts at the margin and runs over several lines; everything else is indented, framed or marked
            if len(lines) < 2 or any(line[:1] in " |+*-=~^>" or "::=" in line or ">>>" in line for line in lines):
                continue
            text = " ".join(" ".join(lines).split())
            if text[0].isupper() and text[-1] == ".":
                found.append(text)
    return tuple(dict.fromkeys(found))


@functools.cache
def text() -> str:
    """All paragraphs in one text, with an empty line between them."""
    return "\n\n".join(paragraphs())


@functools.cache
def digest() -> str:
    """First 12 hexadecimal digits of the text's SHA-256."""
    return hashlib.sha256(text().encode()).hexdigest()[:12]


@functools.cache
def all_sentences() -> tuple[str, ...]:
    return tuple(s for paragraph in paragraphs() for s in re.split(r"(?<=[.!?])\s+(?=[A-Z])", paragraph))


def sentences(seed: int | str = 0) -> Iterator[str]:
    """Endless sentences in their order, from a place that the seed chooses."""
    known = all_sentences()
    start = random.Random(seed).randrange(len(known))
    while True:
        yield known[start]
        start = (start + 1) % len(known)
