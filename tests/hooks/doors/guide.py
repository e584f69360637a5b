"""A branch whose attention sees only itself: the prediction is pushed away from it."""

import torch
from reattend.hooks import Edits, Guide, Plan, attach, sites
from reattend.interventions import MixValue
from tiny_denoisers import build


def use() -> None:
    model, inputs = build("SD3Transformer2DModel")
    before = model(**inputs).sample

    def weaken(call):
        rows = call.clock.rows("weak", call.batch)
        return None if rows is None else MixValue(strength=1.0, rows=rows[:, None])

    steps = [Edits(sites(model)[:1], weaken), Guide("weak", scale=lambda clock: 2.0 if clock.timestep > 100 else 0.0)]
    with attach(model, [Plan("away from the weak branch", steps)]):
        after = model(**inputs).sample
        late = model(**{**inputs, "timestep": torch.tensor([50.0, 50.0])}).sample
    assert after.shape == before.shape and not torch.allclose(after, before)
    assert torch.equal(model(**{**inputs, "timestep": torch.tensor([50.0, 50.0])}).sample, late)
