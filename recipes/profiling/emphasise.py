"""The head search of PASTA: steer heads toward a marked fact, and keep those whose steering makes the answer follow it.

From coarse to fine: layers as a whole first, then the heads of the best layers one by one, then how many of them to take together.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ...hooks import Plan, SiteTable, attach
from ...hooks.tokens.spans import tokenizer_of
from ...interventions import ReattendError
from ..kit.base import Recipe
from ..kit.checks import shown
from ..kit.heads import Head, by_layer, ranked
from ..kit.profile import Profile, table_fingerprint
from ..kit.profiling import checked, profiled_sites, track
from .material.choices import Batch, Choice, batches_of, lead_of, read_choices
from .material.files import content_of, list_of
from .material.question_pairs import conflicts

# (prompt, passages in it to mark, the right answer, all possible answers)
Marked = tuple[str, Sequence[str], str, Sequence[str]]


@checked
def search_heads(
    recipe: type[Recipe],
    model: Any,
    processor: Any,
    *,
    data: Sequence[Marked] | None = None,
    pairs: int = 8,
    layers: int | None = 4,
    alpha: float = 0.01,
    seed: int = 0,
    batch_size: int = 16,
    **parameters: Any,
) -> Profile:
    """Scores heads by how far their steering moves the answer to the marked passage. Cost: one pass over the prompts per candidate.

    data: (prompt, passages as they stand in it, answer, possible answers), where answers must begin with different tokens; half of it
    chooses the number of heads. Without it `pairs` pairs of contradicting facts made up from `seed`, each of them marked once, and as many
    to choose that number. layers: search only the heads of the best so many layers, each tried as a whole before (None: all heads).
    alpha and parameters: as they will be used. Tensors of the profile: score [layers, heads], the mean lead in nats of the right
    answer over the others minus that of the plain model (0 where not tried); tried [layers, heads]; layer_score [layers].
    facts["top"]: how many heads were best together.
    """
    table, chosen = profiled_sites(model, recipe.slug)
    if pairs < 1 or batch_size < 1 or (layers is not None and layers < 1):
        raise ReattendError(f"pairs, batch_size and layers must be at least 1, got {pairs}, {batch_size} and {layers}")
    examples = list(_made_up(2 * pairs, seed)) if data is None else [_marked(item) for item in list_of(content_of(data))]
    if len(examples) < 2:
        raise ReattendError(
            "data must hold at least two (prompt, passages, answer, answers): one to search with, one to choose with"
        )
    middle = (len(examples) + 1) // 2
    search, check = (
        _Trial(recipe, model, processor, table, part, batch_size, {"alpha": alpha, **parameters})
        for part in (examples[:middle], examples[middle:])
    )
    size = max(s.layer for s in chosen) + 1, max(s.num_heads or 0 for s in chosen)
    score, tried, layer_score = torch.zeros(size), torch.zeros(size, dtype=torch.bool), torch.zeros(size[0])
    plain = search.lead([])
    best = [site.layer for site in chosen]
    if layers is not None and layers < len(best):
        for site in track(list(chosen), "layers", len(chosen)):
            layer_score[site.layer] = search.lead([(site.layer, h) for h in range(site.num_heads or 0)]) - plain
        best = sorted(best, key=lambda layer: -float(layer_score[layer]))[:layers]
    candidates = [(s.layer, h) for s in chosen if s.layer in best for h in range(s.num_heads or 0)]
    for head in track(candidates, "heads", len(candidates)):
        score[head], tried[head] = search.lead([head]) - plain, True
    useful = [head for head, value in ranked(score) if value > 0]
    together = {count: check.lead(useful[:count]) for count in _counts(len(useful))}
    plain_check = check.lead([])
    facts = {
        "task": "contradicting facts" if data is None else "user data",
        "prompts": len(examples),
        "data_hash": hashlib.sha256(repr(examples).encode()).hexdigest()[:16],
        "alpha": alpha,
        "baseline": plain,
        "searched": len(candidates),
        "top": max(together, key=lambda count: together[count]) if together else 0,
        "together": {str(count): value - plain_check for count, value in together.items()},
        **parameters,
    }
    return Profile(recipe.slug, table_fingerprint(table), {"score": score, "tried": tried, "layer_score": layer_score}, facts)


def _marked(item: Any) -> Marked:
    right = isinstance(item, (list, tuple)) and len(item) == 4
    if right:
        lists = [isinstance(part, (list, tuple)) and all(isinstance(text, str) for text in part) for part in (item[1], item[3])]
        right = isinstance(item[0], str) and isinstance(item[2], str) and all(lists)
    if not right:
        raise ReattendError(f"data must hold (prompt, [passages], answer, [answers]), got {shown(item)}")
    return item[0], list(item[1]), item[2], list(item[3])


def _made_up(count: int, seed: int) -> Iterable[Marked]:
    for conflict in conflicts(count, seed):
        words = [f" {word}" for word in conflict.words]
        for k in (0, 1):
            yield conflict.prompt, [conflict.facts[k]], words[k], words


def _counts(useful: int) -> list[int]:
    """How many of the useful heads to try together: 1, 2, 4, 8, ... and all."""
    return sorted({min(useful, 2**i) for i in range(math.ceil(math.log2(useful)) + 1)}) if useful else []


class _Trial:
    """Prompts, ready for the model, and the lead of their right answers when some heads are steered."""

    def __init__(
        self,
        recipe: type[Recipe],
        model: Any,
        processor: Any,
        table: SiteTable,
        examples: Sequence[Marked],
        batch_size: int,
        parameters: dict[str, Any],
    ) -> None:
        self.recipe, self.model, self.table, self.parameters = recipe, model, table, parameters
        self.tokenizer = tokenizer_of(processor)
        self.passages = [list(example[1]) for example in examples]
        questions: list[Choice] = read_choices(self.tokenizer, [(prompt, label, words) for prompt, _, label, words in examples])
        self.batches = batches_of(model, self.tokenizer, questions, batch_size)

    def lead(self, heads: Sequence[Head]) -> float:
        """Mean over all prompts; no heads: of the plain model."""
        total = sum(self._lead(batch, heads) * len(batch[1]) for batch in self.batches)
        return total / sum(len(part) for _, part in self.batches)

    def _lead(self, batch: Batch, heads: Sequence[Head]) -> float:
        if not heads:
            return lead_of(self.model, [batch])
        marked = [self.passages[question.place] for question in batch[1]]
        steering = self.recipe(text=marked, heads=by_layer(heads), **self.parameters)
        with attach(self.model, [Plan(steering.slug, steering.plan(self.table))], tokenizer=self.tokenizer):
            return lead_of(self.model, [batch])
