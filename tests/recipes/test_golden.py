"""What official code gave is what methods give: the golden data that a method's example file knows how to run (`golden`), on both executors."""

from __future__ import annotations

import pytest
import torch
from example import modules
from reattend.interventions import fused, reference

RUNS = [(slug, name) for slug, module in modules().items() for name in getattr(module, "GOLDEN", ())]


@pytest.mark.parametrize("run", [fused, reference])
@pytest.mark.parametrize(("slug", "name"), RUNS)
def test_the_method_gives_what_the_official_code_gave(slug, name, run):
    """`GOLDEN` names files of tests/golden/<slug>; `golden(name, run)` yields pairs (what the method gives, what the official code gave)."""
    pairs = list(modules()[slug].golden(name, run))
    assert pairs, name
    for found, wanted in pairs:
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
