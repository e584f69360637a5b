"""Recipes while a suite asks: those that need passages wait for them, and everything that cannot work says so before it runs."""

from __future__ import annotations

import pytest
import torch
from reattend import ReattendError
from reattend.evaluation.steering import Steering
from suite_checks import subject
from tiny_language import SENTENCES


def logits(asked, text: str) -> torch.Tensor:
    with torch.no_grad():
        return asked.module(**asked.encode([text])).logits[0, -1]


def test_a_recipe_acts_from_with_to_its_end_and_a_highlighter_only_where_passages_are_marked() -> None:
    asked = subject(None)
    plain = logits(asked, SENTENCES[0])
    with Steering(asked, ["emphasise"], ["highlight"]) as steering:
        assert torch.equal(logits(asked, SENTENCES[0]), plain)
        with asked.marked(highlight=[["Paris"]]):
            marked = logits(asked, SENTENCES[0])
        with asked.marked(highlight=[["Rome"]]):
            other = logits(asked, SENTENCES[0])
        assert torch.equal(logits(asked, SENTENCES[0]), plain)
    assert not torch.equal(marked, plain) and not torch.equal(marked, other)
    assert steering.applied == sum(steering.stats["emphasise"].values()) == 2 * 4
    with Steering(asked, [("streaming", {"window": 3, "sinks": 1})], ["highlight"]) as steering:
        with asked.marked(highlight=[["Paris"]]):
            assert not torch.equal(logits(asked, SENTENCES[0]), plain)
        assert steering.applied > 0
    assert torch.equal(logits(asked, SENTENCES[0]), plain)
    with asked.marked(highlight=[["Paris"]]):
        assert torch.equal(logits(asked, SENTENCES[0]), plain)


def test_a_text_beside_the_prompt_is_the_suite_s_where_none_was_given() -> None:
    """nag waits for the negatives of a batch; one that brings its own text acts from `with` to its end."""
    import tiny_pipelines
    from reattend.evaluation import Subject
    from tiny_runs import seeded

    pipe = tiny_pipelines.stable_diffusion()
    asked = Subject(pipe)

    def draw() -> torch.Tensor:
        prompts = ["a fox", "a map"]
        return pipe(prompts, num_inference_steps=2, guidance_scale=1.0, generator=seeded(), output_type="latent").images

    plain, strong = draw(), {"scale": 8.0, "limit": 10.0, "strength": 1.0}
    with Steering(asked, [("nag", strong)], ["negative"]) as steering:
        assert torch.equal(draw(), plain)
        with asked.marked(negative=["a dog", "a cat"]):
            named = draw()
        with asked.marked(negative=["a dog", "a dog"]):
            other = draw()
    assert not torch.equal(named[0], plain[0]) and torch.equal(named[0], other[0]) and not torch.equal(named[1], other[1])
    assert steering.applied > 0
    with Steering(asked, [("nag", {**strong, "negative": "a dog"})], ["negative"]), asked.marked(negative=["a cat", "a cat"]):
        assert torch.equal(draw(), other)
    with pytest.raises(ReattendError, match="scale"):
        Steering(asked, [("nag", {"scale": -1})], ["negative"])


def test_boxes_are_the_suite_s_where_none_were_given() -> None:
    import tiny_pipelines
    from reattend.evaluation import Subject
    from reattend.evaluation.variants import Variant
    from tiny_runs import seeded

    pipe = tiny_pipelines.stable_diffusion()
    asked = Subject(pipe)

    def draw() -> torch.Tensor:
        return pipe(["a fox", "a map"], num_inference_steps=2, generator=seeded(), output_type="latent").images

    plain, choice = draw(), ("csg", {"scale": 0})
    left, right = (0, 0, 0.5, 1), (0.5, 0, 1, 1)
    with Steering(asked, [choice], ["boxes", "words"]):
        assert torch.equal(draw(), plain)
        with asked.marked(boxes=[{"fox": left}, {"map": left}], words=[["fox"], ["map"]]):
            placed = draw()
        with asked.marked(boxes=[{"fox": left}, {"map": right}], words=[["fox"], ["map"]]):
            other = draw()
    assert not torch.equal(placed[0], plain[0]) and torch.equal(placed[0], other[0]) and not torch.equal(placed[1], other[1])
    (fact,) = Variant.of([choice]).facts
    assert "boxes" not in fact["parameters"] and fact["given"] == {"scale": 0}
    with pytest.raises(ReattendError, match="boxes is required"):
        Steering(asked, [choice], [])


def test_what_cannot_work_is_refused_before_anything_runs() -> None:
    asked = subject(None)
    with pytest.raises(ReattendError, match="passage"):
        Steering(asked, ["emphasise"], [])
    with pytest.raises(ReattendError, match="alpha"):
        Steering(asked, [("emphasise", {"alpha": -1})], ["highlight"])
    with pytest.raises(ReattendError, match="does not fit"):
        Steering(asked, ["softpag"], [])
