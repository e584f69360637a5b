"""Which columns of a denoiser's text hold which tokens of which text encoder, told by what the columns hold.

A pipeline cuts, pads, joins, repeats and reorders what its text encoders give it, each in its own way; none of that changes what a
column holds. So a column belongs to the token whose state stands in it, bit for bit: for prompts that the pipeline encodes or the user
did, in any number of pieces and rows. Of every state a few channels are kept, which tell tokens apart as well as all of them do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

CHANNELS = 8
# Texts in which a prompt begins only after words of the pipeline's own that reach the denoiser.
BEGINNINGS = ("<Prompt Start>",)
# print of a column that holds zeros, and multipliers of the other prints, one for each channel
EMPTY = -1
PRIMES = (2654435761, 2246822519, 3266489917, 668265263, 374761393, 2971215073, 433494437, 2654435789)


@dataclass(eq=False)
class Encoded:
    """One pass of a text encoder. ids [R, T] long, real [R, T] bool: what is no padding, None where no mask says it. states: (width,
    sample [R, T, CHANNELS]) each."""

    encoder: str
    ids: Tensor
    real: Tensor | None
    states: list[tuple[int, Tensor]] = field(default_factory=list)
    known: dict[tuple[int, torch.dtype], Tensor] = field(default_factory=dict, repr=False)

    def prints(self, number: int, dtype: torch.dtype) -> Tensor:
        """[R, T]: what tells the states of this number apart in texts of this precision."""
        if (number, dtype) not in self.known:
            self.known[number, dtype] = _print(self.states[number][1], dtype)
        return self.known[number, dtype]

    def add(self, output: Any) -> None:
        """Keeps a sample of all states in what a module gave: tensors [R, T, width], also in tuples."""
        for state in _states(output, tuple(self.ids.shape)):
            self.states.append((state.shape[2], sample(state, 0, state.shape[2]).cpu()))


@dataclass(frozen=True)
class Piece:
    """Tokens of one row of a pass of a text encoder that stand in columns of one row of a text. columns: {token: column}, ascending."""

    encoded: Encoded
    row: int
    columns: Mapping[int, int]


@dataclass
class Stream:
    """What one text encoder wrote into one row of a text. ids: of `columns`, in their order, without padding. pieces: its
    beginnings. starts and ends: the columns of start and of end tokens; touched: all of its columns, padding too."""

    encoder: str
    ids: list[int] = field(default_factory=list)
    columns: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    touched: set[int] = field(default_factory=set)

    def add(self, piece: Piece, tokenizer: Any) -> None:
        """Tokens after the first end token of a piece are padding, where no mask says it."""
        first = [id for id in (getattr(tokenizer, name, None) for name in ("bos_token_id", "cls_token_id")) if id is not None]
        last = [id for id in (getattr(tokenizer, name, None) for name in ("eos_token_id", "sep_token_id")) if id is not None]
        real, over = piece.encoded.real, False
        for number, (token, column) in enumerate(piece.columns.items()):
            self.touched.add(column)
            if over or (real is not None and not real[piece.row, token]):
                continue
            id = int(piece.encoded.ids[piece.row, token])
            self.ids.append(id)
            self.columns.append(column)
            if number == 0 and id in first:
                self.starts.append(column)
            elif id in last:
                self.ends.append(column)
                over = real is None


def sample(state: Tensor, start: int, width: int) -> Tensor:
    """[..., CHANNELS]: channels spread over the `width` from `start` on."""
    return state.detach()[..., start + torch.linspace(0, width - 1, CHANNELS).long()]


Held = Mapping[tuple[int, int], Tensor]


def held_by(text: Tensor, encoded: Sequence[Encoded]) -> Held:
    """{(first channel, width): prints [rows, columns]} of a text [rows, columns, width], wherever states of these encodings may stand.

    A state may fill only some channels: two encoders side by side.
    """
    widths = {own for one in encoded for own, _ in one.states}
    starts = sorted({0, *widths})
    places = [(start, own) for own in sorted(widths) for start in starts if start + own <= text.shape[2]]
    return {place: _print(sample(text, *place).cpu(), text.dtype) for place in places}


def row_held(held: Sequence[Held], row: int) -> bytes:
    """What tells the texts of one row apart from those of others."""
    return b"".join(columns[row].numpy().tobytes() for each in held for columns in each.values())


def read_row(
    texts: Sequence[Tensor], held: Sequence[Held], row: int, encoded: Sequence[Encoded], tokenizers: Mapping[str, Any]
) -> list[Stream]:
    """What each text encoder wrote into one row of a denoiser's texts, whose columns run on from one to the next."""
    pieces: list[Piece] = []
    base = 0
    for text, each in zip(texts, held, strict=True):
        for one in _pieces({place: columns[row] for place, columns in each.items()}, encoded, text.dtype):
            pieces.append(Piece(one.encoded, one.row, {token: base + column for token, column in one.columns.items()}))
        base += text.shape[1]
    return _streams(pieces, tokenizers)


