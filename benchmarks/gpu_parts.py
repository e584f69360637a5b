"""What the sections of benchmarks/gpu.py are written with: their part of the page, their time, and the device they measure on."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

MIB = 1 << 20
DASH = "-"


@dataclass
class Table:
    """A Markdown table that fills up while it is measured: cells by row and column, both in the order in which they came."""

    title: str
    columns: list[str]
    rows: dict[str, dict[str, str]] = field(default_factory=dict)

    def markdown(self) -> str:
        lines = [f"### {self.title}", ""] if self.title else []
        lines += ["| | " + " | ".join(self.columns) + " |", "|---" * (len(self.columns) + 1) + "|"]
        for name, cells in self.rows.items():
            lines.append(f"| {name} | " + " | ".join(cells.get(column, "") for column in self.columns) + " |")
        return "\n".join(lines)


class Part:
    """One section of the page, kept on disk after every cell, so that a run that is killed leaves what it had.

    file: where; the run that began this one puts the parts together. until: the time (`time.monotonic`) after which no row is begun.
    """

    def __init__(self, title: str, file: Path, until: float, device: torch.device, dry: bool) -> None:
        self.title, self.file, self.until, self.device, self.dry = title, file, until, Device(device), dry
        self.blocks: list[str | Table] = []
        self.figures: dict[str, float] = {}
        self.missed: list[str] = []
        self.write()

    @property
    def left(self) -> float:
        """Seconds that this section still has."""
        return self.until - time.monotonic()

    def table(self, title: str, columns: Sequence[str]) -> Table:
        made = Table(title, list(columns))
        self.blocks.append(made)
        return made

    def say(self, text: str) -> None:
        self.blocks.append(text)
        self.write()

    def figure(self, name: str, value: float) -> None:
        """A number that targets may ask for."""
        self.figures[name] = value
        self.write()

    def set(self, table: Table, row: str, cells: dict[str, str]) -> None:
        table.rows.setdefault(row, {}).update(cells)
        self.write()

    def reached(self, what: str, seconds: float = 0.0) -> bool:
        """Whether there is time left to begin something that takes so long; what is not begun is named at the end of the section."""
        if self.left > seconds:
            return True
        self.missed.append(what)
        self.write()
        return False

    def attempt(self, table: Table, row: str, measure: Callable[[], None]) -> bool:
        """Measures a row; a failure is what the row then says. False where it failed."""
        try:
            measure()
            return True
        except Exception as error:
            self.set(table, row, {table.columns[0]: "failed: " + said(error)})
            self.device.release()
            # after some errors (an illegal access, a failed assertion) the process can do nothing more on its device
            self.device.wait()
            return False

    def markdown(self) -> str:
        blocks = [block if isinstance(block, str) else block.markdown() for block in self.blocks]
        if self.missed:
            blocks.append(f"Not reached in the time of this section: {'; '.join(self.missed)}.")
        return "\n\n".join([f"## {self.title}", *blocks])

    def write(self) -> None:
        kept = self.file.with_suffix(".new")
        kept.write_text(json.dumps({"markdown": self.markdown(), "figures": self.figures}), encoding="utf-8")
        kept.replace(self.file)


def said(error: BaseException) -> str:
    """The first line of an error, short enough for a cell."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text.replace("|", "/")[:160]


class Device:
    """Times, memory and launches on CUDA; on a CPU (a dry run) what can be had there."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.cuda = device, device.type == "cuda"

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def release(self) -> None:
        if self.cuda:
            torch.cuda.empty_cache()

    def seconds(self, function: Callable[[], Any]) -> float:
        """From an idle device until it is idle again, with the host's part."""
        self.wait()
        start = time.perf_counter()
        function()
        self.wait()
        return time.perf_counter() - start

    def milliseconds(self, function: Callable[[], Any], repeat: int) -> float:
        """Of one call, in a row of so many: by events of the device where there are some."""
        if not self.cuda:
            return 1e3 * self.seconds(lambda: [function() for _ in range(repeat)]) / repeat
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        for _ in range(repeat):
            function()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / repeat

    def ratios(self, variants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, tuple[float, float]]:
        """{name: (median of milliseconds, median of ratios to the first variant of the same round)}; the order turns with each round."""
        names, taken = list(variants), {name: [] for name in variants}
        repeat = {}
        for name, function in variants.items():
            function()
            once = self.milliseconds(function, 1)
            repeat[name] = max(1, min(50, int(2.0 / max(once, 1e-3))))
        for turn in range(rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                taken[name].append(self.milliseconds(variants[name], repeat[name]))
        first = taken[names[0]]
        return {name: (median(own), median(a / b for a, b in zip(own, first))) for name, own in taken.items()}

    def extra_mib(self, function: Callable[[], Any]) -> float | None:
        """How far the device's memory grows above what was there, the output included."""
        if not self.cuda:
            return None
        self.wait()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        kept = function()
        self.wait()
        peak = torch.cuda.max_memory_allocated()
        del kept
        return (peak - before) / MIB

    def launches(self, function: Callable[[], Any]) -> int | None:
        """How many kernels and copies the device is given; on a CPU, how many operations; None where torch's profiler cannot tell."""
        if not self.cuda:
            return operations(function)
        try:
            from torch.profiler import DeviceType, ProfilerActivity, profile

            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
                function()
                torch.cuda.synchronize()
            return sum(1 for event in seen.events() if event.device_type == DeviceType.CUDA) or None
        except Exception:  # where the driver gives no leave to profile, or torch has other names
            return None

    def questions(self, function: Callable[[], Any]) -> int | None:
        """How often the host waits for the device."""
        if not self.cuda:
            return None
        self.wait()
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                function()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing CUDA operation" in str(one.message) for one in heard)


def operations(function: Callable[[], Any]) -> int:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counting(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += 1
            return op(*args, **(kwargs or {}))

    with Counting() as counting:
        function()
    return counting.count


def shown(value: float | int | None, digits: int = 2) -> str:
    return DASH if value is None else f"{value:.{digits}f}"
