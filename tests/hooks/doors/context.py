"""An image looks away from a second text: half as far again from what it reads there as that is from what it reads in its prompt."""

import torch
from reattend.hooks import Context, Plan, attach, sites
from reattend.interventions import Second
from tiny_pipelines import stable_diffusion
from tiny_runs import draw


def use() -> None:
    pipe = stable_diffusion()

    def push(call, text):  # key and value [1, heads, m, head size] of "a dog"
        rows = call.clock.rows("conditional", call.batch)[:, None]
        return Second(key=text.key, value=text.value, rows=rows, combine=-0.5)

    plain = draw(pipe, {"prompt": "a fox"})
    reading = sites(pipe).stack("denoiser").kind("cross")
    with attach(pipe, [Plan("away", [Context("dog", reading, push, texts="a dog")])]) as session:
        pushed = draw(pipe, {"prompt": "a fox"})
    assert not torch.allclose(pushed, plain) and torch.equal(draw(pipe, {"prompt": "a fox"}), plain)
    assert set(session.stats["dog"].values()) == {3}  # steps
