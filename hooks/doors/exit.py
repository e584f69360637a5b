"""The exit door: tokens of some roles leave the sequence after a layer, so that the layers there run on fewer rows and keep fewer keys.

At the first layer after the exit a pass over a prompt is shortened to the tokens that stay, with their own positions and their part of
the mask; after the last layer it gets its old length back, where tokens that left keep the state in which they entered the exit. The
layers after have shorter caches of their own; which position each of their keys has is kept with the sequence, and every later pass
gets its mask for these keys. Padding leaves with the rest. Where rows of a batch keep different numbers of tokens, some that should
have left fill the shorter rows and are seen by nobody.

Gives: layers that run without tokens of these roles, or without those of them that a function of what passes chooses, with the numbers
that hiding the tokens from them would give.

Costs: less than the untouched model: the layers after the exit compute and keep fewer tokens; each pass indexes its hidden states once.

Refuses: types of language models whose layers were not tested with it, sliding windows, flash attention's own functions, sites that are not
all layers from one on, other steps at these sites, and a cache that was filled under another session.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...interventions import ReattendError, Site, UnsupportedError
from ..handles import Handles, Holder
from ..host import Host
from ..passes import Forward
from ..plan import Facts, Plan, Step, sites_misfit
from ..routes.implementations import REMEDY as ON_SDPA
from ..routes.implementations import is_told_little
from ..sites.discovery import layer_module
from ..sites.table import SiteTable
from ..tokens.merging import Passing
from ..trackers.caches import NAMES, cache_in

# Types of language models whose layers are known to take nothing per token but what this door shortens.
TESTED = (
    "llama", "mistral", "gemma", "qwen2", "qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text", "glm4v_text",
)  # fmt: skip
REMEDY = "hiding the tokens instead of taking them out gives the same answers"


@dataclass
class Exit(Step):
    """Tokens of `roles` leave the sequence before `sites`: all decoder layers from some layer on, in their order.

    In every pass that reads a prompt the layers of `sites` run without these tokens (and without padding) and keep no keys of them;
    all others see what they would see if nobody there attended to these tokens. The pass's output has its full length: tokens that
    left have the state in which they entered. chosen(Passing) -> bool [B, T]: which of them leave, where not all do. Counted at each of
    `sites` for every pass in which tokens left. No other step may act or look at `sites`. A cache that was filled under an exit can only be
    used under the same session.
    """

    sites: SiteTable
    roles: Sequence[str]
    label: str = ""
    chosen: Callable[[Passing], Tensor] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.roles, str) or not self.roles:
            raise ReattendError(f"Exit: roles is a list of at least one role whose tokens leave, got {self.roles!r:.60}")

    def check(self, facts: Facts) -> str:
        return (
            facts.without_tokens("its step Exit lets tokens of a prompt leave")
            or sites_misfit(self.sites)
            or token_exit_misfit(self.sites)
            or _gaps(self.sites, facts.table)
            or _without_masks(self.sites)
        )

    def beside(self, plan: Plan, others: Sequence[tuple[Plan, Step]]) -> str:
        return exit_conflict(plan, self, others)

    def install(self, host: Host, session: Holder, plan: Plan) -> Handles:
        session.counter(self.label or plan.recipe)
        layers = [(site, layer_module(session.model, site.name)) for site in self.sites]
        handles = session.handles()
        for site, layer in layers:
            handles.before(layer, _entering(host, session, plan, self, site, site is layers[0][0]), kwargs=True)
        handles.after(layers[-1][1], _leaving(host, session, plan))
        return handles


@dataclass
class Keys:
    """What the layers after the exit hold keys of: absolute position [B, n] long, and which keys nobody sees, bool [B, n]."""

    position: Tensor
    filler: Tensor

    def first(self, count: int) -> Keys:
        return Keys(self.position[:, :count], self.filler[:, :count])

    def joined(self, other: Keys) -> Keys:
        return Keys(torch.cat([self.position, other.position], dim=1), torch.cat([self.filler, other.filler], dim=1))


@dataclass
class Shortened:
    """One pass after the exit. index [B, K] long: the new tokens that stay (None: all). new, keys: own keys and all of them."""

    index: Tensor | None
    new: Keys
    keys: Keys
    fillers: bool
    acts: bool
    length: int
    entered: Tensor | None = None


def token_exit_misfit(table: SiteTable) -> str:
    """Why tokens cannot leave the sequence of a model in mid-stack, or ""."""
    from transformers import DynamicCache

    text = table.config.get_text_config()
    if text.model_type not in TESTED:
        return f"tokens leaving between layers is not tested for language models of type {text.model_type!r}: {REMEDY}"
    if not all(_grows(layer) for layer in DynamicCache(config=text).layers):
        return f"{table.model_name} has layers with a sliding window, whose caches keep keys by number and not by position: {REMEDY}"
    return ""


def _gaps(table: SiteTable, whole: SiteTable) -> str:
    """Why these sites are not all decoder layers from one on, or ""."""
    first, names = min(site.layer for site in table), [site.name for site in table]
    if names == [site.name for site in whole if site.stack == "decoder" and site.kind == "self" and site.layer >= first]:
        return ""
    return f"its sites are not all layers of the decoder from one on: sites(model).stack('decoder').layers({first}) are"


def exit_conflict(plan: Plan, step: Exit, others: Sequence[tuple[Plan, Step]]) -> str:
    """Why these steps cannot run beside an exit: one that comes after it would take columns for other tokens; or ""."""
    gone = {id(module) for _, module in step.where}
    for other, item in others:
        if item is step:
            continue
        if isinstance(item, Exit):
            return f"{plan.recipe!r} and {other.recipe!r} both let tokens leave the sequence: only one can"
        hit = next((site.name for site, module in item.where if id(module) in gone), None)
        if hit is not None:
            return (
                f"recipe {other.recipe!r} acts or looks at {hit}, where recipe {plan.recipe!r} has taken tokens out of "
                f"the sequence: {REMEDY}, and goes together with other recipes"
            )
    return ""


def _entering(
    host: Host, session: Holder, plan: Plan, step: Exit, site: Site, first: bool
) -> Callable[..., tuple[tuple, dict] | None]:
    def enter(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        active = host.active()
        if session not in active:
            return None
        forward = host.tracker.current()
        memory = forward.memory(plan.memory_key)
        hidden = args[0] if args else kwargs.get("hidden_states")
        if len(args) > 1 or not isinstance(hidden, Tensor):
            raise UnsupportedError(f"the layer of {site.name} is called in another way than those that tokens can leave")
        if first:
            conflict = exit_conflict(plan, step, [(p, other) for one in active for p in one.plans for other in p.steps])
            if conflict:
                raise UnsupportedError(conflict)
            if forward.tokens is None:
                raise ReattendError("tokens can only leave where they are known: call the whole model with input_ids")
            cache = cache_in(kwargs)
            memory["pass"] = _begin(memory, forward, step, cache, site, hidden)
        now: Shortened = memory["pass"]
        if now.acts:
            session.counts[step.label or plan.recipe][site.name] += 1
        if first and now.index is not None:
            now.entered = hidden
            hidden = _taken(hidden, now.index, 1)
        kwargs = {name: _shortened(name, value, now, site) for name, value in kwargs.items()}
        if not args:
            return (), {**kwargs, "hidden_states": hidden}
        return (hidden,), kwargs

    return enter


def _leaving(host: Host, session: Holder, plan: Plan) -> Callable[..., Any]:
    def leave(module: nn.Module, args: tuple, output: Any) -> Any:
        if output is None or session not in host.active():
            return None
        now: Shortened | None = host.tracker.current().memory(plan.memory_key).pop("pass", None)
        if now is None or now.index is None or now.entered is None:
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        index = now.index.to(hidden.device)[..., None].expand_as(hidden)
        whole = now.entered.to(hidden.device).scatter(1, index, hidden)
        return (whole, *output[1:]) if isinstance(output, tuple) else whole

    return leave


def _begin(memory: dict[Any, Any], forward: Forward, step: Exit, cache: Any, site: Site, hidden: Tensor) -> Shortened:
    """Who stays in this pass, and the keys that the layers after the exit will hold after it."""
    batch, length = hidden.shape[:2]
    tokens, roles = forward.tokens, step.roles
    assert tokens is not None
    past = tokens.length - length
    old = _held(memory.get("keys"), cache, site.layer, past, batch)
    index, filler, acts = None, torch.zeros(batch, length, dtype=torch.bool), False
    if past < tokens.prompt_length:
        if tokens.blind or tokens.unknown:
            tokens.positions(roles[0], past, past + length)  # says why roles cannot be told
        leaves = [tokens.positions(role, past, past + length) for role in roles if role in tokens]
        if leaves and bool(torch.stack(leaves).any()):
            filler = torch.stack(leaves).any(dim=0)
            if step.chosen is not None:
                places = torch.arange(past, past + length, device=hidden.device).expand(batch, -1)
                seen = Passing(hidden, site, forward.clock, tokens, torch.ones_like(places).float(), places, memory)
                filler = filler & _chosen(step.chosen(seen), filler, site)
            acts = bool(filler.any())
            filler = filler | tokens.positions("padding", past, past + length)
            count = max(1, int((~filler).sum(dim=1).max()))
            if count < length:
                # those that stay come first in a stable sort; what follows fills the rows that have fewer
                index = filler.to(torch.uint8).argsort(dim=1, stable=True)[:, :count].sort(dim=1).values
                filler = filler.gather(1, index)
    fillers = bool(filler.any())
    # made where the model computes: a step sends an accelerator nothing
    where = torch.arange(length, device=hidden.device).expand(batch, -1) if index is None else index.to(hidden.device)
    new = Keys(where + past, filler.to(hidden.device) if fillers else torch.zeros_like(where, dtype=torch.bool))
    keys = new if old is None else old.joined(new)
    memory["fillers"] = fillers or (old is not None and memory.get("fillers", False))
    memory["keys"] = keys
    return Shortened(None if index is None else index.to(hidden.device), new, keys, memory["fillers"], acts, length)


def _chosen(said: Tensor, leaves: Tensor, site: Site) -> Tensor:
    """What a function says of who leaves, on the CPU. Raises ReattendError for something else than bool [B, T]."""
    if not isinstance(said, Tensor) or said.dtype != torch.bool or said.shape != leaves.shape:
        what = f"{said.dtype} {list(said.shape)}" if isinstance(said, Tensor) else repr(said)[:60]
        raise ReattendError(f"Exit at {site.name}: chosen answered {what}; wanted is bool {list(leaves.shape)}")
    return said.cpu()


def _held(known: Keys | None, cache: Any, layer: int, past: int, batch: int) -> Keys | None:
    """The keys that the cache of the first layer after the exit holds already; None for none."""
    if cache is None:
        return None
    own = cache.layers[layer] if layer < len(getattr(cache, "layers", ())) else None
    if not _grows(own if own is not None else getattr(cache, "layer_class_to_replicate", None)):
        raise ReattendError(
            f"tokens cannot leave a sequence whose cache is a {type(cache).__name__} with fixed, quantised or windowed layers: use the "
            f"default cache of generate(), or: {REMEDY}"
        )
    count = 0 if own is None else int(own.get_seq_length())
    if not count:
        if past:
            raise ReattendError("the layers after the exit have no keys of the tokens before: pass the prompt's own cache")
        return None
    shorter = known is not None and known.position.shape[1] > count
    known = known if known is None else known.first(count)
    cut = shorter and known is not None and not bool((known.position < past).all())
    if known is None or cut or known.position.shape != (batch, count):
        raise ReattendError(
            "this cache was not filled under this session, or was copied or cut within the prompt since, so that it is not known which "
            "tokens it holds: run the whole prompt again"
        )
    return known


def _grows(layer: Any) -> bool:
    """Whether a layer of a cache (or its class) keeps all keys, one after the other."""
    from transformers.cache_utils import DynamicLayer

    return layer is DynamicLayer or type(layer) is DynamicLayer


def _shortened(name: str, value: Any, now: Shortened, site: Site) -> Any:
    """An argument of a layer after the exit, for the tokens that stay."""
    if name == "attention_mask":
        return _mask(value, now)
    if now.index is None or name in NAMES:
        return value
    if name == "position_embeddings" and isinstance(value, tuple):
        return tuple(_taken(part, now.index, 1) for part in value)
    if name == "position_ids" and isinstance(value, Tensor):
        return _taken(value, now.index, 1)
    if isinstance(value, Tensor) and value.dim() > 1 and now.length in value.shape:
        raise UnsupportedError(f"the layer of {site.name} takes {name!r} per token, which tokens cannot leave yet")
    return value


def _without_masks(sites: SiteTable) -> str:
    """Why tokens cannot leave these layers, or "": flash attention takes tokens with gaps between their positions for several sequences."""
    hit = next((site.name for site in sites if is_told_little(sites.module(site))), "")
    return f"tokens cannot leave before {hit}, whose attention takes no whole masks: {ON_SDPA}" if hit else ""


def _taken(value: Tensor, index: Tensor, axis: int) -> Tensor:
    """The tokens `index` [B, K] of a tensor [B or 1, ..., T, ...] whose tokens lie on this axis."""
    index = index.to(value.device)
    value = value.expand(index.shape[0], *value.shape[1:])
    shape = [1] * value.dim()
    shape[0], shape[axis] = index.shape
    wide = [index.shape[i] if i == 0 else index.shape[1] if i == axis else n for i, n in enumerate(value.shape)]
    return value.gather(axis, index.view(shape).expand(wide))


def _mask(mask: Any, now: Shortened) -> Tensor | None:
    """The mask of a layer after the exit: the model's own, its rows and columns those of the tokens that stayed."""
    keys, rows = now.keys, now.new.position
    if mask is None:
        if not now.fillers and (rows.shape[1] == 1 or rows.shape[1] == keys.position.shape[1]):
            return None  # tokens stay in their order: causal as before
        visible = keys.position[:, None, None, :] <= rows[:, None, :, None]
        return _without_fillers(visible, now)
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        raise UnsupportedError(f"tokens cannot leave under a mask of type {type(mask).__name__}: {REMEDY}")
    if now.index is not None:
        mask = _taken(mask, now.index, 2)
    return _without_fillers(_taken(mask, keys.position, 3), now)


def _without_fillers(mask: Tensor, now: Shortened) -> Tensor:
    """Nobody sees a filler but itself: a row that saw nothing would give NaN."""
    if not now.fillers:
        return mask
    filler = now.keys.filler.to(mask.device)[:, None, None, :]
    same = now.keys.position[:, None, None, :] == now.new.position[:, None, :, None]
    hidden, itself = filler & ~same.to(mask.device), filler & same.to(mask.device)
    if mask.dtype == torch.bool:
        return mask & ~hidden | itself
    return mask.masked_fill(hidden, torch.finfo(mask.dtype).min).masked_fill(itself, 0)
