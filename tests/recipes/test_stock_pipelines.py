"""Every method for image generation through what users do with a stock pipeline: see `tiny_conditions.py`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import reattend
import torch
from example import examples
from reattend.interventions import ReattendError
from reattend.recipes import recipe_class
from test_matrix import end
from tiny_conditions import CONDITIONS, STEPS

pytestmark = pytest.mark.matrix
METHODS = examples("diffusion")
# that a method refuses a model is asked in test_matrix_denoisers.py
CASES = [
    (name, place)
    for name, (_, example) in METHODS.items()
    for place in CONDITIONS
    if not example.refusal(CONDITIONS[place].case)
]


def steered(name: str, pipe: Any, **more: Any) -> Any:
    slug, example = METHODS[name]
    with tempfile.TemporaryDirectory() as folder:
        return reattend.wrap(pipe).use(slug, **{**example.on(pipe, Path(folder)), **more})


def counts(session: Any) -> list[int]:
    (found,) = session.stats.values()
    return list(found.values())


@pytest.mark.parametrize(("name", "place"), CASES)
def test_a_pipeline_as_it_is_used(name: str, place: str) -> None:
    """At strength 0 no bit changes; else it acts in every pass, like what says the same in another way, and leaves nothing."""
    slug, example = METHODS[name]
    condition = CONDITIONS[place]
    if reason := example.skips.get(place):
        pytest.skip(f"{name}: {reason}")
    if "LoRA" in place:
        pytest.importorskip("peft")
    pipe, run = condition.make()
    base, sites = run(), example.counted(reattend.sites(pipe))
    if example.off is not None:
        session = steered(name, pipe, **example.off)
        assert torch.equal(run(), base) and session.applied == 0
        end(session)
    if words := example.refusal(place):
        with pytest.raises(ReattendError, match=words), steered(name, pipe):
            run()
        return
    with steered(name, pipe) as session:
        got = run()
    if example.reads:
        assert torch.equal(got, base) and session.applied == 0 and torch.equal(run(), base)
        return
    times = 2 if example.unconditional and "two calls" in condition.case else 1
    # what moves the latents does so once a step
    (acted,) = session.stats.values()
    least = {site: condition.steps if site == "latents" else times * sum(condition.passes) for site in acted}
    assert len(acted) == sites
    assert acted == least or example.further and all(acted[site] >= count for site, count in least.items())
    assert not torch.equal(got, base) and got.isfinite().all()
    if {"start", "stop"} <= set(recipe_class(slug).model_fields):
        with steered(name, pipe, start=0.25, stop=0.75) as session:
            run()
        assert counts(session) == [sum(condition.passes[STEPS // 4 : STEPS * 3 // 4])] * sites
    assert torch.equal(run(), base)
    if condition.like is not None:
        second, other = condition.like()
        with steered(name, second):
            wanted = other()
        scale = wanted.abs().max()
        torch.testing.assert_close(got / scale, wanted / scale, atol=1e-4, rtol=1e-3)
