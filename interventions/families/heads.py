"""Heads: where each head of a call looks, what it hands on, and how much of a planted phrase it copied while it was generated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..call import Call
from ..edits import Edit, HeadMix
from ..edits.row_values import sent
from ..engine.kernels import score_rows
from ..engine.reading import row_outputs
from ..errors import ReattendError
from .reweighting import shared_by_layers


@dataclass
class Glance:
    """Where the last query row of one call looks. strongest [B, H] long: position of its heaviest key; first [B] long: of the first
    key that it can see (above 0 with padding or a sliding window). Positions are absolute, padding included."""

    strongest: Tensor
    first: Tensor


def glance(call: Call) -> Glance:
    """The heaviest key of each head for the last row. The largest score is the largest weight, so no softmax is taken."""
    mask = call.mask if call.mask is None or call.mask.shape[2] == 1 else call.mask[:, :, -1:]
    index = torch.zeros(1, dtype=torch.long, device=call.query.device)
    scores, visible = score_rows(call.query[:, :, -1:], call.key, mask, False, call.scaling, call.softcap, index)
    start = call.key_start
    first = torch.full((call.batch,), start, device=call.query.device)
    if visible is not None:
        first = first + visible[:, 0, 0].expand(call.batch, -1).to(torch.uint8).argmax(dim=1)
    return Glance(scores[:, :, 0].argmax(dim=2) + start, first)


def last_prompt_rows(call: Call) -> Tensor | None:
    """Bool [B, Tq]: the query row of each batch row's last prompt token, whichever side is padded; None where none of these queries
    belongs to the prompt, as in a decode step. Without a cache every pass holds the prompt, and so its rows."""
    tokens = call.tokens
    if tokens is not None and call.total - call.num_queries >= tokens.prompt_length:
        return None

    def find() -> Tensor:
        if tokens is None or call.query_tokens is not None:
            prompt = call.query_rows("prompt")
        else:
            prompt = tokens.positions("prompt", call.total - call.num_queries, call.total)
        return sent(prompt & (prompt.flip(1).cumsum(dim=1).flip(1) == 1), call.query.device)

    return shared_by_layers(call, "last prompt rows", find)


def prompt_end(call: Call, recipe: str) -> Tensor | None:
    """`last_prompt_rows` for an edit that must meet each prompt's last token once. Remembers in call.memory what it has seen.

    Raises ReattendError at the second piece of a prompt: nothing told that the last token of the first one was not its end.
    """
    rows, memory = last_prompt_rows(call), call.memory
    if rows is None:
        memory["answering"] = True
        return None
    elsewhere = memory.get("ended at", call.total) != call.total
    if call.total > call.num_queries and elsewhere and not memory["answering"]:
        raise ReattendError(
            f"{recipe} acts at the last token of the prompt, but this prompt comes in pieces and the last token of an earlier piece "
            f"is edited already: pass it at once (prefill_chunk_size=None, and no cache of its first tokens)"
        )
    memory["ended at"], memory["answering"] = call.total, False
    return rows


def last_prompt_outputs(call: Call, edits: Sequence[Edit] = ()) -> Tensor:
    """Output [B, H, Dv] of each head at the last prompt token of every batch row, after the edits, in statistics dtype.

    The call must hold these tokens. Only their rows are worked out: one for a batch of equal lengths or with left padding.
    """
    tokens = call.tokens
    start = call.total - call.num_queries
    if tokens is None or tokens.prompt_length <= start:
        raise ReattendError("the last prompt token does not lie among this call's queries")

    def find() -> tuple[Tensor, Tensor, Tensor]:
        real = tokens.positions("prompt", start, call.total)
        last = (real * torch.arange(1, call.num_queries + 1)).argmax(dim=1)
        index, place = last.unique(return_inverse=True)
        device = call.query.device
        return index.to(device), torch.arange(call.batch, device=device), place.to(device)

    index, batch, place = shared_by_layers(call, "last prompt token", find)
    return row_outputs(call, edits, index)[batch, :, place]


def divergence(one: Tensor, other: Tensor) -> Tensor:
    """Float [B, H]: distance || one - other || of head outputs [B, H, D], in at least float32."""
    return torch.linalg.vector_norm(_wide(one) - _wide(other), dim=-1)


def vision_aware_heads(image: Tensor, text: Tensor, remove_outliers: bool = True, squared: bool = False) -> Tensor:
    """Bool [B, H]: heads of one layer whose outputs [B, H, D] depend on the image more than the layer's (lower) median head's do.

    image, text: outputs at the last prompt token with the image and without it. remove_outliers: a head whose distance and whose
    text-only activation || text || (squared: || text ||^2) both exceed mean + standard deviation of the layer counts as not
    depending on it: it surges without the image rather than sees. VHR (ACL 2025, arXiv 2412.13949).
    """
    distance = divergence(image, text)
    if remove_outliers:
        activation = torch.linalg.vector_norm(_wide(text), dim=-1)
        surges = _stands_out(distance) & _stands_out(activation.square() if squared else activation)
        distance = distance.masked_fill(surges, 0)
    return distance > distance.median(dim=1, keepdim=True).values


def _stands_out(values: Tensor) -> Tensor:
    """Bool [B, H]: over mean + (unbiased) standard deviation of its row; nothing does in a layer of a single head."""
    if values.shape[1] < 2:
        return torch.zeros_like(values, dtype=torch.bool)
    return values > values.mean(dim=1, keepdim=True) + values.std(dim=1, keepdim=True)


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def copy_score(strongest: Tensor, generated: Tensor, prompt: Tensor, span: tuple[int, int], once: bool = False) -> Tensor:
    """Float64 [...]: the share of a phrase that each head copied.

    strongest [steps, ...] long: the position of each head's heaviest key when it chose generated[step]. prompt [n]: token ids.
    span: the phrase's positions [start, stop). A step counts if that position lies in the span and holds the generated token. Steps add
    up, so repeats can push the sum over 1; once: each position of the phrase counts a single time.
    """
    start, stop = span
    if not 0 <= start < stop <= prompt.numel():
        raise ReattendError(f"span must lie in the prompt's {prompt.numel()} tokens and not be empty, got {span}")
    steps = generated.shape[0]
    inside = (strongest >= start) & (strongest < stop)
    tokens = prompt[strongest.clamp(0, prompt.numel() - 1)]
    copied = inside & (tokens == generated.view(steps, *[1] * (strongest.dim() - 1)))
    if not once:
        return copied.sum(dim=0).double() / (stop - start)
    found = torch.zeros(stop - start, *strongest.shape[1:], dtype=torch.bool, device=strongest.device)
    place = (strongest - start).clamp(0, stop - start - 1)
    for step in range(steps):
        found |= torch.zeros_like(found).scatter_(0, place[step][None], copied[step][None])
    return found.sum(dim=0).double() / (stop - start)


def find_phrase(prompt: Sequence[int], phrase: Sequence[int], exact_first: bool = True) -> tuple[int, int] | None:
    """[start, stop) of a phrase's tokens in a prompt, or None. exact_first: an exact match wins.

    Without one (a phrase is often tokenised differently inside a text) it is the first window of the phrase's length that shares
    over 90 % of the phrase's distinct tokens. That window, which the official code always takes, can start a token early.
    """
    prompt, phrase = list(prompt), list(phrase)
    width, wanted = len(phrase), set(phrase)
    windows = range(len(prompt) - width + 1) if width else range(0)
    if exact_first:
        for start in windows:
            if prompt[start : start + width] == phrase:
                return start, start + width
    for start in windows:
        if len(wanted & set(prompt[start : start + width])) / len(wanted) > 0.9:
            return start, start + width
    return None


def mixture(call: Call, rows: Tensor, embedding: Tensor, strength: Tensor) -> HeadMix:
    """o = (1 - s) o + s t at one layer's call, from what is known of the whole model: embedding [layers, heads, D], strength [layers, heads].

    rows: bool [B, Tq].
    """
    assert call.site is not None
    heads, width, device = call.num_heads, call.value.shape[3], call.query.device
    target = embedding[call.site.layer, :heads, :width].to(device)
    return HeadMix(target=target, strength=strength[call.site.layer, :heads].to(device), rows=rows)
