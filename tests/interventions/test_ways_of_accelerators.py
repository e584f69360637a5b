"""Ways of the table that accelerators alone take, on the one that does not exist: right, few launches, no question."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from every_edit import a_call
from reattend.interventions import Call, Gain, Lift, Mix, Transfer, WeightMap, fused, reference
from simulated_device import DEVICE, SimulatedDevice, with_kernels_of_cuda

HEADS = [1, 2]
KEYS = torch.arange(12) % 3 == 0


def share(heads: int) -> torch.Tensor:
    return torch.linspace(0.2, 0.9, heads)[None, :, None]


# name of a way -> edits of heads that take it
EDITS = {
    "columns in one kernel": [
        lambda on: Gain(columns=KEYS.to(on), factor=share(2).to(on), heads=HEADS),
        lambda on: Lift(columns=KEYS.to(on), share=0.8, heads=HEADS),
        lambda on: Transfer(source=torch.stack([KEYS, ~KEYS])[None].to(on), strength=0.5, heads=HEADS),
    ],
    "towards the mean": [
        lambda on: Mix(target="uniform", strength=0.6, heads=HEADS),
        lambda on: Mix(target="uniform", strength=share(2).to(on), heads=HEADS),
    ],
    "materialised": [lambda on: WeightMap(function=lambda weights, rows: weights.square(), heads=HEADS)],
}


def there(call: Call) -> Call:
    mask = None if call.mask is None else call.mask.to(DEVICE)
    return Call(call.query.to(DEVICE), call.key.to(DEVICE), call.value.to(DEVICE), mask, call.is_causal)


@torch.no_grad()
@pytest.mark.parametrize("named", [False, True], ids=["all rows", "some rows"])
@pytest.mark.parametrize("mask", [None, "holes"])
@pytest.mark.parametrize(("name", "number"), [(name, i) for name, made in EDITS.items() for i in range(len(made))])
def test_one_row_with_edits_on_some_heads(name, number, mask, named, monkeypatch):
    """All heads are computed under them, and the others keep the bits of the untouched call."""
    with_kernels_of_cuda(monkeypatch)
    make, call = EDITS[name][number], a_call(1, mask=mask or "causal")
    rows = torch.tensor([[True]] + [[False]] * (call.batch - 1))

    def edit(on):
        made = make(on)
        return made._copy(rows=rows.to(on)) if named else made

    wanted = reference(call, [edit("cpu")])
    with SimulatedDevice() as device:
        other = there(call)
        plain = fused(other, []).cpu()
        asked = edit(DEVICE)
        fused(other, [asked])  # what is found once
        other.ways = Counter()
        device.clear()
        device.forbidden = True
        found = fused(other, [asked])
    assert name in other.ways and not device.questions and not device.copies
    torch.testing.assert_close(found.cpu(), wanted, atol=2e-6, rtol=1e-5)
    untouched = [head for head in range(call.num_heads) if head not in HEADS]
    assert torch.equal(found.cpu()[:, untouched], plain[:, untouched])
    if named:
        assert torch.equal(found.cpu()[1:], plain[1:])
    elif mask is None and name != "materialised":
        assert device.total <= 7, device.launches  # 1 without edits


@torch.no_grad()
def test_a_row_that_sees_nothing_keeps_its_output():
    call = a_call(1)
    mask = torch.ones(call.batch, 1, 1, call.num_keys, dtype=torch.bool)
    mask[-1] = False
    call.mask = mask
    edits = [Mix(target="uniform", strength=0.6)]
    wanted, plain = reference(call, edits), fused(call, [])
    with SimulatedDevice():
        found = fused(there(call), edits).cpu()
    torch.testing.assert_close(found[:-1], wanted[:-1], atol=2e-6, rtol=1e-5)
    assert torch.equal(found[-1], plain[-1])


@torch.no_grad()
@pytest.mark.parametrize("heads", [None, HEADS])
def test_what_lasts_is_worked_out_once_for_an_answer(heads, monkeypatch):
    """An edit of the prompt's columns that is made anew at every step of a growing cache."""
    with_kernels_of_cuda(monkeypatch)
    launched, store = [], {}
    for keys in (12, 13, 14):
        call = a_call(1, keys=keys)
        columns = torch.nn.functional.pad(KEYS, (0, keys - 12)).expand(1, 4 if heads is None else 2, -1).clone()
        columns[:, 0, 1] = True
        wanted = reference(call, [Transfer(source=columns, strength=0.5, heads=heads)])
        with SimulatedDevice() as device:
            other, source = there(call), columns.to(DEVICE)
            fused(other, [])
            device.clear()
            found = fused(other, [Transfer(source=source, strength=0.5, heads=heads).lasting(store)])
            launched.append(device.total)
        torch.testing.assert_close(found.cpu(), wanted, atol=2e-6, rtol=1e-5)
    assert launched[0] > launched[1] == launched[2]
