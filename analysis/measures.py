"""The measures themselves: pure functions of weights and hidden states, as the papers define them.

Sink rate: Gu et al. 2024 (arXiv 2410.10781). Massive activations: Sun et al. 2024 (2402.17762). Similarity with the first token: Cappellazzo et
al. 2025 (2510.22603). WAAD and FAI: "Attention Illuminates LLM Reasoning" (2510.13554).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..interventions import ReattendError


def sink_rate(importance: Tensor, epsilon: float = 0.3) -> Tensor:
    """Percent of (sample, layer, head) for which a position is a sink: [..., T] -> [T].

    importance: mean weight on each position over the rows that can see it. A sink is what gets more than epsilon.
    """
    return 100 * (importance > epsilon).flatten(0, -2).double().mean(dim=0)


def largest_and_median(hidden: Tensor, count: int = 3) -> Tensor:
    """[count + 1]: the largest magnitudes of hidden states [T, D] in falling order, then the (lower) median one."""
    magnitudes = hidden.detach().abs().float().flatten()
    return torch.cat([magnitudes.topk(min(count, magnitudes.numel())).values, magnitudes.median()[None]])


class Massive(NamedTuple):
    """One massive activation: the value that dimension `dim` of the token at `position` holds as it enters `layer`."""

    layer: int
    position: int
    dim: int
    value: float


def massive_activations(hidden: Tensor, absolute: float = 100.0, ratio: float = 1000.0, layer: int = 0) -> list[Massive]:
    """The massive entries of hidden states [T, D], largest first: |x| over `absolute` and over `ratio` times the median |x|."""
    magnitudes = hidden.detach().abs().float()
    limit = max(absolute, ratio * float(magnitudes.median()))
    places = (magnitudes > limit).nonzero()
    values = hidden[places[:, 0], places[:, 1]].float()
    order = values.abs().argsort(descending=True).tolist()
    return [Massive(layer, int(places[i, 0]), int(places[i, 1]), float(values[i])) for i in order]


def sink_dimensions(scores: Tensor, tau: float = 20.0, share: float = 0.5) -> list[int]:
    """Hidden dimensions that stand out at first tokens, strongest first.

    scores [samples, layers, D]: |x| / rms(x) of each sample's first token. A dimension counts if, on the mean over samples, it
    exceeds tau in at least `share` of the layers.
    """
    mean = scores.float().mean(dim=0)
    over = (mean > tau).float().mean(dim=0)
    return [int(d) for d in mean.mean(dim=0).argsort(descending=True) if over[d] >= share and over[d] > 0]


def similarity_with_first(hidden: Tensor) -> Tensor:
    """Cosine [..., T] of every token's hidden state [..., T, D] with the first token's; it does not change if a token is rescaled."""
    unit = torch.nn.functional.normalize(hidden.detach().float(), dim=-1)
    return (unit @ unit[..., :1, :].transpose(-1, -2))[..., 0]


def decorrelation(cosines: Tensor, count: int) -> float:
    """Mean over layers, samples and the `count` tokens after the first one of the squared cosine with it; cosines [..., T].

    0: nothing points where the first token points; 1: everything does. What Llama-AVSR's training loss keeps small.
    """
    if not 0 < count < cosines.shape[-1]:
        raise ReattendError(f"count must lie in 1..{cosines.shape[-1] - 1}, got {count}")
    return float(cosines[..., 1 : count + 1].double().square().mean())


def local_and_global(spans: Tensor, local: float = 0.3, distant: float = 0.3) -> tuple[Tensor, Tensor]:
    """(indices of the heads that look back least, of those that look back most) among heads with mean distances `spans` [N].

    local, distant: the share of heads in each set; at least one head.
    """
    order = spans.argsort()
    low, high = (max(1, round(part * spans.numel())) for part in (local, distant))
    return order[:low], order[-high:]


def transitions(waad: Tensor) -> Tensor:
    """[T - 1]: how much the backward look changes from each token to the next."""
    return waad.diff().abs()


def strongest(values: Tensor, share: float) -> list[int]:
    """Positions of the `share` of values [T] that are largest, in reading order; NaN never counts."""
    known = (~values.isnan()).nonzero()[:, 0]
    count = round(share * known.numel())
    best = known[values[known].argsort(descending=True)[:count]]
    return sorted(best.tolist())


def dominated_anchors(
    waad: Tensor, anchors: Sequence[int], before: int = 3, low: float | None = None, jump: float | None = None
) -> list[tuple[int, int]]:
    """[(anchor, its partner)]: anchors that look back little although the tokens just before them jumped.

    An anchor t counts if waad[t] <= low and the largest transition of the `before` tokens ahead of it is >= jump; its partner is the
    token of that transition. low, jump: the medians where None (the paper's thresholds are not known).
    """
    steps = transitions(waad)
    if not steps.numel():
        return []
    low = float(waad.median()) if low is None else low
    jump = float(steps.median()) if jump is None else jump
    found = []
    for t in anchors:
        start = max(0, t - before)
        if t == 0 or t > steps.numel() or float(waad[t]) > low:
            continue
        partner = start + int(steps[start:t].argmax())
        if float(steps[partner]) >= jump:
            found.append((t, partner))
    return found
