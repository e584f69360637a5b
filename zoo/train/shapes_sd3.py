"""Trains shapes-sd3: a StableDiffusion3Pipeline (joint-attention transformer, rectified flow) that draws coloured shapes, on a CPU.

    python -m reattend.zoo.train.shapes_sd3 [--out FOLDER] [--steps N] [--seed N] [--vae FOLDER]

Two small CLIP text encoders give prompt tokens and the pooled prompt; the third (T5) is left out, as the pipeline allows.
--vae: folder of shapes-sd's run, to share its autoencoder instead of training one.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...hooks import Edits, Plan, Session, attach, sites
from ...interventions import Call, KeyBias
from .loop import Loop
from .pictures import (
    CHANNELS,
    FACTOR,
    SIDE,
    Lessons,
    build_text_encoder,
    build_tokenizer,
    drawn_well,
    save_half,
    train_vae,
)

BATCH, STEPS = 32, 7000
TEXT_WIDTH, WIDTH, HEADS, LAYERS, PATCH = 64, 128, 4, 5, 2
# so many zeros the pipeline puts in the place of a T5 that is left out (its max_sequence_length)
MISSING = 256


def build_transformer() -> Any:
    from diffusers import SD3Transformer2DModel  # type: ignore[attr-defined]

    return SD3Transformer2DModel(
        sample_size=SIDE // FACTOR,
        patch_size=PATCH,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=LAYERS,
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH // HEADS,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=2 * SIDE // FACTOR // PATCH,
        qk_norm="rms_norm",
    )


def build_pipeline(vae: Any, tokenizer: Any, encoders: tuple[Any, Any], transformer: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline  # type: ignore[attr-defined]

    # the pipeline subtracts a shift; the autoencoder has none
    vae.register_to_config(shift_factor=0.0)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=encoders[0],
        tokenizer=tokenizer,
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizer,
        text_encoder_3=None,  # type: ignore[arg-type]
        tokenizer_3=None,  # type: ignore[arg-type]
    )


def encode(encoders: tuple[Any, Any], ids: Tensor, missing: int) -> tuple[Tensor, Tensor]:
    """Prompt tokens and pooled prompt as the pipeline makes them: second to last states side by side, `missing` zeros in T5's place."""
    states = [e(ids, output_hidden_states=True) for e in encoders]
    tokens = torch.cat([s.hidden_states[-2] for s in states], dim=-1)
    zeros = tokens.new_zeros(len(tokens), missing, tokens.shape[2])
    return torch.cat([tokens, zeros], dim=1), torch.cat([s.text_embeds for s in states], dim=-1)


def one_for_many(transformer: Any, many: int) -> Session:
    """Lets the last text token count as `many` equal ones, by a bias of log(many) on its key.

    The tokens in T5's place are all zeros and text has no positions here, so they stay equal in every block: one is enough.
    """

    def count(call: Call) -> KeyBias:
        bias = torch.zeros(call.num_keys)
        bias[-1] = math.log(many)
        return KeyBias(bias=bias)

    return attach(transformer, [Plan("one for many", [Edits(sites(transformer), count)])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/shapes-sd3"), help="folder of checkpoints and of the model")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae", type=Path, default=None)
    given = parser.parse_args()
    torch.manual_seed(given.seed)
    tokenizer = build_tokenizer(given.out / "tokenizer")
    encoders = (
        build_text_encoder(tokenizer, TEXT_WIDTH, 3, projection=True),
        build_text_encoder(tokenizer, TEXT_WIDTH, 3, projection=True),
    )
    transformer = build_transformer()
    vae = train_vae(given.vae or given.out, given.seed)
    pipe = build_pipeline(vae, tokenizer, encoders, transformer)
    pipe.set_progress_bar_config(disable=True)
    parts = {"transformer": transformer, "text_encoder": encoders[0], "text_encoder_2": encoders[1]}
    print({name: f"{sum(p.numel() for p in m.parameters()):,}" for name, m in {**parts, "vae": vae}.items()}, flush=True)
    lessons = Lessons(vae, tokenizer, BATCH)

    def loss(rng: np.random.Generator, chance: torch.Generator) -> dict[str, Tensor]:
        latents, ids = lessons.draw(rng, chance)
        noise = torch.randn(latents.shape, generator=chance)
        # more practice in the middle of the way, as Stable Diffusion 3 was trained
        sigma = torch.randn(len(latents), generator=chance).sigmoid()
        part = sigma[:, None, None, None]
        tokens, pooled = encode(encoders, ids, 1)
        with one_for_many(transformer, MISSING):
            found = transformer(
                hidden_states=(1 - part) * latents + part * noise,
                timestep=1000 * sigma,
                encoder_hidden_states=tokens,
                pooled_projections=pooled,
            ).sample
        return {"velocity": F.mse_loss(found, noise - latents)}

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
