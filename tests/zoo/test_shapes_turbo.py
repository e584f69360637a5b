"""What shapes-turbo learns to predict leads the pipeline's own scheduler from each kept state to the next."""

from __future__ import annotations

import pytest
import torch
from reattend.zoo.train.shapes_turbo import STUDENT_STEPS, TEACHER_STEPS, Jumps


def test_a_step_with_what_it_learns_ends_in_the_next_state() -> None:
    diffusers = pytest.importorskip("diffusers")
    import reattend

    scheduler = diffusers.DDIMScheduler.from_pretrained(reattend.zoo.folder("shapes-sd"), subfolder="scheduler")
    jumps, noise = Jumps(scheduler), torch.Generator().manual_seed(0)
    state, goal = (torch.randn(STUDENT_STEPS, 4, 8, 8, generator=noise) for _ in range(2))
    learned = jumps.velocity(state, goal, torch.arange(STUDENT_STEPS))
    for number, time in enumerate(scheduler.timesteps):
        reached = scheduler.step(learned[number, None], time, state[number, None]).prev_sample
        torch.testing.assert_close(reached, goal[number, None], atol=1e-4, rtol=1e-4)


def test_the_student_s_times_are_among_the_teacher_s() -> None:
    diffusers = pytest.importorskip("diffusers")
    import reattend

    scheduler = diffusers.DDIMScheduler.from_pretrained(reattend.zoo.folder("shapes-sd"), subfolder="scheduler")
    times = Jumps(scheduler).times
    scheduler.set_timesteps(TEACHER_STEPS)
    assert times.tolist() == scheduler.timesteps[:: TEACHER_STEPS // STUDENT_STEPS].tolist()
