"""Trains shapes-llava: LlavaForConditionalGeneration on scenes of coloured shapes, from nothing, on a CPU in about an hour.

    python -m reattend.zoo.train.shapes_llava [--out FOLDER] [--steps N] [--seed N]

First the vision tower and the projector learn to name what each patch shows in the embeddings of the words for it (a LLaVA's tower comes
trained as well, and its projector is aligned first). Then the whole model: half of the samples, later
a quarter, describe a scene, the others answer four questions about it. The pictures are noisy, pale and partly hidden, and
most scenes keep the world's habits: the model learns to see and to guess.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..llava import PATCH, SIDE, llava_processor
from ..worlds.drawing import mask, picture
from ..worlds.language import DESCRIBE, KINDS, WORDS, Question, ask, caption
from ..worlds.shapes import COLOURS, SHAPES, Scene, World, sample_scene
from .loop import Loop

BATCH, STEPS, QUESTIONS = 32, 5000, 4
# so many steps half of the samples describe; descriptions teach the language model to look, without them questions are guessed for long
DESCRIBING = 2000
EYE_BATCH, EYE_STEPS = 64, 2000
WORLD = World()
NOISE = (0.0, 0.7)
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %} user :{% else %} assistant :{% endif %}"
    "{% if message['content'] is string %} {{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %} <image>{% else %} {{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %} {{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %} assistant :{% endif %}"
)


def build_processor() -> Any:
    """A LlavaProcessor whose tokenizer knows one token per word of the world."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
    vocabulary = {word: i for i, word in enumerate([*special, "user", "assistant", ":", *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    return llava_processor(tokenizer, "<image>", TEMPLATE)


def build_model(tokenizer: Any) -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=128,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=(SIDE // PATCH) ** 2,
        tie_word_embeddings=True,
    )
    return LlavaForConditionalGeneration(config)


class Teacher:
    """Draws batches of (pixels, ids, labels); labels are -100 everywhere but on answers."""

    # every so manieth sample of a batch describes its scene, the others answer questions
    every = 4

    def __init__(self, tokenizer: Any) -> None:
        self.ids = tokenizer.get_vocab()

    def encode(self, turns: list[tuple[str, str]]) -> tuple[list[int], list[int]]:
        image = ["<image>"] * (SIDE // PATCH) ** 2
        words, taught = ["<s>"], [False]
        for i, (question, answer) in enumerate(turns):
            asked = ["user", ":", *(image if i == 0 else []), *question.split(), "assistant", ":"]
            told = [*answer.split(), "</s>"]
            words += asked + told
            taught += [False] * len(asked) + [True] * len(told)
        ids = [self.ids[w] for w in words]
        return ids, [i if t else -100 for i, t in zip(ids, taught)]

    def describes(self, row: int) -> bool:
        return row % self.every == 0

    def turns(self, scene: Scene, rng: np.random.Generator, describes: bool) -> list[tuple[str, str]]:
        if describes:
            return [(DESCRIBE, caption(scene))]
        asked: list[Question] = []
        while len(asked) < QUESTIONS:
            kind = KINDS[int(rng.choice(len(KINDS), p=(0.5, 0.2, 0.1, 0.2)))]
            question = ask(kind, scene, rng)
            if question not in asked:
                asked.append(question)
        return [(q.text, q.answer) for q in asked]

    def batch(self, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        pixels, rows = [], []
        for i in range(BATCH):
            scene = sample_scene(rng, WORLD)
            world = replace(WORLD, noise=float(rng.uniform(*NOISE)))
            pixels.append(np.asarray(picture(scene, SIDE, world), dtype=np.float32) / 127.5 - 1.0)
            rows.append(self.encode(self.turns(scene, rng, describes=self.describes(i))))
        longest = max(len(ids) for ids, _ in rows)
        ids = torch.zeros(BATCH, longest, dtype=torch.long)
        labels = torch.full((BATCH, longest), -100)
        for i, (row, target) in enumerate(rows):
            ids[i, : len(row)], labels[i, : len(row)] = torch.tensor(row), torch.tensor(target)
        return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous(), ids, labels


def seen_by_patch(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """int [patches] each: which shape and which colour covers most of a patch, numbered from 1; 0 = nothing covers a sixth of it."""
    across = SIDE // PATCH
    most = np.full((across, across), PATCH * PATCH / 6)
    shapes, colours = np.zeros((across, across), int), np.zeros((across, across), int)
    for thing in scene.things:
        covered = mask(thing, SIDE).reshape(across, PATCH, across, PATCH).sum((1, 3))
        ahead = covered > most
        most[ahead] = covered[ahead]
        shapes[ahead], colours[ahead] = SHAPES.index(thing.shape) + 1, list(COLOURS).index(thing.colour) + 1
    return shapes.ravel(), colours.ravel()


def train_eye(model: Any, ids: dict[str, int], folder: Path, seed: int) -> None:
    """Tower and projector learn what each patch shows: its image token comes to lie near the words for its shape and its colour."""
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    words = model.get_input_embeddings()
    nothing = torch.nn.Embedding(2, words.embedding_dim)
    named = [torch.tensor([ids[word] for word in names]) for names in (SHAPES, COLOURS)]

    def loss(rng: np.random.Generator, chance: torch.Generator) -> dict[str, Tensor]:
        scenes = [sample_scene(rng, WORLD) for _ in range(EYE_BATCH)]
        noisy = [picture(s, SIDE, replace(WORLD, noise=float(rng.uniform(0, NOISE[1])))) for s in scenes]
        pixels = np.stack([np.asarray(p, dtype=np.float32) / 127.5 - 1.0 for p in noisy])
        tokens = projector(tower(torch.from_numpy(pixels).permute(0, 3, 1, 2)).last_hidden_state[:, 1:]).flatten(0, 1)
        losses = []
        for part, truth in enumerate(zip(*map(seen_by_patch, scenes))):
            meanings = torch.cat([nothing.weight[part : part + 1], words(named[part])])
            losses.append(F.cross_entropy(tokens @ meanings.T, torch.from_numpy(np.stack(truth)).flatten()))
        return {"shape": losses[0], "colour": losses[1]}

    modules = {"tower": tower, "projector": projector, "words": words, "nothing": nothing}
    Loop(folder, modules, loss, EYE_STEPS, rate=1.5e-3, seed=seed).run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/shapes-llava"), help="folder of checkpoints and of the model")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.manual_seed(given.seed)
    processor = build_processor()
    model = build_model(processor.tokenizer)
    teacher = Teacher(processor.tokenizer)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)

    train_eye(model, teacher.ids, given.out / "eye", given.seed)

    def loss(rng: np.random.Generator, chance: torch.Generator) -> dict[str, Tensor]:
        early = loop.step < DESCRIBING
        teacher.every = 2 if early else 4
        pixels, ids, labels = teacher.batch(rng)
        # right padding under a causal mask: no row sees its own padding, so no mask is needed
        hidden = model.model(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids)).last_hidden_state
        taught = labels[:, 1:] >= 0
        logits = model.lm_head(hidden[:, :-1][taught])
        each = F.cross_entropy(logits, labels[:, 1:][taught], reduction="none")
        describes = torch.tensor([teacher.describes(i) for i in range(BATCH)])[:, None].expand_as(taught)[taught]
        # half of an answer's tokens end it and are known at once
        return {"describe": each[describes].mean(), "answer": (1 if early else 2) * each[~describes].mean()}

    loop = Loop(given.out, {"model": model}, loss, given.steps, rate=1.2e-3, average=0.997, seed=given.seed)
    loop.run()
    loop.averaged()
    model.half().save_pretrained(given.out / "model")
    processor.save_pretrained(given.out / "model")
    print(f"done after {loop.seconds / 60:.0f} minutes; the model lies in {given.out / 'model'}")


if __name__ == "__main__":
    main()
