"""What one text shows inside a model: a tap on every layer's input and a reader of every attention, kept as small tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..hooks import Capture, Observation, Observe, SiteTable
from ..interventions import Call, Edit, ReattendError
from ..interventions.engine.census import census
from ..interventions.families.sinks import sink_scores
from .measures import Massive, largest_and_median, massive_activations, similarity_with_first

# Entries of one layer that are kept: a model has a handful, a broken one could have millions.
MOST_MASSIVE = 200


@dataclass(eq=False)
class Sample:
    """One text of n tokens, padding left out; every tensor on the CPU, one entry per layer.

    importance [H, n]: mean weight on each position over the rows that see it. span [H]: mean distance looked back. near [H, n] and
    ahead [H, n]: what WAAD and FAI are made of, NaN where a row or column has none. hidden [n], key [n], value [n]: l2 norms, mean over
    heads. first [D]: |x| / rms(x) of the first token. largest [4]: three largest |x| and the median. similarity [n]: cosine with the
    first token. massive: the entries that stand out. answer: position of the first token whose row counts for span, WAAD and FAI.
    """

    tokens: list[str]
    answer: int = 0
    importance: dict[int, Tensor] = field(default_factory=dict)
    span: dict[int, Tensor] = field(default_factory=dict)
    near: dict[int, Tensor] = field(default_factory=dict)
    ahead: dict[int, Tensor] = field(default_factory=dict)
    hidden: dict[int, Tensor] = field(default_factory=dict)
    key: dict[int, Tensor] = field(default_factory=dict)
    value: dict[int, Tensor] = field(default_factory=dict)
    first: dict[int, Tensor] = field(default_factory=dict)
    largest: dict[int, Tensor] = field(default_factory=dict)
    similarity: dict[int, Tensor] = field(default_factory=dict)
    massive: list[Massive] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Settings:
    """How to read. window, horizon: of WAAD and FAI in tokens; absolute, ratio: what makes an activation massive."""

    window: int = 10
    horizon: tuple[int, int] = (10, 50)
    absolute: float = 100.0
    ratio: float = 1000.0


class Reader:
    """Fills one `Sample` per row of a batch during a single forward pass. answers: where each row's answer begins."""

    def __init__(self, table: SiteTable, settings: Settings, answers: Sequence[int]) -> None:
        self.table, self.settings = table, settings
        self.samples = [Sample([], answer) for answer in answers]
        self.real: Tensor | None = None

    def steps(self) -> list[Observe | Capture]:
        return [Observe(self.table, self.look), Capture(self.table, self.count)]

    def _places(self, batch: int, length: int, padding: Tensor | None) -> list[Tensor]:
        """The positions of each row's real tokens, the same at every layer."""
        if batch != len(self.samples):
            raise ReattendError(f"the model was called with a batch of {batch}, expected {len(self.samples)}")
        real = torch.ones(batch, length, dtype=torch.bool) if padding is None else ~padding.cpu()
        if self.real is not None and self.real.shape != real.shape:
            raise ReattendError(
                f"the layers see {self.real.shape[1]} and {length} tokens: only layers that all see the same tokens can be "
                "analysed together"
            )
        self.real = real
        return [row.nonzero()[:, 0] for row in real]

    def look(self, seen: Observation) -> None:
        hidden, layer = seen.hidden, seen.site.layer
        if hidden.dim() != 3:
            raise ReattendError(f"the input of layer {layer} has {hidden.dim()} dimensions, expected [batch, tokens, width]")
        length = hidden.shape[1]
        padding = None if seen.tokens is None else seen.tokens.positions("padding", 0, length, hidden.device)
        every = self._places(hidden.shape[0], length, padding)
        for row, sample, places in zip(hidden, self.samples, every, strict=True):
            own = row[places.to(hidden.device)].float()
            sample.hidden[layer] = torch.linalg.vector_norm(own, dim=-1).cpu()
            sample.first[layer] = sink_scores(own[None, :1])[0, 0].cpu()
            sample.largest[layer] = largest_and_median(own).cpu()
            sample.similarity[layer] = similarity_with_first(own).cpu()
            sample.massive += massive_activations(own, self.settings.absolute, self.settings.ratio, layer)[:MOST_MASSIVE]

    def count(self, call: Call, edits: Sequence[Edit]) -> None:
        assert call.site is not None
        layer, length = call.site.layer, call.num_keys
        if call.num_queries != length:
            raise ReattendError(
                f"{call.site.name} has {call.num_queries} rows and {length} columns: it does not read its own tokens"
            )
        padding = None if call.tokens is None else call.columns("padding")
        every = self._places(call.batch, length, padding)
        rows = torch.zeros(call.batch, length, dtype=torch.bool)
        for number, (sample, places) in enumerate(zip(self.samples, every, strict=True)):
            rows[number, places[sample.answer :]] = True
        found = census(call, edits, rows, self.settings.window, self.settings.horizon)
        near = found.near.masked_fill(~found.rows[:, None], float("nan"))
        ahead = torch.where(found.ahead_rows[:, None] > 0, found.ahead / found.ahead_rows[:, None].clamp_min(1), float("nan"))
        norms = [torch.linalg.vector_norm(x.float(), dim=-1).mean(dim=1).cpu() for x in (call.key, call.value)]
        for number, (sample, places) in enumerate(zip(self.samples, every, strict=True)):
            sample.importance[layer] = found.means[number].cpu().float()[:, places]
            sample.span[layer] = found.span[number].cpu().float()
            if call.site.causal:
                sample.near[layer] = near[number].cpu().float()[:, places]
                sample.ahead[layer] = ahead[number].cpu().float()[:, places]
            sample.key[layer], sample.value[layer] = (norm[number, places] for norm in norms)
