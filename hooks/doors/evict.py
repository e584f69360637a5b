"""The evict door: a cache that really shrinks, per key head; length and positions stay those of the sequence.

After the pass that ends a prompt (and after later ones, where a recipe asks for it) the layers of its cache are exchanged for ones that hold
what the recipe keeps, as many tokens for each key head as it wants; every later pass attends to what is held, with the positions that it had.

Gives: for each selected site keys, values, clock, tokens and memory after a pass; the recipe answers with what stays, bool [batch, key heads,
tokens]. Whoever reads the cache's length finds that of the sequence; beams, drafts that are refused and selected rows work as before.

Costs: one gather per layer when tokens leave; after that less than the untouched cache in memory, kept tokens over all tokens, and one call
of attention per number of tokens that heads hold (all equal: one). The prompt's pass itself is the untouched one and needs its whole cache.

Refuses: models whose caches have windows or states, or keep what their decoder's cross-attention looks at, caches of fixed length or
quantised ones, generation without a cache, and other recipes at the same sites. Without its session such a cache refuses to go on.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...interventions import Call, Clock, Edit, Memory, ReattendError, Site, TokenMap
from ..actions import Action, Rank, RootCall
from ..handles import Handles, Holder
from ..host import Host
from ..passes import Forward
from ..plan import Facts, Plan, Step, sites_misfit
from ..sites.table import SiteTable
from ..trackers.caches import cache_in, cache_of

REMEDY = "an edit that hides the tokens instead (Keep) gives the same answers and goes together with other recipes"


@dataclass
class Held:
    """What a cache holds of one site after a pass: key [B, Hkv, n, D], value [B, Hkv, n, Dv] of all n tokens, and held bool [B, Hkv, n]:
    those that have not left before. clock, tokens and memory as in a Call."""

    key: Tensor
    value: Tensor
    held: Tensor
    site: Site
    clock: Clock
    tokens: TokenMap
    memory: Memory


@dataclass
class Evict(Step):
    """After the pass that ends a prompt: keep(Held) -> bool [B, Hkv, n] (or what broadcasts to it), what stays; None: all of it.

    later: asked after every later pass too, where None costs nothing but the question. Padding always leaves. Counted at each site for
    every pass after which tokens left. Raises ReattendError, after the pass, for an answer of another shape, and for a row and head of
    which nothing would stay.
    """

    sites: SiteTable
    keep: Callable[[Held], Tensor | None]
    later: bool = False
    label: str = ""

    def check(self, facts: Facts) -> str:
        reason = facts.without_tokens("its step Evict lets tokens of a prompt leave the cache") or sites_misfit(self.sites)
        crossed = next((site.name for site in facts.table if site.stack == "decoder" and site.kind == "cross"), "")
        if crossed and not reason:
            return f"{crossed} keeps what it looks at in the same cache, which is no text that could leave it: {REMEDY}"
        return reason or evict_misfit(self.sites)

    def beside(self, plan: Plan, others: Sequence[tuple[Plan, Step]]) -> str:
        own = {id(module) for _, module in self.where}
        for other, step in others:
            # the recipe's own steps learn what stays; they know that columns are gone after the prompt
            hit = None if other is plan else next((site.name for site, module in step.where if id(module) in own), None)
            if hit is not None:
                return f"recipe {other.recipe!r} acts or looks at {hit}, whose tokens recipe {plan.recipe!r} lets leave the cache: {REMEDY}"
        return ""

    def install(self, host: Host, session: Holder, plan: Plan) -> Handles:
        handles = session.handles()
        counter = session.counter(self.label or plan.recipe)
        places = [(site, self.sites.module(site)) for site in self.sites]
        for site, module in places:
            handles.edit(site, module, _attends(_number(site, module)))
        permit = Permit(host, session, plan.recipe)

        def after(call: RootCall) -> None:
            forward = call.forward
            if forward is None or forward.tokens is None or not self._asked(forward):
                return
            cache = cache_of(call.output)
            cache = forward.cache if cache is None else cache
            for site, module in places:
                if _let_go(self, cache, _number(site, module), site, forward, plan, permit):
                    counter[site.name] += 1

        handles.act(Action(Rank.CACHES, after=after))
        return handles

    def ready(self, call: RootCall) -> str:
        if call.given.get("use_cache") is False:
            return "tokens leave a cache, and this pass has none: leave use_cache as it is (True)"
        return _cache_misfit(cache_in(call.given))

    def _asked(self, forward: Forward) -> bool:
        assert forward.tokens is not None
        if forward.clock.phase != "prefill":
            return self.later
        # of a prompt that comes in chunks the last one ends it
        return forward.sequence is None or forward.tokens.length >= forward.sequence.planned


def evict_misfit(table: SiteTable) -> str:
    """Why tokens cannot leave the caches of these sites, or ""."""
    from transformers import DynamicCache

    reason = sites_misfit(table)
    if reason:
        return reason
    odd = next((s for s in table if s.stack != "decoder" or s.kind != "self" or s.route != "attention_interface"), None)
    if odd is not None:
        return f"{odd.name} has no cache of a growing text: choose self-attention of the decoder"
    layers = DynamicCache(config=table.config.get_text_config(decoder=True)).layers
    if not all(type(layer).__name__ == "DynamicLayer" for layer in layers):
        return f"{table.model_name} has layers with a window or a state of their own, which hold tokens by number: {REMEDY}"
    return ""


def _cache_misfit(cache: Any) -> str:
    from ..trackers.held import HeldLayer

    if cache is None:
        return ""
    kinds = [type(layer) for layer in getattr(cache, "layers", ())] or [getattr(cache, "layer_class_to_replicate", None)]
    if all(kind is HeldLayer or getattr(kind, "__name__", "") == "DynamicLayer" for kind in kinds):
        return ""
    return f"tokens cannot leave a {type(cache).__name__} with fixed, quantised or windowed layers: use the default cache of generate()"


def _number(site: Site, module: nn.Module) -> int:
    """A site's layer in the cache."""
    own = getattr(module, "layer_idx", None)
    return site.layer if own is None else int(own)


