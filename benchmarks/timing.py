"""Side-by-side timing: variants take turns in one process, the best of several rounds counts, and only ratios are reported."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from statistics import median


def ratios(variants: dict[str, Callable[[], object]], rounds: int = 5, repeat: int = 1) -> dict[str, float]:
    """{name: time relative to the first variant}. Thread CPU time on one thread, so that other work on the machine does not count."""
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


class Steps:
    """Times of one generation, told by being its `streamer`: from here to the first token, and from each token to the next."""

    def __init__(self) -> None:
        self.times = [time.thread_time()]
        self.prompt = True

    def put(self, tokens: object) -> None:
        if self.prompt:  # generate() hands the prompt over before it begins
            self.prompt = False
        else:
            self.times.append(time.thread_time())

    def end(self) -> None:
        pass

    @property
    def first(self) -> float:
        return self.times[1] - self.times[0]

    @property
    def step(self) -> float:
        """Median of the steps behind the first token; 0 where there are none."""
        return median(b - a for a, b in pairwise(self.times[1:])) if len(self.times) > 2 else 0.0


@dataclass
class Generation:
    """A way of generating text: `run(new)` writes that many tokens and returns the steps of every generation that this took.

    It runs inside the context that `enter` makes (a session, if any).
    """

    run: Callable[[int], list[Steps]]
    enter: Callable[[], AbstractContextManager] = nullcontext


def paces(variants: dict[str, Generation], new: int, rounds: int) -> dict[str, tuple[float, float]]:
    """{name: (seconds until the first token, seconds for each of the `new` tokens behind it)}.

    Of the first tokens the best of several rounds counts, of the steps the median of each round and of these the best.
    """
    first = dict.fromkeys(variants, float("inf"))
    step = dict.fromkeys(variants, float("inf"))
    for turn in range(rounds + 1):
        for name, variant in variants.items():
            with variant.enter():
                found = variant.run(1 + new)
            if turn:  # the first round warms up
                first[name] = min(first[name], sum(one.first for one in found))
                step[name] = min(step[name], sum(one.step for one in found))
    return {name: (first[name], step[name]) for name in variants}


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
