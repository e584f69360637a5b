"""What rows hold is known on the CPU where they came from it, and asked of an accelerator once where they did not."""

from __future__ import annotations

import torch
from every_edit import a_call
from reattend.interventions import Call, Gain, fused, reference
from reattend.interventions.edits.row_values import found_in, sent, values_of
from simulated_device import DEVICE, SimulatedDevice


def asked(device: SimulatedDevice) -> int:
    return sum(count for (what, _), count in device.copies.items() if what == "to the CPU") + sum(device.questions.values())


def test_what_was_sent_is_known():
    rows = torch.tensor([[True, False], [False, False]])
    with SimulatedDevice() as device:
        there = sent(rows, DEVICE)
        assert torch.equal(values_of(there), rows) and not asked(device)
        assert found_in(there, "any", lambda values: bool(values.any())) is True
        assert found_in(there, "any", lambda values: 1 / 0) is True, "found once"
        there[1] = True  # written to: what was known holds no longer
        assert bool(values_of(there).all(dim=1)[1]) and asked(device) == 1
        values_of(there)
        assert asked(device) == 1
    assert values_of(rows) is rows and sent(rows, torch.device("cpu")) is rows


@torch.no_grad()
def test_cuts_by_rows_ask_nothing_of_rows_that_are_known():
    call = a_call(12)
    rows = torch.zeros(call.batch, 12, dtype=torch.bool)
    rows[0, 3:5] = True
    edit = Gain(columns=torch.arange(2), factor=0.5, rows=rows)
    wanted = reference(call, [edit])
    with SimulatedDevice() as device:
        there = Call(*(t.to(DEVICE) for t in (call.query, call.key, call.value)), None, call.is_causal)
        columns = (torch.arange(12) < 2).to(DEVICE)
        edit = Gain(columns=columns, factor=0.5, rows=sent(rows, DEVICE))
        device.clear()
        found = fused(there, [edit])
        first = asked(device)
        assert torch.equal(fused(there, [edit]).cpu(), found.cpu())
    torch.testing.assert_close(found.cpu(), wanted, atol=2e-6, rtol=1e-5)
    assert not first
