"""What SEKA learns: along which directions a question moves the keys of the words that answer it, per layer and key head."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...hooks import Capture, Plan, Projected, Projection, attach
from ...hooks.sites.projections import projection_misfit
from ...hooks.tokens.spans import inside_range, tokenizer_of
from ...hooks.tokens.transcript import Offsets, read
from ...interventions import Call, ReattendError
from ...interventions.families.gaze import row_shares
from ...interventions.families.subspaces import KeyDistance, PairedKeys
from ..kit.checks import shown
from ..kit.profile import Profile, fingerprint
from ..kit.profiling import checked, profiled_sites, track
from .material.files import content_of, list_of
from .material.question_pairs import Triplet, triplets

CONTEXT = "Context: "
# the three texts of a triplet: without a question, with the one it answers, with another
VERSIONS = ("neutral", "relevant", "irrelevant")


@dataclass
class Sample:
    """A triplet's texts as tokens, and which of them are the answer's in each."""

    kind: str
    ids: list[list[int]]
    places: list[list[int]]


@dataclass
class Watcher:
    """What one batch of samples showed. Rows come in the order of VERSIONS: all neutral texts, then all relevant ones, ..."""

    samples: Sequence[Sample]
    real: Tensor
    feature: str | None = None
    # {layer: keys [3, Hkv, N, D] of all answer tokens}; attention [rows]: weight of the last token on the answer, summed over layers
    keys: dict[int, Tensor] = field(default_factory=dict)
    attention: Tensor | float = 0.0

    def __post_init__(self) -> None:
        count = len(self.samples)
        rows, places = [], []
        self.answers = torch.zeros(self.real.shape, dtype=torch.bool)
        for version in range(len(VERSIONS)):
            for i, sample in enumerate(self.samples):
                rows += [version * count + i] * len(sample.places[version])
                places += sample.places[version]
        self.rows, self.places = torch.tensor(rows), torch.tensor(places)
        self.answers[self.rows, self.places] = True
        # which sample each answer token of a version belongs to
        self.owner = torch.tensor([i for i, s in enumerate(self.samples) for _ in s.places[0]])
        last = self.real & (self.real.flip(1).cumsum(dim=1).flip(1) == 1)
        self.last = last

    def read_keys(self, seen: Projected) -> None:
        device = seen.key.device
        found = seen.key[self.rows.to(device), :, self.places.to(device)].detach().float()
        if self.feature is not None:
            found = found.tanh() if self.feature == "tanh" else torch.nn.functional.elu(found)
        self.keys[seen.site.layer] = found.view(len(VERSIONS), -1, *found.shape[1:]).transpose(1, 2)

    def read_attention(self, call: Call, edits: Sequence[Any]) -> None:
        self.attention = self.attention + row_shares(call, self.last, self.answers[:, None])[:, 0].cpu()

    def risen(self, least: float) -> Tensor:
        """Bool [samples]: the relevant question raises the last token's attention on the answer at least `least` times."""
        neutral, relevant, _ = torch.as_tensor(self.attention).view(len(VERSIONS), -1)
        return relevant >= least * neutral


