"""The observe and projection doors: read-only taps on layer inputs; keys (and queries) between their projection and RoPE."""

from __future__ import annotations

import dis
import functools
import inspect
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ...interventions import ReattendError, Site, UnsupportedError
from ..plan import Observation, Observe, Plan, Project, Projection, ReadProjection
from ..sites.discovery import layer_module
from ..sites.table import SiteTable

if TYPE_CHECKING:
    from ..attachment import Attachment
    from ..session import Session

# Names of the projections, and of the norms that act on their outputs per head (or on all heads at once).
NORMS = {"key": ("k_norm", "k_layernorm", "key_layernorm"), "query": ("q_norm", "q_layernorm", "query_layernorm")}
PROJECTIONS = {"key": "k_proj", "query": "q_proj"}


def install_observation(attachment: Attachment, session: Session, plan: Plan, step: Observe) -> None:
    """Puts on hooks that call step.tap with the hidden state entering the layer of each site."""
    for site in step.sites:

        def tap(module: nn.Module, args: tuple, kwargs: dict, site=site) -> None:
            if session not in attachment.active():
                return
            hidden = args[0] if args else kwargs.get("hidden_states")
            if not isinstance(hidden, Tensor):
                raise UnsupportedError(
                    f"the layer of {site.name} is called without hidden_states, so its input cannot be observed"
                )
            forward = attachment.denoiser.current() or attachment.tracker.current()
            step.tap(Observation(hidden.detach(), site, forward.clock, forward.tokens, forward.memory(plan.memory_key)))
            if forward.probe is not None:
                forward.probe.read(step, step.sites.module(site))

        session.handles.before(layer_module(session.model, site.name), tap, kwargs=True)


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
    code = inspect.unwrap(cls.forward).__code__  # type: ignore[attr-defined]
    used = [str(i.argval) for i in dis.get_instructions(code) if isinstance(i.argval, str)]
    rotary = [place for place, name in enumerate(used) if name.startswith("apply_") and "rotary" in name]
    return norm in used and (not rotary or used.index(norm) < rotary[-1])


def install_projection(attachment: Attachment, session: Session, plan: Plan, step: Project | ReadProjection) -> None:
    """Puts on hooks between projection and RoPE of each site that let the step edit or read the keys of new tokens.

    Raises UnsupportedError for sites that have no key projection of their own.
    """
    misfit = projection_misfit(step.sites, step.query)
    if misfit:
        raise UnsupportedError(misfit)
    for site in step.sites:
        module = step.sites.module(site)
        # queries wait here for the keys of the same pass, per thread
        waiting: dict[int, Tensor] = {}
        if step.query:
            session.handles.after(_target(module, "query"), _keep_query(attachment, session, site, waiting))
        session.handles.after(_target(module, "key"), _on_keys(attachment, session, plan, step, site, waiting))


def _target(attention: nn.Module, which: str) -> nn.Module:
    target = last_module(attention, which)
    assert target is not None
    return target


def _keep_query(attachment: Attachment, session: Session, site: Site, waiting: dict[int, Tensor]) -> Callable[..., None]:
    def keep(_: nn.Module, args: tuple, output: Tensor | None) -> None:
        if output is not None and session in attachment.active():
            waiting[threading.get_ident()] = _heads_first(output, args, site, site.num_heads)[0]

    return keep


def _on_keys(
    attachment: Attachment,
    session: Session,
    plan: Plan,
    step: Project | ReadProjection,
    site: Site,
    waiting: dict[int, Tensor],
) -> Callable[..., Tensor | None]:
    def project(_: nn.Module, args: tuple, output: Tensor | None) -> Tensor | None:
        if output is None or session not in attachment.active():
            return None
        forward = attachment.denoiser.current() or attachment.tracker.current()
        key, back = _heads_first(output, args, site, site.num_kv_heads)
        query = waiting.pop(threading.get_ident(), None)
        if step.query and query is None:
            raise ReattendError(f"{site.name} projects its keys before its queries, which a recipe wants to read first")
        seen = Projection(key, query, site, forward.clock, forward.tokens, forward.memory(plan.memory_key))
        if isinstance(step, ReadProjection):
            step.reader(seen)
            return None
        edit = step.edit(seen)
        if edit is None or edit.is_identity:
            return None
        session.counts[step.label][site.name] += 1
        return back(edit.on_key(key))

    return project


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
