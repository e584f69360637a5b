"""What token-reweighting recipes share: biases on the prompt's columns, from token roles and factors."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..call import Call, TokenMap
from ..errors import ReattendError

T = TypeVar("T")


def prompt_bias(
    call: Call,
    terms: Sequence[tuple[str, float]],
    *,
    free: Sequence[str] = (),
    rows_with: str | None = None,
    name: str = "prompt_bias",
) -> Tensor | None:
    """Bias [B, Tk] for `KeyBias`: each term (role, b) adds b to the prompt's columns of that role; generated columns keep 0.

    Weights of the role are thus multiplied by exp(b) against those of generated tokens. free: roles whose columns keep 0 in the
    end. rows_with: sequences without any token of this role get no bias at all. None where no column is biased, or all that the call
    sees are biased alike, so that the call stays untouched. The prompt is read once, kept in call.memory under `name`; see
    `shared_by_layers` for the rest.
    """
    tokens = call.tokens
    if tokens is None:
        call.columns("prompt")  # raises, and says where
        return None
    store = call.memory.setdefault(name, {})
    made_for = (tokens.prompt_length, call.query.device)
    if made_for not in store:
        whole = over_prompt(tokens, terms, free, rows_with)
        store[made_for] = OverPrompt(whole, whole.to(call.query.device)) if bool(whole.any()) else None
    known = store[made_for]
    return of_call(call, known.there) if known is not None and known.tells_apart(call) else None


def marked_columns(call: Call, role: str, more: Sequence[str] = (), apart: bool = False) -> Tensor | None:
    """Bool [B, Tk]: columns of a role of the prompt, and of `more` roles in the sequences that have any of it; None without any.

    apart: None also where the call sees all columns or none of them (see `OverPrompt.tells_apart`). The prompt is read once and kept in
    call.memory; see `shared_by_layers` for the rest.
    """
    known = marked_prompt(call, role, more)
    if known is None or (apart and not known.tells_apart(call)):
        return None
    return of_call(call, known.there)


def marked_prompt(call: Call, role: str, more: Sequence[str] = ()) -> OverPrompt | None:
    """What `marked_columns` cuts to the columns of a call; None without any such token."""
    tokens = call.tokens
    if tokens is None:
        call.columns(role)
        return None
    key = ("marked", role, *more, tokens.prompt_length, call.query.device)
    if key not in call.memory:
        whole = tokens.positions(role, 0, tokens.prompt_length)
        there = tokens.anywhere(role)
        for other in more:
            whole = whole | (tokens.positions(other, 0, tokens.prompt_length) & there)
        call.memory[key] = OverPrompt(whole, whole.to(call.query.device)) if bool(whole.any()) else None
    return call.memory[key]


@dataclass
class OverPrompt:
    """Values over the prompt [B, prompt], 0 on generated tokens: whole on the CPU, there where the model computes."""

    whole: Tensor
    there: Tensor
    # what has been found: (first and last column that a call sees, whether generated ones follow) -> tells apart
    found: dict[tuple[int, int, bool], bool] = field(default_factory=dict)

    def tells_apart(self, call: Call) -> bool:
        """Whether some row of the batch has different values on the columns that a call sees: what counts only against other columns
        (a bias, a share of the row) changes nothing where it has not."""
        tokens = call.tokens
        assert tokens is not None
        if call.sinks is not None:
            return True  # learned sinks are one more column, which no token is
        start, stop = call.key_start, min(call.total, tokens.prompt_length)
        if stop <= start:
            return False  # a window has left the prompt behind
        key = (start, stop, call.total > tokens.prompt_length)
        if key not in self.found:
            self.found[key] = self._differ(self.whole[:, start:stop], tokens.positions("prompt", start, stop), key[2])
        return self.found[key]

    def seen(self, call: Call) -> Tensor:
        """Bool [B, 1] on the CPU: the rows of the batch with a value other than 0 among the columns that a call sees."""
        return (self.whole[:, call.key_start : call.key_start + call.num_keys] != 0).any(dim=1, keepdim=True)

    @staticmethod
    def _differ(part: Tensor, real: Tensor, generated: bool) -> bool:
        if generated:
            return bool((part.bool() & real).any())
        low, high = (part.to(torch.float32).masked_fill(~real, fill) for fill in (float("inf"), float("-inf")))
        return bool((low.amin(dim=1) < high.amax(dim=1)).any())


def of_call(call: Call, whole: Tensor) -> Tensor:
    """A tensor over the prompt [B, prompt], cut and widened with zeros to the key columns of a call: [B, Tk].

    Raises ReattendError where the call has another batch than the prompt.
    """
    if whole.shape[0] != call.batch:
        where = call.site.name if call.site else "this call"
        raise ReattendError(f"{where} has a batch of {call.batch}, but the prompt was read with a batch of {whole.shape[0]}")
    piece = whole[:, call.key_start : call.key_start + call.num_keys]
    return torch.nn.functional.pad(piece, (0, call.num_keys - piece.shape[1]))


def shared_by_layers(call: Call, key: Hashable, make: Callable[[], T]) -> T:
    """make(), once for all layers of a step that see the same keys. key: what it depends on besides (the heads of a layer)."""
    tokens, query, keys = call.tokens, call.query, call.key.shape[2]
    total, prompt = (keys, None) if tokens is None else (tokens.length, tokens.prompt_length)
    now = (total, query.shape[2], prompt)
    step = call.memory.get("step")
    if step is None or step[0] != now:
        step = call.memory["step"] = (now, {})
    known, where = step[1], (key, total - keys, keys, query.device)
    if where not in known:
        known[where] = make()
    return known[where]


def kept_by_steps(call: Call, store: dict[Any, Any]) -> dict[Any, Any]:
    """What the steps of an answer keep for one another at a site (see `Edit.lasting`): anew where rows or columns are others."""
    name = call.site.name if call.site else ""
    key = (call.batch, call.key_start, None if call.tokens is None else call.tokens.prompt_length)
    if name not in store or store[name][0] != key:
        store[name] = (key, {})
    return store[name][1]


def over_prompt(tokens: TokenMap, terms: Sequence[tuple[str, float]], free: Sequence[str], rows_with: str | None) -> Tensor:
    """The sum of the terms over the prompt's real columns: float32 [B, prompt_length] on the CPU."""
    length = tokens.prompt_length

    def columns(role: str) -> Tensor:
        return tokens.positions(role, 0, length)

    bias = torch.zeros(tokens.batch, length)
    for role, amount in terms:
        bias += amount * columns(role)
    bias *= columns("prompt")
    for role in free:
        bias *= ~columns(role)
    if rows_with is not None:
        bias *= tokens.anywhere(rows_with)
    return bias
