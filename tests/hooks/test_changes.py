"""How large a guide's shift was of the prediction that it was added to: a session knows it, and says so where nobody could see it."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import reattend
import torch
from reattend.hooks import Guide, Plan, attach
from reattend.hooks.session import VISIBLE
from reattend.hooks.trackers.denoising_run import Run
from reattend.hooks.trackers.guided_pass import GuidedPass, Part, settle
from reattend.interventions import Clock, ReattendWarning
from simulated_device import DEVICE, SimulatedDevice
from tiny_runs import draw, flux, stable_diffusion, stable_diffusion_3

CASES = {
    "SD": stable_diffusion,
    "SD, no guidance": lambda: stable_diffusion(guidance=1.0),
    "SD3": stable_diffusion_3,
    "Flux, two calls": flux,
}


def shifting(part: float) -> Plan:
    """A guide whose shift is this part of the conditional prediction."""
    return Plan("shifting", [Guide("branch", formula=lambda seen: part * seen.conditional)])


@pytest.mark.parametrize("case", CASES)
def test_a_shift_that_nobody_sees_warns_once_with_its_size(case: str) -> None:
    pipe, call, _, _ = CASES[case]()
    with pytest.warns(ReattendWarning) as seen, attach(pipe, [shifting(VISIBLE / 2)]) as session:
        draw(pipe, call)
        draw(pipe, call)
        assert session.changes == {"shifting": pytest.approx(VISIBLE / 2, rel=1e-4)}
    (warning,) = [str(one.message) for one in seen]
    assert warning.startswith("recipe 'shifting' changed nothing visible: its largest change was 1.0e-03 of a prediction")
    assert session.changes == {"shifting": pytest.approx(VISIBLE / 2, rel=1e-4)}  # also after its end


@pytest.mark.parametrize("case", CASES)
def test_a_shift_that_is_seen_does_not_warn(case: str) -> None:
    pipe, call, _, _ = CASES[case]()
    with warnings.catch_warnings():
        warnings.simplefilter("error", ReattendWarning)
        with attach(pipe, [shifting(VISIBLE * 2)]) as session:
            draw(pipe, call)
    assert session.changes == {"shifting": pytest.approx(2 * VISIBLE, rel=1e-4)}


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_the_branch_of_a_recipe_that_equals_the_conditional_rows(guidance: float) -> None:
    pipe, call, _, _ = stable_diffusion(guidance=guidance)
    with (
        pytest.warns(ReattendWarning, match="'softpag' changed nothing visible"),
        reattend.apply(pipe, "softpag", strength=1e-6),
    ):
        draw(pipe, call)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ReattendWarning)
        with reattend.apply(pipe, "softpag", layers=[0], strength=1.0, scale=10.0) as session:
            draw(pipe, call)
    assert session.changes["softpag"] > VISIBLE


def test_the_largest_step_and_row_counts_and_counts_start_anew() -> None:
    pipe, call, _, _ = stable_diffusion()

    def formula(seen: Any) -> torch.Tensor:
        shift = torch.zeros_like(seen.conditional)
        if seen.clock.step == 1:
            shift[1] = 0.25 * seen.conditional[1]
        return shift

    with attach(pipe, [Plan("once", [Guide("branch", formula=formula)])]) as session:
        draw(pipe, call)
        assert session.changes == {"once": pytest.approx(0.25, rel=1e-4)}
        session.clear_counts()
        assert session.changes == {}


def test_strength_zero_and_dropped_branches_have_no_size() -> None:
    pipe, call, _, _ = stable_diffusion()
    with (
        pytest.warns(ReattendWarning) as seen,
        reattend.apply(pipe, "softpag", strength=0.0) as session,
        attach(pipe, [Plan("read", [Guide("read", formula=None)])]) as other,
    ):
        draw(pipe, call)
    assert session.changes == other.changes == {}
    assert ["never acted" in str(one.message) for one in seen] == [True]


def test_a_size_that_is_not_a_number_is_not_called_small() -> None:
    pipe, call, _, _ = stable_diffusion()
    with warnings.catch_warnings():
        warnings.simplefilter("error", ReattendWarning)
        with attach(pipe, [Plan("none", [])]) as session:
            for size in (1e-6, float("nan"), 1e-6):
                session.note("nan", torch.tensor(size))


def test_nothing_is_asked_of_a_device_until_the_end() -> None:
    model = torch.nn.Linear(1, 1)
    with SimulatedDevice() as device, attach(model, [Plan("device", [])]) as session:
        asked = []
        for note in (None, lambda change: session.note("device", change)):
            device.clear()
            torch.manual_seed(0)
            output = torch.randn(4, 2, 3, 3).to(DEVICE)
            part = Part("branch", [0, 1], 2.0, lambda seen: seen.scale * (seen.conditional - seen.branch), 2, note)
            halves = {"conditional": [0, 1], "unconditional": []}
            for _ in range(3):
                settle(output, GuidedPass(Clock("denoise"), [part], 2, halves, Run()))
            asked.append((sum(device.questions.values()), sum(device.copies.values())))
        assert asked[0] == asked[1]
        assert session.changes["device"] > VISIBLE
        assert sum(device.questions.values()) + sum(device.copies.values()) > sum(asked[1])
