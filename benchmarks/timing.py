"""Side-by-side timing: variants take turns in one process, the best of several rounds counts, and only ratios are reported."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass


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


@dataclass
class Generation:
    """A way of generating text: `run(new)` writes that many tokens, inside the context that `enter` makes (a session, if any)."""

    run: Callable[[int], object]
    enter: Callable[[], AbstractContextManager] = nullcontext


def paces(variants: dict[str, Generation], new: int, rounds: int) -> dict[str, tuple[float, float]]:
    """{name: (seconds until the first token, seconds for each of the `new` tokens behind it)}, the best of several rounds each."""
    first = dict.fromkeys(variants, float("inf"))
    rest = dict.fromkeys(variants, float("inf"))
    for turn in range(rounds + 1):
        for name, variant in variants.items():
            with variant.enter():
                times = []
                for tokens in (1, 1 + new):
                    start = time.thread_time()
                    variant.run(tokens)
                    times.append(time.thread_time() - start)
            if turn:  # the first round warms up
                first[name] = min(first[name], times[0])
                rest[name] = min(rest[name], times[1])
    return {name: (first[name], (rest[name] - first[name]) / new) for name in variants}


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
