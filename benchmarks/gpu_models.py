"""Whole language models on a device under recipes, in eager Python, beside the untouched model with the same weights."""

from __future__ import annotations

import copy
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import gpu_profiles
import reattend
import torch
from gpu_parts import DASH, Part, Table, said, shown
from reattend.interventions import ReattendWarning
from timing import Answer, switched
from torch import nn

GIB = 1 << 30
MOST_SECONDS = 2.0  # for one cell: then it has as many rounds as it has, at least one


class Shape(NamedTuple):
    """A Llama. needs: GiB of free memory with which all is measured."""

    name: str
    layers: int
    width: int
    inner: int
    heads: int
    kv: int
    vocabulary: int
    needs: float

    def __str__(self) -> str:
        return f"{self.name}: {self.layers} layers of width {self.width}, {self.heads} heads on {self.kv}, vocabulary {self.vocabulary}"


SHAPES = [
    Shape("Llama of 8B's shape", 32, 4096, 14336, 32, 8, 128256, 44),
    Shape("the first quarter of a Llama of 8B's shape", 8, 4096, 14336, 32, 8, 128256, 14),
    Shape("Llama of 1B's shape", 16, 2048, 8192, 32, 8, 128256, 7),
    Shape("the first quarter of a Llama of 1B's shape", 4, 2048, 8192, 32, 8, 32000, 0),
]
TOY = Shape("toy Llama", 6, 32, 64, 4, 2, 100, 0)


def fitting(part: Part, shapes: list[Shape]) -> Shape:
    """The largest one that this card has memory for."""
    if part.dry:
        return TOY
    free = torch.cuda.mem_get_info()[0] / GIB
    return next((shape for shape in shapes if shape.needs <= free), shapes[-1])


