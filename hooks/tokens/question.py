"""The question of a prompt: the user's last turn without template, image and wrapper tokens, and the words of it that matter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from ...interventions import ReattendError, TokenMap
from .spans import Passages, add_spans, tokenizer_of
from .transcript import Transcript


class Asked(Passages, Protocol):
    """What a step of the spans door says of a question."""

    words: Callable[[str], list[tuple[int, int]]] | None
    must_read: bool


def add_question(
    tokens: TokenMap, ids: Tensor | None, step: Asked, given: Any, read: Callable[[], list[Transcript] | None]
) -> None:
    """Adds the roles of a question to the map. given: the session's tokenizer or processor; `read` as in `add_spans`.

    Raises ReattendError where the text has to be read and there is no tokenizer, or no ids, to read it with; and as `add_spans`.
    """
    rows = None if ids is None else read()
    named = step.texts is not None or step.ranges is not None
    if rows is None and (step.must_read or not named):
        missing = "the tokenizer: reattend.apply(model, ..., tokenizer=processor)" if ids is not None else "input_ids"
        remedy = "" if named else "; or name its tokens by ranges"
        raise ReattendError(f"the user's question is read as text, which needs {missing}{remedy}")
    if named:
        add_spans(tokens, ids, step, read)
    found = tokens.roles[step.name].clone() if named else _last_turn(tokens)
    for role in ("image", "video", "padding"):
        if role in tokens.roles:
            found &= ~tokens.roles[role].cpu()
    words = found.clone()
    if rows is not None and ids is not None:
        special = special_ids(tokenizer_of(given))
        found &= torch.tensor([[int(i) not in special for i in row] for row in ids.tolist()])[:, : found.shape[1]]
        words = torch.zeros_like(found)
        for index, row in enumerate(rows):
            for piece in _pieces(found[index], row):
                words[index, _words(piece, row, step.words)] = True
    # a question of nothing but little words is read whole
    words |= found & ~words.any(dim=1, keepdim=True)
    tokens.roles[step.name], tokens.roles[f"{step.name}-words"] = found, words


def special_ids(tokenizer: Any) -> set[int]:
    """Ids that no user types: turn markers, image wrappers, separators. An unknown word is the user's own."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    ids = {int(i) for i in getattr(tokenizer, "all_special_ids", ())} | {int(i) for i, t in added.items() if t.special}
    return ids - {getattr(tokenizer, "unk_token_id", None)}


def _last_turn(tokens: TokenMap) -> Tensor:
    """Bool [B, prompt]: what the user said last."""
    spoken = torch.zeros(tokens.batch, tokens.prompt_length, dtype=torch.bool)
    for role in ("system", "user", "assistant"):
        if role in tokens.roles:
            spoken |= tokens.roles[role]
    user = tokens.roles.get("user", torch.zeros_like(spoken))
    # turns are apart: the last one is what follows the user's last start
    starts = user & ~torch.nn.functional.pad(user, (1, 0))[:, :-1]
    turn = starts.long().cumsum(dim=1)
    last = user & (turn == turn[:, -1:])
    return torch.where(spoken.any(dim=1, keepdim=True), last, torch.ones_like(last))


def _pieces(found: Tensor, row: Transcript) -> list[list[int]]:
    """Runs of tokens between images, as indices into the transcript; takes the white space at their ends out of `found`."""
    pieces: list[list[int]] = [[]]
    for i, position in enumerate(row.positions):
        if bool(found[position]):
            pieces[-1].append(i)
        elif pieces[-1]:
            pieces.append([])
    kept = []
    for piece in pieces:
        for end in (0, -1):
            while piece and not _text(row, piece[end]).strip():
                found[row.positions[piece.pop(end)]] = False
        if piece:
            kept.append(piece)
    return kept


def _text(row: Transcript, i: int) -> str:
    return row.text[slice(*row.offsets[i])]


def _words(piece: list[int], row: Transcript, words: Callable[[str], list[tuple[int, int]]] | None) -> list[int]:
    """Positions of the piece's tokens that share a character with one of its words."""
    if words is None:
        return [row.positions[i] for i in piece]
    start, stop = row.offsets[piece[0]][0], row.offsets[piece[-1]][1]
    ranges = [(a + start, b + start) for a, b in words(row.text[start:stop])]
    return [row.positions[i] for i in piece if any(row.offsets[i][0] < b and row.offsets[i][1] > a for a, b in ranges)]
