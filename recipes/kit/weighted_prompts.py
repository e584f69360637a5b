"""Prompts with weights in them, as users of image generators write them: "a (red:1.4) circle"."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import overload

from ...interventions import ReattendError

# an escaped sign, or (words:number)
PIECES = re.compile(r"\\([()\\])|\(([^()]*):([^():]*)\)")
# what is left of brackets inside brackets
NESTED = re.compile(r"\([^()]*:[^()]*\)")
ESCAPED = {"(": "\ue000", ")": "\ue001", "\\": "\ue002"}


@overload
def plain_prompt(prompt: str) -> str: ...
@overload
def plain_prompt(prompt: Sequence[str]) -> list[str]: ...
def plain_prompt(prompt: str | Sequence[str]) -> str | list[str]:
    """What a pipeline is given of a prompt with weights: "a red circle" of "a (red:1.4) circle"; of several prompts a list.

    A recipe cannot take the brackets out of what a pipeline was given: they would be tokens, read by every text encoder, and in the pooled
    text too. So the prompt is written once, the pipeline gets this, and prompt-reweight the prompt itself as `words`. A bracket that is
    meant as one is written \\( and \\). Raises ReattendError for weights that are no numbers, words that are empty, and brackets in brackets.
    """
    if isinstance(prompt, str):
        return _read(prompt)[0]
    return [_read(one)[0] for one in prompt]


def weighted(prompt: str) -> list[tuple[tuple[str, int], float]]:
    """[((word or passage, which occurrence of it in the plain prompt), factor)] of a prompt with "(word:factor)" in it."""
    return _read(prompt)[1]


def _read(prompt: str) -> tuple[str, list[tuple[tuple[str, int], float]]]:
    plain, found, end = "", [], 0
    for piece in PIECES.finditer(prompt):
        plain, end = plain + prompt[end : piece.start()], piece.end()
        if piece[1] is not None:
            plain += ESCAPED[piece[1]]
            continue
        word = piece[2].strip()
        try:
            factor = float(piece[3])
        except ValueError:
            raise ReattendError(
                f'a weight in a prompt is a number, as in "a (red:1.4) circle"; got {piece[0]!r:.80} (a bracket itself is written \\( and \\))'
            ) from None
        if not word:
            raise ReattendError(f"a weight in a prompt belongs to a word or passage before its colon; got {piece[0]!r:.80}")
        before = re.findall(rf"(?<!\w){re.escape(word)}(?!\w)", plain, re.IGNORECASE)
        found.append(((word, len(before)), factor))
        plain += piece[2]
    plain += prompt[end:]
    if nested := NESTED.search(plain):
        raise ReattendError(
            f"weights in a prompt cannot stand in one another: {_signs(nested[0])!r:.80} holds a weight already"
        )
    return _signs(plain), found


def _signs(text: str) -> str:
    for sign, stand_in in ESCAPED.items():
        text = text.replace(stand_in, sign)
    return text
