"""Answers on disk: one JSON line per batch, appended as soon as it is done, found again by what was asked of whom.

A file holds the answers of one model to one suite under one variant. Its name ends with a fingerprint of everything that answers
depend on, so a changed parameter, seed, suite or model begins a new file and never mixes with an old one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..recipes.kit.checks import writing
from .subject import Subject
from .suites import Item

FOLDER = "answers"


def digest(value: Any) -> str:
    """A short fingerprint of JSON values."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def batch_key(items: Sequence[Item]) -> str:
    return digest([[item.id, item.group, item.data] for item in items])


class Book:
    """The answers to one suite under one variant. lines: {key of a batch: {"batch", "seconds", "applied", "records"}}.

    folder: None keeps them in memory only. Every process appends to a file of its own and reads those of all.
    """

    def __init__(self, folder: Path | None, name: str, key: dict[str, Any], rank: int = 0) -> None:
        self.lines: dict[str, dict[str, Any]] = {}
        self.file: Path | None = None
        if folder is None:
            return
        stem = f"{re.sub(r'[^A-Za-z0-9.=-]+', '-', name).strip('-')[:60]}.{digest(key)}"
        self.file = folder / FOLDER / f"{stem}.{rank}.jsonl"
        self.key = key
        for file in sorted((folder / FOLDER).glob(f"{stem}.*.jsonl")):
            self._read(file)

    def _read(self, file: Path) -> None:
        for line in file.read_bytes().split(b"\n"):
            try:
                held = json.loads(line)
            except ValueError:
                continue  # the line at which a run was stopped
            if isinstance(held, dict) and "batch" in held:
                self.lines.setdefault(held["batch"], held)

    def add(self, line: dict[str, Any]) -> None:
        """Keeps the answers of one batch, at once also on disk."""
        # what is kept is what would be read, so that a first and a resumed run see the same values
        line = json.loads(json.dumps(line, ensure_ascii=False))
        self.lines[line["batch"]] = line
        if self.file is None:
            return
        fresh = not self.file.exists()
        with writing(self.file, "out"), self.file.open("ab") as out:
            if fresh:
                out.write(_line({"key": self.key}))
            elif not self.file.read_bytes().endswith(b"\n"):
                out.write(b"\n")
            out.write(_line(line))


def _line(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"


def model_key(subject: Subject) -> dict[str, Any]:
    """What tells a model's answers from another's: class, a few weights of every parameter, number type, kind of device, processor."""
    parts = {"": subject.module}
    if subject.pipe is not None:
        parts = {k: v for k, v in subject.pipe.components.items() if isinstance(v, nn.Module)}
    found = hashlib.sha256()
    for part, module in parts.items():
        for name, parameter in module.named_parameters():
            found.update(f"{part}.{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
            found.update(_some(parameter))
    config = getattr(subject.module, "config", None)
    tools: Any = getattr(subject.processor, "image_processor", subject.processor if subject.kind == "vision" else None)
    scheduler = getattr(subject.pipe, "scheduler", None)
    return {
        "class": type(subject.pipe or subject.module).__name__,
        "weights": found.hexdigest()[:16],
        "device": subject.device.type,
        "attention": str(getattr(config, "_attn_implementation", "")),
        "template": getattr(subject.processor, "chat_template", None),
        "image_processor": digest(tools.to_dict()) if hasattr(tools, "to_dict") else "",
        "scheduler": digest(dict(scheduler.config)) if scheduler is not None else "",
    }


def _some(parameter: torch.Tensor) -> bytes:
    """The last row of a parameter: enough to tell a model from the same model trained on."""
    if parameter.device.type == "meta" or not parameter.numel():
        return b""
    row = parameter.detach()
    while row.dim() > 1:
        row = row[-1]
    return row.float().cpu().numpy().tobytes()
