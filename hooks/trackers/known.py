"""Which known sequence a pass goes on with: by its cache, by a copy of that, or without one; and which passes nobody can count."""

from __future__ import annotations

from collections.abc import Sequence as Several
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ...interventions import ReattendError
from ..passes import Sequence
from .caches import cache_length, rows_repeat, same_content, strange_cache, takes_cache
from .caller import Caller

Known = WeakKeyDictionary[Any, Sequence]


def known_sequence(by_cache: Known, cache: Any, past: int, batch: int) -> Sequence | None:
    """The sequence that a cache holds, as long as the cache is and no longer; None for one that nobody has read.

    Raises ReattendError where rows were taken from the cache, so that nobody can tell which are left.
    """
    if not past or not is_followed(cache):
        return None
    known = by_cache.get(cache)
    if known is None:
        known = _copied(by_cache, cache, past, batch)
        if known is None:
            return None
        by_cache[cache] = known
    if known.tokens.length != past:
        known.moved_to(past)
    if known.tokens.batch != batch:
        times, rest = divmod(batch, known.tokens.batch)
        if rest or not rows_repeat(cache, times):
            raise ReattendError(
                f"this cache had {known.tokens.batch} rows when it was last read and has {batch} now, so that it cannot be told "
                f"which tokens its rows hold: pass whole prompts without it, or call session.reset(), after which its tokens "
                f"count as not read"
            )
        known.move(torch.arange(known.tokens.batch).repeat_interleave(times))
    return known


def _copied(by_cache: Known, cache: Any, past: int, batch: int) -> Sequence | None:
    """What is known of the cache of which this one is a copy, for the copy to go on with."""
    for reference in by_cache.keyrefs():
        other = reference()
        sequence = None if other is None else by_cache.get(other)
        if sequence is None:
            continue
        tokens = sequence.tokens
        long_enough = tokens.length >= past and tokens.batch in (batch, 1) and cache_length(other) >= past
        if long_enough and same_content(cache, other, past):
            return sequence.fork(past)
    return None


def uncached_sequence(
    before: Several[Sequence], root: Any, ids: Tensor | None, batch: int, width: int, who: Caller
) -> Sequence | None:
    """The sequence that a pass without a cache goes on with, inside one call of generate; elsewhere each pass is a prompt."""
    if who.call is None:
        return None
    for last in before:
        if last.call is not who.call or last.tokens.batch != batch:
            continue
        if width == 1 and last.tokens.length > 1 and not takes_cache(root):
            return last  # the model keeps what it has read by itself
        if width != last.tokens.length + 1:
            continue
        # beams may have changed places since the last step: only their prompts are sure to be the same
        prompt = last.tokens.prompt_length
        if ids is None or torch.equal(ids[:, :prompt], last.ids(prompt, ids.device)):
            return last
    return None


def came_from(before: Tensor, now: Tensor) -> Tensor | None:
    """[B] long: the row of `before` [B, n] that each row of `now` goes on with; None where all stay, or where it cannot be told."""
    same = (now[:, None] == before[None]).all(dim=-1).cpu()
    if bool(same.diagonal().all()) or not bool(same.any(dim=1).all()):
        return None
    return torch.where(same.diagonal(), torch.arange(len(now)), same.long().argmax(dim=1))


def uncountable(
    root: Any, given: dict[str, Any], cache: Any, past: int, width: int, mask: Any, who: Caller,
    last: tuple[Any, int, bool] | None, returned: str,
) -> str:  # fmt: skip
    """Why the steps of a pass would be miscounted, or "": it goes on with tokens whose cache nobody here has seen.

    last: (call of generate, width, had a cache) of the pass before in this thread. returned: the strange name of a cache that it returned.
    """
    named = takes_cache(root)
    strange = "" if named or cache is not None else strange_cache(given)
    problem = ""
    if strange:
        problem = f"it was given a cache by the name {strange!r}"
    elif not past and isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] > width:
        problem = f"its attention mask has {mask.shape[1]} columns for {width} tokens, and no cache holds the others"
    elif past and who.virtual and not isinstance(given.get("input_ids"), Tensor):
        problem = f"PEFT puts its {who.virtual} virtual tokens before every token, because it sees no cache"
    elif width == 1 and cache is None and last is not None and last[1] > 1:
        if returned:
            problem = f"the pass before has returned a cache by the name {returned!r}"
        elif named and who.call is not None and last[0] is who.call and not last[2] and given.get("use_cache") is not False:
            problem = "generate passes one token after a longer prompt, and no cache is seen"
    return problem


def is_followed(cache: Any) -> bool:
    return cache is not None and not isinstance(cache, (tuple, list))
