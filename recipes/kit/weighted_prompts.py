"""Prompts with weights in them, as users of image generators write them: "a (red:1.4) circle"."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple, overload

from ...hooks.tokens.words import joined
from ...interventions import ReattendError
from .checks import shown

# an escaped sign, a bracket, or what lies between
PIECES = re.compile(r"\\[()\\]|[()]|[^()\\]+|\\")
NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)")
# what is no weight for want of a bracket
BEFORE_CLOSED, AFTER_OPENED = re.compile(rf":\s*{NUMBER.pattern}\s*$"), re.compile(rf":\s*{NUMBER.pattern}\s*($|[,.;)\s])")
ITSELF = r"a bracket itself is written \( and \)"


class Weighted(NamedTuple):
    """start, stop: of the words in the plain prompt."""

    start: int
    stop: int
    factor: float
    written: str


@overload
def plain_prompt(prompt: str) -> str: ...
@overload
def plain_prompt(prompt: Sequence[str]) -> list[str]: ...
def plain_prompt(prompt: str | Sequence[str]) -> str | list[str]:
    """What a pipeline is given of a prompt with weights: "a red circle" of "a (red:1.4) circle"; of several prompts a list.

    A recipe cannot take the brackets out of what a pipeline was given: they would be tokens, read by every text encoder, and in the pooled
    text too. So the prompt is written once, the pipeline gets this, and prompt-reweight the prompt itself as `words`. Brackets without a
    colon, and colons outside brackets, are text; a bracket that is meant as one is written \\( and \\). Raises ReattendError for weights that
    are no plain numbers, words that are empty or parts of words, weights in weights, and a bracket of a weight that has no partner.
    """
    if isinstance(prompt, str):
        return _read(prompt)[0]
    if not isinstance(prompt, Sequence) or not all(isinstance(one, str) for one in prompt):
        raise ReattendError(f"prompt must be a text or a list of texts, got {shown(prompt)}")
    return [_read(one)[0] for one in prompt]


def weighted(prompt: str) -> list[tuple[tuple[str, int], float]]:
    """[((word or passage, which occurrence of it in the plain prompt), factor)] of a prompt with "(word:factor)" in it."""
    plain, found = _read(prompt)
    return [((plain[one.start : one.stop], occurrence(plain, one.start, one.stop)), one.factor) for one in found]


def written_weights(prompt: str) -> list[str]:
    """The weights of a prompt as they stand in it: "(red:1.4)"."""
    return [one.written for one in _read(prompt)[1]]


def occurrence(text: str, start: int, stop: int) -> int:
    """Which occurrence of a passage stands there, as the words of a prompt are counted: whole words, in any case, one blank as good as two."""
    wanted = re.compile(r"\s+".join(map(re.escape, text[start:stop].split())), re.IGNORECASE)
    count = at = 0
    while (found := wanted.search(text, at)) is not None and found.start() < start:
        count += not (joined(text, found.start()) or joined(text, found.end()))
        at = found.start() + 1
    return count


def _read(prompt: str) -> tuple[str, list[Weighted]]:
    """(the plain prompt, its weights in their order)."""
    plain = ""
    # the brackets that are open: their places in the plain prompt, in the prompt, and that of the last colon in them
    opened: list[list[int]] = []
    found: list[Weighted] = []
    for piece in PIECES.finditer(prompt):
        sign = piece[0]
        if sign == "(":
            opened.append([len(plain), piece.start(), -1])
        if sign == ")" and not opened and BEFORE_CLOSED.search(plain):
            raise ReattendError(
                f"a weight in a prompt has no opening bracket before {prompt[: piece.end()][-40:]!r} ({ITSELF})"
            )
        if sign != ")" or not opened:
            if opened and ":" in sign:
                opened[-1][2] = len(plain) + sign.rindex(":")
            plain += sign[1:] if len(sign) > 1 and sign[0] == "\\" else sign
            continue
        start, begins, colon = opened.pop()
        if colon < 0:
            plain += sign
            continue
        one = _weight(plain, start, colon, prompt[begins : piece.end()])
        if found and found[-1].start > start:
            raise ReattendError(f"weights in a prompt cannot stand in one another: {one.written!r:.80} holds a weight already")
        found.append(one)
        plain = plain[:start] + plain[start + 1 : colon]
    if any(AFTER_OPENED.search(plain, start) for start, _, _ in opened):
        raise ReattendError(f"a weight in a prompt has no closing bracket after {prompt[opened[-1][1] :]!r:.40} ({ITSELF})")
    for one in found:
        if joined(plain, one.start) or joined(plain, one.stop):
            raise ReattendError(
                f"a weight in a prompt belongs to whole words or passages; {one.written!r:.80} stands inside a word"
            )
    return plain, sorted(found)


def _weight(plain: str, start: int, colon: int, written: str) -> Weighted:
    """The weight of the bracket that stands at `start` of the plain prompt, whose number comes after `colon`."""
    number, inside = plain[colon + 1 :].strip(), plain[start + 1 : colon]
    if not NUMBER.fullmatch(number):
        raise ReattendError(f'a weight in a prompt is a number, as in "a (red:1.4) circle"; got {written!r:.80} ({ITSELF})')
    word = inside.strip()
    if not word:
        raise ReattendError(f"a weight in a prompt belongs to a word or passage before its colon; got {written!r:.80}")
    # where the words stand once the bracket before them is gone
    first = start + len(inside) - len(inside.lstrip())
    return Weighted(first, first + len(word), float(number), written)
