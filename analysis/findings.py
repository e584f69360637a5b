"""The numbers of the papers, worked out from what an analysis read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..interventions import ReattendError
from . import measures
from .measures import Massive
from .reading import Sample, Settings

# A column that gets this many times its even share of the weight draws attention in the sense of the speech diagnostics (our choice).
TIMES_UNIFORM = 5.0
# A token whose state points where the first token's points (our choice).
SIMILAR = 0.8


@dataclass
class Rhythm:
    """WAAD and FAI of one text, [n] each, over heads that look near and far; NaN for positions that have none.

    waad: mean distance that a row's near-sighted heads look back, capped at the window: peaks where the model looks beyond the current
    phrase. fai: mean weight that far-sighted heads of later rows give to a position. preplan, anchors: the positions with the strongest
    changes of waad and the highest fai. local, distant: (layer, head) of the two sets.
    """

    waad: Tensor
    fai: Tensor
    preplan: list[int]
    anchors: list[int]
    dominated: list[tuple[int, int]]
    local: list[tuple[int, int]]
    distant: list[tuple[int, int]]


@dataclass
class Findings:
    """What was found. Everything can be asked again with other thresholds; nothing is run again.

    samples: one per text. layers: those that were read. epsilon: a sink gets more than this mean weight. skip_last: positions at the end
    of a text that are never called sinks, because few rows see them. recipes: what was at work during the analysis.
    """

    model: dict[str, Any]
    stack: str
    samples: list[Sample]
    layers: list[int]
    epsilon: float
    skip_last: int
    settings: Settings
    recipes: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    # -- sinks -------------------------------------------------------------------------------------------------------

    def sink_rate(self, position: int = 0, epsilon: float | None = None) -> float:
        """Percent of (text, layer, head) whose mean weight on this position is over epsilon."""
        rates = self.sink_rates(epsilon)
        if not 0 <= position < rates.numel():
            raise ReattendError(f"position must lie in 0..{rates.numel() - 1}, got {position}")
        return float(rates[position])

    def sink_rates(self, epsilon: float | None = None) -> Tensor:
        """[n] percent, for every position that all texts have."""
        limit = self.epsilon if epsilon is None else epsilon
        n = min(map(len, self.samples))
        every = [torch.cat([s.importance[layer][:, :n] for layer in self.layers]) for s in self.samples]
        return measures.sink_rate(torch.cat(every), limit)

    def first_token(self) -> dict[int, Tensor]:
        """{layer: [H]}: each head's mean weight on the first token, over texts."""
        return {n: torch.stack([s.importance[n][:, 0] for s in self.samples]).mean(dim=0) for n in self.layers}

    def sinks(self, sample: int = 0, epsilon: float | None = None) -> list[tuple[int, str, float]]:
        """[(position, token, share of heads)] of one text: positions over epsilon in some head, most heads first."""
        text, limit = self.samples[sample], self.epsilon if epsilon is None else epsilon
        shares = torch.cat([text.importance[n] for n in self.layers]).gt(limit).float().mean(dim=0)
        late = shares.numel() - self.skip_last
        places = [k for k in shares.nonzero()[:, 0].tolist() if k == 0 or k < late]
        return sorted(((k, text.tokens[k], float(shares[k])) for k in places), key=lambda item: -item[2])

    def drawing(self, sample: int = 0, times: float = TIMES_UNIFORM) -> list[tuple[int, str, float]]:
        """[(position, token, weight / even share)]: positions after the first whose mean weight exceeds `times` an even share.

        Means over layers and heads; the even share of a column is the mean of 1 / (number of columns that a row sees) over its rows.
        """
        text = self.samples[sample]
        means = torch.cat([text.importance[n] for n in self.layers]).mean(dim=0)
        n = means.numel()
        causal = bool(text.near)
        seen = torch.arange(1, n + 1, dtype=torch.float64) if causal else torch.full((n,), float(n), dtype=torch.float64)
        even = seen.reciprocal().flip(0).cumsum(0).flip(0) / torch.arange(n, 0, -1) if causal else seen.reciprocal()
        ratios = means.double() / even
        places = [k for k in range(1, n - self.skip_last) if ratios[k] > times]
        return sorted(((k, text.tokens[k], float(ratios[k])) for k in places), key=lambda item: -item[2])

    # -- hidden states -----------------------------------------------------------------------------------------------

    def norms(self) -> dict[str, Tensor]:
        """{"hidden" | "key" | "value": [layers, n]}: mean l2 norms per position that all texts have."""
        n = min(map(len, self.samples))

        def mean(name: str) -> Tensor:
            every = [torch.stack([getattr(s, name)[layer][:n] for layer in self.layers]) for s in self.samples]
            return torch.stack(every).mean(dim=0)

        return {name: mean(name) for name in ("hidden", "key", "value")}

    def largest(self) -> Tensor:
        """[layers, 4]: the three largest magnitudes entering each layer and the median one, mean over texts."""
        return torch.stack([torch.stack([s.largest[n] for n in self.layers]) for s in self.samples]).mean(dim=0)

    def massive(self, sample: int = 0) -> list[Massive]:
        """The massive activations of one text, largest first."""
        return sorted(self.samples[sample].massive, key=lambda m: -abs(m.value))

    def sink_dims(self, tau: float = 20.0) -> list[int]:
        """Hidden dimensions that hold massive values at the first token, strongest first; layers 2 to the one before the last are judged."""
        middle = self.layers[2:-1] or self.layers
        scores = torch.stack([torch.stack([s.first[n] for n in middle]) for s in self.samples])
        return measures.sink_dimensions(scores, tau)

    def similarity(self) -> float | None:
        """Mean squared cosine of the tokens before the answer with the first one, over the inner states; None for a single token or layer."""
        values = [v for s in self.samples for v in [_decorrelation(s, self.layers)] if v is not None]
        return sum(values) / len(values) if values else None

    def intermediate_sinks(self, sample: int = 0, similar: float = SIMILAR) -> list[tuple[int, str, int, float]]:
        """[(position, token, layers, cosine)]: tokens after the first that hold massive activations in the first token's dimensions.

        layers: in how many that is so while the token's state has a cosine over `similar` with the first one's; cosine: the largest.
        """
        text = self.samples[sample]
        own = {(m.layer, m.dim) for m in text.massive if m.position == 0}
        found: dict[int, set[int]] = {}
        for m in text.massive:
            if m.position and (m.layer, m.dim) in own and float(text.similarity[m.layer][m.position]) > similar:
                found.setdefault(m.position, set()).add(m.layer)
        rows = [(k, text.tokens[k], len(at), max(float(text.similarity[n][k]) for n in at)) for k, at in found.items()]
        return sorted(rows, key=lambda row: (-row[2], row[0]))

    # -- rhythm ------------------------------------------------------------------------------------------------------

    def rhythm(
        self, sample: int = 0, layers: str | list[int] = "all", local: float = 0.3, distant: float = 0.3, share: float = 0.4
    ) -> Rhythm:
        """WAAD and FAI of one text. layers: "all", "middle5" (5 evenly spaced ones of the middle third) or a list of layers.

        local, distant: share of heads in either set. share: of the positions that count as preplan tokens and as anchors. Raises
        ReattendError for attention that looks in both directions.
        """
        text = self.samples[sample]
        if not text.near:
            raise ReattendError(f"WAAD and FAI need causal attention, and that of the {self.stack} looks in both directions")
        chosen = self._rhythm_layers(layers)
        heads = [(n, h) for n in chosen for h in range(text.span[n].numel())]
        near, far = measures.local_and_global(torch.cat([text.span[n] for n in chosen]), local, distant)
        waad = torch.cat([text.near[n] for n in chosen])[near].mean(dim=0)
        fai = torch.cat([text.ahead[n] for n in chosen])[far].mean(dim=0)
        anchors = measures.strongest(fai, share)
        named = [[heads[i] for i in index.tolist()] for index in (near, far)]
        known = waad[text.answer :]
        pairs = measures.dominated_anchors(known, [t - text.answer for t in anchors if t >= text.answer])
        return Rhythm(
            waad,
            fai,
            measures.strongest(measures.transitions(waad), share),
            anchors,
            [(a + text.answer, b + text.answer) for a, b in pairs],
            *named,
        )

    def _rhythm_layers(self, layers: str | list[int]) -> list[int]:
        if layers == "all":
            return self.layers
        if layers == "middle5":
            n = len(self.layers)
            places = torch.linspace(n // 3, max(n // 3, 2 * n // 3 - 1), 5).round().long().unique().tolist()
            return [self.layers[i] for i in places]
        chosen = [n for n in layers if isinstance(n, int)]
        if not chosen or isinstance(layers, str) or set(chosen) - set(self.layers):
            raise ReattendError(f"layers must be 'all', 'middle5' or a list of {self.layers}, got {layers!r}")
        return chosen


def _decorrelation(sample: Sample, layers: list[int]) -> float | None:
    """Over the states between the layers: what enters the first one are the embeddings, which do not count."""
    before = sample.answer or len(sample)
    inner = [n for n in layers if n > 0]
    if before < 2 or not inner:
        return None
    return measures.decorrelation(torch.stack([sample.similarity[n] for n in inner]), before - 1)
