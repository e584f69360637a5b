"""Which of CUDA's kernels is called, and with what: torch's answers are given here, and its kernels stood in for through the dispatcher."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from reattend.interventions import Call
from reattend.interventions.edits import Operands
from reattend.interventions.engine import accelerators, kernels
from reattend.interventions.engine.accelerators import CUDNN, EFFICIENT, FLASH, LOWEST, MATH
from reattend.interventions.engine.kernels import OUTPUTS, STATISTICS, Attention, attend, chunk_values
from reattend.interventions.families import calibration
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

BATCH, HEADS, SHARED, DIM = 2, 8, 2, 16
NAMES = {"cudnn": CUDNN, "flash": FLASH, "efficient": EFFICIENT}


def written_out(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, is_causal: bool, scale: float):
    """(output, natural log-sum-exp [B, H, T]) in the query's dtype; grouped heads as they come."""
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1).float() for t in (key, value))
    scores = query.float() @ key.transpose(2, 3) * scale
    if bias is not None:
        scores = scores + bias.float()
    if is_causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), float("-inf"))
    return (scores.softmax(dim=-1) @ value).to(query.dtype), scores.logsumexp(dim=-1)


class Device(TorchDispatchMode):
    """Stands in for CUDA's attention kernels, with their layouts of the log-sum-exp, and notes what they were called with."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, dict]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::_scaled_dot_product_").removesuffix("_attention")
        if name not in NAMES:
            return func(*args, **(kwargs or {}))
        asked = {a.name: a.default_value for a in func._schema.arguments}
        asked |= dict(zip(asked, args)) | (kwargs or {})
        bias = asked.get("attn_bias")
        self.calls.append((name, asked))
        assert bias is None or bias.dtype == asked["query"].dtype
        output, lse = written_out(asked["query"], asked["key"], asked["value"], bias, asked["is_causal"], asked["scale"])
        if name == "cudnn":
            lse = lse[..., None]
        if name == "efficient":
            assert asked["key"].shape[1] == asked["query"].shape[1], "it takes no groups"
            assert bias is None or (
                bias.shape == (*asked["query"].shape[:3], asked["key"].shape[2]) and bias.stride(2) % 8 == 0
            )
            lse = torch.nn.functional.pad(lse, (0, -lse.shape[2] % 32), value=float("nan"))
        rest = [output.new_empty(0) if str(r.type) == "Tensor" else 0 for r in func._schema.returns[2:]]
        return (output, lse, *rest)


class Torch:
    """What torch says: `takes` by whether there is a mask and whether heads share key heads; the rest is the plain algorithm's."""

    def __init__(self) -> None:
        self.asked: list[tuple] = []
        self.takes = {}
        self.able = {FLASH, EFFICIENT}

    def choice(self, query, key, value, mask=None, dropout=0.0, is_causal=False, *, scale=None, enable_gqa=False) -> int:
        grouped = query.shape[1] != key.shape[1]
        assert enable_gqa == grouped
        self.asked.append((tuple(query.shape), tuple(key.shape), mask is not None))
        return self.takes.get((mask is not None, grouped), MATH)

    def can(self, kernel: int):
        def able(params) -> bool:
            grouped = params.query.shape[1] != params.key.shape[1]
            barred = params.attn_mask is not None if kernel == FLASH else grouped
            return kernel in self.able and not barred

        return able


@pytest.fixture
def hopper(monkeypatch) -> Iterator[tuple[Torch, Device]]:
    """A card that takes cuDNN for everything."""
    card, device = Torch(), Device()
    card.takes = {(mask, grouped): CUDNN for mask in (True, False) for grouped in (True, False)}
    monkeypatch.setattr(torch, "_fused_sdp_choice", card.choice)
    monkeypatch.setattr(torch.backends.cuda, "can_use_flash_attention", card.can(FLASH))
    monkeypatch.setattr(torch.backends.cuda, "can_use_efficient_attention", card.can(EFFICIENT))
    monkeypatch.setattr(accelerators, "_answers", {})
    with device:
        yield card, device


@pytest.fixture
def ampere(hopper) -> tuple[Torch, Device]:
    """A card that takes flash, beside a mask efficient attention, which knows no groups."""
    card, device = hopper
    card.takes = {(False, True): FLASH, (False, False): FLASH, (True, False): EFFICIENT}
    return card, device


