"""Language models under recipes where torch compiles them: generate's own compilation with a static cache, and a compiled forward."""

from __future__ import annotations

import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import reattend
import torch
from gpu_models import SHAPES, Heard, Recipe, Shape, fitting, llama, prompt, recipes
from gpu_parts import Part, Table, shown
from torch import Tensor

# layers are compiled one by one: few of them show what a layer costs, and compile in the time that there is
LAYERS, VOCABULARY = 4, 32000
NEW = 40
WARM = 12  # tokens that are written before the clock runs: a graph is compiled, run, and recorded in the first ones
COLUMNS = [
    "ms a token",
    "ratio",
    "added microseconds a layer",
    "graphs compiled",
    "while the clock ran",
    "graph breaks",
    "logits off by, and by the recipe",
    "remarks",
]


class Clock:
    """A logits processor: writes the same token whatever the logits, and knows when each was asked for."""

    def __init__(self, device: Any, warm: int, last: int) -> None:
        self.device, self.warm, self.last = device, warm, last
        self.count, self.times, self.graphs = 0, [], []
        self.logits: Tensor | None = None

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        self.count += 1
        if self.count in (self.warm, self.last):
            self.device.wait()
            self.times.append(time.perf_counter())
            self.graphs.append(graphs())
        if self.count == self.warm:
            self.logits = scores.float().cpu()
        forced = torch.full_like(scores, float("-inf"))
        forced[:, 7] = 0.0
        return forced

    @property
    def seconds(self) -> float:
        return (self.times[1] - self.times[0]) / (self.last - self.warm)


class Written(NamedTuple):
    """A generation. graphs: compiled in all, and while the clock ran; breaks: of graphs. logits of one token, on the CPU."""

    seconds: float
    graphs: tuple[int, int]
    breaks: int
    logits: Tensor


def graphs() -> int:
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def breaks() -> int:
    from torch._dynamo.utils import counters

    return sum(counters["graph_break"].values())


def generated(part: Part, model: Any, inputs: dict[str, Any], **how: Any) -> Written:
    """Tokens after a prompt; a token's time is that of `generate`, its own work included."""
    from transformers import LogitsProcessorList

    warm, last = (3, 6) if part.dry else (WARM, NEW)
    before, broken, clock = graphs(), breaks(), Clock(part.device, warm, last)
    given = {name: value for name, value in inputs.items() if name != "logits_to_keep"}
    model.generate(
        **given, max_new_tokens=last, min_new_tokens=last, do_sample=False, logits_processor=LogitsProcessorList([clock]), **how
    )
    assert clock.logits is not None
    return Written(clock.seconds, (graphs() - before, clock.graphs[1] - clock.graphs[0]), breaks() - broken, clock.logits)


def measure(part: Part) -> None:
    shape = fitting(part, [few_layers(SHAPES[0], 10), few_layers(SHAPES[2], 0)])
    shape = shape._replace(layers=2) if part.dry else shape
    compiler_limits()
    model, length = llama(shape, part), 64 if part.dry else 4096
    inputs = prompt(model, 1, length)
    part.say(
        f"{shape}, {str(model.dtype).removeprefix('torch.')}, {length} tokens before; milliseconds of a token as `generate` writes it. Ratios "
        "to the untouched model in the same mode. Beside them how far logits lie from those of the same generation without a compiler, as a "
        "share of the largest (for the untouched model that is rounding), and how far the recipe moves them."
    )
    how: dict[str, Any] = {"cache_implementation": "static"}
    if part.dry:
        from transformers import CompileConfig

        config = CompileConfig(backend="eager")
        config._compile_all_devices = True  # type: ignore[assignment]
        how["compile_config"] = config
    table = part.table("generate with a static cache, which compiles the model's steps", COLUMNS)
    with tempfile.TemporaryDirectory(prefix="reattend-gpu-profiles-") as folder:
        chosen = recipes(model, Path(folder), part.dry)
        base = untouched(part, table, model, inputs, how)
        if base is None:
            return
        for label, recipe in list(chosen.items())[: 1 if part.dry else None]:
            # as long as the first compilation took, which a session may need once more
            if part.reached(label, base.compile / 2):
                under(part, table, model, inputs, how, label, recipe, base)
        if not part.reached("model.forward compiled by the user", base.compile * 2):
            return
        own_forward(part, model, inputs, chosen)


class Base(NamedTuple):
    """The untouched model: eager and compiled. compile: seconds that it took to compile."""

    eager: Written
    compiled: Written
    compile: float


