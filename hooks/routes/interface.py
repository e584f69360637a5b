"""The transformers route: an attention function and its mask function, registered while sessions last.

The models' configs name our function for the time of a session; it hands every call without edits to the function the model had
before, with the mask that function expects.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...interventions import Call, ReattendError, ReattendWarning, Site, UnsupportedError, row_weights
from ...interventions.engine.autocast import without_autocast
from ..host import Host
from ..module_hooks import Hook
from ..passes import Forward
from ..protocols import Steered
from ..sites.discovery import uncompiled
from ..sites.rotary import rotary_at
from ..sites.source import source_of
from ..steering import acting_at, edited
from ..trackers.caches import filled_columns
from ..trackers.in_flight import Pass, lifecycle
from .graphs import acts_in, plans, traced
from .implementations import PACKED, WITH_MASKS, call_of, from_outside, is_served, packs
from .names import NO_PAGES, Name, Switched, configs, original_name, plain, register, release

# the attachments of all models that a module belongs to, by its id
_owners: dict[int, list[Host]] = {}


class InterfaceRoute:
    """Switches the configs of one attached model to our attention function, and back."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.sessions: list[Steered] = []
        # (site, module, its config) of all modules that sessions act at
        self.modules: dict[int, tuple[Site, Any, Any]] = {}
        self.switched: list[Switched] = []

    def install(self, session: Steered) -> None:
        """Switches the configs of the sites that this session edits. Raises UnsupportedError for kernels that cannot be edited."""
        modules: list[tuple[Site, Any]] = [pair for pair in session.acted if pair[0].route == "attention_interface"]
        for site, module in modules:
            name = original_name(site, module.config)
            if packs(name, module):
                raise UnsupportedError(f"{site.name} runs attention implementation {name!r}: {PACKED}")
        with lifecycle:
            self.sessions = [*self.sessions, session]
            for site, module in modules:
                self._switch(site, module.config)
                owners = _owners.get(id(module), [])
                if self.host not in owners:
                    _owners[id(module)] = [*owners, self.host]
                self.modules[id(module)] = (site, module, module.config)
            for entry in self.switched:
                _name(entry, entry.original)

    def leave(self, session: Steered) -> None:
        """Lets go of what only this session acts at; safe to call twice."""
        with lifecycle:
            self.sessions = [other for other in self.sessions if other is not session]
            if not self.sessions:
                return  # `uninstall` restores it all
            wanted = set().union(*(other.modules for other in self.sessions))
            for key in [key for key in self.modules if key not in wanted]:
                self._disown(key)
                del self.modules[key]
            for entry in self.switched:
                if entry.left_for is None:
                    _name(entry, entry.original)

    def _disown(self, key: int) -> None:
        rest = [owner for owner in _owners.get(key, ()) if owner is not self.host]
        if rest:
            _owners[key] = rest
        else:
            _owners.pop(key, None)

    def _switch(self, site: Site, config: Any) -> Switched:
        entry = configs.get(id(config)) or Switched(config, original_name(site, config))
        # this route knows it before anybody else does, so that after an interrupt `uninstall` finds all of it
        if entry not in self.switched:
            self.switched.append(entry)
        if self not in entry.users:
            entry.users.append(self)
        configs[id(config)] = entry
        return entry

    # -- passes --------------------------------------------------------------------------------------------------------

    def follow(self, sessions: Sequence[Steered]) -> None:
        """Before a pass: where the user has switched to another implementation, it is the one that is edited from now on.

        Warns where it cannot be edited: recipes are then off until the user switches back.
        """
        for entry in self.switched:
            now = entry.config._attn_implementation_internal
            if now is entry.name:
                entry.left_for = None
            elif now != entry.left_for:
                self._adopt(entry, sessions)
        for key, (site, module, config) in list(self.modules.items()):
            if module.config is not config:
                with lifecycle:
                    entry = self._switch(site, module.config)
                    self.modules[key] = (site, module, module.config)
                    _name(entry, entry.original)

    def _adopt(self, entry: Switched, sessions: Sequence[Steered]) -> None:
        site = self._site_under(entry, sessions)
        if site is None:
            return
        with lifecycle:
            now = plain(entry.config._attn_implementation_internal or "eager")
            entry.left_for = None if is_served(now) else now
            if entry.left_for is not None:
                warnings.warn(
                    f"{site.name} was switched to attention implementation {now!r} inside a session, which cannot be edited: recipes "
                    f'do nothing there until model.set_attn_implementation("sdpa")',
                    ReattendWarning,
                    stacklevel=2,
                )
                return
            _name(entry, now)

    def _site_under(self, entry: Switched, sessions: Sequence[Steered]) -> Site | None:
        """A site with this config that these sessions act at; None where there is none."""
        acted = set().union(*(session.modules for session in sessions))
        return next((site for key, (site, _, config) in self.modules.items() if config is entry.config and key in acted), None)

    def check(self, landed: Pass) -> None:
        """After a pass. Raises ReattendError where attention was computed by something that this route cannot see."""
        for entry in self.switched:
            now = entry.config._attn_implementation_internal
            if isinstance(now, Name) or now == entry.left_for:
                continue
            if self._site_under(entry, landed.sessions) is not None:
                raise ReattendError(
                    f"the attention implementation was switched to {now!r} while a forward pass was under way, which has missed recipes "
                    f"in some layers: switch between passes"
                )
        wanted = [session.decoder_modules for session in landed.sessions if session.decoder_modules]
        if any(entry.left_for is not None for entry in self.switched):
            return  # said when it was switched
        if wanted and all(landed.seen.isdisjoint(modules) for modules in wanted):
            site = self.modules[next(iter(wanted[0]))][0]
            raise ReattendError(
                f"a recipe acts at {site.name}, but no attention of that stack came through the session in this pass: the module's "
                f"forward or its attention function was replaced after the session began"
            )

    # -- the end -------------------------------------------------------------------------------------------------------

    def uninstall(self) -> None:
        """Restores the configs; safe to call twice. Our names stay known until `release`."""
        with lifecycle:
            for key, owners in list(_owners.items()):
                if self.host in owners:
                    self._disown(key)
            self.modules = {}
            while self.switched:
                entry = self.switched[-1]
                entry.users = [user for user in entry.users if user is not self]
                now = entry.config._attn_implementation_internal
                if entry.users and now is entry.name:
                    _name(entry, entry.original)
                elif not entry.users:
                    if isinstance(now, Name):
                        entry.config._attn_implementation_internal = entry.original
                    configs.pop(id(entry.config), None)
                self.switched.pop()

    def release(self) -> None:
        """Takes our names out of transformers' registries, if no other model needs them; safe to call twice."""
        with lifecycle:
            release(self)


