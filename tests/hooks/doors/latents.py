"""The latents are pulled towards their mean before each of the first two steps."""

import tiny_pipelines
import torch
from reattend.hooks import Latents, Plan, attach


def use() -> None:
    pipe = tiny_pipelines.stable_diffusion()
    call = {"prompt": "a b", "num_inference_steps": 3, "output_type": "latent"}
    draw = lambda: pipe(**call, generator=torch.Generator().manual_seed(0)).images  # noqa: E731
    plain, returned = draw(), []

    def calm(step):
        return step.latents * 0.9 if step.clock.step < 2 else None

    with attach(pipe, [Plan("calm", [Latents(calm, after=lambda step: returned.append(step.latents))])]) as session:
        calmer = draw()
    assert session.stats == {"calm": {"latents": 2}} and len(returned) == 3
    assert torch.equal(returned[-1], calmer) and calmer.std() < plain.std()
    assert torch.equal(draw(), plain) and "step" not in vars(pipe.scheduler)
