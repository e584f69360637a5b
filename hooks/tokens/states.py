"""What hidden states stand for that enter a layer, or come out of a projection: which tokens, of which rows of the batch."""

from __future__ import annotations

import functools
import inspect
from dataclasses import replace

import torch
from torch import Tensor, nn

from ...interventions import Call, Site, TokenMap, UnsupportedError
from ..passes import Forward
from .denoisers import DenoiserForward, locate


def parameters_of(module: nn.Module) -> tuple[str, ...]:
    """Names of the parameters of a module's forward, in order."""
    return _parameters(type(module))


@functools.lru_cache(maxsize=1024)
def _parameters(kind: type) -> tuple[str, ...]:
    parameters = inspect.signature(kind.forward).parameters.values()  # type: ignore[attr-defined]
    return tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))[1:]


def rows_of(forward: Forward, site: Site, states: Tensor) -> Tensor:
    """Long [B]: of which of the user's rows each row of states [B, T, ...] is; sites that fold frames or places have several of each, and
    so have beams and the answers that generate is to return for one prompt.

    Raises UnsupportedError where the first axis is not the batch.
    """
    batch = states.shape[0]
    rows = forward.batch if isinstance(forward, DenoiserForward) else batch
    tokens_first = batch != rows and states.shape[1] == rows and site.kind != "temporal"
    if tokens_first or batch % rows:
        raise UnsupportedError(
            f"{site.name}: what enters its layer has the shape {tuple(states.shape)}, of which no axis can be told to be the {rows} rows of "
            "the batch, so single rows cannot be written there"
        )
    source = torch.arange(rows) if forward.clock.source is None else forward.clock.source
    # beams and several answers are rows of the user's one
    sequence = None if forward.clock.source is not None else forward.sequence
    if sequence is not None and sequence.tokens.batch == rows and site.stack.startswith("decoder"):
        source = source // sequence.copies
    return source.repeat_interleave(batch // rows)


def version_of(value: Tensor) -> int:
    """Grows with every change in place; tensors of inference mode do not count theirs."""
    return 0 if value.is_inference() else value._version


def counted(value: Tensor) -> Tensor:
    """The same tensor; of one from inference mode, where changes in place show nowhere, a copy that shows them in its `_version`."""
    if not value.is_inference():
        return value
    with torch.inference_mode(False):
        return value.clone()


def tokens_of(
    forward: Forward,
    site: Site,
    attention: nn.Module,
    states: Tensor,
    *,
    keys: bool = False,
    text: bool = False,
    beside: bool = False,
) -> TokenMap | None:
    """The map of the tokens in states [B, ..., T, width] at a site with its module.

    keys: they are the tokens that the site looks at, where these are others than those that look. text: they are a joint block's own
    stream of text. beside: there is such a stream beside them, so that they are the image alone. None where it is not known.
    """
    if not isinstance(forward, DenoiserForward):
        return forward.tokens_of(states, site)
    if states.dim() not in (3, 4):
        return None
    if text:
        site = replace(site, kind="self", stack="denoiser.text_refiner")
    elif beside and site.kind == "joint":
        site = replace(site, kind="self")
    # tokens are found for calls of attention: this is one whose tokens are these
    these, one = (states.new_empty(states.shape[0], 1, length, 0) for length in (states.shape[-2], 0))
    crossed = site.kind == "cross"
    call = Call(one if crossed and keys else these, one if crossed and not keys else these, these, site=site)
    locate(call, forward, 0, attention)
    return call.tokens if keys or call.query_tokens is None else call.query_tokens
