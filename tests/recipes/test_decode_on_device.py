"""What a decode step of every method costs an accelerator: nothing that it would wait for, and how many launches more.

On the accelerator that does not exist (`simulated_device`): once a prompt is read and one token written, steps ask it nothing and send it
nothing, and their numbers are those of the CPU. `pytest -s` prints what each method adds, as docs/performance.md has it.
"""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from matrix_models import Case, cases
from reattend.hooks.trackers.caches import cache_name, cache_of
from simulated_device import DEVICE, SimulatedDevice

pytestmark = [
    pytest.mark.filterwarnings("ignore:var. no first token is a sink"),
    pytest.mark.filterwarnings("ignore:the borders of the segments"),
]

# Launches that a step may have more than the untouched model: per layer (for edits of all heads, and with a list of heads), and once.
ALL_HEADS, SOME_HEADS, ONCE = 3, 6, 4
# Methods that take more per layer by what they are, and how many; of two passes one is the untouched model's over again.
SECOND = "a second pass of the whole model"
WHOLE = "rows are changed by what they hold, so they are written out"
MORE: dict[str, tuple[int, str]] = {}


def steps(case: Case, rows: list[int], device: SimulatedDevice, there: bool) -> tuple[torch.Tensor, list[SimulatedDevice]]:
    """(logits [4, B, V] of a prompt and three steps after it, what each of the four asked)."""
    inputs = case.inputs(rows)
    if there:
        inputs = {name: value.to(DEVICE) for name, value in inputs.items()}
    mask, cache, logits, seen = inputs["attention_mask"], None, [], []
    for token in (None, 7, 8, 9):
        if token is not None:
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            ids = torch.full((len(mask), 1), token, device=mask.device)
            inputs = {"input_ids": ids, "attention_mask": mask, cache_name(case.model): cache}
        device.clear()
        # what is learned in the first step may be asked for in it
        device.forbidden = token in (8, 9)
        output = case.model(**inputs, use_cache=True)
        device.forbidden = False
        seen.append(copy.copy(device))
        cache = cache_of(output)
        logits.append(output.logits[:, -1].float().cpu())
    return torch.stack(logits), seen


@functools.cache
def untouched(kind: str, model: str, rows: tuple[int, ...]) -> list[int]:
    """Launches of the prompt and of each step without a method."""
    case = Case(next(iter(cases("", **{kind: [model]}))).values[0], model, kind)
    with torch.no_grad(), SimulatedDevice() as device:
        case.model = on_device(kind, model)
        return [one.total for one in steps(case, list(rows), device, True)[1]]


@functools.cache
def on_device(kind: str, model: str):
    case = Case(next(iter(cases("", **{kind: [model]}))).values[0], model, kind)
    with SimulatedDevice():
        return copy.deepcopy(case.model).to(DEVICE)


@torch.no_grad()
@pytest.mark.parametrize("batch", [False, True], ids=["one", "batch"])
@pytest.mark.parametrize(("name", "model", "kind"), cases("operations", llm=["Llama", "Gemma3"], lvlm=["llava"]))
def test_a_step_asks_an_accelerator_nothing(name, model, kind, batch):
    case = Case(name, model, kind)
    if case.example.refusal(model):
        return
    rows = list(case.models.rows) if batch else [0]
    with SimulatedDevice() as device:
        with case.apply(rows):
            wanted, _ = steps(case, rows, device, False)
        case.model = on_device(kind, model)
        with case.apply(rows) as session:
            found, seen = steps(case, rows, device, True)
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)
    layers = len({site for counts in session.stats.values() for site in counts if site != "logits"}) or 4
    plain = untouched(kind, model, tuple(rows))
    more, once = divmod(max(0, seen[2].total - plain[2]), layers)
    asked = [sum(one.ours(told).values()) for one in (seen[0], seen[1]) for told in ("questions", "copies")]
    print(
        f"\n| {name} | {model}{', batch' if batch else ''} | {(seen[2].total - plain[2]) / layers:.1f} | {seen[0].total - plain[0]} "
        f"| {asked[0]} | {asked[1]} | {asked[2]} | {asked[3]} |",
        end="",
    )
    if model == "Llama" or kind == "lvlm":
        allowed = limit(case) if not batch else float("inf")
        assert more + (once > ONCE) <= allowed, dict(seen[2].launches)


def limit(case: Case) -> float:
    if case.label in MORE:
        return MORE[case.label][0]
    some = "heads" in case.example.parameters or case.example.profile is not None
    return SOME_HEADS if some else ALL_HEADS
