"""A denoiser's middle blocks are computed at every second step only; at the others their last change is added again."""

import tiny_denoisers
import torch
from reattend.hooks import Plan, Reuse, attach, rows, sites


def use() -> None:
    model, inputs = tiny_denoisers.build("FluxTransformer2DModel")
    blocks, ran = sites(model).stack("denoiser.single"), []
    for module in (model.single_transformer_blocks[0].attn, model.single_transformer_blocks[1].attn):
        module.register_forward_hook(lambda *_: ran.append(1))
    step = Reuse(blocks, when=lambda moment: moment.clock.step % 2 == 1)
    with torch.no_grad(), rows("conditional"), attach(model, [Plan("every second", [step])]) as session:
        for time in (1.0, 0.8, 0.6, 0.4):
            model(**{**inputs, "timestep": torch.full((2,), time)})
    assert len(ran) == 4 and session.stats["every second"] == {site.name: 2 for site in blocks}
    assert not any("forward" in vars(module) for module in model.modules())