def operands(
    rows: int, keys: int | None = None, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    sizes = ((HEADS, rows), (SHARED, keys or rows), (SHARED, keys or rows))
    return tuple(torch.randn(BATCH, heads, n, DIM, generator=g).to(dtype) for heads, n in sizes)  # type: ignore[return-value]


def statistics(query, key, value, mask=None, is_causal=False, sinks=None, piece=False):
    """What the table gives on CUDA, for tensors that are not there."""
    chosen = next(kernel for kernel in STATISTICS if kernel.name == "CUDA's own choice")
    return chosen.run(Attention(query, key, value, mask, is_causal, DIM**-0.5, None, sinks, piece))


def equal(found, query, key, value, mask=None, is_causal=False, sinks=None) -> None:
    wanted = kernels._in_chunks(Attention(query, key, value, mask, is_causal, DIM**-0.5, None, sinks))
    torch.testing.assert_close(found[0], wanted[0], atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(found[1], wanted[1].float(), atol=2e-2, rtol=2e-2)


def hidden(keys: int, dtype: torch.dtype = torch.bool) -> Tensor:
    """Padding of the first batch row, [B, 1, 1, Tk]."""
    seen = (torch.arange(keys) >= torch.tensor([[3], [0]]))[:, None, None]
    return seen if dtype == torch.bool else torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, float("-inf"))


@pytest.mark.parametrize("mask", [None, torch.bool, torch.bfloat16])
def test_the_answer_of_torch_is_called_with_its_own_heads(hopper, mask):
    _, device = hopper
    q, k, v = operands(20)
    mask = None if mask is None else hidden(20, mask)
    found = statistics(q, k, v, mask, is_causal=mask is None)
    equal(found, q, k, v, mask, mask is None)
    [(name, asked)] = device.calls
    assert name == "cudnn" and asked["compute_log_sumexp"] is True and asked["is_causal"] is (mask is None)
    assert asked["dropout_p"] == 0.0 and asked["query"] is q and asked["key"] is k and asked["value"] is v
    assert mask is None or float(asked["attn_bias"].min()) == torch.tensor(LOWEST).bfloat16()


def test_flash_takes_groups_and_a_width_that_is_no_multiple_of_eight(ampere):
    _, device = ampere
    q, k, v = (t[..., :12] for t in operands(20))
    found = statistics(q, k, v, is_causal=True)
    equal(found, q, k, v, None, True)
    [(name, asked)] = device.calls
    assert name == "flash" and [asked[n].shape for n in ("query", "key")] == [(BATCH, HEADS, 20, 16), (BATCH, SHARED, 20, 16)]
    assert found[0].shape == q.shape


@pytest.mark.parametrize("keys", [20, 24])
@pytest.mark.parametrize("whole", [True, False])
def test_efficient_attention_gets_repeated_heads(ampere, keys, whole):
    card, device = ampere
    q, k, v = operands(20, keys)
    mask = hidden(keys, torch.bfloat16)
    if whole:
        mask = mask.repeat(1, 1, 20, 1).masked_fill(~torch.ones(20, keys, dtype=torch.bool).tril(keys - 20 + 4), float("-inf"))
    equal(statistics(q, k, v, mask), q, k, v, mask)
    assert [name for name, _ in device.calls] == ["efficient"]
    # nothing was repeated to ask
    assert [(query[1], key[1]) for query, key, _ in card.asked] == [(HEADS, SHARED), (SHARED, SHARED)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_where_torch_takes_no_kernel_rows_are_materialised(hopper, dtype):
    card, device = hopper
    for answer in (MATH, 4, -1, 99):  # overrideable, error, and what is not known yet
        card.takes = dict.fromkeys(card.takes, answer)
        accelerators._answers.clear()
        q, k, v = operands(20, dtype=dtype)
        assert statistics(q, k, v, is_causal=True) is None
    assert not device.calls and STATISTICS[-1].fits(Attention(q, k, v, None, True, 1.0, None, None))


@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("mask", [False, True])
def test_few_rows_never_go_to_cudnn(hopper, rows, mask):
    card, device = hopper
    for able, wanted in (({FLASH, EFFICIENT}, "efficient" if mask else "flash"), ({EFFICIENT}, "efficient"), (set(), None)):
        card.able = able
        accelerators._answers.clear()
        device.calls.clear()
        q, k, v = operands(rows, 40)
        bias = hidden(40) if mask else None
        found = statistics(q, k, v, bias)
        if wanted is None:
            assert found is None and not device.calls
            continue
        equal(found, q, k, v, bias)
        [(name, asked)] = device.calls
        assert name == wanted
        if rows == 1:  # the heads of a group are rows of their key head
            assert asked["key"] is k and asked["query"].shape == (BATCH, SHARED, HEADS // SHARED, DIM)


def test_nor_do_pieces_whose_sizes_come_once(hopper):
    _, device = hopper
    q, k, v = operands(20, 40)
    equal(statistics(q, k, v, piece=True), q, k, v)
    assert [name for name, _ in device.calls] == ["flash"]


def test_a_gradient_is_asked_of_no_kernel_for_its_log_sum_exp_and_never_of_cudnn(hopper):
    card, device = hopper
    q, k, v = operands(20, dtype=torch.float32)
    q.requires_grad_()
    assert not kernels._gives_lse(Attention(q, k, v, None, True, 1.0, None, None))
    for rows in (20, 1):
        chosen = next(kernel for kernel in OUTPUTS if kernel.name == "CUDA's with a gradient")
        found = chosen.run(Attention(q[:, :, :rows], k, v, None, False, DIM**-0.5, None, None))
        assert found is not None and found[1] is None
        torch.testing.assert_close(found[0], attend(q[:, :, :rows], k, v)[0], atol=1e-5, rtol=1e-5)
    assert [name for name, _ in device.calls] == ["efficient"] * 2
    card.takes = dict.fromkeys(card.takes, FLASH)
    accelerators._answers.clear()
    assert chosen.run(Attention(q, k, v, None, False, 1.0, None, None)) is None  # torch's own SDPA then


def test_outputs_get_repeated_heads_where_groups_have_no_kernel(ampere, monkeypatch):
    """Beside a mask torch's own SDPA would fall back to whole matrices."""
    q, k, v = operands(20)
    assert not accelerators.choose(q, k, v, None, True, False, False).repeats
    assert accelerators.choose(q, k, v, hidden(20), False, False, False).repeats


def test_torch_is_asked_once_for_each_size_and_again_where_a_setting_changes(hopper, monkeypatch):
    card, _ = hopper

    def questions(*operands, **options) -> int:
        before = len(card.asked)
        statistics(*operands, **options)
        return len(card.asked) - before

    assert questions(*operands(20), is_causal=True) == 1
    assert questions(*operands(20, seed=1), is_causal=True) == 0
    assert questions(*operands(20), is_causal=False) == 1
    assert questions(*operands(20), hidden(20)) == 1
    assert questions(*operands(20), hidden(20).expand(-1, -1, 20, -1)) == 1
    assert questions(*operands(21), is_causal=True) == 1
    assert questions(*operands(20, dtype=torch.float16), is_causal=True) == 1
    assert questions(operands(20)[0].transpose(1, 2).contiguous().transpose(1, 2), *operands(20)[1:], is_causal=True) == 1
    for name in ("flash", "mem_efficient", "math", "cudnn"):
        monkeypatch.setattr(torch.backends.cuda, f"{name}_sdp_enabled", lambda: "changed")
        assert questions(*operands(20), is_causal=True) == 1
        assert questions(*operands(20), is_causal=True) == 0
    torch.use_deterministic_algorithms(True)
    try:
        assert questions(*operands(20), is_causal=True) == 1
    finally:
        torch.use_deterministic_algorithms(False)
    order = torch._C._get_sdp_priority_order()
    torch._C._set_sdp_priority_order(order[::-1])
    try:
        assert questions(*operands(20), is_causal=True) == 1
    finally:
        torch._C._set_sdp_priority_order(order)


def test_answers_do_not_pile_up(hopper, monkeypatch):
    monkeypatch.setattr(accelerators, "MOST_ANSWERS", 3)
    for rows in range(8, 16):
        statistics(*operands(rows))
    assert len(accelerators._answers) <= 3


def test_a_switch_of_the_users_is_honoured():
    """torch's own answer, on the device that is here."""
    q, k, v = operands(20, dtype=torch.float32)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert accelerators.choose(q, k, v, None, True, False, False).kernel == MATH
    assert accelerators.choose(q, k, v, None, True, False, False).kernel == FLASH


def test_inside_a_compiled_region_torch_is_not_asked(hopper, monkeypatch):
    card, _ = hopper
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert statistics(*operands(20)) is None and not card.asked


def test_kernels_are_called_by_their_names_in_the_dispatcher():
    """What is registered in their place is then what runs, as torch's `activate_flash_attention_impl` does it."""
    assert accelerators.aten is torch.ops.aten


def test_a_learned_sink_joins_by_the_log_sum_exp(hopper):
    q, k, v = operands(20)
    sinks = torch.linspace(-1, 2, HEADS)
    equal(statistics(q, k, v, is_causal=True, sinks=sinks), q, k, v, None, True, sinks)


class Card:
    """A device module as torch has one for each kind."""

    def __init__(self, memory: int) -> None:
        self.total_memory = memory

    def get_device_properties(self, device: torch.device) -> Card:
        return self


def test_chunks_follow_the_memory_of_the_device(monkeypatch):
    assert chunk_values(torch.device("cpu")) == 4 << 20
    kernels._values_of_memory.cache_clear()
    monkeypatch.setattr(torch, "get_device_module", lambda device: Card(80 << 30))
    assert chunk_values(torch.device("cuda", 0)) == 320 << 20  # 1.25 GiB of float32
    monkeypatch.setattr(torch, "get_device_module", lambda device: Card(8 << 30))
    assert chunk_values(torch.device("cuda", 0)) == 320 << 20  # known already
    assert chunk_values(torch.device("cuda", 1)) == 64 << 20
    monkeypatch.undo()
    kernels._values_of_memory.cache_clear()
    for kind in ("meta", "mps"):
        assert chunk_values(torch.device(kind)) == 64 << 20
    kernels._values_of_memory.cache_clear()


@pytest.mark.parametrize(("memory", "count"), [(141 << 30, 15), (80 << 30, 26), (24 << 30, 86)])
def test_the_weights_of_a_prompt_of_16k_are_read_in_tens_of_chunks(monkeypatch, memory, count):
    """32 heads on 8 key heads; on the meta device, where asking for a value would raise. A CPU reads them in 1,024 chunks."""
    x = Operands(*(torch.empty(1, h, 16384, 128, dtype=torch.bfloat16, device="meta") for h in (32, 8, 8)), None, True, 0)
    monkeypatch.setattr(kernels, "_values_of_memory", lambda device: max(kernels.LEAST_VALUES, memory // 256))
    monkeypatch.setattr(calibration, "untouched_heads", lambda call, heads: (x, x.query.new_empty(1, 32, 16384)))
    chunks = list(calibration.weight_chunks(Call(x.query, x.key, x.value, is_causal=True), range(32)))
    print(f"{memory >> 30} GiB: {len(chunks)} chunks of {chunks[0].weights.shape[2]} rows")
    assert len(chunks) == count and sum(chunk.weights.shape[2] for chunk in chunks) == 16384


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize("groups", [1, 4])
def test_cuda_kernels_give_the_numbers(dtype, dim, groups):
    for rows in (1, 3, 100, 257):
        g = torch.Generator().manual_seed(rows)
        sizes = ((8, rows), (8 // groups, 257), (8 // groups, 257))
        q, k, v = (torch.randn(2, heads, n, dim, generator=g).to(dtype).cuda() for heads, n in sizes)
        chunk = torch.ones(rows, 257, dtype=torch.bool, device="cuda").tril(257 - rows + 4)
        padding = hidden(257).cuda()
        bias = torch.linspace(-2, 2, 257, device="cuda").to(dtype) + hidden(257, dtype).cuda()
        for mask in (None, padding, padding & chunk, bias):
            output, lse = attend(q, k, v, mask, mask is None, need_lse=True)
            exact = mask if mask is None or mask.dtype == torch.bool else mask.double()
            call = Attention(q.double(), k.double(), v.double(), exact, mask is None, dim**-0.5, None, None)
            error = {torch.float32: 2e-3, torch.bfloat16: 3e-2, torch.float16: 5e-3}[dtype]
            for found, wanted in zip((output, lse), kernels._in_chunks(call)):
                torch.testing.assert_close(found.double(), wanted, atol=error, rtol=error)
