"""The lookahead door: after each pass the likeliest next tokens are tried on the cache, read, and taken back again.

Gives: for each of the likeliest next tokens what a function reads at one site when the model goes on with it, and a score that turns
logits and readings into the logits [B, V] that leave the model. Trials are passes of their own, nested in the forward hook like those of
branches, edited by nobody.

Costs: one pass of one token per candidate and step.

Refuses: models whose logits cannot be replaced, caches whose last token cannot be taken back, and more or less than one site.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...interventions import Call, Clock, ReattendError, TokenMap
from ..actions import Action, Rank, RootCall
from ..handles import Handles, Holder
from ..host import Host, TokenTracker
from ..passes import Forward, Running
from ..plan import Facts, Plan, Step, sites_misfit
from ..protocols import Steered
from ..sites.table import SiteTable
from ..trackers.caches import cache_in, cache_name, cache_of
from ..trackers.positions import install_positions, next_position, with_positions
from ..trackers.sides import holds_on, width_of
from .branch import branch_misfit
from .capture import Capture


@dataclass
class Trials:
    """What a lookahead has seen: logits [B, V], the tried tokens `ids` [B, n], and for each of the n what was read of it [B, ...].

    clock, tokens and memory are those of the real pass.
    """

    logits: Tensor
    ids: Tensor
    readings: list[Tensor]
    clock: Clock
    tokens: TokenMap
    memory: dict[Any, Any]


@dataclass
class Lookahead(Step):
    """After every pass the `count` likeliest next tokens of each row are tried; score(Trials) -> the logits [B, V] that leave the model.

    A trial is an unedited pass with one token, after which the cache is as before; read(Call) -> [B, ...] at the call of `sites` (one
    site). Needs a cache whose last token can be taken back. Trials have no gradient, and a backward pass through what was read of them
    raises ReattendError. Counted as "logits" under `label`.
    """

    count: int
    sites: SiteTable
    read: Callable[[Call], Tensor]
    score: Callable[[Trials], Tensor]
    label: str = ""

    def __post_init__(self) -> None:
        if self.count < 1 or len(self.sites) != 1:
            raise ReattendError("a lookahead tries at least one token and reads one site")

    def check(self, facts: Facts) -> str:
        return (
            facts.without_tokens("its step Lookahead tries the next token of a prompt")
            or sites_misfit(self.sites)
            or branch_misfit(facts.root)
        )

    def install(self, host: Host, session: Holder, plan: Plan) -> Handles:
        handles, label = session.handles(), self.label or plan.recipe
        install_positions(host, handles)
        session.counter(label)

        def read(call: Call, edits: Any) -> None:
            call.memory["trial"] = self.read(call)

        inner = Plan(plan.recipe, [Capture(self.sites, read)])
        trials = session.nest(handles, inner)

        def before(call: RootCall) -> None:
            assert call.forward is not None
            check_pass(call.forward, call.given, plan)

        def after(call: RootCall) -> None:
            assert call.forward is not None
            forward, tracker = call.forward, host.tracker

            def attempt(cache: Any, ids: Tensor) -> Tensor:
                _try(tracker, forward, call.given, cache, ids, trials)
                return forward.memory(inner.memory_key)["trial"]

            _look_ahead(self, plan, forward, call.output, attempt)
            session.counts[label]["logits"] += 1

        handles.act(Action(Rank.TRIALS, before, after))
        return handles


def check_pass(forward: Forward, given: dict[str, Any], plan: Plan) -> None:
    """Before a pass. Raises ReattendError where trials could not be taken back."""
    if forward.tokens is None or forward.sequence is None:
        raise ReattendError(
            f"{plan.recipe}: trying next tokens needs tokens: call the whole model with input_ids or inputs_embeds"
        )
    if given.get("use_cache") is False:
        raise ReattendError(f"{plan.recipe}: trying next tokens needs a cache: generate with use_cache=True")
    if forward.tokens.length - forward.tokens.prompt_length > 0 and width_of(given) > 1:
        raise ReattendError(f"{plan.recipe}: next tokens are tried one step at a time, not in drafts (assisted decoding)")
    if forward.fresh and bool(forward.tokens.positions("padding", 0, forward.tokens.length)[:, -1].any()):
        raise ReattendError(f"{plan.recipe}: next tokens are tried after the last column: prompts must be padded on the left")
    layers = getattr(cache_in(given), "layers", ())
    fixed = next((layer for layer in layers if not holds_on(layer) and not _is_static(layer)), None)
    if fixed is not None:
        raise ReattendError(f"{plan.recipe}: a {type(fixed).__name__} cannot give a tried token back: use the default cache")


def _look_ahead(step: Lookahead, plan: Plan, forward: Forward, output: Any, attempt: Callable[[Any, Tensor], Tensor]) -> None:
    """After a pass: tries the likeliest next tokens of every row and puts what the recipe makes of them into the output's logits."""
    tokens, cache = forward.tokens, cache_of(output)
    assert tokens is not None
    if cache is None:
        raise ReattendError(f"{plan.recipe}: trying next tokens needs a cache: generate with use_cache=True")
    memory = forward.memory(plan.memory_key)
    logits = output.logits[:, -1]
    room = _with_room(cache, tokens.length)
    graph = _with_graph(cache) if torch.is_grad_enabled() else []
    with torch.no_grad():
        ids = logits.topk(min(step.count, logits.shape[-1]), dim=-1).indices
        readings = [attempt(room, ids[:, k : k + 1]) for k in range(ids.shape[1])]
    for layer, keys, values in graph:  # a layer may have cut itself to its window
        count = layer.keys.shape[2]
        layer.keys, layer.values = keys[:, :, keys.shape[2] - count :], values[:, :, values.shape[2] - count :]
    if torch.is_grad_enabled() and logits.requires_grad:
        readings = [_Unknown.apply(reading, logits, plan.recipe) for reading in readings]
    found = step.score(Trials(logits, ids, readings, forward.clock, tokens, memory)).to(logits.dtype)
    output.logits = torch.cat([output.logits[:, :-1], found[:, None]], dim=1)


