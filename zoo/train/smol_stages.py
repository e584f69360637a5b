"""The two stages in which smol-llava learns: to see in the words of its language model, and to talk about what it sees."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...interventions import ReattendError
from ..smol_llava import TRAINED
from ..worlds.shapes import COLOURS, SHAPES
from .ahead import Ahead
from .loop import Loop
from .smol_lessons import Chats, Patches, pixels


@dataclass(frozen=True)
class Size:
    """Of a stage. seconds: its budget, 0 = none. save_every: steps between checkpoints."""

    steps: int
    batch: int
    seconds: float = 0.0
    save_every: int = 250


@dataclass(frozen=True)
class Place:
    """Where a stage runs. processes: that draw lessons ahead. half: the language model in bfloat16, on a GPU tower and projector too."""

    folder: Path
    device: str = "cpu"
    processes: int = 0
    half: bool = False
    seed: int = 0

    def autocast(self) -> torch.autocast:
        kind = torch.device(self.device).type
        return torch.autocast(kind, torch.bfloat16, enabled=self.half and kind != "cpu")


def prepare(model: Any, place: Place) -> None:
    """Freezes the language model, in bfloat16 where computing is; tower and projector stay in float32 and learn."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(TRAINED))
    model.to(place.device).eval()
    if place.half:
        model.model.language_model.to(torch.bfloat16)
        model.lm_head.to(torch.bfloat16)


def word_ids(tokenizer: Any, words: Any) -> Tensor:
    """int64 [words]: the token of each word as it stands inside a sentence. Raises ReattendError for a word of several tokens."""
    found = [tokenizer(f" {word}", add_special_tokens=False).input_ids for word in words]
    for word, pieces in zip(words, found):
        if len(pieces) != 1:
            raise ReattendError(f"{word!r} is {len(pieces)} tokens of this language model; a patch is put near one")
    return torch.tensor([pieces[0] for pieces in found])


class Meanings(nn.Module):
    """How well a patch's image token points to the words for its shape and colour, by the angle alone, and how far its size is off.

    What shows nothing has a direction of its own for either. gain: sharpens the cosines to logits, learned.
    """

    def __init__(self, shapes: Tensor, colours: Tensor) -> None:
        super().__init__()
        self.words = [shapes.detach().float(), colours.detach().float()]  # [words, width]
        self.rms = float(torch.cat(self.words).pow(2).mean().sqrt())
        self.nothing = nn.Parameter(torch.randn(2, shapes.shape[1], device=shapes.device) * self.rms)
        self.gain = nn.Parameter(torch.tensor(3.0, device=shapes.device))

    def forward(self, tokens: Tensor, truths: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """tokens: [n, width]; truths: int64 [n] of shapes and of colours."""
        towards = F.normalize(tokens, dim=1)
        losses = {}
        for i, name in enumerate(("shape", "colour")):
            meanings = F.normalize(torch.cat([self.nothing[i : i + 1], self.words[i]]), dim=1)
            losses[name] = F.cross_entropy(self.gain.exp() * towards @ meanings.T, truths[i])
        # tokens much larger or smaller than words are unlike anything that the language model has met
        return losses | {"size": 0.1 * (tokens.pow(2).mean(1).sqrt() / self.rms).log().pow(2).mean()}


def learn_to_see(model: Any, tokenizer: Any, place: Place, size: Size) -> Loop:
    """Stage 1: tower and projector alone put each patch near the embeddings of the words for its shape and its colour."""
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    words = model.get_input_embeddings().weight
    meanings = Meanings(*(words[word_ids(tokenizer, names).to(words.device)] for names in (SHAPES, tuple(COLOURS))))

    def loss(rng: np.random.Generator, chance: torch.Generator) -> dict[str, Tensor]:
        seen, *truths = lessons(loop.step)
        with place.autocast():
            tokens = projector(tower(pixels(seen, place.device)).last_hidden_state[:, 1:])
        shapes, colours = (truth.to(place.device).flatten() for truth in truths)
        return meanings(tokens.flatten(0, 1).float(), (shapes, colours))

    loop = Loop(
        place.folder / "eye",
        {"tower": tower, "projector": projector, "meanings": meanings},
        loss,
        size.steps,
        rate=1.5e-3,
        warmup=100,
        budget=size.seconds,
        seed=place.seed,
        save_every=size.save_every,
    )
    with Ahead(Patches(size.batch, place.seed), size.steps, place.processes) as lessons:
        loop.run()
    return loop


def learn_to_talk(model: Any, tokenizer: Any, place: Place, size: Size) -> Loop:
    """Stage 2: tower and projector through the frozen language model, on chats; ends with the running mean of their weights."""

    def loss(rng: np.random.Generator, chance: torch.Generator) -> dict[str, Tensor]:
        seen, ids, labels, describes = lessons(loop.step)
        ids, labels, describes = (part.to(place.device) for part in (ids, labels, describes))
        with place.autocast():
            hidden = model.model(
                input_ids=ids, pixel_values=pixels(seen, place.device), attention_mask=torch.ones_like(ids), use_cache=False
            ).last_hidden_state
            taught = labels[:, 1:] >= 0
            logits = model.lm_head(hidden[:, :-1][taught])
        each = F.cross_entropy(logits.float(), labels[:, 1:][taught], reduction="none")
        row = describes[:, None].expand_as(taught)[taught]
        # half of an answer's tokens end it and are known at once
        return {"describe": each[row].mean(), "answer": 2 * each[~row].mean()}

    loop = Loop(
        place.folder,
        {"tower": model.model.vision_tower, "projector": model.model.multi_modal_projector},
        loss,
        size.steps,
        rate=1e-3,
        average=0.998,
        rates={"tower": 0.4},
        budget=size.seconds,
        seed=place.seed,
        save_every=size.save_every,
    )
    with Ahead(Chats(tokenizer, size.batch, size.steps // 3, place.seed), size.steps, place.processes) as lessons:
        loop.run()
    loop.averaged()
    return loop