def untouched(part: Part, table: Table, model: Any, inputs: dict[str, Any], how: dict[str, Any]) -> Base | None:
    found: list[Base] = []

    def ask() -> None:
        generated(part, model, inputs)
        eager = generated(part, model, inputs)
        cells = {"ms a token": f"{1e3 * eager.seconds:.2f}", "ratio": ""}
        part.set(table, "untouched, eager Python, dynamic cache", cells)
        start = time.monotonic()
        first = generated(part, model, inputs, **how)
        compiling = time.monotonic() - start
        compiled = generated(part, model, inputs, **how)
        off = relative(compiled.logits, eager.logits)
        ratio = compiled.seconds / eager.seconds
        cells = {
            "ms a token": f"{1e3 * compiled.seconds:.2f}",
            "ratio": f"1.00 ({ratio:.2f} of eager)",
            "graphs compiled": str(first.graphs[0]),
            "while the clock ran": str(compiled.graphs[1]),
            "graph breaks": str(first.breaks),
            "logits off by, and by the recipe": f"{off:.1e}",
            "remarks": f"{compiling:.0f} s to compile",
        }
        part.set(table, "untouched", cells)
        part.figure("compiled, untouched over eager", ratio)
        found.append(Base(eager, compiled, compiling))

    part.attempt(table, "untouched", ask)
    return found[0] if found else None


def relative(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def under(
    part: Part, table: Table, model: Any, inputs: dict[str, Any], how: dict[str, Any], label: str, recipe: Recipe, base: Base
) -> None:
    """One recipe: without a compiler once, for its logits, then compiled, then the untouched model again."""
    given, heard = recipe.given(inputs["input_ids"].shape[1]), Heard()
    layers = model.config.num_hidden_layers

    def ask() -> None:
        with heard, reattend.apply(model, recipe.slug, **given):
            first = generated(part, model, inputs, **how)
            second = generated(part, model, inputs, **how)
        with warnings.catch_warnings(), reattend.apply(model, recipe.slug, **given):
            warnings.simplefilter("ignore")
            eager = generated(part, model, inputs)
        again = generated(part, model, inputs, **how)
        plain = min(base.compiled.seconds, again.seconds)
        ratio, added = second.seconds / plain, 1e6 * (second.seconds - plain) / layers
        off, effect = relative(second.logits, eager.logits), relative(eager.logits, base.eager.logits)
        remarks = list(heard.texts)
        if again.graphs[0]:
            remarks.append(f"taken off: {again.graphs[0]} more graphs")
        cells = {
            "ms a token": f"{1e3 * second.seconds:.2f}",
            "ratio": shown(ratio),
            "added microseconds a layer": f"{added:.1f}",
            "graphs compiled": str(first.graphs[0]),
            "while the clock ran": str(second.graphs[1]),
            "graph breaks": str(first.breaks),
            "logits off by, and by the recipe": f"{off:.1e}, {effect:.1e}",
            "remarks": "; ".join(remarks).replace("|", "/"),
        }
        part.set(table, label, cells)
        part.figure(f"compiled, decode, {label}", ratio)
        if recipe.compiled is not None:
            part.figure(f"aim, compiled, decode, {label}", recipe.compiled)

    if not part.attempt(table, label, ask) and heard.texts:
        part.set(table, label, {"remarks": "; ".join(heard.texts).replace("|", "/")})


def own_forward(part: Part, model: Any, inputs: dict[str, Any], chosen: dict[str, Recipe]) -> None:
    """The model's forward, compiled by the user before anything is applied: prompts are read by it too."""
    table = part.table('model.forward = torch.compile(model.forward, mode="reduce-overhead"), static cache', COLUMNS)
    inner = model.forward
    how: dict[str, Any] = {"cache_implementation": "static", "disable_compile": True}
    options: dict[str, Any] = {"backend": "eager"} if part.dry else {"mode": "reduce-overhead"}
    model.forward = torch.compile(inner, **options)
    try:
        base = untouched(part, table, model, inputs, how)
        if base is None:
            return
        for label in ("spotlight",) if part.dry else ("instaboost", "emphasise, all heads"):
            if part.reached(f"{label}, model.forward compiled", base.compile / 2):
                under(part, table, model, inputs, how, label, chosen[label], base)
    finally:
        # an attribute of the instance, which hides the method of its class
        del model.forward


def few_layers(shape: Shape, needs: float) -> Shape:
    return shape._replace(name=f"{LAYERS} layers as in a {shape.name}", layers=LAYERS, vocabulary=VOCABULARY, needs=needs)


def compiler_limits() -> None:
    """Each session may compile the model once more: a limit of graphs for one function would end in eager Python without a word."""
    import torch._dynamo.config as config

    for name in ("recompile_limit", "cache_size_limit"):
        if hasattr(config, name):
            setattr(config, name, 64)
