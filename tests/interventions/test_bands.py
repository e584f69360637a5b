"""Windows with sinks as an accelerator computes them, which is told here of the CPU: the numbers, the operations, what is asked."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from reattend.interventions import AppendKV, Band, Call, Keep, KeyBias, fused, reference
from reattend.interventions.edits import Operands
from reattend.interventions.engine import bands, biases, kernels
from reattend.interventions.engine.biases import folds
from simulated_device import DEVICE, SimulatedDevice
from torch.utils._python_dispatch import TorchDispatchMode

BATCH, HEADS, SHARED, DIM = 2, 4, 2, 8


@pytest.fixture
def accelerator(monkeypatch):
    """Blocks of 8 rows, three of them at a time."""
    monkeypatch.setattr(bands, "is_accelerator", lambda device: True)
    monkeypatch.setattr(bands, "STEP", 8)
    taken = []

    def noting(name: str, run):
        def noted(*arguments):
            taken.append(name)
            return run(*arguments)

        return noted

    for name in ("_blocks_at_once", "_over_everything"):
        monkeypatch.setattr(bands, name, noting(name, getattr(bands, name)))
    monkeypatch.setattr(kernels, "CHUNK_VALUES", 3 * BATCH * (2 * HEADS * DIM + 8) * 24)
    return taken


def masked(kind: str, queries: int, keys: int) -> dict:
    if kind == "causal":
        return {"is_causal": True}
    real = torch.arange(keys) >= torch.tensor([[5], [0]])
    if kind == "causal with padding":
        return {"is_causal": True, "mask": real[:, None, None]}
    mask = real[:, None, None] & torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    if kind == "both ways":
        mask = real[:, None, None].expand(-1, -1, queries, -1)
    mask = mask | torch.eye(queries, keys, dtype=torch.bool).roll(keys - queries, 1)  # rows of padding see themselves
    if kind == "some rows see far ones alone":
        mask = mask.clone()
        mask[:, :, -3:] = torch.arange(keys) == 9
    if kind == "of every head":
        mask = mask.repeat(1, HEADS, 1, 1)
        mask[:, 1, :, 7] &= torch.arange(queries) == keys  # one head does not see a column
    if kind == "additive":
        return {"mask": torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)}
    return {"mask": mask}


MASKS = ["causal", "causal with padding", "padding", "additive", "of every head", "some rows see far ones alone", "both ways"]
BANDS = {
    "sinks": lambda: Band(4, 12),
    "no sinks": lambda: Band(0, 12),
    "sinks after padding": lambda: Band(3, 9, first=torch.tensor([5, 0])),
    "sinks that a window has dropped": lambda: Band(4, 12, first=torch.tensor([-2])),
    "narrow": lambda: Band(1, 1),
    "wider than the sequence": lambda: Band(2, 500),
    "last rows": lambda: Band(4, 12, dense_after=44),
    "last rows of each": lambda: Band(
        4, 12, first=torch.tensor([5, 0]), dense_after=torch.tensor([40, 46]), dense_until=torch.tensor([44, 49])
    ),
}


def call_with(kind: str, queries: int, keys: int) -> Call:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(BATCH, h, n, DIM, generator=g) for h, n in ((HEADS, queries), (SHARED, keys), (SHARED, keys)))
    return Call(q, k, v, **masked(kind, queries, keys))


def same(call: Call, edits: list) -> None:
    """But for rows that see nothing, whose output has no meaning."""
    index = torch.arange(call.num_queries)
    visible = kernels.visible_rows(call.mask, call.is_causal, index, call.num_queries, call.num_keys)
    real = 1 if visible is None else visible.any(dim=-1, keepdim=True)
    found, wanted = (run(call, edits) * real for run in (fused, reference))
    torch.testing.assert_close(found, wanted, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("name", BANDS)
def test_blocks_as_a_batch_are_the_band(accelerator, kind, name):
    for queries, keys in ((50, 50), (30, 50), (3, 50), (1, 50)):
        call = call_with(kind, queries, keys)
        for more in ([], [KeyBias(bias=torch.linspace(-1, 1, keys)), KeyBias(bias=torch.rand(keys), heads=[1, 2])]):
            edits = [Keep(pattern=BANDS[name]()), *more]
            accelerator.clear()
            same(call, edits)
            if queries > 4:
                assert set(accelerator) == {"_over_everything" if kind == "both ways" else "_blocks_at_once"}


def test_appended_columns_stay(accelerator):
    call = call_with("causal", 50, 50)
    more = AppendKV(key=torch.randn(BATCH, SHARED, 3, DIM), value=torch.randn(BATCH, SHARED, 3, DIM))
    edits = [more, Keep(pattern=Band(2, 9))]
    torch.testing.assert_close(fused(call, edits), reference(call, edits), atol=2e-6, rtol=1e-5)
    assert accelerator == ["_blocks_at_once"]


def test_gradients_flow_through_blocks(accelerator):
    found = []
    for run in (fused, reference):
        call = call_with("padding", 50, 50)
        leaves = [call.query.requires_grad_(), call.key.requires_grad_(), call.value.requires_grad_()]
        found.append(torch.autograd.grad(run(call, [Keep(pattern=Band(3, 9))]).square().sum(), leaves))
    for own, wanted in zip(*found):
        torch.testing.assert_close(own, wanted, atol=1e-4, rtol=1e-4)


VIEWS = ("view", "expand", "slice", "select", "transpose", "permute", "detach", "alias", "unsqueeze", "split")


class Operations(TorchDispatchMode):
    """Counts what would be launched; on the meta device a question about a value raises."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not any(word in func.__name__ for word in VIEWS):
            self.count[func.__name__] += 1
        return func(*args, **(kwargs or {}))


