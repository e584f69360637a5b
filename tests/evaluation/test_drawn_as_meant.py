"""The suites of pictures draw a model of the zoo as its card says, and every other pipeline as before."""

from __future__ import annotations

import pytest
import tiny_pipelines
from reattend import ReattendError
from reattend.evaluation import evaluate, suite
from reattend.evaluation.subject import Subject
from reattend.zoo import load


@pytest.fixture(scope="module")
def turbo():
    return Subject(load("shapes-turbo"))


@pytest.mark.parametrize("name", ["binding", "negatives"])
def test_a_model_that_is_drawn_in_one_way(turbo, name):
    assert suite(name).asked_of(turbo).as_dict() == suite(name, steps=4, guidance=1).as_dict(), "the key of recorded answers"
    assert suite(name, guidance=3).asked_of(turbo) == suite(name, steps=4, guidance=3)
    assert suite(name, steps=20, guidance=2).asked_of(turbo) == suite(name), "what is named holds, also where it is the default"


def test_other_models_are_asked_as_before():
    for pipe in (tiny_pipelines.stable_diffusion(), load("shapes-sd"), load("shapes-sd3")):
        for name in ("binding", "negatives"):
            asked = suite(name)
            assert asked.asked_of(Subject(pipe)) is asked and (asked.steps, asked.guidance) == (20, 2.0)


def test_a_run_says_how_it_drew(turbo):
    found = evaluate(turbo.source, "binding,binding:steps=4:guidance=1", count=1, progress=False)
    (asked,) = found.suites
    assert (asked["steps"], asked["guidance"]) == (4, 1.0)


def test_a_negative_prompt_needs_guidance_that_the_model_is_not_drawn_with(turbo):
    with pytest.raises(ReattendError, match='by "pipeline" needs a guidance above 1, got 1.0'):
        evaluate(turbo.source, "negatives:by=pipeline", count=1, progress=False)