def llama(shape: Shape, part: Part) -> nn.Module:
    """Random weights, made on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.width, intermediate_size=shape.inner, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv, max_position_embeddings=1 << 15, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if part.dry else torch.bfloat16)
    try:
        with torch.device(part.device.device):
            model = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def twin(model: nn.Module) -> nn.Module:
    """A copy that shares its weights: a session on one of the two leaves the other one untouched."""
    kept = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, kept)


def prompt(model: Any, batch: int, length: int) -> dict[str, Any]:
    """Random tokens; logits of the last one only, as `generate` asks for them."""
    device = next(model.parameters()).device
    ids = torch.randint(3, model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(length)).to(device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "logits_to_keep": 1}


class Recipe(NamedTuple):
    """slug, and its parameters for a prompt of so many tokens. prefill, decode, compiled: the largest ratios that are aimed at, at 4k."""

    slug: str
    given: Callable[[int], dict[str, Any]]
    prefill: float | None = 1.10
    decode: float | None = None
    compiled: float | None = 1.05


def recipes(model: Any, folder: Path, dry: bool) -> dict[str, Recipe]:
    """{label: recipe}, the ones that compilers are asked about first. folder: of made-up profiles."""
    layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
    some = [h for h in (1, 9, 17, 25) if h < heads] or [0]
    few = [[layer, head] for layer in range(layers) for head in some]
    every = [[layer, head] for layer in range(layers) for head in range(heads)]
    two = [[layer, head] for layer in (layers // 3, 2 * layers // 3) for head in range(heads)]
    seka, mixed = (gpu_profiles.made(slug, model, folder) for slug in ("seka", "soft-injection"))

    def marked(n: int) -> dict[str, Any]:
        return {"ranges": [(n // 4, n // 4 + max(2, n // 40))]}

    def third(n: int) -> dict[str, Any]:
        return {"ranges": [(n // 8 + i * n // 5, n // 8 + (i + 1) * n // 5) for i in range(3)]}

    found = {
        "emphasise, all heads": Recipe("emphasise", lambda n: {**marked(n), "alpha": 0.05}, decode=1.25),
        "instaboost": Recipe("instaboost", lambda n: {**marked(n), "multiplier": 20}, decode=1.25),
        f"retrieval-heads, {len(some)} heads of every layer": Recipe("retrieval-heads", lambda n: {"heads": few}),
        "streaming": Recipe("streaming", lambda n: {"window": min(1020, n // 2)}, prefill=None),
        "spotlight": Recipe("spotlight", lambda n: {**marked(n), "target": 0.3}, compiled=None),
        "act, all heads": Recipe("act", lambda n: {"heads": every, "threshold_alpha": 5.0}, prefill=1.30, decode=1.25),
        "seka": Recipe("seka", lambda n: {**marked(n), "layers": "all", "profile_path": seka}),
        "soft-injection": Recipe("soft-injection", lambda n: {"profile_path": mixed}),
        "emphasise, 2 layers": Recipe("emphasise", lambda n: {**marked(n), "alpha": 0.05, "heads": two}),
        "pine, 3 segments": Recipe("pine", third, prefill=None, compiled=None),
        "spa (floor 2.0)": Recipe("spa", lambda n: {**marked(n), "strength": 1.4}, prefill=None, compiled=None),
    }
    return {label: found[label] for label in list(found)[::4]} if dry else found


class Heard:
    """Warnings of reattend while something is measured, each once."""

    def __init__(self) -> None:
        self.texts: dict[str, None] = {}

    def __enter__(self) -> Heard:
        self.held = warnings.catch_warnings(record=True)
        self.list = self.held.__enter__()
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", ReattendWarning)
        return self

    def __exit__(self, *error: Any) -> None:
        self.held.__exit__(*error)
        self.texts = dict.fromkeys(str(one.message).splitlines()[0][:120] for one in self.list)


class Pair:
    """The untouched model and its twin, on which recipes act, taking turns."""

    def __init__(self, part: Part, model: nn.Module) -> None:
        self.part, self.model, self.own = part, model, twin(model)

    def prefill(self, inputs: dict[str, Any], enter: Callable[[], AbstractContextManager], rounds: int) -> tuple[float, float]:
        """(seconds of the untouched model, ratio), the first round not counted."""
        plain, own = Answer(self.model, inputs), Answer(self.own, inputs)
        with enter():
            return self._turns(plain.start, own.start, rounds)

    def decode(
        self, inputs: dict[str, Any], enter: Callable[[], AbstractContextManager], steps: int
    ) -> tuple[float, float, str]:
        """(seconds of a token of the untouched model, ratio, launches and waits of a step under what is entered)."""
        plain, own = Answer(self.model, inputs), Answer(self.own, inputs)
        with enter():
            plain.start()
            own.start()
            found = self._turns(plain.step, own.step, steps)
            launches, waits = self.part.device.launches(own.step), self.part.device.questions(own.step)
        return *found, f"{shown(launches, 0)}, {shown(waits, 0)}"

    def _turns(self, plain: Callable[[], None], own: Callable[[], None], rounds: int) -> tuple[float, float]:
        taken, start = [], time.monotonic()
        for turn in range(rounds + 1):
            if turn > 1 and time.monotonic() - start > MOST_SECONDS:
                break
            if turn % 2:
                second, first = self.part.device.seconds(own), self.part.device.seconds(plain)
            else:
                first, second = self.part.device.seconds(plain), self.part.device.seconds(own)
            taken.append((first, second))
        taken = taken[1:]
        return median(first for first, _ in taken), median(second / first for first, second in taken)


class Settings(NamedTuple):
    """What a column of the table asks. rounds: prompts read or tokens written while the clock runs."""

    column: str
    phase: str
    batch: int
    length: int
    rounds: int
    seconds: float


SETTINGS = [
    Settings("prefill 4k", "prefill", 1, 4096, 4, 0.3),
    Settings("decode 4k", "decode", 1, 4096, 16, 0.3),
    Settings("prefill 16k", "prefill", 1, 16384, 2, 2.0),
    Settings("decode 4k, batch 8", "decode", 8, 4096, 8, 2.5),
    Settings("prefill 4k, batch 8", "prefill", 8, 4096, 1, 4.0),
]
TOY_SETTINGS = [
    Settings("prefill 4k", "prefill", 1, 96, 1, 0.0),
    Settings("decode 4k", "decode", 2, 96, 1, 0.0),
]


def measure(part: Part) -> None:
    shape = fitting(part, SHAPES)
    model = llama(shape, part)
    settings = TOY_SETTINGS if part.dry else SETTINGS
    part.say(
        f"{shape}, random weights, {str(model.dtype).removeprefix('torch.')}, eager Python (no compiler), the model's own dynamic cache. "
        "Ratios to the untouched model, which takes turns with a twin that shares its weights and is under the recipe; medians, with the "
        "host's time. Beside them how many kernels a step launches and how often it waits for the device."
    )
    counted = "launches and waits of a step"
    table = part.table("", [*(one.column for one in settings), counted, "remarks"])
    pair = Pair(part, model)
    with tempfile.TemporaryDirectory(prefix="reattend-gpu-profiles-") as folder:
        chosen = recipes(model, Path(folder), part.dry)
        for one in settings:
            inputs = prompt(model, one.batch, one.length)
            for label, recipe in {"untouched": None, "untouched, eager attention": None, **chosen}.items():
                # n x n weights for all heads
                if label.endswith("eager attention") and (one.length > 4096 or one.batch > 1):
                    part.set(table, label, {one.column: DASH})
                    continue
                if part.reached(f"{label}, {one.column}", one.seconds):
                    row(part, table, pair, inputs, one, label, recipe, counted)
    targets_of(part, chosen)


def row(
    part: Part, table: Table, pair: Pair, inputs: dict[str, Any], one: Settings, label: str, recipe: Recipe | None, counted: str
) -> None:
    """One cell: a recipe at one setting."""

    def enter() -> AbstractContextManager:
        if recipe is not None:
            return reattend.apply(pair.own, recipe.slug, **recipe.given(one.length))
        return switched(pair.own, "eager") if label.endswith("eager attention") else nullcontext()

    heard = Heard()
    try:
        with heard:
            if one.phase == "prefill":
                seconds, ratio = pair.prefill(inputs, enter, one.rounds)
            else:
                seconds, ratio, beside = pair.decode(inputs, enter, one.rounds)
                if one.batch == 1 or part.dry:
                    part.set(table, label, {counted: beside})
    except Exception as error:
        part.set(table, label, {one.column: "failed", "remarks": said(error)})
        part.device.release()
        part.device.wait()
        return
    milliseconds = f" ({1e3 * seconds:.1f} ms)" if label == "untouched" else ""
    part.set(table, label, {one.column: shown(ratio) + milliseconds})
    if heard.texts:
        part.set(table, label, {"remarks": "; ".join(heard.texts).replace("|", "/")})
    part.figure(f"model, {one.column}, {label}", ratio)
    part.device.release()


def targets_of(part: Part, chosen: dict[str, Recipe]) -> None:
    """What is aimed at, beside the figures, for the page's last table."""
    for label, recipe in chosen.items():
        for column, aim in (("prefill 4k", recipe.prefill), ("decode 4k", recipe.decode)):
            if aim is not None:
                part.figure(f"aim, model, {column}, {label}", aim)