@checked
def learn_subspaces(
    recipe: str,
    model: Any,
    processor: Any,
    *,
    data: Sequence[Triplet | Sequence[str]] | None = None,
    pairs: int = 100,
    seed: int = 0,
    batch_size: int = 8,
    min_rise: float = 1.2,
    feature: str | None = None,
    official_span: bool = False,
    experts: bool = True,
) -> Profile:
    """Reads keys in three texts per triplet and keeps the subspaces they span. Cost: three short forward passes for each triplet.

    data: (context, question, answer as it stands in the context, a question about something else[, kind of question]); without it
    2 * `pairs` triplets made up from `seed`. Tensors per layer n: "n.relevant.vectors" [Hkv, D, D] and ".values" [Hkv, D], singular
    vectors and values of neutral against relevant keys; "n.irrelevant..." of neutral against irrelevant ones; "n.distance" and
    "n.mean_distance" [Hkv], how far apart relevant and irrelevant keys are (see `KeyDistance`). experts: also "n.experts.vectors"
    [M, Hkv, D, D] and the like for each kind of question, from the texts where the question raises the last token's attention on the
    answer `min_rise` times. official_span: the official rule for the answer's tokens (see `answer_tokens`).
    Raises ReattendError for a model whose keys cannot be read, or data in which no answer is found.
    """
    table, chosen = profiled_sites(model, recipe)
    misfit = projection_misfit(chosen)
    if misfit:
        raise ReattendError(f"cannot profile this model: {misfit}")
    if feature not in (None, "tanh", "elu"):
        raise ReattendError(f"feature must be None, 'tanh' or 'elu', got {feature!r}")
    if pairs < 1 or batch_size < 1:
        raise ReattendError(f"pairs and batch_size must be at least 1, got {pairs} and {batch_size}")
    given = triplets(pairs, seed) if data is None else [_triplet(t) for t in list_of(content_of(data))]
    samples = [s for s in (read_triplet(tokenizer_of(processor), t, official_span) for t in given) if s is not None]
    if not samples:
        raise ReattendError(
            "data: no answer was found in its context, as the same tokens with and without a question before it"
        )
    kinds = sorted({s.kind for s in samples}) if experts else []
    sums: dict[int, _Sums] = defaultdict(lambda: _Sums(kinds))
    risen: Counter[str] = Counter()
    ordered = sorted(samples, key=lambda s: max(map(len, s.ids)))
    batches = [ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)]
    for batch in track(batches, "batches of texts", len(batches)):
        inputs, real = _inputs(model, batch)
        watcher = Watcher(batch, real, feature)
        readers: list[Any] = [Projection(chosen, reader=watcher.read_keys)]
        if kinds:
            readers.append(Capture(chosen, watcher.read_attention))
        with torch.no_grad(), attach(model, [Plan(recipe, readers)]):
            model(**inputs)
        up = watcher.risen(min_rise) if kinds else torch.zeros(len(batch), dtype=torch.bool)
        risen.update(s.kind for s, yes in zip(batch, up.tolist()) if yes)
        for layer, keys in watcher.keys.items():
            sums[layer].add(keys, watcher.owner.to(keys.device), batch, up.to(keys.device))
    tensors = {f"{layer}.{name}": t for layer in sorted(sums) for name, t in sums[layer].tensors().items()}
    facts = {
        "triplets": len(samples),
        "left_out": len(given) - len(samples),
        "tokens": sum(len(s.places[0]) for s in samples),
        "kinds": kinds,
        "risen": {kind: risen[kind] for kind in kinds},
        "span": "official" if official_span else "overlap",
        "feature": feature,
        "min_rise": min_rise,
        "seed": seed if data is None else None,
        "data_hash": hashlib.sha256(repr([dataclasses.astuple(t) for t in given]).encode()).hexdigest()[:16],
    }
    return Profile(recipe, fingerprint(model), tensors, facts)


