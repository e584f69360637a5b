"""Every method in steps that generate compiles by itself: in the graph, one graph for all steps, and the logits of the uncompiled model."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from matrix_models import Case, cases
from reattend.interventions import ReattendWarning
from torch._dynamo.utils import counters
from transformers import CompileConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore:var. no first token is a sink"),
    pytest.mark.filterwarnings("ignore:the borders of the segments"),
]

# graphs that the untouched model takes: the second for a window's cache that counts what it has taken
GRAPHS = {"Llama": 1, "Gemma3": 2}
# methods whose hooks inside the model act in every step: they say so, and steps run as they are written
WITH_HOOKS = {"spa"}


CASES = [
    *cases("graphs", llm=["Llama"]),
    *(
        pytest.param(*case.values, id=case.id, marks=[*case.marks, pytest.mark.slow])
        for case in cases("graphs", llm=["Gemma3"])
    ),
]


@torch.no_grad()
@pytest.mark.parametrize(("name", "model", "kind"), CASES)
def test_steps_that_generate_compiles(name: str, model: str, kind: str) -> None:
    case = Case(name, model, kind)
    if case.example.refusal(model):
        return
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(1)
        return graph.forward

    config = CompileConfig(backend=backend, mode=None)
    config._compile_all_devices = True
    torch._dynamo.reset()
    counters.clear()
    vars(case.model).pop("_compiled_call", None)
    try:
        with case.apply() as session:
            wanted, counts = case.generate(new=4, cache_implementation="static", disable_compile=True)[1], session.stats
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            with case.apply() as session:
                found = case.generate(new=4, cache_implementation="static", compile_config=config)[1]
        words = [
            str(one.message) for one in said if issubclass(one.category, ReattendWarning) and "compiled" in str(one.message)
        ]
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
        assert session.stats == counts
        if case.slug in WITH_HOOKS:
            assert len(words) == 1 and f"recipe {case.slug!r}" in words[0]
        else:
            assert not words and len(graphs) == GRAPHS[model] and not counters["graph_break"]
    finally:
        vars(case.model).pop("_compiled_call", None)
        torch._dynamo.reset()
