"""What a decode step of every method costs an accelerator: nothing that it would wait for, and how many launches more.

On the accelerator that does not exist (`simulated_device`): once a prompt is read and one token written, steps ask it nothing and send it
nothing, and their numbers are those of the CPU. `pytest -s` prints a line for each method: launches that a step has more in each layer that
is changed, launches that reading the prompt has more, then what is asked and sent while the prompt is read, and in the first step.
"""

from __future__ import annotations

import copy
import functools
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from matrix_models import Case, cases
from reattend.hooks import sites
from reattend.hooks.trackers.caches import cache_name, cache_of
from simulated_device import DEVICE, SimulatedDevice, with_kernels_of_cuda

pytestmark = [
    pytest.mark.filterwarnings("ignore:var. no first token is a sink"),
    pytest.mark.filterwarnings("ignore:the borders of the segments"),
]

# Launches that a step may have more than the untouched model: per layer that is changed (by edits of all heads, of a list of heads), and
# once. Counted with one prompt; beside other prompts, a mask, windows and rows of the batch that nobody names take more.
ALL_HEADS, SOME_HEADS, ONCE = 3, 6, 4
# Methods that take more per layer, by what they are.
SECOND = "a second pass of the whole model"
WHOLE = "what a row holds decides how it changes, so it is written out"
MORE = {
    "block-topk": (20, "each step scores all blocks and gathers the best"),
    "pine": (32, "each row ranks the segments and meets each of them at a distance of its own"),
    "spa": (48, SECOND),
    "spa, images": (48, SECOND),
    "pai": (65, SECOND),
    "gift": (24, WHOLE),
    "gift, from a probe": (24, WHOLE),
    "cmai": (64, f"{WHOLE}, and looked at before"),
    "cmai, own layer": (55, f"{WHOLE}, and looked at before"),
    "opera": (99, "every candidate is tried in a pass of its own"),
}


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


PLACES = [*cases("operations", llm=["Llama"], lvlm=["llava"])]
FURTHER = [
    pytest.param(*one.values, id=one.id, marks=[*one.marks, pytest.mark.matrix]) for one in cases("operations", llm=["Gemma3"])
]


@torch.no_grad()
@pytest.mark.parametrize(("name", "model", "kind"), PLACES)
def test_a_step_asks_an_accelerator_nothing_and_launches_little(name, model, kind, monkeypatch):
    case = Case(name, model, kind)
    if case.example.refusal(model):
        return
    found = asked_of_device(case, model, kind, [0], monkeypatch)
    allowed, _ = MORE.get(name) or (SOME_HEADS if has_heads(case) else ALL_HEADS, "")
    assert found.more <= allowed * found.layers + ONCE, found.launches


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "model", "kind"), [*(pytest.param(*one.values, id=one.id, marks=[pytest.mark.matrix]) for one in PLACES), *FURTHER]
)
def test_with_rows_that_differ_too(name, model, kind, monkeypatch):
    """Prompts of other lengths, padded on the left, some without a passage or an image; a window."""
    case = Case(name, model, kind)
    if not case.example.refusal(model):
        asked_of_device(case, model, kind, list(case.models.rows), monkeypatch)


@torch.no_grad()
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["instaboost", "emphasise", "streaming", "spotlight"])
def test_generate_asks_once_per_prompt(name, cache, monkeypatch):
    """The whole loop of generate: what reattend asks does not grow with the answer."""
    with_kernels_of_cuda(monkeypatch)
    case = Case(name, "Llama", "llm")
    how = {"cache_implementation": "static", "disable_compile": True} if cache == "static" else {}
    with case.apply():
        wanted = case.generate(new=6, **how)
    inputs = {key: value.to("cpu") for key, value in case.inputs().items()}
    with SimulatedDevice() as device:
        case.model = on_device("llm", "Llama")
        monkeypatch.setattr(case, "inputs", lambda rows=None: {key: value.to(DEVICE) for key, value in inputs.items()})
        asked = []
        with case.apply():
            for new in (3, 6):
                device.clear()
                tokens, logits = case.generate(new=new, **how)
                asked.append((device.ours("questions"), device.ours("copies")))
    assert torch.equal(tokens.cpu(), wanted[0])
    torch.testing.assert_close(logits.cpu(), wanted[1], atol=2e-5, rtol=1e-4)
    assert sum(asked[0][0].values()) >= sum(asked[1][0].values()), asked
    assert sum(asked[0][1].values()) >= sum(asked[1][1].values()), asked


@dataclass
class Found:
    """What a step launches more than without the method, in how many layers it acts, and which launches these are."""

    more: int
    layers: int
    launches: Counter[str]


def asked_of_device(case: Case, model: str, kind: str, rows: list[int], monkeypatch) -> Found:
    """Runs prompt and steps there and on the CPU, prints what they cost and compares their numbers."""
    with_kernels_of_cuda(monkeypatch)
    plain = untouched(kind, model, tuple(rows))
    with SimulatedDevice() as device:
        with case.apply(rows):
            wanted, _ = steps(case, rows, device, False)
        case.model = on_device(kind, model)
        with case.apply(rows) as session:
            found, seen = steps(case, rows, device, True)
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)
    attention = {site.name for site in sites(case.model).stack("decoder").kind("self")}
    acted = {name for counts in session.stats.values() for name in counts}
    layers = len(acted & attention or attention)  # logits follow from all of them
    more = seen[2].total - plain[2]
    # what is asked while a prompt is read is asked for all layers together
    for told, count in seen[0].ours("questions").items():
        assert count < layers, (told, count)
    asked = [sum(one.ours(told).values()) for one in seen[:2] for told in ("questions", "copies")]
    cells = (
        case.label,
        model,
        len(rows),
        f"{more / layers:.1f}",
        seen[0].total - plain[0],
        *asked,
        MORE.get(case.label, (0, ""))[1],
    )
    print("\n" + " | ".join(map(str, cells)), end=" ")
    return Found(more, layers, seen[2].launches)


def has_heads(case: Case) -> bool:
    return "heads" in case.example.parameters or case.example.profile is not None
