"""The merge door: tokens of an image encoder leave or become part of others after a layer's attention, and all that follows runs on fewer.

Gives: a function of what passes (hidden states, roles, how many tokens each stands for and which it was, memory) that says which tokens
stay, which become part of which, and with what weights. The second half of that layer and all later layers run on the new tokens; if asked,
later attention weighs them by size (log size added to the scores), and every layer gives all tokens back, each with the state of the one
that it is part of, while the next takes them together again: for backbones, dense heads and features. In LLaVA fewer image tokens reach
the decoder: features, placeholders, mask and positions shrink together before its first pass, and the cache with them. Around a single
attention module tokens are merged, dropped or repeated at its input, and put back at its output.

Costs: the function; one gather, or a product [K, N] x [N, width] for tokens that become part of others, and for the old tokens a sum that
nobody reads. With weighed sizes one key bias per layer. With tokens given back one gather of all states per layer. EViT at a keep rate of
0.7 in three of twelve layers of a ViT-S/16 takes 0.66 of the plain model's time (batch 8, one CPU core, median of four).

Refuses: encoders whose layers take positions or windows (DINOv3, SAM, Pixtral, Qwen-VL) and every other stack, unless around a module; a
second merge in the same encoder or around the same module; around a module, arguments per token that are not merged with them (RoPE);
rows that keep different numbers of tokens where nobody puts them back; backbones and masked image modelling without `restore`; in
vision-language models that do not read one square of features per image, merging without `restore`; dropping tokens around causal
attention; training mode, where tokens are merged within a layer.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from ...interventions import Call, Edit, ReattendError, Site, UnsupportedError
from ...interventions.families.merging import Regroup
from ..actions import Action, Rank
from ..handles import Handles, Holder
from ..host import Host
from ..passes import Forward
from ..plan import Facts, Plan, Step, sites_misfit
from ..prompts.fewer_tokens import FewerTokens, dense_misfit, reads_images
from ..sites.discovery import layer_module, second_half, tower_of
from ..sites.table import SiteTable
from ..tokens.merging import MergedTokens, Passing
from ..tokens.states import parameters_of, tokens_of


@dataclass
class Merge(Step):
    """reduce(Passing) -> Regroup, or None where all tokens go on, at the layers of `sites`.

    place: "attention", after a layer's attention and before its second half; "layer", after the layer; "around", at the input of the
    site's attention module, to be undone at its output. weigh: later attention adds the log of a token's size. restore: every layer gives
    all tokens back, and the next takes them together again. label: its name in the session's counters, for every pass and site at which
    tokens were merged. Raises ReattendError for a place that there is not, and for a Regroup of another number of tokens.
    """

    sites: SiteTable
    reduce: Callable[[Passing], Regroup | None]
    place: Literal["attention", "layer", "around"] = "attention"
    weigh: bool = False
    restore: bool = False
    label: str = ""
    # by thread: what a layer's second half works on; what a module's output is put back with
    passing: dict[int, Any] = field(default_factory=dict, init=False, repr=False)
    # whether layers give all tokens back: also where the decoder of a model gets fewer in the end
    whole: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.place not in ("attention", "layer", "around"):
            raise ReattendError(f'Merge: place must be "attention", "layer" or "around", got {self.place!r:.60}')

    def check(self, facts: Facts) -> str:
        if reason := sites_misfit(self.sites):
            return reason
        if self.place == "around":
            return ""
        for site in self.sites:
            tower = tower_of(facts.model, site.name)
            if site.stack != "vision" or site.kind != "self" or tower is None or second_half(facts.model, site.name) is None:
                name = type(self.sites.module(site)).__name__ if tower is None else type(tower).__name__
                return f"the tokens of {site.name} ({name}) cannot be merged between its layers, of which not enough is known"
        return "" if self.restore else dense_misfit(facts.model, facts.root, self.sites)

    def beside(self, plan: Plan, others: Sequence[tuple[Plan, Step]]) -> str:
        around, own = self.place == "around", {module for _, module in self.where}
        for other, step in others:
            if step is self or not isinstance(step, Merge) or (step.place == "around") is not around:
                continue
            both = next((site.name for site, module in step.where if module in own), "") if around else "an image encoder"
            if both:
                return f"{plan.recipe!r} and {other.recipe!r} both merge tokens of {both}: only one can"
        return ""

    # -- hooks -------------------------------------------------------------------------------------------------------

    def install(self, host: Host, session: Holder, plan: Plan) -> Handles:
        handles = session.handles()
        session.counter(self.label or plan.recipe)

        def at(site: Site, function: Callable[..., Any]) -> Callable[..., Any]:
            def hook(module: nn.Module, *given: Any) -> Any:
                if session not in host.active():
                    return None
                return function(host.current(), session, plan, site, module, *given)

            return hook

        if self.place == "around":
            for site in self.sites:
                module = self.sites.module(site)
                handles.before(module, at(site, self._into), kwargs=True)
                handles.after(module, at(site, self._back))
                handles.edit(site, module, self._weighed)
            return handles
        self.whole = self.restore or reads_images(host.tracker.root)
        merging = {site.name for site in self.sites}
        start = min(site.layer for site in self.sites)
        table = session.table
        assert table is not None
        stack = [site for site in table if site.stack == "vision" and site.kind == "self" and site.layer >= start]
        for site in stack:
            layer = layer_module(session.model, site.name)
            if site.layer > start:
                handles.before(layer, at(site, self._entering), kwargs=True)
                handles.edit(site, table.module(site), self._weighed)
            if site.name in merging and self.place == "attention":
                norm, last = second_half(session.model, site.name) or (layer, layer)
                handles.before(norm, at(site, self._halfway))
                handles.after(last, at(site, self._caught))
            # before whoever collects the outputs of layers
            handles.after(layer, at(site, self._leaving), first=True)
        root = host.tracker.root
        if not self.restore and reads_images(root):
            fewer = FewerTokens(root)
            tower = tower_of(session.model, stack[0].name)
            assert tower is not None
            handles.after(tower, at(stack[0], functools.partial(self._encoded, fewer)), first=True)
            handles.act(Action(Rank.ARGUMENTS, before=fewer.before, after=fewer.after))
            handles.act(Action(Rank.TRIALS, before=fewer.facts))
        return handles

    def _weighed(self, call: Call, forward: Forward) -> Sequence[Edit]:
        assert call.site is not None
        merged = forward.merged_at(call.site)
        if merged is None or not (self.weigh or merged.uneven):
            return ()
        return (merged.by_size if self.weigh else merged.fillers,)

    def _regroup(
        self, forward: Forward, session: Holder, plan: Plan, site: Site, hidden: Tensor, before: MergedTokens
    ) -> Regroup | None:
        """What the function says of these tokens."""
        memory = forward.memory(plan.memory_key)
        new = self.reduce(Passing(hidden, site, forward.clock, before.tokens, before.size, before.position, memory))
        if new is None:
            return None
        groups = new.groups if isinstance(new, Regroup) else None
        fits = isinstance(new, Regroup) and len(new.index) == len(hidden)
        if not fits or (groups is not None and groups.shape[1] != hidden.shape[1]):
            raise ReattendError(
                f"Merge at {site.name}: its function must say what becomes of {tuple(hidden.shape[:2])} tokens, got {new!r:.80}"
            )
        session.counter(self.label or plan.recipe)[site.name] += 1
        return new

    def _merged(self, forward: Forward, session: Holder, plan: Plan, site: Site, hidden: Tensor) -> Tensor | None:
        """The tokens that go on in an encoder; None where all do."""
        encoder = forward.encoder
        if encoder is None or hidden.dim() != 3:
            raise UnsupportedError(
                f"the layer of {site.name} runs outside of its encoder: it is not known which tokens pass it"
            )
        before = encoder.merged
        if before is None:
            before = MergedTokens.first(forward.tokens_of(hidden, site), hidden.shape[0], hidden.shape[1], hidden.device)
        new = self._regroup(forward, session, plan, site, hidden, before)
        if new is None:
            return None
        if new.groups is None:
            raise ReattendError(f"Merge at {site.name}: tokens can be repeated around a module only")
        after = before.after(new, hidden if self.whole else None)
        if not self.whole and after.uneven:
            raise ReattendError(
                f"Merge at {site.name}: rows keep different numbers of tokens; let every row keep as many, or restore=True"
            )
        encoder.merged = after
        return new.merge(hidden)

    def _encoded(
        self,
        fewer: FewerTokens,
        forward: Forward,
        session: Holder,
        plan: Plan,
        site: Site,
        tower: nn.Module,
        args: tuple,
        output: Any,
    ) -> None:
        fewer.encoded(output, None if forward.encoder is None else forward.encoder.merged)

    # -- in the midst of a layer, and after it -----------------------------------------------------------------------

    def _entering(
        self, forward: Forward, session: Holder, plan: Plan, site: Site, layer: nn.Module, args: tuple, kwargs: dict
    ) -> tuple[tuple, dict] | None:
        encoder = forward.encoder
        if encoder is None or encoder.merged is None:
            return None
        names = parameters_of(layer)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if isinstance(given.get("attention_mask"), Tensor):
            raise UnsupportedError(f"the layer of {site.name} takes a mask, which is not cut to merged tokens")
        if not self.whole:
            return None
        whole, short = encoder.given_back
        hidden = given[names[0]]
        short = short if hidden is whole else encoder.merged.short(hidden)
        return ((short, *args[1:]), kwargs) if args else ((), {**kwargs, names[0]: short})

    def _halfway(self, forward: Forward, session: Holder, plan: Plan, site: Site, norm: nn.Module, args: tuple) -> tuple | None:
        self.passing.pop(threading.get_ident(), None)
        if norm.training:
            raise ReattendError(f"{site.name}: call model.eval() before tokens are merged")
        new = self._merged(forward, session, plan, site, args[0])
        if new is None:
            return None
        self.passing[threading.get_ident()] = [new, None]
        return (new, *args[1:])

    def _caught(
        self, forward: Forward, session: Holder, plan: Plan, site: Site, last: nn.Module, args: tuple, output: Any
    ) -> Any:
        passing = self.passing.get(threading.get_ident())
        if passing is None or output is None:
            return None
        passing[1] = output
        return output.new_zeros(len(output), 1, output.shape[2])  # joins the old tokens in a sum that nobody reads

    def _leaving(
        self, forward: Forward, session: Holder, plan: Plan, site: Site, layer: nn.Module, args: tuple, output: Any
    ) -> Any:
        passing = self.passing.pop(threading.get_ident(), None)
        encoder = forward.encoder
        if output is None or encoder is None:
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        new = None if passing is None else passing[0] + passing[1]
        if self.place == "layer" and any(site.name == own.name for own in self.sites):
            new = self._merged(forward, session, plan, site, hidden)
        if self.whole and encoder.merged is not None:
            short = hidden if new is None else new
            new = encoder.merged.whole(short)
            encoder.given_back = new, short
        if new is None:
            return None
        return (new, *output[1:]) if isinstance(output, tuple) else new

    # -- around a module ---------------------------------------------------------------------------------------------

    def _into(
        self, forward: Forward, session: Holder, plan: Plan, site: Site, module: nn.Module, args: tuple, kwargs: dict
    ) -> tuple[tuple, dict] | None:
        self.passing.pop(threading.get_ident(), None)
        forward.merged.pop(site.name, None)
        names = parameters_of(module)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        hidden = given.get(names[0])
        if not isinstance(hidden, Tensor) or hidden.dim() != 3:
            raise UnsupportedError(
                f"{type(module).__name__} of {site.name} is called without hidden states [batch, tokens, width]"
            )
        before = MergedTokens.first(tokens_of(forward, site, module, hidden), hidden.shape[0], hidden.shape[1], hidden.device)
        new = self._regroup(forward, session, plan, site, hidden, before)
        if new is None:
            return None
        if site.causal and new.groups is not None:
            raise UnsupportedError(f"{site.name} is causal: around it tokens can be repeated, not merged or dropped")
        rest, text = {name: value for name, value in given.items() if name != names[0]}, given.get("encoder_hidden_states")
        rest.pop("encoder_hidden_states", None)
        # in joint attention a text stands beside them
        lengths = {hidden.shape[1], hidden.shape[1] + (text.shape[1] if isinstance(text, Tensor) and text.dim() == 3 else 0)}
        other = next((name for name, value in rest.items() if _per_token(value, lengths)), "")
        if other and new.count != hidden.shape[1]:
            raise UnsupportedError(f"{site.name} takes {other!r} per token, which is not merged with them")
        self.passing[threading.get_ident()] = new
        forward.merged[site.name] = before.after(new)
        merged = new.merge(hidden)
        return ((merged, *args[1:]), kwargs) if args else ((), {**kwargs, names[0]: merged})

    def _back(
        self, forward: Forward, session: Holder, plan: Plan, site: Site, module: nn.Module, args: tuple, output: Any
    ) -> Any:
        new = self.passing.pop(threading.get_ident(), None)
        forward.merged.pop(site.name, None)
        if new is None or output is None:
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        whole = new.undo(hidden)
        return (whole, *output[1:]) if isinstance(output, tuple) else whole


def _per_token(value: Any, lengths: set[int]) -> bool:
    """Whether an argument of a module has a dimension of as many tokens as one of these."""
    parts = value if isinstance(value, tuple) else (value,)
    return any(isinstance(part, Tensor) and part.dim() > 1 and bool(lengths & set(part.shape[:-1])) for part in parts)
