"""`compare` on pipelines that draw: prompts, also empty ones and pairs of a source and its edit, and pictures of a recipe's own."""

from __future__ import annotations

import pytest
import reattend
import tiny_pipelines

SHORT = dict(num_inference_steps=2, attention=False)
ERASER = dict(boxes=[0.0, 0.0, 0.5, 0.5], scale=5.0)


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipelines.stable_diffusion()


@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
def test_an_empty_prompt_that_was_given_is_a_prompt(pipe, several):
    given = [[("attentive-eraser", ERASER)]] if several else [("attentive-eraser", ERASER)]
    report = reattend.compare(pipe, *given, prompt="", num_inference_steps=2)
    assert report.request["prompt"] == ""
    assert not (report.columns[0].same if several else report.metrics["identical"])
