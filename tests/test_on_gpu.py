"""On a CUDA device: edits against a float64 reference, and recipes beside the CPU. All of it, and times: `python benchmarks/gpu.py`."""

from __future__ import annotations

import functools
import itertools

import gpu_edits
import gpu_recipes
import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore"),
]
TURNS = 6  # of the conditions that each edit meets in each dtype
NAMES = list(gpu_edits.every_edit().examples(gpu_edits.every_edit().a_call(9)))


@functools.cache
def cases(name: str) -> list[tuple[str, torch.dtype, gpu_edits.Condition]]:
    own = (case for case in gpu_edits.cases() if case[0] == name)
    return list(itertools.islice(own, TURNS * len(gpu_edits.DTYPES)))


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_an_edit_is_that_of_a_float64_reference(name):
    found = [gpu_edits.ask(*case, torch.device("cuda")) for case in cases(name)]
    wrong = [one for one in found if one is not None and one != ""]
    assert not wrong, "\n".join(map(str, wrong))
    assert None in found, "no condition applies to it"


@torch.no_grad()
@pytest.mark.parametrize("models", ["language", "vision", "pictures"])
def test_recipes_are_those_of_the_cpu(models):
    if models == "pictures":
        pytest.importorskip("diffusers")
    found = {name: compare() for name, compare in getattr(gpu_recipes, models)(torch.device("cuda")).items()}
    assert not {name: one for name, one in found.items() if not one.right}
