"""The accelerator that does not exist says what a real one would be asked, and computes what the CPU computes."""

from __future__ import annotations

import copy

import pytest
import simulated_device
import torch
import torch.nn.functional as F
from reattend.hooks.trackers.caches import cache_name
from simulated_device import DEVICE, SimulatedDevice
from tiny_llama import IDS, session_of, tiny_llama
from transformers import StaticCache


@pytest.fixture
def device():
    with SimulatedDevice() as entered:
        yield entered


def made(*shape):
    return torch.randn(*shape).to(DEVICE)


def test_tensors_say_that_they_are_elsewhere(device):
    x = torch.zeros(3, 4, device=DEVICE)
    x[1] = 5.0
    x[:, 2] = torch.arange(3, device=DEVICE).float()
    assert x.device == DEVICE and not x.is_cpu
    assert x.tolist() == [[0, 0, 0, 0], [5, 5, 1, 5], [0, 0, 2, 0]]
    assert torch.tensor([1, 2], device=DEVICE).device == DEVICE and x.cpu().device.type == "cpu"
    with pytest.raises(TypeError, match="cpu"):
        x.numpy()


def test_it_meets_no_tensor_of_the_cpu_but_numbers(device):
    x = made(3, 4)
    (x * torch.tensor(2.0)) + 1
    for meet in (
        lambda: x + torch.ones(3, 4),
        lambda: torch.where(torch.ones(3, 4) > 0, x, 0.0),
        lambda: torch.ones(5)[x.long()],
    ):
        with pytest.raises(RuntimeError, match="expected all tensors on"):
            meet()


ASKS = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.any()),
    "nonzero": lambda x: (x > 0).nonzero(),
    "boolean index": lambda x: x[x > 0],
    "boolean assignment": lambda x: x.index_put_((x > 0,), torch.ones(2, device=DEVICE)),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x + 0),
    "repeat": lambda x: torch.repeat_interleave(torch.ones(3, dtype=torch.long, device=DEVICE)),
}


@pytest.mark.parametrize("what", ASKS)
def test_questions_are_counted(device, what):
    x = torch.tensor([[1.0, -1.0, 2.0], [-3.0, -1.0, -1.0]], device=DEVICE)
    device.clear()
    ASKS[what](x)
    assert sum(device.questions.values()) == 1 and not device.copies
    device.clear()
    x[x > 0] = 3.0  # a fill
    x.masked_fill(x > 0, 1.0)
    assert not device.questions


COPIES = {
    "tensor": lambda x: torch.tensor([1, 2], device=DEVICE),
    "to": lambda x: torch.ones(2).to(DEVICE),
    "cpu": lambda x: x.cpu(),
    "list": lambda x: x.tolist(),
    "copy": lambda x: x.copy_(torch.ones(3, 4)),
    "index": lambda x: x[torch.tensor([1, 2])],
}


@pytest.mark.parametrize("what", COPIES)
def test_copies_are_counted(device, what):
    x = made(3, 4)
    device.clear()
    COPIES[what](x)
    assert sum(device.copies.values()) == 1 and not device.questions


def test_launches(device):
    x = made(3, 4)
    device.clear()
    x[1:].t().unsqueeze(0).expand(2, -1, -1)
    assert not device.total
    x + 1
    torch.softmax(x, -1)
    x.double()
    assert device.launches == {"add": 1, "_softmax": 1, "_to_copy": 1}
    q, k = made(1, 4, 6, 8), made(1, 2, 6, 8)
    device.clear()
    found = F.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)
    assert device.launches == {"scaled_dot_product_attention": 1}
    wanted = F.scaled_dot_product_attention(q.cpu(), k.cpu(), k.cpu(), is_causal=True, enable_gqa=True)
    torch.testing.assert_close(found.cpu(), wanted)


@pytest.mark.parametrize(
    "kernel",
    [
        lambda q: torch.ops.aten._scaled_dot_product_flash_attention(q, q, q, 0.0, True, False),
        lambda q: torch.ops.aten._scaled_dot_product_efficient_attention(q, q, q, None, True, 0.0, True),
        lambda q: torch.ops.aten._scaled_dot_product_cudnn_attention(q, q, q, None, True, 0.0, True, False),
    ],
)
def test_kernels_of_cuda_are_one_launch(device, kernel):
    q = made(1, 2, 6, 8)
    wanted = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q.cpu(), q.cpu(), q.cpu(), 0.0, True)
    device.clear()
    output, lse = kernel(q)[:2]
    assert device.total == 1
    torch.testing.assert_close(output.cpu(), wanted[0])
    torch.testing.assert_close(lse.cpu().reshape(1, 2, -1)[..., :6], wanted[1])


def test_what_reattend_asks_is_forbidden_and_what_others_ask_is_not(device, monkeypatch):
    x = made(3)
    device.forbidden = True
    bool(x.any())
    assert device.questions and not device.ours("questions")
    monkeypatch.setattr(simulated_device, "TESTS", "/nowhere")  # as if this file were of the package
    with pytest.raises(simulated_device.Asked, match=r"item at tests/test_simulated_device.py:\d+"):
        bool(x.any())
    with pytest.raises(simulated_device.Asked, match="from the CPU"):
        torch.tensor([1.0], device=DEVICE)
    assert device.ours("questions") and device.ours("copies")


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
def test_whole_models_run_on_it(device, static):
    model, how = tiny_llama(), {"max_new_tokens": 4, "do_sample": False, "disable_compile": True}
    there = copy.deepcopy(model).to(DEVICE)
    caches = [StaticCache(config=model.config, max_cache_len=20) if static else None for _ in range(2)]
    wanted = model.generate(IDS, **{cache_name(model): caches[0]}, **how)
    found = there.generate(IDS.to(DEVICE), **{cache_name(model): caches[1]}, **how)
    assert found.device == DEVICE and torch.equal(found.cpu(), wanted)
    torch.testing.assert_close(there(found).logits.cpu(), model(wanted).logits)


@torch.no_grad()
def test_a_static_cache_is_asked_for_its_length_until_it_is_known(device):
    """It is held by the device; whoever changes it between two passes is noticed without a question."""
    model = tiny_llama().to(DEVICE)
    cache, ids = StaticCache(config=model.config, max_cache_len=30), IDS.to(DEVICE)
    with session_of(model):
        model(ids, **{cache_name(model): cache})
        asked = []
        for step in range(5):
            device.clear()
            if step == 3:
                cache.crop(-1)
            model(ids[:, :1], **{cache_name(model): cache})
            asked.append(sum(device.ours("questions").values()))
    assert asked == [1, 0, 0, 1, 1] and int(cache.get_seq_length()) == IDS.shape[1] + 4
