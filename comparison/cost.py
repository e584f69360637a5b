"""What a run costs: passes of the model and what they read, seconds, and peak memory above the start.

Passes, tokens and samples are facts of the method. Seconds are those of one run after the other: what else the machine did is in them,
so that no report sets them in relation; benchmarks/timing.py does, with runs that take turns.
"""

from __future__ import annotations

import gc
import os
import threading
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..hooks.module_hooks import Hook

SAMPLE_SECONDS = 0.005


@dataclass
class Cost:
    """seconds: wall clock. first: of these, until the first step was done (a text's prefill and first token). steps: how many.

    memory: peak bytes above the start of the run. memory_kind: "accelerator" or "process" (sampled). passes: forward passes of the
    model, those that recipes add included. tokens: how many they read in all, padding included; None for models that read none.
    samples: rows of their batches in all.
    """

    seconds: float = 0.0
    first: float | None = None
    memory: int = 0
    memory_kind: str = "process"
    steps: int | None = None
    passes: int = 0
    tokens: int | None = None
    samples: int = 0

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
            "forward_passes": self.passes,
            "tokens_read": self.tokens,
            "samples_read": self.samples,
        }


class Meter:
    """`with Meter(device, module) as meter: ...` then `meter.cost`. module: the model whose passes count."""

    def __init__(self, device: torch.device, module: nn.Module) -> None:
        self.device, self.module = device, module
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
        self._hook = Hook(self.module, self._count, kwargs=True)
        self._start = time.perf_counter()
        return self

    def _count(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.cost.passes += 1
        named = (kwargs.get(name) for name in ("input_ids", "inputs_embeds"))
        read = next((value for value in named if isinstance(value, Tensor)), None)
        first = next((value for value in (read, *args, *kwargs.values()) if isinstance(value, Tensor) and value.dim()), None)
        if first is None:
            return
        self.cost.samples += first.shape[0]
        if read is None and not first.is_floating_point() and first.dim() == 2:
            read = first
        if read is not None:
            self.cost.tokens = (self.cost.tokens or 0) + read.shape[0] * read.shape[1]

    def tick(self) -> None:
        """A step is done."""
        if self.cost.first is None:
            self.cost.first = time.perf_counter() - self._start

    def __exit__(self, *_: Any) -> None:
        self._hook.remove()
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
