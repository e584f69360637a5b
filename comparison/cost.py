"""What a run costs: seconds, and peak memory above the start - of the accelerator, or of the process where there is none."""

from __future__ import annotations

import gc
import os
import threading
import time
from dataclasses import dataclass
from typing import Any

import torch

SAMPLE_SECONDS = 0.005


@dataclass
class Cost:
    """seconds: wall clock. first: of these, until the first step was done (a text's prefill and first token). steps: how many.

    memory: peak bytes above the start of the run. memory_kind: "accelerator" or "process" (sampled).
    """

    seconds: float = 0.0
    first: float | None = None
    memory: int = 0
    memory_kind: str = "process"
    steps: int | None = None

    @property
    def per_step(self) -> float | None:
        """Seconds per step after the first."""
        if self.first is None or self.steps is None or self.steps < 2:
            return None
        return (self.seconds - self.first) / (self.steps - 1)

    def as_dict(self) -> dict[str, Any]:
        return {
            "seconds": self.seconds,
            "seconds_to_first_step": self.first,
            "steps": self.steps,
            "seconds_per_further_step": self.per_step,
            "peak_memory_bytes": self.memory,
            "memory_kind": self.memory_kind,
        }


class Meter:
    """`with Meter(device) as meter: ...` then `meter.cost`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cost = Cost(memory_kind="accelerator" if device.type == "cuda" else "process")

    def __enter__(self) -> Meter:
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._start_memory = torch.cuda.memory_allocated(self.device)
        else:
            self._sampler = _ProcessPeak()
            self._sampler.start()
        self._start = time.perf_counter()
        return self

    def tick(self) -> None:
        """A step is done."""
        if self.cost.first is None:
            self.cost.first = time.perf_counter() - self._start

    def __exit__(self, *_: Any) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.cost.seconds = time.perf_counter() - self._start
        if self.device.type == "cuda":
            self.cost.memory = torch.cuda.max_memory_allocated(self.device) - self._start_memory
        else:
            self.cost.memory = self._sampler.stop()


class _ProcessPeak:
    """Samples the process's resident memory in a thread."""

    def __init__(self) -> None:
        import psutil

        self._process = psutil.Process(os.getpid())
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def start(self) -> None:
        self._first = self._peak = self._process.memory_info().rss
        self._thread.start()

    def stop(self) -> int:
        self._over.set()
        self._thread.join()
        return max(0, max(self._peak, self._process.memory_info().rss) - self._first)

    def _sample(self) -> None:
        while not self._over.wait(SAMPLE_SECONDS):
            self._peak = max(self._peak, self._process.memory_info().rss)
