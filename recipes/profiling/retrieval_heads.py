"""Detection of retrieval heads: generates answers about hidden needles and notes, at every step, where each head looks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...hooks import Capture, Plan, attach
from ...interventions import Call, ReattendError
from ...interventions.families.heads import Glance, copy_score, glance
from ..kit.profile import Profile, fingerprint
from ..kit.profiling import checked, profiled_sites, track
from .material.answers import written
from .material.needles import NEEDLES, Needle, Sample, make_samples, recall

LENGTHS, DEPTHS = (150, 300, 600), (0.1, 0.5, 0.9)
SUCCESS, FEWEST = 0.5, 5


@dataclass
class Answer:
    """What a model made of a sample: the new tokens up to the first end or line break, their text, the answer's recall in it."""

    sample: Sample
    tokens: list[int]
    text: str
    recall: float


@dataclass
class Watcher:
    """The glances of one batch: {layer: one per step}."""

    seen: dict[int, list[Glance]] = field(default_factory=dict)

    def read(self, call: Call, edits: Sequence[Any]) -> None:
        assert call.site is not None
        self.seen.setdefault(call.site.layer, []).append(glance(call))

    def strongest(self, row: int, steps: int) -> Tensor:
        """[steps, layers, heads] long."""
        return torch.stack(
            [torch.stack([g.strongest[row] for g in self.seen[k][:steps]], dim=1).T for k in sorted(self.seen)], 1
        ).cpu()

    def first(self, row: int, steps: int) -> Tensor:
        """[layers] long: the first key that all these steps could see."""
        return torch.stack([torch.stack([g.first[row] for g in self.seen[k][:steps]]).max() for k in sorted(self.seen)]).cpu()


def needle_samples(
    processor: Any,
    lengths: Sequence[int] = LENGTHS,
    depths: Sequence[float] = DEPTHS,
    needles: int | Sequence[Needle] = NEEDLES,
    seed: int = 0,
) -> list[Sample]:
    """The prompts of a run: one for each length (tokens), depth (0 = at the start, 1 = at the end) and needle (or how many of ours)."""
    if isinstance(needles, int):
        if not 1 <= needles <= len(NEEDLES):
            raise ReattendError(f"needles must be 1 to {len(NEEDLES)}, or a list of Needle, got {needles}")
        needles = NEEDLES[:needles]
    if not lengths or not depths or not needles:
        raise ReattendError("lengths, depths and needles must not be empty")
    if any(not 0 <= depth <= 1 for depth in depths):
        raise ReattendError(f"depths must lie in [0, 1], got {list(depths)}")
    return make_samples(processor, lengths, depths, needles, seed)


def answers(
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    batch_size: int = 9,
    extra_tokens: int = 20,
    label: str = "needles",
    after: Callable[[list[Answer], Tensor], None] | None = None,
) -> list[Answer]:
    """Greedy answers to the samples, in left-padded batches of similar length. after(answers, pads [B]) follows each batch."""
    order = sorted(samples, key=lambda s: len(s.ids))
    parts = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    result: list[Answer] = []
    for part in track(parts, label, len(parts)):
        width = max(len(s.ids) for s in part)
        limit = max(s.answer_tokens for s in part) + extra_tokens
        made = written(model, processor, [s.ids for s in part], limit)
        done = [Answer(s, new, text, recall(s.needle.answer, text)) for s, (new, text) in zip(part, made, strict=True)]
        if after is not None:
            after(done, torch.tensor([width - len(s.ids) for s in part]))
        result += done
    return result


@checked
def detect(
    slug: str,
    model: Any,
    processor: Any,
    *,
    lengths: Sequence[int] = LENGTHS,
    depths: Sequence[float] = DEPTHS,
    needles: int | Sequence[Needle] = NEEDLES,
    count: str = "official",
    batch_size: int = 9,
    extra_tokens: int = 20,
    seed: int = 0,
) -> Profile:
    """A profile with score [layers, heads] (mean share of a needle that a head copied) and count [layers, heads] (samples measured).

    lengths: tokens of the text around a needle. depths: where it lies, 0 to 1. needles: how many of ours, or your own. count:
    "official" adds up all steps, "set" counts every needle token once. extra_tokens: generated beyond the answer's own length. Samples
    with a ROUGE-1 recall of 50 % or less do not count; with fewer than 5 that do, this raises ReattendError. A layer whose window does
    not reach back to a needle is not measured by it.
    """
    if count not in ("official", "set"):
        raise ReattendError(f'count must be "official" or "set", got {count!r}')
    if batch_size < 1 or extra_tokens < 0:
        raise ReattendError(f"batch_size must be 1 or more and extra_tokens 0 or more, got {batch_size} and {extra_tokens}")
    _, chosen = profiled_sites(model, slug)
    samples = needle_samples(processor, lengths, depths, needles, seed)
    watcher = Watcher()
    scores: list[Tensor] = []
    measured: list[Tensor] = []

    def score(done: list[Answer], pads: Tensor) -> None:
        for row, answer in enumerate(done):
            steps = len(answer.tokens)
            if answer.recall > SUCCESS and steps:
                looked = watcher.strongest(row, steps) - int(pads[row])
                prompt, new = torch.tensor(answer.sample.ids), torch.tensor(answer.tokens)
                sees = watcher.first(row, steps) - int(pads[row]) <= answer.sample.span[0]
                scores.append(copy_score(looked, new, prompt, answer.sample.span, once=count == "set") * sees[:, None])
                measured.append(sees[:, None].expand(looked.shape[1:]))
        watcher.seen.clear()

    with attach(model, [Plan(slug, [Capture(chosen, watcher.read)])], tokenizer=processor):
        made = answers(model, processor, samples, batch_size, extra_tokens, "retrieval heads", score)
    if len(scores) < FEWEST:
        raise ReattendError(
            f"only {len(scores)} of {len(samples)} hidden sentences were found by the model, and a profile needs {FEWEST}: "
            "use shorter lengths, more needles, or a model that can answer from a text"
        )
    counts = torch.stack(measured).sum(dim=0)
    mean = torch.stack(scores).sum(dim=0) / counts.clamp_min(1)
    words = "\n".join(f"{s.needle.sentence}|{s.needle.question}" for s in samples)
    facts = {
        "lengths": list(lengths),
        "depths": list(depths),
        "needles": len({s.needle for s in samples}),
        "needles_hash": hashlib.sha256(words.encode()).hexdigest()[:16],
        "count": count,
        "seed": seed,
        "samples": len(samples),
        "successes": len(scores),
        "success_rate": len(scores) / len(samples),
        "recall": sum(a.recall for a in made) / len(made),
    }
    return Profile(slug, fingerprint(model), {"score": mean.float(), "count": counts.float()}, facts)
