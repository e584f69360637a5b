"""What enters a layer: which tokens (those of its attention, or in a block of two streams the image's alone), of which rows."""

from __future__ import annotations

import functools
import inspect
from dataclasses import replace

import torch
from torch import Tensor, nn

from ...interventions import Call, Site, TokenMap
from ..passes import Forward
from .denoisers import DenoiserForward, locate


def parameters_of(module: nn.Module) -> tuple[str, ...]:
    """Names of the parameters of a module's forward, in order."""
    return _parameters(type(module))


@functools.lru_cache(maxsize=1024)
def _parameters(kind: type) -> tuple[str, ...]:
    parameters = inspect.signature(kind.forward).parameters.values()  # type: ignore[attr-defined]
    return tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))[1:]


def rows_entering(forward: Forward, batch: int) -> Tensor:
    """Long [batch]: of which of the user's rows each row of a layer is; sites that fold frames or places have several of each."""
    rows = forward.batch if isinstance(forward, DenoiserForward) else batch
    source = torch.arange(rows) if forward.clock.source is None else forward.clock.source
    return source.repeat_interleave(batch // len(source)) if batch % len(source) == 0 else torch.arange(batch)


def tokens_entering(forward: Forward, site: Site, hidden: Tensor, text: Tensor | None) -> TokenMap | None:
    """The map of the tokens in hidden [B, T, width], which enter the layer of a site; text: the stream beside them, where there is one."""
    if not isinstance(forward, DenoiserForward):
        return forward.tokens_at(site)
    if hidden.dim() != 3:
        return None
    # tokens are found for calls of attention: this is one whose tokens are those that enter
    states = hidden[:, None]
    keys = text[:, None, :, :1] if site.kind == "cross" and text is not None else states
    joint = site.kind == "joint" and text is not None
    call = Call(states, keys, keys, site=replace(site, kind="self") if joint else site)
    locate(call, forward, 0)
    return call.tokens if call.query_tokens is None else call.query_tokens