def at(length: int, monkeypatch, memory: int) -> tuple[Operands, list, Operations]:
    """A prompt on a device with this memory, bfloat16, 32 heads on 8 key heads of dimension 128; what attention is asked for."""
    monkeypatch.setattr(kernels, "_values_of_memory", lambda device: max(kernels.LEAST_VALUES, memory // 256))
    q, k, v = (torch.empty(1, h, length, 128, dtype=torch.bfloat16, device="meta") for h in (32, 8, 8))
    asked: list = []

    def attend(query, key, value, mask, *rest):
        asked.append((tuple(query.shape), tuple(key.shape)))
        return torch.empty(*query.shape[:3], value.shape[3], dtype=query.dtype, device="meta"), None

    monkeypatch.setattr(bands, "attend", attend)
    return Operands(q, k, v, None, True, offset=0), asked, Operations()


@pytest.mark.parametrize(("memory", "calls"), [(80 << 30, 2), (16 << 30, 7)])
def test_a_prompt_of_16k_is_a_few_dozen_launches_and_no_question(monkeypatch, memory, calls):
    x, asked, operations = at(16384, monkeypatch, memory)
    band = Band(4, 1020)
    launches = []
    for _ in range(2):
        asked.clear()
        operations.count.clear()
        with operations:
            bands.attend_band(x, band, None, 128**-0.5)
        launches.append(operations.count.total() + len(asked))
    print(f"{memory >> 30} GiB: {len(asked)} calls of attention; operations of the first layer and of every other: {launches}")
    assert (
        len(asked) == calls
        and sum(query[0] for query, _ in asked) == 16384 // 512
        and launches[0] <= 40 * calls
        and launches[1] <= 8 * calls
    )
    assert {key[2] for _, key in asked} == {4 + 1019 + 512 + 1}


def test_a_decode_step_beside_a_mask_asks_nothing(monkeypatch):
    x, asked, operations = at(4096, monkeypatch, 80 << 30)
    x.query, x.offset = x.query[:, :, :1], 4095
    with operations:
        x.mask = torch.empty(1, 1, 1, 4096, dtype=torch.bool, device="meta")
        bands.attend_band(x, Band(4, 1020), None, 128**-0.5)
    assert [key[2] for _, key in asked] == [4096]


def test_heads_that_fused_kernels_would_no_longer_take_are_not_widened(monkeypatch):
    for device, dim, wanted in (("cpu", 256, True), ("meta", 256, False), ("meta", 248, True), ("meta", 128, True)):
        assert folds(torch.empty(1, 1, 1, dim, device=device)) is wanted
    monkeypatch.setattr(biases, "folds", lambda query: False)
    monkeypatch.setattr(kernels, "CHUNK_VALUES", BATCH * 50 * 20)
    for kind in MASKS:
        call = call_with(kind, 50, 50)
        for edits in ([KeyBias(bias=torch.randn(BATCH, 1, 50))], [KeyBias(bias=torch.randn(1, HEADS, 50))]):
            same(call, edits)


@pytest.mark.parametrize(("kind", "asked"), [("causal", 0), ("causal with padding", 1), ("padding", 2), ("both ways", 1)])
def test_a_device_is_asked_only_about_a_mask(monkeypatch, kind, asked):
    """Whether it looks back, and which rows it leaves nothing of the band; once for all layers that share both."""
    monkeypatch.setattr(bands, "STEP", 8)
    call, band = call_with(kind, 50, 50), Band(3, 9, first=torch.tensor([5, 0]), dense_after=torch.tensor([46, 46]))
    wanted = fused(call, [Keep(pattern=band)])
    with SimulatedDevice() as device:
        moved = {name: getattr(call, name).to(DEVICE) for name in ("query", "key", "value")}
        there = Call(**moved, mask=None if call.mask is None else call.mask.to(DEVICE), is_causal=call.is_causal)
        device.clear()
        edits, seen = [Keep(pattern=band)], []
        for _ in range(2):
            found = fused(there, edits)
            back = sum(count for (what, _), count in device.ours("copies").items() if what == "to the CPU")
            seen.append((sum(device.ours("questions").values()) + back, device.total))
            device.clear()
    real = (
        torch.ones(BATCH, 1, 50, 1)
        if kind in ("causal", "both ways")
        else (torch.arange(50) >= torch.tensor([[5], [0]]))[:, None, :, None]
    )
    torch.testing.assert_close(found.cpu() * real, wanted * real, atol=2e-6, rtol=1e-5)
    assert [questions for questions, _ in seen] == [asked, 0] and seen[1][1] < 30, seen


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_cuda_kernels_give_the_numbers_of_windows_and_biases(dtype, dim):
    n, heads = 700, 8
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(BATCH, h, n, dim, generator=g).to(dtype) for h in (heads, 2, 2))
    first = torch.tensor([5, 0])
    ways = {
        "window": Keep(pattern=Band(4, 100, first)),
        "last rows": Keep(pattern=Band(4, 100, first, dense_after=650)),
        "many columns": KeyBias(bias=torch.linspace(-2, 2, n)),
        "of each head": KeyBias(bias=torch.randn(1, heads, n, generator=g)),
    }
    for kind in ("causal", "causal with padding", "padding", "additive", "both ways"):
        how = masked(kind, n, n)
        exact = Call(*(t.double() for t in (q, k, v)), **how)
        real = torch.ones(1) if kind != "causal with padding" else (torch.arange(n) >= first[:, None])[:, None, :, None]
        there = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in how.items()}
        for edit in ways.values():
            found = fused(Call(q.cuda(), k.cuda(), v.cuda(), **there), [edit]).cpu().double() * real
            error = {torch.float32: 2e-3, torch.bfloat16: 3e-2, torch.float16: 5e-3}[dtype]
            torch.testing.assert_close(found, reference(exact, [edit]) * real, atol=error, rtol=error)


