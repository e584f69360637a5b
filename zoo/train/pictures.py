"""What the two image generators of the zoo share: the world's tokenizer, text encoder and autoencoder, and batches to learn from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..worlds.drawing import picture
from ..worlds.language import WORDS, prompt
from ..worlds.reading import judge, read
from ..worlds.shapes import CLEAR, Scene, sample_scene
from .loop import Loop

SIDE, FACTOR, CHANNELS, LENGTH = 64, 4, 4, 24
SPECIAL = ["<|startoftext|>", "<|endoftext|>"]
VAE_STEPS, VAE_BATCH = 1500, 12


def build_tokenizer(folder: Path) -> Any:
    """A CLIPTokenizer (byte-pair encoding) trained until every word of the world is one token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    core = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=1000, end_of_word_suffix="</w>", special_tokens=SPECIAL, show_progress=False)
    core.train_from_iterator([" ".join(WORDS)] * 10, trainer)
    held = json.loads(core.to_str())["model"]
    letters = sorted({c for word in WORDS for c in word} | set("abcdefghijklmnopqrstuvwxyz0123456789"))
    merges = [tuple(m) if not isinstance(m, str) else tuple(m.split(" ")) for m in held["merges"]]
    # numbered anew: the trainer breaks ties by an order of letters that is another one in every process. Which pair it merges first
    # does not matter to the world's words, each of which becomes one token
    tokens = sorted({*letters, *(f"{c}</w>" for c in letters), *("".join(pair) for pair in merges)})
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *tokens])}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=LENGTH)  # type: ignore[arg-type]
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    return tokenizer


def build_text_encoder(tokenizer: Any, width: int, layers: int, *, projection: bool = False) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)


def build_vae() -> Any:
    from diffusers import AutoencoderKL  # type: ignore[attr-defined]

    return AutoencoderKL(
        block_out_channels=(12, 24, 48),  # type: ignore[arg-type]
        down_block_types=("DownEncoderBlock2D",) * 3,  # type: ignore[arg-type]
        up_block_types=("UpDecoderBlock2D",) * 3,  # type: ignore[arg-type]
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=4,
        sample_size=SIDE,
        mid_block_add_attention=False,
    )


def scenes(rng: np.random.Generator, count: int, least: int = 1) -> list[Scene]:
    drawn: list[Scene] = []
    while len(drawn) < count:
        scene = sample_scene(rng, CLEAR, habits="absent")
        if len(scene.things) >= least:
            drawn.append(scene)
    return drawn


def pixels(drawn: list[Scene], side: int = SIDE) -> Tensor:
    """float32 [n, 3, side, side] in [-1, 1]."""
    stack = np.stack([np.asarray(picture(s, side, CLEAR), dtype=np.float32) for s in drawn])
    return torch.from_numpy(stack / 127.5 - 1.0).permute(0, 3, 1, 2).contiguous()


def train_vae(folder: Path, seed: int = 0) -> Any:
    """The autoencoder, trained in `folder` or read from there; its scaling factor makes latents have unit variance."""
    from diffusers import AutoencoderKL  # type: ignore[attr-defined]

    if (folder / "vae" / "config.json").is_file():
        return AutoencoderKL.from_pretrained(folder / "vae").eval()
    vae = build_vae()

    def loss(rng: np.random.Generator, chance: torch.Generator) -> dict[str, Tensor]:
        real = pixels(scenes(rng, VAE_BATCH))
        latents = vae.encode(real).latent_dist
        drawn = vae.decode(latents.sample(chance)).sample
        spread = 0.5 * (latents.mean**2 + latents.var - 1 - latents.logvar).mean()
        return {"pixels": F.l1_loss(drawn, real) + F.mse_loss(drawn, real), "spread": 3e-4 * spread}

    Loop(folder / "vae-training", {"vae": vae}, loss, VAE_STEPS, rate=2e-3, seed=seed, warmup=100).run()
    with torch.no_grad():
        mean = vae.encode(pixels(scenes(np.random.default_rng(1), 64))).latent_dist.mean
    vae.register_to_config(scaling_factor=round(1 / float(mean.std()), 4), shift_factor=None)
    vae.save_pretrained(folder / "vae")
    return vae


class Lessons:
    """Batches of (latents of a scene, token ids of its prompt), prompts dropped with the chance `unsaid` for guidance."""

    def __init__(self, vae: Any, tokenizer: Any, batch: int, unsaid: float = 0.12) -> None:
        self.vae, self.tokenizer, self.batch, self.unsaid = vae, tokenizer, batch, unsaid

    def draw(self, rng: np.random.Generator, chance: torch.Generator) -> tuple[Tensor, Tensor]:
        drawn = scenes(rng, self.batch)
        with torch.no_grad():
            latents = self.vae.encode(pixels(drawn)).latent_dist.sample(chance) * self.vae.config.scaling_factor
        texts = ["" if rng.random() < self.unsaid else prompt(s, rng) for s in drawn]
        ids = self.tokenizer(texts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt").input_ids
        return latents, ids


def drawn_well(pipe: Any, count: int, seed: int, batch: int = 16, **options: Any) -> dict[str, float]:
    """Mean scores (see `judge`) of pictures that a pipeline drew for prompts of two to four things."""
    rng = np.random.default_rng([seed, 77])
    asked = scenes(rng, count, least=2)
    texts = [prompt(s, rng) for s in asked]
    scores: list[dict[str, float]] = []
    for start in range(0, count, batch):
        chance = torch.Generator().manual_seed(seed + start)
        images = pipe(texts[start : start + batch], generator=chance, **options).images
        scores += [judge(s.things, read(image)) for s, image in zip(asked[start:], images)]
    return {name: float(np.mean([s[name] for s in scores])) for name in scores[0]}


def save_half(pipe: Any, folder: Path) -> None:
    """Weights in half precision, to be small; loaded into float32 unless the user says otherwise."""
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.half()
    pipe.save_pretrained(folder)
