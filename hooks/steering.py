"""Where routes meet sessions: which of them act at a call of attention, and what they do to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from ..interventions import Call, Edit, Site, autocast_dtype, cast, fused, without_autocast
from .host import Host
from .passes import Forward
from .protocols import Steered

# sessions, each with the model that it belongs to
Acting = Sequence[tuple[Steered, Host]]


def acting_at(owners: Sequence[Host], module: nn.Module) -> list[tuple[Steered, Host]]:
    """The sessions that act at a module in this thread, in the order in which they began."""
    if len(owners) == 1:
        owner, acting = owners[0], []
        for session in owner.active(module):
            if session.acts_at(module):
                acting.append((session, owner))
        return acting
    acting = [(session, owner) for owner in owners for session in owner.active(module) if session.acts_at(module)]
    return sorted(acting, key=lambda pair: pair[0].number)


def edited(
    acting: Acting, module: nn.Module, call: Call, place: Callable[[Call, Site, Host], Forward]
) -> tuple[Call, list[Edit], Tensor] | None:
    """(a call as sessions see it, their edits, its output [B, H, Tq, Dv] with these); None where they leave it as it is.

    Under autocast they see operands that are cast, and nothing of what they compute is.
    """
    dtype = autocast_dtype(call.query.device)
    if dtype is not None:
        with without_autocast(call.query.device):
            return edited(acting, module, cast(call, dtype), place)
    edits = edits_of(acting, module, call, place)
    if not edits and not call.then:
        return None
    output = fused(call, edits)
    for look in call.then:
        look(output)
    return call, edits, output


def edits_of(acting: Acting, module: nn.Module, call: Call, place: Callable[[Call, Site, Host], Forward]) -> list[Edit]:
    """What all sessions do to one call, identities left out; those that only look then read the call with these edits.

    place(call, site, host) tells the call where it stands in a session's model: its clock, its tokens.
    """
    edits: list[Edit] = []
    at: Any = None
    for session, owner in acting:
        site = session.site_at(module)
        if at != (id(owner), site.name):
            at, call.site = (id(owner), site.name), site
            forward = place(call, site, owner)
        edits += session.edits(module, call, forward)
    if edits:
        edits = [edit for edit in edits if not edit.is_identity]
    for session, owner in acting:
        readers = session.readers_at(module)
        if not readers:
            continue
        site = session.site_at(module)
        if at != (id(owner), site.name):
            at, call.site = (id(owner), site.name), site
            forward = place(call, site, owner)
        for read in readers:
            read(call, edits, forward)
    return edits
