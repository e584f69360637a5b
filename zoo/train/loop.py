"""The training loop that all zoo models share: fixed seeds, checkpoints that are data only, resume, and the time that is left.

Every step draws its batch from (seed, step) alone, so a run that was interrupted goes on exactly where it stopped.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Loss = Callable[[np.random.Generator, torch.Generator], "dict[str, Tensor]"]


@dataclass
class Loop:
    """Trains `modules` on `loss` (a dict of parts that are added up) with AdamW, warm-up and cosine decay.

    folder: where checkpoints and the log lie; a run that finds a checkpoint there goes on from it. average: decay of the running mean
    of the weights (0: none), which `averaged()` puts in place of the weights at the end. rates: factor of the rate for modules that
    learn slower. budget: seconds of the whole training, in however many pieces (0: as long as it takes): the schedule follows the steps
    or the seconds, whichever is further, and the training ends with it. watch: every `watch_every` steps, watch(step) -> metrics for
    the log.
    """

    folder: Path
    modules: dict[str, nn.Module]
    loss: Loss
    steps: int
    rate: float = 1e-3
    decay: float = 0.02
    warmup: int = 200
    clip: float = 1.0
    average: float = 0.0
    rates: dict[str, float] = field(default_factory=dict)
    budget: float = 0.0
    seed: int = 0
    save_every: int = 250
    watch: Callable[[int], dict[str, float]] | None = None
    watch_every: int = 1000
    log: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.parameters = {
            f"{m}.{n}": p for m, module in self.modules.items() for n, p in module.named_parameters() if p.requires_grad
        }
        groups = []
        for module, held in self.modules.items():
            learned = [p for p in held.parameters() if p.requires_grad]
            matrices, vectors = [p for p in learned if p.ndim > 1], [p for p in learned if p.ndim <= 1]
            for params, decay in ((matrices, self.decay), (vectors, 0.0)):
                groups.append({"params": params, "weight_decay": decay, "factor": self.rates.get(module, 1.0)})
        self.optimizer = torch.optim.AdamW(groups, lr=self.rate, betas=(0.9, 0.98))
        self.mean = {n: p.detach().clone() for n, p in self.parameters.items()} if self.average else {}
        # seconds: up to the last checkpoint
        self.step, self.seconds, self.began = 0, 0.0, time.monotonic()

    def run(self) -> None:
        self._resume()
        self.began = time.monotonic()
        began, first, recent = self.began, self.step, []
        for module in self.modules.values():
            module.train()
        over = self.gone >= 1
        while not over:
            recent.append(self._step())
            over = self.gone >= 1  # asked once a step: time goes on
            if self.step % 50 == 0 or over:
                self._report(recent, began, first, over)
                recent = []
            if self.watch is not None and self.step % self.watch_every == 0:
                self._watch()
            if self.step % self.save_every == 0 or over:
                now = time.monotonic()
                self.seconds, self.began = self.seconds + now - self.began, now
                began, first = now, self.step
                self._save()
        for module in self.modules.values():
            module.eval()

    @property
    def gone(self) -> float:
        """How much of the training is over, 0 to 1 or a little more."""
        return max(self.step / self.steps, self.spent / self.budget if self.budget else 0.0)

    @property
    def spent(self) -> float:
        """Seconds of all pieces so far."""
        return self.seconds + time.monotonic() - self.began

    def averaged(self) -> None:
        """Puts the running mean in place of the weights."""
        with torch.no_grad():
            for name, value in self.mean.items():
                self.parameters[name].copy_(value)

    def _step(self) -> dict[str, float]:
        rate = self.rate * min(1.0, (self.step + 1) / self.warmup)
        rate *= 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(self.gone, 1.0)))
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        chance = torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)
        parts = self.loss(np.random.default_rng([self.seed, self.step]), chance)
        self.optimizer.zero_grad(set_to_none=True)
        torch.stack(list(parts.values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), self.clip)
        self.optimizer.step()
        self.step += 1
        keep = min(self.average, self.step / (self.step + 10))
        with torch.no_grad():
            for name, value in self.mean.items():
                value.lerp_(self.parameters[name], 1 - keep)
        return {name: float(part.detach()) for name, part in parts.items()}

    def _report(self, recent: list[dict[str, float]], began: float, first: int, over: bool) -> None:
        means = {name: round(float(np.mean([r[name] for r in recent])), 5) for name in recent[0]}
        pace = (time.monotonic() - began) / max(self.step - first, 1)
        left = pace * (self.steps - self.step) / 60
        if self.budget:
            left = min(left, (self.budget - self.spent) / 60)
        shown = "  ".join(f"{n} {v:.4f}" for n, v in means.items())
        print(f"step {self.step}/{self.steps}  {shown}  {pace:.2f} s/step  {left:.0f} min left", flush=True)
        if self.step % 250 == 0 or over:
            self.log.append({"step": self.step, **means})

    def _watch(self) -> None:
        assert self.watch is not None
        weights = {n: p.detach().clone() for n, p in self.parameters.items()}
        self.averaged()
        for module in self.modules.values():
            module.eval()
        with torch.no_grad():
            seen = {name: round(value, 4) for name, value in self.watch(self.step).items()}
            for name, value in weights.items():
                self.parameters[name].copy_(value)
        for module in self.modules.values():
            module.train()
        print(f"step {self.step}  {seen}", flush=True)
        self.log.append({"step": self.step, **seen})

    # -- checkpoints -------------------------------------------------------------------------------------------------

    @property
    def _file(self) -> Path:
        return self.folder / "checkpoint.safetensors"

    def _save(self) -> None:
        held = {f"weights.{n}": p.detach() for n, p in self.parameters.items()}
        held |= {f"mean.{n}": v for n, v in self.mean.items()}
        for name, p in self.parameters.items():
            held |= {f"state.{name}.{key}": v for key, v in self.optimizer.state[p].items()}
        held = {name: value.contiguous() for name, value in held.items()}
        facts = {"step": self.step, "seconds": self.seconds, "log": self.log}
        waiting = self._file.with_suffix(".new")
        save_file(held, waiting, {"reattend": json.dumps(facts)})
        waiting.replace(self._file)  # a run that is cut off while writing keeps the older one

    def _resume(self) -> None:
        if not self._file.is_file():
            return
        from safetensors import safe_open

        with safe_open(self._file, "pt") as opened:
            facts = json.loads((opened.metadata() or {})["reattend"])
        held = load_file(self._file)
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(held[f"weights.{name}"])
                if self.mean:
                    self.mean[name].copy_(held[f"mean.{name}"])
                if f"state.{name}.step" in held:  # a parameter that the loss does not reach has none
                    moments = {key: held[f"state.{name}.{key}"].to(p.device) for key in ("exp_avg", "exp_avg_sq")}
                    self.optimizer.state[p] = {"step": held[f"state.{name}.step"], **moments}
        self.step, self.seconds, self.log = facts["step"], facts["seconds"], facts["log"]
        print(f"goes on from step {self.step}", flush=True)
