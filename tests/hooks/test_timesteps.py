"""Which step it is: what every denoiser's forward calls its timestep and its latents, and how runs move on by them."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import Any

import pytest
import reattend
import torch
from diffusers.models import ModelMixin, controlnets, transformers, unets
from reattend.hooks.sites.inputs import HIDDEN, TIMESTEP, hidden_in, timestep_in
from reattend.hooks.trackers.denoising_run import Running, advance

# classes whose forward names no timestep, or no latents: what is not known there is said to be unknown
NO_TIMESTEP = {
    "ControlNetXSAdapter": "a container",
    "MiniMaxMusic3RVQDepthDecoder": "reads tokens",
    "MotionAdapter": "a container",
    "RFD4ProteinaTransformer": "two times, of atoms and of latents",
    "UVit2DModel": "fills in tokens, by no schedule",
}
NO_HIDDEN = {
    "ControlNetXSAdapter": "a container",
    "Cosmos3OmniTransformer": "text and pictures in one stream of tokens",
    "MiniMaxMusic3RVQDepthDecoder": "reads tokens",
    "RFD4ProteinaTransformer": "proteins",
    "T5FilmDecoder": "notes",
    "UVit2DModel": "tokens",
}


def classes() -> dict[str, list[str]]:
    """{name: parameters of its forward} of the denoisers and ControlNets of diffusers."""
    found = {}
    for package in (transformers, unets, controlnets):
        for info in pkgutil.iter_modules(package.__path__):
            if "flax" in info.name:
                continue
            module = importlib.import_module(f"{package.__name__}.{info.name}")
            for name, kind in vars(module).items():
                if inspect.isclass(kind) and kind.__module__ == module.__name__ and issubclass(kind, ModelMixin):
                    found[name] = list(inspect.signature(kind.forward).parameters)[1:]
    return found


def test_every_denoiser_says_its_timestep_and_its_latents_or_nothing() -> None:
    known = classes()
    assert len(known) > 50
    assert {name for name, names in known.items() if not set(names) & set(TIMESTEP)} == set(NO_TIMESTEP) & set(known)
    assert {name for name, names in known.items() if not set(names) & set(HIDDEN)} == set(NO_HIDDEN) & set(known)
    # a second time beside the timestep is a target or a condition, never the step
    others = {other for names in known.values() for other in names if "timestep" in other} - set(TIMESTEP)
    assert others <= {
        "audio_timestep", "action_timesteps", "clean_timestep", "r_timestep", "ref_fixed_timestep", "sound_timesteps", "target_timestep",
        "timestep_cond", "timestep_indices", "timestep_r", "use_cross_timestep",
    }  # fmt: skip


@pytest.mark.parametrize("name", TIMESTEP)
@pytest.mark.parametrize("value", [0.25, torch.tensor(0.25), torch.tensor([0.25, 0.0])])
def test_a_timestep_by_every_name(name: str, value: Any) -> None:
    assert timestep_in({name: value, "timestep_cond": torch.ones(1)}) == 0.25


def test_what_is_not_there_is_not_guessed() -> None:
    assert timestep_in({"bb_ca_time": torch.ones(1)}) is None and timestep_in({"timestep": torch.ones(0)}) is None
    assert timestep_in({"t": [1.0]}) is None
    assert hidden_in({"bb_ca": torch.ones(1, 2)}) is None and hidden_in({"sample": torch.tensor(1.0)}) is None
    rows = hidden_in({"x": (torch.ones(2), torch.ones(3))})
    assert isinstance(rows, list) and [len(row) for row in rows] == [2, 3]


class Scheduler:
    """As much of a scheduler as a run reads."""

    order = 1

    def __init__(self, *timesteps: float) -> None:
        self.timesteps, self.step_index = torch.tensor(timesteps), None
        self.num_inference_steps = len(timesteps)


class Pipeline:
    def __init__(self, *timesteps: float) -> None:
        self.scheduler = Scheduler(*timesteps)


def test_a_run_without_a_timestep_has_no_number_of_steps() -> None:
    run = advance(None, None, Running(Pipeline(9.0, 7.0), True), ())
    assert (run.steps, run.timestep) == (None, None)
    assert advance(run, None, Running(Pipeline(9.0, 7.0), True), ()).steps is None


def test_a_controlnets_pass_begins_the_step_but_does_not_take_it_from_the_denoiser() -> None:
    running, run, seen = Running(Pipeline(9.0, 7.0), True), None, []
    for timestep in (9.0, 7.0):
        for beside in (True, True, False, False):
            run = advance(run, timestep, running, (), beside)
            seen.append((run.step, run.new_step))
    first = [(0, True), (0, True), (0, True), (0, False)]
    assert seen == [*first, *((1, new) for _, new in first)]


def test_one_schedule_used_twice_and_a_session_begun_in_mid_run_by_another_name() -> None:
    """A denoiser of the user's whose timestep is called otherwise: its steps are counted all the same."""
    scheduler, run, seen = Scheduler(1.0, 0.5, 0.25), None, []
    for timestep in (1.0, 0.5, 0.25, 1.0, 0.5, 0.25):
        run = advance(run, timestep_in({"timestep_ratio": torch.full((2,), timestep)}), None, [scheduler])
        seen.append((run.step, run.steps))
    assert seen == [(0, 3), (1, 3), (2, 3)] * 2
    late = advance(None, 0.5, Running(Pipeline(1.0, 0.5, 0.25), None), ())
    assert (late.step, late.steps) == (0, 2)  # nothing says that the pipeline used the first part of its schedule


def test_step_and_steps_are_shown_to_interventions() -> None:
    clock = reattend.interventions.Clock("denoise", 1, None)
    assert clock.steps is None and clock.unknown == ""