def _streams(pieces: list[Piece], tokenizers: Mapping[str, Any]) -> list[Stream]:
    streams: dict[str, Stream] = {}
    for piece in sorted(pieces, key=lambda piece: next(iter(piece.columns.values()))):
        name = piece.encoded.encoder
        streams.setdefault(name, Stream(name)).add(piece, tokenizers[name])
    return list(streams.values())


def _pieces(held: Held, encoded: Sequence[Encoded], dtype: torch.dtype) -> list[Piece]:
    """The tokens that stand in the columns of one row of one text."""
    found: list[tuple[int, Piece]] = []
    for (start, own), columns in held.items():
        # of equal ones the last counts
        prints = [
            (one, one.prints(n, dtype)) for one in reversed(encoded) for n, (width, _) in enumerate(one.states) if width == own
        ]
        found += [(start, piece) for piece in _explained(prints, columns)]
    return _largest(found, {start: columns for (start, _), columns in held.items()})


def _explained(prints: list[tuple[Encoded, Tensor]], held: Tensor) -> Iterator[Piece]:
    """What of these passes stands in the columns that hold these prints; no more once one row of a pass explains them all."""
    if not bool(torch.isin(held, torch.cat([each.flatten() for _, each in prints])).any()):
        return
    whole = int((held != EMPTY).sum())
    for one, each in prints:
        for row in range(len(each)):
            columns = _aligned(each[row], held)
            if columns:
                yield Piece(one, row, columns)
            if len(columns) == whole:
                return


def _largest(found: list[tuple[int, Piece]], held: Mapping[int, Tensor]) -> list[Piece]:
    """Of pieces that claim the same columns those that explain most of them: prompts that begin alike share states in causal encoders."""
    taken: dict[int, set[int]] = {}
    kept: list[tuple[int, Piece]] = []
    for start, piece in sorted(found, key=lambda item: -len(item[1].columns)):
        used = taken.setdefault(start, set())
        columns = {token: column for token, column in piece.columns.items() if column not in used}
        if columns:
            used.update(columns.values())
            kept.append((start, Piece(piece.encoded, piece.row, columns)))
    return [Piece(p.encoded, p.row, _between(p.columns, taken[start], held[start])) for start, p in kept]


def _between(columns: Mapping[int, int], taken: set[int], held: Tensor) -> dict[int, int]:
    """The same with the tokens between two of them that stand where these stand, whose columns were changed (weighted words)."""
    filled = dict(columns)
    tokens = sorted(columns)
    for before, after in zip(tokens, tokens[1:], strict=False):
        if columns[after] - columns[before] != after - before:
            continue
        for token in range(before + 1, after):
            column = columns[before] + token - before
            if column not in taken and int(held[column]) != EMPTY:
                filled[token] = column
                taken.add(column)
    return dict(sorted(filled.items(), key=lambda item: item[1]))


def _aligned(prints: Tensor, held: Tensor) -> dict[int, int]:
    """{token: column} where the same prints stand, in the longest runs: a token has one column, and a column one token."""
    pairs = ((prints[:, None] == held[None]) & (held != EMPTY)).nonzero().tolist()
    shifts: dict[int, int] = {}
    for token, column in pairs:
        shifts[column - token] = shifts.get(column - token, 0) + 1
    found: dict[int, int] = {}
    used: set[int] = set()
    for token, column in sorted(pairs, key=lambda pair: (-shifts[pair[1] - pair[0]], pair)):
        if token not in found and column not in used:
            found[token] = column
            used.add(column)
    return dict(sorted(found.items(), key=lambda item: item[1]))


def _print(values: Tensor, dtype: torch.dtype) -> Tensor:
    """One number [...] for the channels [..., CHANNELS] as they are in this precision; EMPTY where they are all zero."""
    values = values.to(dtype).float() + 0.0  # no negative zeros
    bits = values.contiguous().view(torch.int32).long() & 0xFFFFFFFF
    mixed = torch.zeros(values.shape[:-1], dtype=torch.long)
    for channel, prime in enumerate(PRIMES):
        mixed = (mixed ^ bits[..., channel]) * prime
        mixed = mixed ^ (mixed >> 29)
    mixed = mixed & 0x7FFFFFFFFFFFFFFF
    return torch.where((values == 0).all(dim=-1), EMPTY, mixed)


def _states(output: Any, shape: tuple[int, ...]) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.dim() == 3 and tuple(output.shape[:2]) == shape and output.is_floating_point():
            yield output
    elif isinstance(output, (list, tuple)):
        for part in output:
            yield from _states(part, shape)
    elif isinstance(output, Mapping):
        for part in output.values():
            yield from _states(part, shape)
