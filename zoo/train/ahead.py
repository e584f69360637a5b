"""Lessons drawn ahead of the step that wants them, by worker processes; without any, drawn when they are wanted."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

# lessons that wait, per process
WAITING = 4


def processes(device: str) -> int:
    """As many as the machine can spare beside the one that trains on an accelerator; none where training itself needs the processor."""
    if torch.device(device).type == "cpu":
        return 0
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(mine - 1, 1)


class _Lessons(Dataset):
    def __init__(self, draw: Callable[[int], Any]) -> None:
        self.draw = draw

    def __getitem__(self, step: int) -> Any:
        return self.draw(step)


class Ahead:
    """draw(step), drawn ahead in the order of steps by so many processes. A lesson depends on its step alone, whoever draws it.

    Around a training as a context manager, which ends the processes.
    """

    def __init__(self, draw: Callable[[int], Any], steps: int, processes: int) -> None:
        self.draw, self.steps, self.processes = draw, steps, processes
        self.next = -1
        self.lessons: Iterator[Any] = iter(())

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *_: Any) -> None:
        self.lessons, self.next = iter(()), -1

    def __call__(self, step: int) -> Any:
        if self.processes == 0:
            return self.draw(step)
        if step != self.next:  # the first one, of a training that may go on from a later step
            loader = DataLoader(
                _Lessons(self.draw),
                batch_size=None,
                sampler=range(step, self.steps),
                num_workers=self.processes,
                prefetch_factor=WAITING,
            )
            self.lessons = iter(loader)
        self.next = step + 1
        return next(self.lessons)