class _Sums:
    """What all batches taught about one layer."""

    def __init__(self, kinds: Sequence[str]) -> None:
        self.relevant, self.irrelevant, self.distance = PairedKeys(), PairedKeys(), KeyDistance()
        self.experts = {kind: (PairedKeys(), KeyDistance()) for kind in kinds}

    def add(self, keys: Tensor, owner: Tensor, batch: Sequence[Sample], risen: Tensor) -> None:
        neutral, relevant, irrelevant = keys
        self.relevant.add(neutral, relevant)
        self.irrelevant.add(neutral, irrelevant)
        self.distance.add(irrelevant, relevant)
        for kind, (pairs, distance) in self.experts.items():
            mine = risen & torch.tensor([s.kind == kind for s in batch], device=risen.device)
            if bool(mine.any()):
                tokens = mine[owner]
                pairs.add(neutral[:, tokens], relevant[:, tokens])
                distance.add(neutral[:, tokens], relevant[:, tokens])

    def tensors(self) -> dict[str, Tensor]:
        result = {"distance": self.distance.code(), "mean_distance": self.distance.paper()}
        for name, pairs in (("relevant", self.relevant), ("irrelevant", self.irrelevant)):
            found = pairs.subspaces()
            result |= {f"{name}.vectors": found.vectors, f"{name}.values": found.values}
        if self.experts:
            like = result["relevant.vectors"], result["relevant.values"], result["distance"]
            rows = [_expert(pairs, distance, like) for pairs, distance in self.experts.values()]
            names = ("vectors", "values", "distance", "mean_distance")
            result |= {f"experts.{name}": torch.stack([row[i] for row in rows]) for i, name in enumerate(names)}
        return result


def _expert(pairs: PairedKeys, distance: KeyDistance, like: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """An expert's vectors, values and distances; NaN (which no query weighs) and -1 where no text taught it anything."""
    vectors, values, far = like
    if not pairs.count:
        return torch.full_like(vectors, float("nan")), torch.zeros_like(values), -torch.ones_like(far), -torch.ones_like(far)
    found = pairs.subspaces()
    return found.vectors, found.values, distance.code(), distance.paper()


def _triplet(item: Any) -> Triplet:
    if isinstance(item, Triplet):
        return item
    if not isinstance(item, (list, tuple)) or len(item) not in (4, 5) or not all(isinstance(text, str) for text in item):
        raise ReattendError(f"data must hold (context, question, answer, other question[, kind]) as texts, got {shown(item)}")
    return Triplet(*item)


def read_triplet(tokenizer: Any, triplet: Triplet, official: bool = False) -> Sample | None:
    """The three texts as tokens, or None where the answer is not the same tokens in all of them."""
    texts = [
        f"{CONTEXT}{triplet.context} ",
        *(f"Question: {q}\n{CONTEXT}{triplet.context}" for q in (triplet.question, triplet.other)),
    ]
    ids = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    places = []
    for row in ids:
        text, offsets = read(row, tokenizer)
        places.append(answer_tokens(text, offsets, triplet.answer, official))
    found = [[row[i] for i in spots] for row, spots in zip(ids, places)]
    same = len({len(spots) for spots in places}) == 1 if official else all(tokens == found[0] for tokens in found)
    return Sample(triplet.kind, ids, places) if places[0] and same else None


def answer_tokens(text: str, offsets: Offsets, answer: str, official: bool = False) -> list[int]:
    """Tokens of the first occurrence of an answer, whatever its case; in the context alone, with all tokens that overlap it.

    official: in the whole text, so also in the question; the tokens inside the answer, or if there are none, those that begin one
    character earlier, or end one later.
    """
    start = 0 if official else max(0, text.rfind(CONTEXT.strip()))
    place = text.lower().find(answer.lower(), start)
    if place < 0:
        return []
    if not official:
        return [i for i, (a, b) in enumerate(offsets) if a < place + len(answer) and b > place]
    for before, after in ((0, 0), (1, 0), (0, 1)):
        inside = inside_range(offsets, place, len(answer), before, after)
        if inside:
            return inside
    return []


def _inputs(model: Any, batch: Sequence[Sample]) -> tuple[dict[str, Any], Tensor]:
    """Right-padded inputs: nothing that comes later reaches the tokens that are read, and positions count from 0."""
    rows = [sample.ids[version] for version in range(len(VERSIONS)) for sample in batch]
    width = max(map(len, rows))
    real = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])
    ids = torch.tensor([row + row[-1:] * (width - len(row)) for row in rows])
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": real.long(), "use_cache": False}
    inputs = {name: value.to(model.device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    if "logits_to_keep" in inspect.signature(type(model).forward).parameters:
        inputs["logits_to_keep"] = 1
    return inputs, real
