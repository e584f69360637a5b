"""A branch of a denoiser whose tokens change places before its middle blocks, and the prediction pushed away from it."""

import tiny_denoisers
import torch
from reattend.hooks import Guide, Inject, Plan, attach, sites


def use() -> None:
    model, inputs = tiny_denoisers.build("UNet2DConditionModel")
    blocks = sites(model).stack("denoiser.mid")
    order = torch.randperm(4 * 4, generator=torch.Generator().manual_seed(0))
    step = Inject(blocks, lambda seen: seen.hidden[:, order], rows="shuffled")
    plain = model(**inputs).sample
    with attach(model, [Plan("shuffled tokens", [step, Guide("shuffled", scale=3.0)])]) as session:
        pushed = model(**inputs).sample
    assert not torch.allclose(pushed, plain) and torch.equal(model(**inputs).sample, plain)
    # once for the block, however many of its sites were selected
    assert session.stats["shuffled tokens"] == {blocks[0].name: 1}
