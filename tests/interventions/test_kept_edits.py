"""Edits that a user keeps: called again with tensors changed in place, and through hundreds of steps without growing."""

from __future__ import annotations

import gc

import pytest
import torch
from every_edit import a_call
from reattend.interventions import Band, Gain, HeadGain, Keep, KeyBias, Lift, ScaleQuery, Transfer, fused, reference
from reattend.interventions.edits import Edit
from simulated_device import DEVICE, SimulatedDevice
from torch import Tensor

KEPT = {
    "key bias": (lambda x: KeyBias(bias=x), torch.linspace(-1, 1, 12)),
    "key bias of some heads": (lambda x: KeyBias(bias=x, heads=[1, 3]), torch.linspace(-1, 1, 24).view(1, 2, 12)),
    "factor": (lambda x: Gain(columns=[0, 1], factor=x), torch.full((3, 4, 1), 0.5)),
    "columns": (lambda x: Gain(columns=x, factor=0.3), torch.arange(12) < 3),
    "columns of some heads": (lambda x: Transfer(source=x, heads=[2, 3]), torch.arange(12) < 3),
    "lifted columns": (lambda x: Lift(columns=x, share=0.6), torch.arange(12) < 3),
    "a second edit": (lambda x: [HeadGain(factor=0.5), Gain(columns=x, factor=0.1)], torch.arange(12) < 3),
    "two plans": (lambda x: [Transfer(source=[1], strength=0.5), Gain(columns=x, factor=0.1)], torch.arange(12) < 3),
    "head gain": (lambda x: HeadGain(factor=x), torch.linspace(0.1, 1, 4)[None]),
    "scale query": (lambda x: ScaleQuery(factor=x, heads=[0, 1]), torch.tensor([0.5, 2.0]).view(1, 2, 1)),
    "rows": (lambda x: Gain(columns=[0, 1], factor=0.1, rows=x), torch.tensor([[True], [False], [False]])),
    "window": (lambda x: Keep(pattern=Band(1, 3, first=x), heads=[0]), torch.tensor([0, 1, 2])),
}


def edits_of(made: Edit | list[Edit]) -> list[Edit]:
    return made if isinstance(made, list) else [made]


@torch.no_grad()
@pytest.mark.parametrize("queries", [1, 7])
@pytest.mark.parametrize("name", KEPT)
def test_tensors_changed_in_place_are_seen(name, queries):
    torch.manual_seed(queries)
    make, values = KEPT[name]
    values = values.clone()
    edits, call = edits_of(make(values)), a_call(queries)
    fused(call, edits)
    before = fused(call, edits)
    if values.dtype == torch.bool:
        values.logical_not_()
    elif values.dtype == torch.long:
        values.add_(2)
    else:
        values.mul_(0.3)
    wanted = reference(call, edits_of(make(values.clone())))
    assert (wanted - before).abs().max() > 1e-3
    torch.testing.assert_close(fused(call, edits), wanted, atol=2e-6, rtol=1e-5)


def test_what_an_optimiser_has_learned_is_seen():
    """Its steps change parameters in place."""
    factor, call = torch.nn.Parameter(torch.full((1, 4, 1), 0.5)), a_call(1)
    edit = Gain(columns=[0, 1], factor=factor)
    optimiser = torch.optim.SGD([factor], lr=1.0)
    for _ in range(2):
        with torch.no_grad():
            found, wanted = fused(call, [edit]), reference(call, [Gain(columns=[0, 1], factor=factor.detach().clone())])
            torch.testing.assert_close(found, wanted, atol=2e-6, rtol=1e-5)
        fused(call, [edit]).square().sum().backward()
        optimiser.step()
        factor.data.clamp_min_(0.01)


LONG = {
    "gain": lambda: [Gain(columns=[1, 2], factor=0.2)],
    "part of a transfer": lambda: [Transfer(source=[0], strength=0.5)],
    "lift of some heads": lambda: [Lift(columns=[1], share=0.5, heads=[1, 2])],
    "different heads": lambda: [Gain(columns=[1], factor=0.2, heads=[0]), Transfer(source=[0], strength=0.5, heads=[0, 1])],
    "all but one kept by a user": lambda: [Transfer(source=[0], strength=0.5), Gain(columns=[1], factor=0.2)],
    "window": lambda: [Keep(pattern=Band(2, 6))],
    "batch rows": lambda: [Gain(columns=[1], factor=0.2, rows=torch.tensor([[True], [False]]))],
}


def alive() -> int:
    gc.collect()
    return sum(type(x) is Tensor for x in gc.get_objects())


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("queries", [1, 6])
@pytest.mark.parametrize("name", LONG)
def test_an_edit_that_is_kept_does_not_grow_with_the_steps(name, queries):
    edits, counts = LONG[name](), []
    for step in range(80):
        call = a_call(queries, 30 + step, batch=2, mask="holes")
        fused(call, edits if name != "all but one kept by a user" else [edits[0], LONG[name]()[1]])
        del call
        if step in (39, 79):
            counts.append(alive())
    assert counts[1] - counts[0] < 30


@torch.no_grad()
@pytest.mark.parametrize(("on", "inference"), [(torch.device("cpu"), False), (torch.device("cpu"), True), (DEVICE, False)])
def test_a_cut_to_batch_rows_is_made_once(on, inference, monkeypatch):
    """Layers that share the edit share it, though each finds the rows anew where several edits name them."""
    cuts, cut = [], Gain.at_batch
    monkeypatch.setattr(Gain, "at_batch", lambda edit, index: cuts.append(index) or cut(edit, index))
    rows = [torch.tensor([[True], [False], [False]]), torch.tensor([[False], [True], [False]])]
    with SimulatedDevice() as device:
        edits = [Gain(columns=[i], factor=0.2, rows=own.to(on)) for i, own in enumerate(rows)]
        call = a_call(7)
        for name in ("query", "key", "value"):
            setattr(call, name, getattr(call, name).to(on))
        with torch.inference_mode(inference):
            fused(call, edits)
            device.clear()
            fused(call, edits)
            asked = [*device.questions, *(copy for copy in device.copies if copy[0] == "to the CPU")]
            assert not [where for _, where in asked if "batch.py" in where or "row_values.py" in where]
    assert len(cuts) == 2
