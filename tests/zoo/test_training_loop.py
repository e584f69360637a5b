"""A training that is cut off goes on exactly where it stopped, from files that hold data only."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from reattend.zoo.train.loop import Loop
from torch import nn


def training(folder, steps: int, **options) -> Loop:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

    def loss(rng: np.random.Generator, chance: torch.Generator):
        x = torch.from_numpy(rng.standard_normal((16, 4), dtype=np.float32))
        return {"fit": ((model(x) - x.sum(1, keepdim=True)) ** 2).mean(), "noise": 0 * torch.rand(1, generator=chance).sum()}

    # an idle layer has no optimizer state
    return Loop(
        folder,
        {"model": model, "idle": nn.Linear(2, 2)},
        loss,
        steps,
        rate=1e-2,
        average=0.9,
        warmup=5,
        save_every=5,
        **options,
    )


def weights(loop: Loop) -> list[torch.Tensor]:
    return [p.detach().clone() for p in loop.parameters.values()]


def test_resumed_run_equals_the_whole_run(tmp_path):
    whole = training(tmp_path / "whole", 20)
    whole.run()

    class Cut(Exception):
        pass

    def stop(step: int):
        if step == 10:
            raise Cut
        return {"seen": 1.0}

    with pytest.raises(Cut):
        training(tmp_path / "cut", 20, watch=stop, watch_every=5).run()
    assert [f.name for f in (tmp_path / "cut").iterdir()] == ["checkpoint.safetensors"]
    resumed = training(tmp_path / "cut", 20)
    resumed.run()
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(resumed)))
    assert all(torch.equal(whole.mean[n], resumed.mean[n]) for n in whole.mean)
    whole.averaged(), resumed.averaged()
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(resumed)))


def test_it_learns_and_watching_changes_nothing(tmp_path):
    seen = []

    def watch(step: int) -> dict[str, float]:
        seen.append(step)
        return {"metric": 1.0}

    plain, watched = training(tmp_path / "a", 300), training(tmp_path / "b", 300, watch=watch, watch_every=100)
    plain.run(), watched.run()
    assert seen == [100, 200, 300]
    assert all(torch.equal(a, b) for a, b in zip(weights(plain), weights(watched)))
    losses = [entry["fit"] for entry in plain.log if "fit" in entry]
    assert losses and losses[-1] < 0.5
    assert {"step": 300, "metric": 1.0} in watched.log


def test_a_budget_of_time_ends_the_training_and_its_schedule(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    rates = []

    def go(folder, steps: int, budget: float, pieces: int = 1) -> Loop:
        for _ in range(pieces):
            loop = training(folder, steps, budget=budget)
            fit = loop.loss

            def slow(rng, chance, loop=loop, fit=fit):
                rates.append(loop.optimizer.param_groups[0]["lr"])
                now[0] += 1.0  # a step takes a second
                return fit(rng, chance)

            loop.loss = slow
            loop.run()
        return loop

    loop = go(tmp_path / "timed", 1000, 20)
    assert loop.step == 20 and loop.seconds == 20
    assert loop.log[-1]["step"] == 20 and (tmp_path / "timed" / "checkpoint.safetensors").is_file()
    timed, rates[:] = list(rates), []
    go(tmp_path / "counted", 20, 0)
    assert timed == rates, "the rate follows the time as it follows the steps"
    again = go(tmp_path / "timed", 1000, 20)
    assert again.step == 20, "the budget is that of all pieces together"


def test_modules_learn_at_rates_of_their_own(tmp_path):
    plain, slower = training(tmp_path / "a", 1), training(tmp_path / "b", 1, rates={"model": 0.5})
    before = weights(plain)
    plain.run(), slower.run()
    # Adam's first step is as long as the rate, whatever the gradient
    for start, one, half in zip(before, weights(plain), weights(slower)):
        torch.testing.assert_close(one - start, 2 * (half - start), atol=1e-6, rtol=1e-3)


def test_a_checkpoint_goes_on_upon_another_device(tmp_path):
    training(tmp_path, 5).run()
    elsewhere = training(tmp_path, 10)
    for module in elsewhere.modules.values():
        module.to("meta")
    moved = Loop(tmp_path, elsewhere.modules, elsewhere.loss, 10, average=0.9)
    moved._resume()
    states = [moved.optimizer.state[p] for p in moved.modules["model"].parameters()]
    assert {state[key].device.type for state in states for key in ("exp_avg", "exp_avg_sq")} == {"meta"}
    assert {state["step"].device.type for state in states} == {"cpu"}, "as AdamW keeps it"
