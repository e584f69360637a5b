"""What smol-llava learns from: pictures with the truth about each patch, and chats about scenes in SmolLM2's own form.

A lesson follows from (seed, step) alone, so it does not matter who draws it, and a training that was cut off goes on with the next one.
Every fourth scene, by chance, is a crowd.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..smol_llava import IMAGE, PATCH, SIDE
from ..worlds.drawing import picture
from ..worlds.language import ask
from ..worlds.shapes import CROWDED, Scene, World, sample_scene
from .shapes_llava import NOISE, QUESTIONS, Teacher, seen_by_patch

CROWDS = 0.25


def scenes(rng: np.random.Generator, count: int) -> list[Scene]:
    return [sample_scene(rng, CROWDED if rng.random() < CROWDS else World()) for _ in range(count)]


def pictures(drawn: list[Scene], rng: np.random.Generator) -> Tensor:
    """uint8 [n, 3, side, side], each with a noise of its own."""
    noisy = [picture(scene, SIDE, replace(World(), noise=float(rng.uniform(*NOISE)))) for scene in drawn]
    return torch.from_numpy(np.stack([np.asarray(image) for image in noisy])).permute(0, 3, 1, 2).contiguous()


def pixels(drawn: Tensor, device: Any) -> Tensor:
    """Pictures as the tower takes them: float32 in [-1, 1]."""
    return drawn.to(device).float() / 127.5 - 1.0


@dataclass(frozen=True)
class Patches:
    """step -> (pictures, shapes, colours): uint8 [n, 3, side, side], and int64 [n, patches] numbered from 1, 0 = nothing is there."""

    batch: int
    seed: int = 0

    def __call__(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        rng = np.random.default_rng([self.seed, 1, step])
        drawn = scenes(rng, self.batch)
        seen = pictures(drawn, rng)
        shapes, colours = (torch.from_numpy(np.stack(truth)) for truth in zip(*map(seen_by_patch, drawn)))
        return seen, shapes, colours


@dataclass(frozen=True)
class Chats:
    """step -> (pictures, ids, labels, describes): uint8 [n, 3, side, side], int64 [n, tokens] twice, bool [n].

    Labels are -100 everywhere but on answers. For the first `describing` steps half of the rows describe their scene, then a quarter.
    """

    tokenizer: Any
    batch: int
    describing: int
    seed: int = 0

    def __call__(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rng = np.random.default_rng([self.seed, 2, step])
        teacher = ChatTeacher(self.tokenizer)
        teacher.every = 2 if step < self.describing else 4
        drawn = scenes(rng, self.batch)
        seen = pictures(drawn, rng)
        describes = [teacher.describes(row) for row in range(self.batch)]
        rows = [teacher.encode(teacher.turns(scene, rng, tells)) for scene, tells in zip(drawn, describes)]
        longest = max(len(ids) for ids, _ in rows)
        # padding on the right under a causal mask: no row sees its own
        ids = torch.full((self.batch, longest), self.tokenizer.pad_token_id)
        labels = torch.full((self.batch, longest), -100)
        for i, (row, target) in enumerate(rows):
            ids[i, : len(row)], labels[i, : len(row)] = torch.tensor(row), torch.tensor(target)
        return seen, ids, labels, torch.tensor(describes)


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

    def turns(self, scene: Scene, rng: np.random.Generator, describes: bool) -> list[tuple[str, str]]:
        if describes or len(scene.kinds) == len(scene.things):
            return super().turns(scene, rng, describes)
        # of several stars none is "the star": what can be asked of a crowd is whether there is one
        asked = []
        while len(asked) < QUESTIONS:
            question = ask("presence", scene, rng)
            if question not in asked:
                asked.append(question)
        return [(q.text, q.answer) for q in asked]
