"""Side-by-side timing: variants take turns in one process, in CPU time of one thread, and only ratios are reported."""

from __future__ import annotations

import copy
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from reattend.hooks.trackers.caches import cache_name, cache_of


def ratios(variants: dict[str, Callable[[], object]], rounds: int = 5, repeat: int = 1) -> dict[str, float]:
    """{name: time relative to the first variant}, of several rounds the best. Other work on the machine does not count in CPU time."""
    best = dict.fromkeys(variants, float("inf"))
    for function in variants.values():
        function()
    for _ in range(rounds):
        for name, function in variants.items():
            start = time.thread_time()
            for _ in range(repeat):
                function()
            best[name] = min(best[name], time.thread_time() - start)
    first = next(iter(best.values()))
    return {name: seconds / first for name, seconds in best.items()}


class Answer:
    """A greedy answer of a model, token by token."""

    def __init__(self, model: Any, inputs: dict[str, torch.Tensor]) -> None:
        self.model, self.inputs = model, inputs

    def start(self) -> None:
        """Reads the prompt."""
        self.mask = self.inputs["attention_mask"]
        self._read(self.model(**self.inputs, use_cache=True))

    def step(self) -> None:
        """Writes one more token."""
        self.mask = torch.cat([self.mask, self.mask[:, :1]], dim=1)
        given = {"input_ids": self.token, "attention_mask": self.mask, cache_name(self.model): self.cache}
        self._read(self.model(**given, use_cache=True))

    def _read(self, output: Any) -> None:
        self.cache, self.token = cache_of(output), output.logits[:, -1:].argmax(dim=-1)


class Stopped(Exception):
    """A pass that went as far as it should."""


class PromptUpTo(Answer):
    """Reads the prompt up to a layer, counted from 0, and no further."""

    def __init__(self, model: Any, inputs: dict[str, torch.Tensor], layers: Any, last: int) -> None:
        super().__init__(model, inputs)
        self.layer = layers[last + 1]

    def start(self) -> None:
        handle = self.layer.register_forward_pre_hook(self.stop)
        try:
            self.model(**self.inputs, use_cache=True)
        except Stopped:
            pass
        finally:
            handle.remove()

    @staticmethod
    def stop(*_: Any) -> None:
        raise Stopped


class switched:
    """Another attention implementation for a while."""

    def __init__(self, model: Any, name: str) -> None:
        self.model, self.name = model, name

    def __enter__(self) -> None:
        self.model.set_attn_implementation(self.name)

    def __exit__(self, *_: Any) -> None:
        self.model.set_attn_implementation("sdpa")


@dataclass(frozen=True)
class Pace:
    """The median of ratios, and its 95 % interval (bootstrap)."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, ratios: list[float], resamples: int = 2000) -> Pace:
        drawn = np.random.default_rng(0).choice(ratios, (resamples, len(ratios)))
        low, high = np.quantile(np.median(drawn, axis=1), (0.025, 0.975))
        return cls(median(ratios), float(low), float(high))


@dataclass
class Variant:
    """A way of answering. enter(model): what holds meanwhile, a session or another implementation. more(model): further answers at work.

    each: whether these go on with every token, or read their prompts only.
    """

    enter: Callable[[Any], AbstractContextManager] = nullcontext
    more: Callable[[Any], list[Answer]] = lambda model: []
    each: bool = False


@torch.no_grad()
def paces(
    model: Any, inputs: dict[str, torch.Tensor], variants: dict[str, Variant], new: int, rounds: int
) -> dict[str, tuple[Pace, Pace]]:
    """{name: (time to read the prompt, time of one more token)}, as ratios to the untouched model.

    The untouched model and a copy of it, on which the variant runs, take turns with every prompt and every token, and the median of the
    ratios counts: what slows a machine for a second slows both. Thread CPU time on one thread.
    """
    copied = copy.deepcopy(model)
    found = {}
    for name, variant in variants.items():
        with variant.enter(copied):
            plain, own = Answer(model, inputs), [Answer(copied, inputs), *variant.more(copied)]
            first = [_ratio(plain.start, [a.start for a in own]) for _ in range(rounds + 1)][1:]
            going = [a.step for a in (own if variant.each else own[:1])]
            later = [_ratio(plain.step, going) for _ in range(new + 1)][1:]
        found[name] = Pace.of(first), Pace.of(later)
    return found


def _ratio(plain: Callable[[], None], own: list[Callable[[], None]]) -> float:
    start = time.thread_time()
    plain()
    middle = time.thread_time()
    for function in own:
        function()
    return (time.thread_time() - middle) / (middle - start)


PEAK = """
def peak():
    # VmHWM belongs to this process alone; getrusage's peak is inherited from the process that started it
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
result = measured()
print(peak() - before)
"""


def extra_memory(script: str, *arguments: str) -> float:
    """MiB that the peak resident memory grew while `script`'s function `measured()` ran, in a process of its own (Linux)."""
    output = subprocess.run(
        [sys.executable, "-c", script + PEAK, *arguments], capture_output=True, text=True, check=True
    ).stdout
    return int(output.split()[-1]) / 1024


def table(title: str, rows: dict[str, dict[str, float]], digits: int = 2) -> str:
    """A Markdown table: one line per row name, one column per key."""
    columns = list(next(iter(rows.values())))
    lines = [f"### {title}", "", "| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, values in rows.items():
        cells = [f"{values[c]:.{digits}f}" if c in values else "" for c in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
