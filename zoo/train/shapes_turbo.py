"""Distils shapes-turbo from shapes-sd: the same pictures in four steps without guidance, on a CPU in about an hour.

    python -m reattend.zoo.train.shapes_turbo [--out FOLDER] [--steps N] [--seed N]

The teacher draws with twenty steps and guidance 2, and its latents are kept at every fifth step. The student, which begins with the teacher's
weights, learns to go from each of these states to the next in one step. Autoencoder, tokenizer and text encoder stay those of shapes-sd.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..loading import load
from ..worlds.language import prompt
from .loop import Loop
from .pictures import LENGTH, drawn_well, save_half, scenes

BATCH, STEPS = 32, 1600
TEACHER_STEPS, STUDENT_STEPS, GUIDANCE = 20, 4, 2.0
# trajectories are drawn and kept in pieces, so that a run that is cut off goes on
PIECE, PIECES = 64, 48


def piece_of(folder: Path, number: int) -> Path:
    return folder / "trajectories" / f"{number:04d}.safetensors"


def draw_piece(pipe: Any, folder: Path, number: int, seed: int) -> None:
    """Keeps token ids [n, length] and the latents [n, states, c, h, w] that the teacher passes through."""
    file = piece_of(folder, number)
    if file.is_file():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, 5, number])
    texts = [prompt(scene, rng) for scene in scenes(rng, PIECE)]
    shape = (PIECE, pipe.unet.config.in_channels, pipe.unet.config.sample_size, pipe.unet.config.sample_size)
    states = [torch.randn(shape, generator=torch.Generator().manual_seed(seed * 1_000_003 + number))]

    def keep(_: Any, step: int, __: Any, given: dict[str, Any]) -> dict[str, Any]:
        if (step + 1) % (TEACHER_STEPS // STUDENT_STEPS) == 0:
            states.append(given["latents"].clone())
        return given

    pipe(
        texts,
        latents=states[0],
        num_inference_steps=TEACHER_STEPS,
        guidance_scale=GUIDANCE,
        callback_on_step_end=keep,
        output_type="latent",
    )
    ids = pipe.tokenizer(texts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt").input_ids
    save_file({"ids": ids, "states": torch.stack(states, dim=1).half()}, file)


class Jumps:
    """What a step of the student has to predict to get from one kept state to the next."""

    def __init__(self, scheduler: Any) -> None:
        scheduler.set_timesteps(STUDENT_STEPS)
        self.times = scheduler.timesteps
        after = [int(t) - scheduler.config.num_train_timesteps // STUDENT_STEPS for t in self.times]
        kept = scheduler.alphas_cumprod
        self.here = torch.stack([kept[int(t)] for t in self.times])
        self.there = torch.stack([kept[t] if t >= 0 else scheduler.final_alpha_cumprod for t in after])

    def velocity(self, state: Tensor, goal: Tensor, number: Tensor) -> Tensor:
        """The v with which DDIM's step from `state` ends in `goal`."""
        a, b = (self.here[number] ** 0.5)[:, None, None, None], ((1 - self.here[number]) ** 0.5)[:, None, None, None]
        c, d = (self.there[number] ** 0.5)[:, None, None, None], ((1 - self.there[number]) ** 0.5)[:, None, None, None]
        return (goal - (c * a + d * b) * state) / (d * a - c * b)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/shapes-turbo"), help="folder of trajectories, checkpoints and of the model"
    )
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", type=int, nargs=2, metavar=("FIRST", "LAST"), help="draw these pieces of the trajectories and no more"
    )
    given = parser.parse_args()
    torch.manual_seed(given.seed)
    pipe = load("shapes-sd")
    pipe.set_progress_bar_config(disable=True)
    for number in range(*given.only) if given.only else range(PIECES):
        draw_piece(pipe, given.out, number, given.seed)
        print(f"trajectories {number + 1}/{PIECES}", flush=True)
    if given.only:
        return
    pieces = [load_file(piece_of(given.out, number)) for number in range(PIECES)]
    ids, states = (torch.cat([piece[name] for piece in pieces]) for name in ("ids", "states"))
    with torch.no_grad():
        texts = torch.cat([pipe.text_encoder(part).last_hidden_state for part in ids.split(256)])
    jumps, unet = Jumps(pipe.scheduler), pipe.unet.to(memory_format=torch.channels_last)

    def loss(rng: np.random.Generator, _: torch.Generator) -> dict[str, Tensor]:
        rows = torch.from_numpy(rng.integers(len(ids), size=BATCH))
        number = torch.from_numpy(rng.integers(STUDENT_STEPS, size=BATCH))
        state, goal = states[rows, number].float(), states[rows, number + 1].float()
        found = unet(state, jumps.times[number], encoder_hidden_states=texts[rows]).sample
        return {"velocity": F.mse_loss(found, jumps.velocity(state, goal, number))}

    def watch(_: int) -> dict[str, float]:
        return drawn_well(pipe, 32, seed=0, num_inference_steps=STUDENT_STEPS, guidance_scale=1.0)

    loop = Loop(
        given.out, {"unet": unet}, loss, given.steps, rate=4e-4, decay=0.01, average=0.995, warmup=100, seed=given.seed, watch=watch,
        watch_every=200,
    )  # fmt: skip
    loop.run()
    loop.averaged()
    save_half(pipe, given.out / "model")
    print(f"done after {loop.seconds / 60:.0f} minutes; the pipeline lies in {given.out / 'model'}")


if __name__ == "__main__":
    main()