@torch.no_grad()
@pytest.mark.parametrize("queries", [6, 12])
def test_a_mask_that_is_changed_in_place_is_read_again(queries):
    """Also where it leaves other rows without a column of the band, or shows them later ones."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 2, n, 8) for n in (queries, 12, 12))
    causal = torch.ones(queries, 12, dtype=torch.bool).tril(12 - queries)
    near = torch.ones(queries, 12, dtype=torch.bool).triu(10 - queries)  # the columns of the window
    edit = Keep(pattern=Band(0, 3))
    with SimulatedDevice():
        on = [x.to(DEVICE) for x in (query, key, value)]
        shown = (causal & ~near).to(DEVICE).expand(2, 1, -1, -1).clone()
        for mask in (causal & ~near, causal, causal | near):
            mask = mask.expand(2, 1, -1, -1).clone()
            shown.copy_(mask.to(DEVICE))
            found = fused(Call(*on, mask=shown), [edit]).cpu()
            wanted = reference(Call(query, key, value, mask=mask), [edit])
            sees = mask.any(dim=3, keepdim=True)
            torch.testing.assert_close(found * sees, wanted * sees, atol=2e-6, rtol=1e-5)


@torch.no_grad()
def test_places_that_are_changed_in_place_are_read_again():
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 2, 12, 8) for _ in range(3))
    first, dense = torch.tensor([0, 2]), torch.tensor([9, 11])
    edit = Keep(pattern=Band(1, 2, first, dense))
    with SimulatedDevice():
        call = Call(*(x.to(DEVICE) for x in (query, key, value)), is_causal=True)
        for _ in range(2):
            wanted = reference(Call(query, key, value, is_causal=True), [edit])
            torch.testing.assert_close(fused(call, [edit]).cpu(), wanted, atol=2e-6, rtol=1e-5)
            first += 2
            dense -= 3
