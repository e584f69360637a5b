"""Trains shapes-sd: a StableDiffusionPipeline that draws coloured shapes from prompts, from nothing, on a CPU in about an hour and a half.

    python -m reattend.zoo.train.shapes_sd [--out FOLDER] [--steps N] [--seed N]

First the autoencoder, then the denoiser together with its text encoder (v-prediction, prompts dropped for guidance).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .loop import Loop
from .pictures import CHANNELS, FACTOR, SIDE, Lessons, build_text_encoder, build_tokenizer, drawn_well, save_half, train_vae

BATCH, STEPS = 32, 3600
TEXT_WIDTH = 96


def build_unet() -> Any:
    from diffusers import UNet2DConditionModel  # type: ignore[attr-defined]

    return UNet2DConditionModel(
        sample_size=SIDE // FACTOR,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        block_out_channels=(40, 80, 96),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def build_pipeline(vae: Any, tokenizer: Any, text_encoder: Any, unet: Any) -> Any:
    from diffusers import DDIMScheduler, StableDiffusionPipeline  # type: ignore[attr-defined]

    scheduler = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
        timestep_spacing="trailing",
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,  # type: ignore[arg-type]
        safety_checker=None,  # type: ignore[arg-type]
        feature_extractor=None,  # type: ignore[arg-type]
        requires_safety_checker=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/shapes-sd"), help="folder of checkpoints and of the model")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.manual_seed(given.seed)
    tokenizer = build_tokenizer(given.out / "tokenizer")
    text_encoder, unet = build_text_encoder(tokenizer, TEXT_WIDTH, 3), build_unet().to(memory_format=torch.channels_last)
    vae = train_vae(given.out, given.seed)
    pipe = build_pipeline(vae, tokenizer, text_encoder, unet)
    pipe.set_progress_bar_config(disable=True)
    parts = {"unet": unet, "text_encoder": text_encoder}
    print({name: f"{sum(p.numel() for p in m.parameters()):,}" for name, m in {**parts, "vae": vae}.items()}, flush=True)
    lessons, scheduler = Lessons(vae, tokenizer, BATCH), pipe.scheduler

    def loss(rng: np.random.Generator, chance: torch.Generator) -> dict[str, Tensor]:
        latents, ids = lessons.draw(rng, chance)
        noise = torch.randn(latents.shape, generator=chance)
        times = torch.randint(scheduler.config.num_train_timesteps, (len(latents),), generator=chance)
        noisy = scheduler.add_noise(latents, noise, times)
        found = unet(noisy, times, encoder_hidden_states=text_encoder(ids).last_hidden_state).sample
        return {"velocity": F.mse_loss(found, scheduler.get_velocity(latents, noise, times))}

    def watch(step: int) -> dict[str, float]:
        return drawn_well(pipe, 32, seed=0, num_inference_steps=20, guidance_scale=2.0)

    loop = Loop(
        given.out, parts, loss, given.steps, rate=1e-3, decay=0.01, average=0.999, seed=given.seed, watch=watch, watch_every=500
    )
    loop.run()
    loop.averaged()
    save_half(pipe, given.out / "model")
    print(f"done after {loop.seconds / 60:.0f} minutes; the pipeline lies in {given.out / 'model'}")


if __name__ == "__main__":
    main()
