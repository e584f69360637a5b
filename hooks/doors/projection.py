"""The projection door: keys (and queries) of new tokens between their projection and RoPE, to be changed or read."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ...interventions import Clock, ProjectKey, ReattendError, Site, TokenMap
from ..handles import Handles, Holder
from ..host import Host
from ..plan import Facts, Plan, Step, sites_misfit
from ..sites.source import source_of
from ..sites.table import SiteTable

# Names of the projections, and of the norms that act on their outputs per head (or on all heads at once).
NORMS = {"key": ("k_norm", "k_layernorm", "key_layernorm"), "query": ("q_norm", "q_layernorm", "query_layernorm")}
PROJECTIONS = {"key": "k_proj", "query": "q_proj"}


@dataclass
class Projected:
    """What the projection door sees of one pass at one site: the new tokens before RoPE and cache, after norms per head.

    key [B, Hkv, T, D]; query [B, H, T, D], where the step asked for it; clock, tokens and memory as in a Call.
    """

    key: Tensor
    query: Tensor | None
    site: Site
    clock: Clock
    tokens: TokenMap | None
    memory: dict[Any, Any]

    @property
    def start(self) -> int:
        """Absolute position of the first of these tokens."""
        return self._map.length - self.key.shape[2]

    def rows(self, role: str) -> Tensor:
        """Bool [B, T] on the CPU: which of these tokens carry a role. Raises ReattendError where the pass has no token map."""
        return self._map.positions(role, self.start, self._map.length)

    @property
    def _map(self) -> TokenMap:
        if self.tokens is None:
            raise ReattendError(
                f"no token map at {self.site.name}: call the whole model with input_ids, so that tokens have roles"
            )
        return self.tokens


@dataclass
class Projection(Step):
    """edit(Projected) -> ProjectKey | None: a change of the key projection's output of new tokens, before RoPE and cache.

    What is changed stays in the cache, so that later steps cost nothing. reader(Projected): read-only, after all edits of the sessions
    before. A step has one of the two. query: it gets the queries of the same tokens too. label: its name in the session's counters, for
    an edit. Raises ReattendError for both or neither.
    """

    sites: SiteTable
    edit: Callable[[Projected], ProjectKey | None] | None = None
    reader: Callable[[Projected], None] | None = None
    label: str = ""
    query: bool = False

    def __post_init__(self) -> None:
        if (self.edit is None) == (self.reader is None):
            raise ReattendError(
                "a Projection step takes either edit=..., which changes keys, or reader=..., which looks at them"
            )

    def check(self, facts: Facts) -> str:
        return sites_misfit(self.sites) or projection_misfit(self.sites, self.query)

    def install(self, host: Host, session: Holder, plan: Plan) -> Handles:
        handles = session.handles()
        if self.edit is not None:
            session.counter(self.label or plan.recipe)
        for site in self.sites:
            module = self.sites.module(site)
            # queries wait here for the keys of the same pass, per thread
            waiting: dict[int, Tensor] = {}
            if self.query:
                handles.after(_target(module, "query"), _keep_query(host, session, site, waiting))
            handles.after(_target(module, "key"), self._on_keys(host, session, plan, site, waiting))
        return handles

    def _on_keys(
        self, host: Host, session: Holder, plan: Plan, site: Site, waiting: dict[int, Tensor]
    ) -> Callable[..., Tensor | None]:
        def project(_: nn.Module, args: tuple, output: Tensor | None) -> Tensor | None:
            if output is None or session not in host.active():
                return None
            forward = host.current()
            key, back = _heads_first(output, args, site, site.num_kv_heads)
            query = waiting.pop(threading.get_ident(), None)
            if self.query and query is None:
                raise ReattendError(f"{site.name} projects its keys before its queries, which a recipe wants to read first")
            seen = Projected(key, query, site, forward.clock, forward.tokens, forward.memory(plan.memory_key))
            if self.reader is not None:
                self.reader(seen)
                return None
            assert self.edit is not None
            edit = self.edit(seen)
            if edit is None or edit.is_identity:
                return None
            session.counts[self.label or plan.recipe][site.name] += 1
            return back(edit.on_key(key))

        return project


def projection_misfit(table: SiteTable, query: bool = False) -> str:
    """Why the keys (and queries) of one of these sites cannot be reached before RoPE, or ""."""
    for site in table:
        for which in ("key", "query") if query else ("key",):
            if last_module(table.module(site), which) is None or not site.head_dim:
                return (
                    f"{site.name} has no {PROJECTIONS[which]} of its own (it may be fused with others), so its {which}s cannot be "
                    f"reached before RoPE"
                )
    return ""


def last_module(attention: nn.Module, which: str) -> nn.Module | None:
    """The module whose output is the site's keys or queries just before RoPE: the norm, where one comes before RoPE, or the projection."""
    projection = getattr(attention, PROJECTIONS[which], None)
    if not isinstance(projection, nn.Module):
        return None
    for name in NORMS[which]:
        norm = getattr(attention, name, None)
        if isinstance(norm, nn.Module) and _before_rotary(type(attention), name):
            return norm
    return projection


@functools.lru_cache(maxsize=1024)
def _before_rotary(cls: type, norm: str) -> bool:
    """Whether a class's forward uses the norm before its last rotary embedding (some models rotate first and norm then)."""
    used = source_of(cls.forward).order  # type: ignore[attr-defined]
    rotary = [place for place, name in enumerate(used) if name.startswith("apply_") and "rotary" in name]
    return norm in used and (not rotary or used.index(norm) < rotary[-1])


def _target(attention: nn.Module, which: str) -> nn.Module:
    target = last_module(attention, which)
    assert target is not None
    return target


def _keep_query(host: Host, session: Holder, site: Site, waiting: dict[int, Tensor]) -> Callable[..., None]:
    def keep(_: nn.Module, args: tuple, output: Tensor | None) -> None:
        if output is not None and session in host.active():
            waiting[threading.get_ident()] = _heads_first(output, args, site, site.num_heads)[0]

    return keep


def _heads_first(output: Tensor, args: tuple, site: Site, heads: int | None) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """([B, heads, T, D], the way back) of what a projection [B, T, heads * D] or a norm per head returns."""
    if output.dim() == 3:
        wide = output.unflatten(2, (-1, site.head_dim or 1))
        if heads is None or wide.shape[2] == heads:
            return wide.transpose(1, 2), lambda key: key.transpose(1, 2).flatten(2)
    elif output.dim() == 4 and heads in output.shape[1:3]:
        tokens_first = output.shape[2] == heads
        if tokens_first and output.shape[1] == heads and args and isinstance(args[0], Tensor):
            # as many tokens as heads: in a view of the projection's output the step from token to token is the longer one
            tokens_first = args[0].stride(1) > args[0].stride(2)
        if tokens_first:
            return output.transpose(1, 2), lambda key: key.transpose(1, 2)
        return output, lambda key: key
    raise ReattendError(
        f"{site.name}: an output of shape {tuple(output.shape)} cannot be split into {heads} heads of {site.head_dim}"
    )
