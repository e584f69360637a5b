"""Which image tokens matter, from the attention inside a vision encoder: what each patch receives, and the choices made from that."""

from __future__ import annotations

import torch
from torch import Tensor

from ..call import Call
from ..engine.kernels import rows_per_chunk
from ..engine.reading import row_weights


def attention_received(call: Call, query: int | None = None) -> Tensor:
    """[B, Tk]: weight on every patch, summed over heads, from one query row (a CLS token; -1 = the last) or, for None, the mean of all."""
    count, device = call.num_queries, call.query.device
    if query is not None:
        return row_weights(call, [], torch.tensor([query % count], device=device)).sum(dim=(1, 2))
    total = torch.zeros(call.batch, call.num_keys, device=device)
    for part in torch.arange(count, device=device).split(rows_per_chunk(call.batch, call.num_heads, call.num_keys, device)):
        total += row_weights(call, [], part).sum(dim=(1, 2))
    return total / count


def top_share(scores: Tensor, share: float) -> Tensor:
    """Bool [n]: the int(n * share) largest scores."""
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    chosen[scores.topk(int(scores.numel() * share)).indices] = True
    return chosen


def outliers(scores: Tensor) -> Tensor:
    """Bool [n]: scores above the upper quartile by more than 1.5 times the distance of the quartiles (linear interpolation)."""
    if not scores.numel():
        return torch.zeros_like(scores, dtype=torch.bool)
    low, high = torch.quantile(scores.float(), torch.tensor([0.25, 0.75], device=scores.device))
    return scores > high + 1.5 * (high - low)


def informed_tokens(
    first: Tensor, penultimate: Tensor, local_share: float, spatial: Tensor | None = None, spatial_share: float = 0.0
) -> tuple[Tensor, Tensor]:
    """PAINT's two sets of one image's n tokens, (local, summary), bool [n] each and disjoint.

    Summary: outliers of what tokens receive in the penultimate layer. Local: the largest in the first layer (and of `spatial`),
    without the summary tokens.
    """
    summary = outliers(penultimate)
    local = top_share(first, local_share)
    if spatial is not None:
        local = local | top_share(spatial, spatial_share)
    return local & ~summary, summary


def head_shares(call: Call, index: Tensor, image: Tensor) -> Tensor:
    """[B, H, R]: each head's image weight in each of the query rows `index` [R], over that of the row's head with most.

    Weights are those after the edits of recipes before this one. image: bool [B, Tk].
    """
    mass = (row_weights(call, call.edits, index) * image[:, None, None]).sum(dim=-1)
    return mass / mass.amax(dim=1, keepdim=True).clamp_min(torch.finfo(mass.dtype).tiny)
