"""A training that is cut off goes on exactly where it stopped, from files that hold data only."""

from __future__ import annotations

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
