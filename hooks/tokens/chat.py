"""Who says what in a prompt: the roles "system", "user" and "assistant", found by the markers of the tokenizer's chat template.

The markers are learned from the template itself: conversations with made-up contents are rendered, and what stands between the
contents are the markers from one speaker to the next. No table of templates is kept.
"""

from __future__ import annotations

import os
import weakref
from typing import Any

import torch

from ...interventions import TokenMap
from .spans import tokenizer_of
from .transcript import Transcript

ROLES = ("system", "user", "assistant")
CONVERSATIONS = (
    ("user",),
    ("user", "assistant"),
    ("user", "assistant", "user"),
    ("user", "assistant", "user", "assistant"),
    ("system", "user"),
    ("system", "user", "assistant", "user"),
)
# (speaker before, speaker after) -> the markers between their contents; None is the outside of the conversation
Markers = dict[tuple[str | None, str | None], list[str]]
_learned: weakref.WeakKeyDictionary[Any, tuple[Any, Markers]] = weakref.WeakKeyDictionary()


def add_chat_roles(tokens: TokenMap, given: Any, rows: list[Transcript]) -> None:
    """Adds the roles that occur in these rows. given: a tokenizer or processor with a chat template."""
    markers = markers_of(given)
    for index, row in enumerate(rows):
        for role, start, stop in turns(row.text, markers):
            if role not in tokens.roles:
                tokens.roles[role] = torch.zeros(tokens.batch, tokens.prompt_length, dtype=torch.bool)
            tokens.roles[role][index, row.overlapping(start, stop)] = True


def has_template(given: Any) -> bool:
    return _speaker(given) is not None


def _speaker(given: Any) -> Any:
    """The object whose chat template counts: the processor's own before its tokenizer's."""
    return next((x for x in (given, tokenizer_of(given)) if getattr(x, "chat_template", None)), None)


def turns(text: str, markers: Markers) -> list[tuple[str, int, int]]:
    """(role, start, stop) of every content in a rendered conversation; empty where no marker occurs."""
    found: list[tuple[str, int, int]] = []
    role: str | None = None
    place = 0
    while True:
        best: tuple[int, int, str | None] | None = None
        for (before, after), strings in markers.items():
            for marker in strings if before == role else ():
                at = text.find(marker, place)
                # of markers at one place the longest counts: the end of a turn is often the beginning of a longer marker
                if at >= 0 and (best is None or (at, -len(marker)) < best[:2]):
                    best = (at, -len(marker), after)
        if role is not None:
            stop = len(text) if best is None else best[0]
            if stop > place:
                found.append((role, place, stop))
        if best is None:
            return found
        place, role = best[0] - best[1], best[2]


def markers_of(given: Any) -> Markers:
    """The markers of a tokenizer's or processor's chat template; empty where they cannot be told from the contents."""
    speaker = _speaker(given)
    template = str(speaker.chat_template)
    known = _learned.get(speaker)
    if known is None or known[0] != template:
        known = (template, learn(speaker, getattr(tokenizer_of(given), "bos_token", None)))
        _learned[speaker] = known
    return known[1]


def learn(speaker: Any, bos: str | None = None) -> Markers:
    """Markers from renderings with made-up contents. A template that puts the system's text into the user's turn has no system role."""
    pieces: Markers = {}
    for roles in CONVERSATIONS:
        for generate in (False, True) if roles[-1] == "user" else (False,):
            rendered = _pieces(speaker, roles, generate)
            # after the last content comes the end, or with a generation prompt the assistant's turn
            after = [*roles, "assistant" if generate else None]
            for before, then, piece in zip((None, *roles), after, rendered):
                strings = pieces.setdefault((before, then), [])
                if piece not in strings:
                    strings.append(piece)
    inner = [piece for (before, _), strings in pieces.items() if before is not None for piece in strings]
    if bos and not any(bos in piece for piece in inner):
        # prompts are also written without it; where it opens every turn (ChatML) it belongs to the markers
        for then in ROLES:
            if (None, then) in pieces:
                pieces[(None, then)] = [piece.removeprefix(bos) for piece in pieces[(None, then)]]
    if any(not piece.strip() for piece in pieces.get(("system", "user"), [""])):
        pieces = {key: strings for key, strings in pieces.items() if "system" not in key}
    _drop_default_system(pieces)
    for role in ROLES:
        header = _header(pieces, role)
        if header is not None and header not in pieces.setdefault((None, role), []):
            pieces[(None, role)].append(header)
    # a marker of white space alone would be found in any text
    return {key: kept for key, strings in pieces.items() if (kept := [s for s in strings if s.strip()])}


def _pieces(speaker: Any, roles: tuple[str, ...], generate: bool) -> list[str]:
    """What a rendering puts before, between and after its contents; empty where the template refuses or alters them."""
    contents = [f"reattend{i}marks{i}content" for i in range(len(roles))]
    for wrap in (str, lambda text: [{"type": "text", "text": text}]):
        conversation = [{"role": role, "content": wrap(text)} for role, text in zip(roles, contents)]
        try:
            text = speaker.apply_chat_template(conversation, tokenize=False, add_generation_prompt=generate)
        except Exception:
            continue  # a template is its author's program: it may refuse a role or a kind of content in any way
        if isinstance(text, str) and all(text.count(content) == 1 for content in contents):
            result = []
            for content in contents:
                piece, _, text = text.partition(content)
                result.append(piece)
            return [*result, text]
    return []


def _drop_default_system(pieces: Markers) -> None:
    """Opens no user turn with the template's default system text: that text is the system's content."""
    pairs = [(a, b) for a in pieces.get((None, "system"), []) for b in pieces.get(("system", "user"), [])]
    pieces[(None, "user")] = [
        piece
        for piece in pieces.get((None, "user"), [])
        if not any(piece.startswith(a) and piece.endswith(b) and len(piece) >= len(a) + len(b) for a, b in pairs)
    ]


def _header(pieces: Markers, role: str) -> str | None:
    """A turn's own opening, without the end of the turn before: for conversations that begin in an unusual way."""
    before = {"user": "assistant", "assistant": "user"}.get(role)
    ends = [s for s in pieces.get((before, None), []) if s]
    full = pieces.get((before, role), [])
    if before is None or not ends or not full:
        return None
    header = full[0].removeprefix(os.path.commonprefix([full[0], *ends]))
    return header if header.strip() and header != full[0] else None