def _attends(number: int) -> Callable[[Call, Forward], Sequence[Edit]]:
    def edit(call: Call, forward: Forward) -> Sequence[Edit]:
        layers = getattr(forward.cache, "layers", ())
        held = getattr(layers[number], "edits", None) if number < len(layers) else None
        return () if held is None else held(call.num_heads)

    return edit


class Permit:
    """Lets a cache that was shrunk go on where its session is at work; copies share it, and it keeps nothing of them alive."""

    def __init__(self, host: Host, session: Holder, recipe: str) -> None:
        self.host, self.session, self.recipe = weakref.ref(host), weakref.ref(session), recipe

    @property
    def holds(self) -> bool:
        host, session = self.host(), self.session()
        return host is not None and session is not None and session in host.active()

    def __deepcopy__(self, memo: Any) -> Permit:
        return self


def _let_go(step: Evict, cache: Any, number: int, site: Site, forward: Forward, plan: Plan, permit: Permit) -> bool:
    """Asks what stays of one layer, and exchanges the layer; False where all of it does."""
    from ..trackers.held import HeldLayer, shrunk

    tokens = forward.tokens
    assert tokens is not None
    layers: list[Any] = getattr(cache, "layers", [])
    if number >= len(layers) or _cache_misfit(cache):
        raise ReattendError(f"{plan.recipe}: {site.name} has no layer in this cache that tokens could leave: {REMEDY}")
    layer = layers[number]
    if isinstance(layer, HeldLayer):
        key, value, held = layer.whole()
    else:
        key, value = layer.keys, layer.values
        held = torch.ones(key.shape[:3], dtype=torch.bool, device=key.device)
    # drafts may be taken back, so that nothing is decided by them
    sure = tokens.prompt_length if forward.clock.phase == "prefill" else forward.past + 1
    later = key[:, :, sure:], value[:, :, sure:]
    key, value, held = key[:, :, :sure], value[:, :, :sure], held[:, :, :sure]
    padding = tokens.positions("padding", 0, key.shape[2], key.device) if "padding" in tokens else None
    keep = step.keep(Held(key, value, held, site, forward.clock, tokens, forward.memory(plan.memory_key)))
    if keep is None:
        return False
    if not isinstance(keep, Tensor):
        raise ReattendError(
            f"{plan.recipe}: keep answered {keep!r:.60} at {site.name}; wanted is bool {list(held.shape)} or None"
        )
    try:
        keep = keep.to(key.device).expand(held.shape)
    except RuntimeError as error:
        raise ReattendError(
            f"{plan.recipe}: keep answered {list(keep.shape)} at {site.name}; wanted is bool {list(held.shape)}"
        ) from error
    if keep.dtype != torch.bool:
        raise ReattendError(f"{plan.recipe}: keep answered {keep.dtype} at {site.name}; wanted is bool {list(held.shape)}")
    keep = keep & held
    real = keep if padding is None else keep & ~padding[:, None]
    if not bool(real.any(dim=2).all()):
        raise ReattendError(
            f"{plan.recipe}: keep leaves a head of {site.name} without any token; keep the first or the last one"
        )
    if bool(keep.all()):
        return False
    layers[number] = held_layer = shrunk(key, value, keep, permit, padding, getattr(layer, "origin", None))
    held_layer.append(*later)
    return True