def _is_static(layer: Any) -> bool:
    """Whether a layer of a cache holds all tokens in their order, in a buffer of a fixed size."""
    return type(layer).__name__ == "StaticLayer"


def _with_room(cache: Any, length: int) -> Any:
    """The cache, or another one with what it holds, where it has no room for one more token or could not give it back."""
    layers = getattr(cache, "layers", ())
    if not layers or not all(map(_is_static, layers)) or (all(map(holds_on, layers)) and length < layers[0].max_cache_len):
        return cache
    from transformers import DynamicCache

    room = DynamicCache()
    for number, layer in enumerate(layers):
        room.update(layer.keys[:, :, :length], layer.values[:, :, :length], number)
    return room


def _with_graph(cache: Any) -> list[tuple[Any, Tensor, Tensor]]:
    """(layer, keys, values) of the layers that a backward pass may go through: trials, which have no gradient, would cut that off."""
    layers = getattr(cache, "layers", ())
    found = [(layer, getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in layers]
    return [
        (x, k, v)
        for x, k, v in found
        if isinstance(k, Tensor) and isinstance(v, Tensor) and (k.requires_grad or v.requires_grad)
    ]


class _Unknown(torch.autograd.Function):
    """A reading of a trial, for a graph: it depends on what the logits depend on, but how is not known."""

    @staticmethod
    def forward(ctx: Any, reading: Tensor, logits: Tensor, recipe: str) -> Tensor:
        ctx.recipe = recipe
        return reading.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise ReattendError(
            f"{ctx.recipe}: the passes that try next tokens have no gradient, so that of these logits would be wrong: take gradients "
            f"outside of the session"
        )


def _try(tracker: TokenTracker, forward: Forward, given: dict[str, Any], cache: Any, ids: Tensor, own: Steered) -> None:
    """A pass with one further token per row, for the reader; the cache is then as before."""
    tokens, root = forward.tokens, tracker.root
    assert tokens is not None and root is not None
    arguments: dict[str, Any] = {"input_ids": ids, cache_name(root): cache, "use_cache": True}
    known = tokens.positions("padding", 0, tokens.length, ids.device)
    arguments["attention_mask"] = pad((~known).long(), (0, 1), value=1)
    positions = with_positions(given, forward.positions).get("position_ids")
    if isinstance(positions, Tensor):
        arguments["position_ids"] = next_position(positions)
    if hasattr(cache, "activate_past_recording"):
        cache.activate_past_recording()
    length = tokens.length
    facts = Forward(forward.clock, tokens, forward.sequence, probe=Running(own), cache=cache)
    tokens.length += 1
    try:
        with tracker.aside(facts):
            root(**arguments)
    finally:
        tokens.length = length
        if cache.get_seq_length() > length:
            cache.crop(length - cache.get_seq_length())