def _name(entry: Switched, original: str) -> None:
    """Names our function for implementation `original` in a config, with all modules that sessions act at under it."""
    acted = [module for user in entry.users for _, module, config in user.modules.values() if config is entry.config]
    name = Name(original, plans.number(acted))
    for user in entry.users:
        register(name, user, _attention)
    entry.original, entry.name = original, name
    entry.config._attn_implementation_internal = name


def _attention(
    name: str,
    plan: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Stands in for implementation `name`: edits the call if a session asks for it, and delegates otherwise."""
    if torch.compiler.is_dynamo_compiling():
        return _traced(name, plan, module, query, key, value, attention_mask, kwargs)
    owners = _owners.get(id(module))
    if owners is not None:
        result = _edited(owners, name, module, query, key, value, attention_mask, kwargs)
        if result is not None:
            return result
    return _original(name, module)(module, query, key, value, attention_mask, **kwargs)


def _traced(
    name: str, plan: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """The same in code that is traced."""
    if not acts_in(plan, module):
        return _originals[_number_of_original(name, type(module))](module, query, key, value, mask, **kwargs)
    asked = bool(kwargs.get("output_attentions"))
    # an exported program would outlive the session
    if _exporting() or (name == "eager" and _constant_reading(id(module), asked)):
        return _apart(name, plan, module, query, key, value, mask, **kwargs)
    output = traced(_attention, name, plan, module, query, key, value, mask, kwargs)
    return _apart(name, plan, module, query, key, value, mask, **kwargs) if output is None else (output, None)


# ends the graph: what it calls is not traced
_apart = uncompiled(_attention)


# the functions that graphs have called, by number: a function itself cannot be a constant of a graph
_originals: dict[int, Any] = {}


@torch.compiler.assume_constant_result
def _number_of_original(name: str, cls: type) -> int:
    function = _lookup(name, cls)
    with lifecycle:
        number = next((number for number, known in _originals.items() if known is function), len(_originals))
        _originals[number] = function
    return number


@torch.compiler.assume_constant_result
def _exporting() -> bool:
    # traced by older torch, this would be True in graphs that are not exported too
    return torch.compiler.is_exporting()


@torch.compiler.assume_constant_result
def _constant_reading(module: int, asked: bool) -> bool:
    return asked or _weights_are_read(plans.modules[module], {})


@functools.lru_cache(maxsize=4096)
def _lookup(name: str, cls: type) -> Any:
    """The function that `cls` would have called: from the interface object its own file uses, or its own eager function."""
    home = sys.modules[_forward_of(cls).__module__]
    interface = getattr(home, "ALL_ATTENTION_FUNCTIONS", None)
    if interface is not None and name in interface:
        return from_outside(name, interface[name])
    if name == "eager":
        used = source_of(cls.forward).order  # type: ignore[attr-defined]
        for candidate in [n for n in used if n.endswith("eager_attention_forward")]:
            return getattr(home, candidate)
    raise UnsupportedError(f"{cls.__name__} has no attention function for implementation {name!r}")


def _forward_of(cls: type) -> Any:
    import inspect

    return inspect.unwrap(cls.forward)  # type: ignore[attr-defined]


def _original(name: str, module: nn.Module) -> Any:
    return _lookup(name, type(module))  # type: ignore[arg-type]


def _edited(
    owners: list[Host],
    name: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None] | None:
    known = owners[0].in_step(module) if len(owners) == 1 else None
    acting, under_way = (acting_at(owners, module), None) if known is None else known
    if not acting:
        return None
    if "cache" in kwargs and _paged(kwargs):
        raise ReattendError(f"{acting[0][0].site.name}: {NO_PAGES}")
    if module.training and kwargs.get("dropout", 0.0):
        raise ReattendError(f"{acting[0][0].site.name}: attention dropout is on; call model.eval() before using a recipe")

    def run() -> Tensor:
        return _original(name, module)(module, query, key, value, mask, **kwargs)[0].transpose(1, 2)

    def located(call: Call, site: Site, owner: Host) -> Forward:
        forward = owner.current() if under_way is None else under_way
        forward.locate(call, site)
        if forward.merged:
            forward.locate_merged(call, site)
        call.rotation = lambda: rotary_at(owner.model, owner.rotary, forward.rotaries, site, module, kwargs)
        if site.stack == "decoder" and site.kind == "self" and (forward.buffered or call.tokens is None):
            call.keep_columns(filled_columns(call.query, call.key, call.mask, call.tokens, forward.buffered))
            if call.mask is not None and name in WITH_MASKS and kwargs.get("position_bias") is None:
                forward.share_mask(call, mask)
        return forward

    make = _call if name in WITH_MASKS else call_of
    call = make(name, module, query, key, value, mask, kwargs)
    call.original = run
    found = edited(acting, call, located)
    if found is None:
        return None
    call, edits, output = found
    output = output.transpose(1, 2)
    if not output.is_contiguous():
        output = output.contiguous()
    if name != "eager" or not _weights_are_read(module, kwargs):
        return output, None
    with without_autocast(query.device):
        weights = row_weights(call, edits, torch.arange(call.num_queries, device=query.device))
    return output, torch.nn.functional.pad(weights, (0, key.shape[2] - call.num_keys)).to(query.dtype)


def _weights_are_read(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether somebody may look at the weights that eager attention returns: the caller who asks for them, or hooks of others."""
    if kwargs.get("output_attentions") or getattr(getattr(module, "config", None), "output_attentions", False):
        return True
    hooks = (*module._forward_hooks.values(), *nn.modules.module._global_forward_hooks.values())
    return "forward" in vars(module) or any(not isinstance(hook, Hook) for hook in hooks)


def _paged(kwargs: dict[str, Any]) -> bool:
    """Whether a call is one of continuous batching, whose cache is no `Cache`."""
    cache = kwargs.get("cache")
    return cache is not None and "Paged" in type(cache).__name__


def _call(name: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, kwargs: dict[str, Any]) -> Call:
    """The call as tensors, with the causality that implementation `name` would have applied."""
    is_causal, bias = False, kwargs.get("position_bias")
    if mask is None and name == "sdpa" and query.shape[2] > 1:
        is_causal = kwargs.get("is_causal")
        is_causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if is_causal and key.shape[2] > query.shape[2]:
        # prefill into an empty static cache: only its first columns are filled
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    if mask is not None and mask.shape[-1] > key.shape[2]:
        mask = mask[..., : key.shape[2]]
    if bias is not None:
        if mask is None:
            if is_causal:
                hidden = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril().logical_not()
                mask, is_causal = bias[..., : key.shape[2]].masked_fill(hidden, float("-inf")), False
            else:
                mask = bias
        else:
            mask = bias.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else bias + mask
    return Call(
        query, key, value, mask, is_causal, kwargs.get("scaling"), kwargs.get("softcap"), kwargs.get("s_aux"), name == "sdpa"
    )
