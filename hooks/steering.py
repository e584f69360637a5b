"""Where routes meet sessions: which of them act at a call of attention, and what they do to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from ..interventions import Call, Edit, Site
from ..interventions.engine.autocast import autocast_dtype, cast, without_autocast
from ..interventions.engine.ways import fused_as_it_is
from .host import Host
from .passes import Forward
from .protocols import Place

# what sessions do at a module, each with the model that its session belongs to
Acting = Sequence[tuple[Place, Host]]


def acting_at(owners: Sequence[Host], module: nn.Module) -> Acting:
    """What the sessions of this thread do at a module, in the order in which they began."""
    acting = [
        (place, owner) for owner in owners for session in owner.active(module) if (place := session.at(module)) is not None
    ]
    return acting if len(owners) == 1 else sorted(acting, key=lambda pair: pair[0].number)


def edited(acting: Acting, call: Call, locate: Callable[[Call, Site, Host], Forward]) -> tuple[Call, list[Edit], Tensor] | None:
    """(a call as sessions see it, their edits, its output [B, H, Tq, Dv] with these); None where they leave it as it is.

    Under autocast they see operands that are cast, and nothing of what they compute is. locate: as for `edits_of`.
    """
    dtype = autocast_dtype(call.query.device)
    if dtype is not None:
        with without_autocast(call.query.device):
            return edited(acting, cast(call, dtype), locate)
    edits = edits_of(acting, call, locate)
    if not edits and not call.looks:
        return None
    output = fused_as_it_is(call, edits)
    for look in call.looks:
        look(output)
    return call, edits, output


def edits_of(acting: Acting, call: Call, locate: Callable[[Call, Site, Host], Forward]) -> list[Edit]:
    """What all sessions do to one call; those that only look then read the call with these edits.

    locate(call, site, host) tells the call where it stands in a session's model: its clock, its tokens.
    """
    edits: list[Edit] = []
    call.edits = edits
    host: Any = None
    name = ""
    for place, owner in acting:
        site = place.site
        if owner is not host or site.name != name:
            host, name, call.site = owner, site.name, site
            forward = locate(call, site, owner)
        before = len(edits)
        for editor in place.editors:
            edits += editor(call, forward)
        if len(edits) > before:
            call.ways = place.ways
    for place, owner in acting:
        if not place.readers:
            continue
        site = place.site
        if owner is not host or site.name != name:
            host, name, call.site = owner, site.name, site
            forward = locate(call, site, owner)
        for read in place.readers:
            read(call, edits, forward)
    return edits
