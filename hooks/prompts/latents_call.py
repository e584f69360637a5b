"""A call of a denoiser as the latents door takes part in it: the latents in its input, other ones put there, further passes beside it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...interventions import Clock, ReattendError, Site
from ..actions import RootCall
from ..host import Host
from ..passes import Enough, Running
from ..plan import Step
from ..protocols import Steered
from ..sites.denoisers import family_of
from ..sites.inputs import HIDDEN, TIMESTEP, name_in, timestep_in
from ..sites.quantised import without_gradient
from ..tokens.latents import Place
from ..trackers.scheduler import Evaluation, Followed, at_timestep, scaled
from .further_pass import Companions, Further

HALVES = ("conditional", "unconditional")
# what denoisers count a scheduler's timesteps in
UNITS: tuple[Callable[[float], float], ...] = (lambda t: t, lambda t: t / 1000, lambda t: 1 - t / 1000)


@dataclass
class LatentsCall:
    """A call of the denoiser, for the latents door. readers: the session of its further passes, whose `steps` read them; who: for errors."""

    host: Host
    readers: Steered
    steps: Sequence[Step]
    companions: Companions
    call: RootCall
    denoiser: nn.Module
    place: Place
    followed: Followed
    pipeline: Any
    who: str

    @property
    def kind(self) -> str:
        return type(self.denoiser).__name__

    @property
    def hidden(self) -> Tensor:
        return self.call.given[name_in(self.call.given, HIDDEN)]

    def scaled(self, latents: Tensor, scheduler: Any = None, timestep: Any = None) -> Tensor:
        scheduler = self.followed.scheduler if scheduler is None else scheduler
        timestep = self.call.given.get(name_in(self.call.given, TIMESTEP)) if timestep is None else timestep
        return scaled(scheduler, latents, timestep).to(self.hidden.dtype)

    def recovered(self) -> tuple[Tensor, Tensor]:
        """(the latents in the input, those that the scheduler holds): what it gave last, where the denoiser sees just that; else the input,
        scaled back."""
        seen, last = self.place.cut(self.hidden).clone(), self.followed.last
        if last is not None and last.shape == seen.shape and torch.equal(self.scaled(last), seen):
            return seen, last
        # in double precision, so that only the rounding of the input itself is left
        wide = seen.dtype if seen.device.type == "mps" else torch.float64
        ones = seen.new_ones(1, dtype=wide)
        factor = scaled(self.followed.scheduler, ones, self.call.given.get(name_in(self.call.given, TIMESTEP)))
        return seen, seen if factor is ones else (seen.to(wide) / factor).to(seen.dtype)

    def put(self, one: Evaluation) -> None:
        """Lets the denoiser, and what runs beside it, see these latents; rows that are as they were keep their bits."""
        call = self.call
        beside = self.companions.of(call.given, self.kind)
        wanted = torch.where(one.moved, self.scaled(one.latents), one.seen)
        with self.host.denoiser.aside(Running(self.readers), call.clock, call.run):
            arguments = Further(self.place, wanted).arguments(self.kind, call.given, beside, real=True)
        names = call.names[: len(call.args)]
        call.replace(tuple(arguments[name] for name in names), {k: v for k, v in arguments.items() if k not in names})

    def further(
        self,
        latents: Tensor,
        timestep: Any,
        text: str | Mapping[str, Any] | None,
        grad: bool,
        early: bool,
        until: Sequence[Site] | None,
    ) -> Any:
        """A further pass: see AtStep.predict."""
        call, found = self.call, self.place.cut(self.hidden)
        if not isinstance(latents, Tensor) or latents.shape != found.shape:
            got = tuple(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
            raise ReattendError(f"{self.who}: predict takes latents of shape {tuple(found.shape)}, got {got}")
        if getattr(call.root, "is_cache_enabled", False):
            raise ReattendError(f"{self.who}: a further pass would disturb the cache of diffusers: disable_cache() first")
        reason = without_gradient([call.root]) if grad else ""
        if reason:
            raise ReattendError(f"{self.who}: {reason}")
        rows, texts = self._rows(text)
        if rows is not None and getattr(call.pipeline, "do_perturbed_attention_guidance", False):
            raise ReattendError(
                f"{self.who}: the pipeline puts a perturbed part of its own into the batch and counts rows to find it, so a part of these "
                "cannot run by itself: call it with pag_scale=0, or use the pipeline without PAG"
            )
        scheduler, other = self.followed.scheduler, None
        if timestep is not None:
            timestep = float(timestep)
            scheduler, other = at_timestep(scheduler, timestep), self._timestep(timestep)
        running = Running(self.readers, self._pending(until) if early else None)
        aside = self.host.denoiser.aside(running, self._clock(rows), call.run)
        beside = self.companions.of(call.given, self.kind)
        output = None
        with torch.inference_mode(False), torch.set_grad_enabled(grad), aside:
            with contextlib.suppress(Enough):
                pushed = Further(self.place, self.scaled(latents, scheduler, timestep), rows, other, texts)
                output = call.root(**pushed.arguments(self.kind, call.given, beside))
            running.ended(output)
        if early or output is None:
            return None
        return output if isinstance(output, Tensor) else next(iter(output.values())) if isinstance(output, dict) else output[0]

    def _rows(self, text: str | Mapping[str, Any] | None) -> tuple[list[int] | None, Mapping[str, Any]]:
        if text is None:
            return None, {}
        half = text if isinstance(text, str) else "conditional"
        marked = self.call.clock.branches.get(half) if half in HALVES else None
        rows = [] if marked is None else marked.nonzero()[:, 0].tolist()
        if not rows:
            known = [name for name in HALVES if name in self.call.clock.branches] or "none whose half is known"
            raise ReattendError(
                f'{self.who}: text must be None, "conditional", "unconditional" or arguments by name, for rows of the call under way, which '
                f"has {known}; got {text!r:.40}"
            )
        texts = {} if isinstance(text, str) else text
        strange = next((name for name in texts if name not in self.call.given), None)
        if strange is not None:
            raise ReattendError(
                f"{self.who}: text names {strange!r}, but {type(self.denoiser).__name__} was called with {sorted(self.call.given)}"
            )
        return rows, texts

    def _clock(self, rows: list[int] | None) -> Clock:
        clock = self.call.clock
        if rows is None:
            return clock
        branches = {name: marked[rows] for name, marked in clock.branches.items()}
        return Clock(clock.phase, clock.step, clock.steps, clock.timestep, clock.scheduled, branches)

    @property
    def _stands(self) -> dict[int, float]:
        """{place in the scheduler's timesteps: what the denoiser was given there}, of this run so far."""
        return self.call.run.kept.setdefault(LatentsCall, {})

    def note(self) -> None:
        """Notes where the run stands: before the first step some schedulers only know where they will begin."""
        scheduler, now = self.followed.scheduler, self.call.clock.timestep
        index = getattr(scheduler, "step_index", None)
        index = getattr(scheduler, "begin_index", None) if index is None else index
        if index is not None and now is not None:
            self._stands[index] = now

    def _timestep(self, wanted: float) -> float:
        """A timestep of the scheduler's in the denoiser's units, which are those of the calls of this run."""
        now, known = timestep_in(self.call.given), self.followed.scheduler.timesteps.tolist()
        pairs = [([known[index]], given) for index, given in self._stands.items() if index < len(known)]
        found = {
            unit(wanted) for unit in UNITS if now is not None and all(_among(unit, *pair) for pair in (*pairs, (known, now)))
        }
        if len(found) == 1:
            return found.pop()
        what = "is none of the scheduler's" if not found else "may count up or down"
        raise ReattendError(f"{self.who}: the denoiser's timestep {now} {what}, so another cannot be given")

    def _pending(self, until: Sequence[Site] | None) -> set[tuple[int, int]] | None:
        """What a pass has to read before it can stop; None where it runs to its end."""
        root = self.call.root
        # accelerate's hooks put offloaded weights back only after a whole pass
        if family_of(self.denoiser).per_sample or hasattr(root, "_hf_hook") or hasattr(root, "hf_device_map"):
            return None
        inside = {id(module) for module in self.denoiser.modules()}
        reading = [one for one in self.steps if one.reads]
        named = None if until is None else {site.name for site in until}
        pairs = [(one, module) for one in reading for site, module in one.where if named is None or site.name in named]
        return {(id(one), id(module)) for one, module in pairs if id(module) in inside} or None


def _among(unit: Callable[[float], float], known: Sequence[float], now: float) -> bool:
    """Whether a denoiser's timestep is one of these of a scheduler's, in this unit."""
    return any(abs(unit(t) - now) < 1e-3 * max(1.0, abs(now)) for t in known)
