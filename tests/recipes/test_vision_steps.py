"""What vision-language recipes add to a decode step, counted in operations: at one row their number is the cost, and what is the same for
all layers or all steps must not be done at each."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter

import pytest
import reattend
import torch
from asked_images import ONE, PROMPTS, tiny_models, tokenizer
from reattend.hooks.trackers.caches import cache_name, cache_of
from torch.utils._python_dispatch import TorchDispatchMode

# they look at the same memory in another shape and run nothing
VIEWS = {
    "view", "_unsafe_view", "transpose", "unsqueeze", "slice", "select", "expand", "t", "detach", "split", "split_with_sizes",
    "squeeze", "permute", "alias", "unbind", "lift_fresh", "as_strided",
}  # fmt: skip
LAYERS = 6
METHODS = {
    "var": {"tau": 1.5, "sink_dims": list(range(8)), "rho": 1.0, "summ": 0.0},
    "gift": {"saliency_layers": [1], "words": "content", "alpha": 3.0},
    "pai": {"alpha": 0.5, "gamma": 1.0},
    "selective-emphasis": {"local_share": 0.5},
    "vhr": {},
    "visual-token-exit": {},
}
# operations per layer and step beyond plain SDPA's, prompts without padding. A decode step by hand (scores, softmax, values) is 4 of them.
MOST = {"var": 19, "gift": 23, "pai": 7, "selective-emphasis": 7, "vhr": 1, "visual-token-exit": 0}
# the same where a row of the batch is left alone: its own numbers are put back bit for bit
ALONE = {"gift": 10}
pytestmark = pytest.mark.filterwarnings("ignore:var. no first token is a sink")


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name not in VIEWS:
            self.count[name] += 1
        return function(*args, **(kwargs or {}))


@functools.cache
def tiny():
    return tiny_models.llava(num_hidden_layers=LAYERS)


def from_layer(method, first):
    """The method's parameters such that it acts from this layer on."""
    rest = list(range(first, LAYERS))
    where = {"gift": {"enhance_layers": rest}, "vhr": {"layers": rest}, "visual-token-exit": {"exit_layer": first - 1}}
    return {**METHODS[method], **where.get(method, {"first_layer": first})}


def steps(prompts, method=None, first=2):
    """Operations of the second, third and fourth decode step."""
    inputs, model = tiny().inputs(prompts), tiny().model
    session = contextlib.nullcontext()
    if method is not None:
        session = reattend.apply(model, method, tokenizer=tokenizer(), **from_layer(method, first))
    counts = []
    with session, torch.no_grad():
        out, mask = model(**inputs, use_cache=True), inputs["attention_mask"]
        for _ in range(4):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            with Operations() as seen:
                out = model(
                    input_ids=out.logits[:, -1:].argmax(-1),
                    attention_mask=mask,
                    **{cache_name(model): cache_of(out)},
                    use_cache=True,
                )
            counts.append(seen.count.total())
    if method is not None:
        assert session.stats[method]
    return counts[1:]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("prompts", [[ONE], PROMPTS], ids=["one", "padded batch"])
def test_operations_per_layer_and_step(method, prompts):
    plain, more, fewer = steps(prompts), steps(prompts, method, 2), steps(prompts, method, 3)
    assert len(set(plain)) == len(set(more)) == len(set(fewer)) == 1, "no step costs more than the one before it"
    layer = more[0] - fewer[0]
    most = MOST[method] + (ALONE.get(method, 0) if prompts is PROMPTS else 0)
    assert layer <= most, f"{method} adds {layer} operations per layer and step"
    shared = more[0] - plain[0] - (LAYERS - 2) * layer
    assert shared <= 15, f"{method} adds {shared} operations per step for all layers together"
