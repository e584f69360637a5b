"""Triton's kernels equal the reference executor: in Triton's interpreter, or compiled where there is a GPU."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch
from reattend.interventions import Call, Edit, Gain, KeyBias, Lift, Mix, ScoreGain, TokenMap, Transfer, fused, reference
from reattend.interventions.engine import one_kernel, op, statistics
from reattend.interventions.engine.kernels import attend
from reattend.interventions.engine.tasks import FEW_ROWS, Group
from reattend.interventions.families.sinks import GiveBack, VisualSinks
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="needs Triton, which is there on Linux: pip install -e .[dev]")
from reattend.interventions.engine.triton import correction
from reattend.interventions.engine.triton import statistics as kernels_statistics

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.filterwarnings("ignore:overflow|invalid|divide:RuntimeWarning")  # numpy, of what the kernels mask

HALF = {torch.float32: 2e-5, torch.bfloat16: 4 * 2.0**-8, torch.float16: 4 * 2.0**-11}
# batch, heads, key heads, query rows, keys, head size; then what else the call has
SHAPES = {
    "prefill": ((1, 2, 2, 20, 20, 16), "causal"),
    "groups of three": ((1, 6, 2, 17, 17, 64), "causal"),
    "several blocks": ((1, 2, 1, 70, 70, 16), "causal"),
    "one row": ((2, 6, 2, 1, 40, 64), "padding"),
    "one row of one head each": ((2, 2, 2, 1, 35, 16), "padding"),
    "three rows": ((1, 4, 2, 3, 33, 16), "causal"),
    "chunk": ((1, 3, 1, 18, 50, 80), "causal"),
    "padding": ((2, 2, 1, 19, 19, 16), "padding"),
    "additive mask": ((1, 2, 1, 17, 35, 128), "additive"),
    "odd head": ((1, 2, 1, 18, 18, 5), "causal"),
    "soft cap": ((1, 2, 2, 17, 17, 16), "softcap"),
    "learned sinks": ((1, 4, 2, 17, 17, 16), "sinks"),
    "learned sinks, one row": ((1, 4, 2, 1, 17, 16), "sinks"),
}


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Every call runs the kernels, whichever device this machine has."""
    for module in (one_kernel, op, statistics):
        monkeypatch.setattr(module, "has_triton", lambda device: True)
    monkeypatch.setattr(one_kernel, "is_accelerator", lambda device: True)


def a_call(name: str, dtype: torch.dtype = torch.float32) -> Call:
    (batch, heads, shared, queries, keys, dim), kind = SHAPES[name]
    query, key, value = (torch.randn(batch, h, n, dim) for h, n in ((heads, queries), (shared, keys), (shared, keys)))
    mask = None
    causal = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    if kind == "padding":
        pads = torch.tensor([0, keys // 3])[:batch]
        mask = ((torch.arange(keys)[None] >= pads[:, None])[:, None] & causal)[:, None]
    elif kind == "additive":
        mask = torch.randn(batch, heads, queries, keys).masked_fill(~causal, torch.finfo(dtype).min).to(dtype).to(DEVICE)
    return Call(
        *((x * size).to(dtype).to(DEVICE) for x, size in ((query, 2.0), (key, 1.0), (value, 1.0))),
        mask=None if mask is None else mask.to(DEVICE),
        is_causal=mask is None,
        softcap=3.0 if kind == "softcap" else None,
        sinks=torch.randn(heads, device=DEVICE) if kind == "sinks" else None,
    )


def known(call: Call, edits: dict[str, Edit]) -> dict[str, Edit]:
    """Without key biases of all rows where rows are few: these take them as an additive row."""
    few = call.num_queries <= FEW_ROWS
    return {name: edit for name, edit in edits.items() if not few or not isinstance(edit, KeyBias) or edit.rows is not None}


def edits_of(call: Call) -> dict[str, Edit]:
    b, h, t, n = call.batch, call.num_heads, call.num_queries, call.num_keys
    columns = torch.zeros(b, h, n, dtype=torch.bool)
    columns[..., 0] = True
    columns[..., 5] = torch.rand(b, h) > 0.5
    columns, late = columns.to(DEVICE), (torch.arange(n) > n // 2).to(DEVICE)
    each, rows = torch.rand(b, h, t, device=DEVICE), (torch.rand(b, t) > 0.5).to(DEVICE)
    every: dict[str, Edit] = {
        "gain": Gain(columns=columns, factor=0.3),
        "gain to nothing": Gain(columns=[0, 3], factor=0.0),
        "gain of each row": Gain(columns=columns, factor=each * 4, rows=rows),
        "gain alone": Gain(columns=columns, factor=0.4, renormalise=None),
        "gain below zero": Gain(columns=columns, factor=-each, renormalise=None),
        "gain over a set": Gain(columns=columns, factor=2 * each, renormalise=late),
        "gain over a set with it": Gain(columns=columns, factor=0.2, renormalise=[0, 5, 7]),
        "gain over the others": Gain(columns=late, factor=0.2, renormalise=~late, rows=rows),
        "lift": Lift(columns=columns, share=0.3),
        "exact lift": Lift(columns=late, share=0.8 * each, exact=True, least=0.05, largest=20.0),
        "transfer": Transfer(source=columns, strength=0.8 * each),
        "transfer of all": Transfer(source=columns, rows=rows),
        "transfer to a set": Transfer(source=columns, target=late, strength=0.7),
        "transfer to a set by row": Transfer(source=late, target=columns, strength=each),
        "mix with itself": Mix(target="identity", strength=each, rows=rows),
        "score gain": ScoreGain(factor=torch.where(columns, 0.7, 0.2), rows=rows),
        "give back": GiveBack(found=visual_sinks(b, n), key_start=0, move=0.4, rho=0.5, summ=0.1, rows=rows),
        "bias of some rows": KeyBias(bias=torch.where(columns, 1.5, 0.0), rows=rows),
        "bias": KeyBias(bias=torch.where(late, 1.5, 0.0)),
        "bias that hides": KeyBias(bias=torch.where(columns, -1e4, 0.0)),
        "bias that hides all others": KeyBias(bias=torch.where(columns, 300.0, 0.0)),
    }
    return known(call, every)


def visual_sinks(batch: int, keys: int) -> VisualSinks:
    """An image of the columns 2 to 9, two sinks on it and one before it."""
    image = torch.zeros(batch, keys, dtype=torch.bool)
    image[:, 2:10] = True
    sinks = torch.zeros_like(image)
    sinks[:, [0, 4, 7]] = True
    if batch > 1:
        sinks[1, 7] = False
    roles = {"image": image.to(DEVICE), "bos": (torch.arange(keys) == 0).expand(batch, -1).to(DEVICE)}
    return VisualSinks(sinks.to(DEVICE), TokenMap(batch, keys, keys, roles))


def exactly(call: Call, edits: list[Edit]) -> Tensor:
    wide = [x.double().cpu() for x in (call.query, call.key, call.value)]
    mask = None if call.mask is None else call.mask.cpu() if call.mask.dtype == torch.bool else call.mask.double().cpu()
    sinks = None if call.sinks is None else call.sinks.double().cpu()
    own = dataclasses.replace(call, query=wide[0], key=wide[1], value=wide[2], mask=mask, sinks=sinks)
    return reference(own, [on_cpu(edit) for edit in edits])


def on_cpu(edit: Edit) -> Edit:
    moved = {f.name: getattr(edit, f.name) for f in dataclasses.fields(edit)}
    found = {"found": visual_sinks(*moved["found"].sinks.shape)} if "found" in moved else {}
    return dataclasses.replace(edit, **found, **{name: x.cpu() for name, x in moved.items() if isinstance(x, Tensor)})


def seen(call: Call) -> Tensor:
    """Rows that see a key: nobody knows what the others give."""
    if call.mask is None:
        return torch.ones(1, 1, 1, 1, dtype=torch.bool)
    visible = call.mask if call.mask.dtype == torch.bool else call.mask > torch.finfo(call.mask.dtype).min / 2
    return visible.any(dim=3, keepdim=True).cpu()


def edited(call: Call, edits: list[Edit]) -> Tensor:
    """By the kernel; at decode the table has an additive row for some of them before."""
    group = Group(call, list(range(call.num_heads)), edits)
    assert one_kernel.is_known(group)
    return group.finish(one_kernel.run(group, one_kernel.restate(group)))


def check(call: Call, edits: list[Edit], name: str = "") -> Tensor:
    found = edited(call, edits)
    wanted = exactly(call, edits)
    error = ((found.double().cpu() - wanted).abs() * seen(call)).max()
    assert error <= HALF[call.query.dtype] * max(1.0, float(wanted.abs().max())), f"{name}: {error}"
    assert found.isfinite().all()
    return found


@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_edits_equal_the_reference(shape, part):
    """Every edit in every shape, each of them in one of the dtypes."""
    torch.manual_seed(part)
    dtype = list(HALF)[part]
    call = a_call(shape, dtype)
    for place, (name, edit) in enumerate(edits_of(call).items()):
        if (place + list(SHAPES).index(shape)) % 4 == part:  # the slow test has the fourth quarter too
            check(call, [edit], name)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_edit_in_every_dtype(shape, dtype):
    torch.manual_seed(3)
    call = a_call(shape, dtype)
    for name, edit in edits_of(call).items():
        check(call, [edit], name)


@pytest.mark.parametrize("shape", ["prefill", "one row", "learned sinks"])
def test_edits_come_after_key_biases(shape):
    torch.manual_seed(0)
    call = a_call(shape)
    bias = KeyBias(bias=torch.randn(call.num_keys, device=DEVICE))
    for name in ("gain", "transfer", "lift", "transfer to a set"):
        check(call, [bias, edits_of(call)[name]], name)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("queries", [1, 20])
def test_a_column_that_holds_the_whole_row(queries, dtype):
    """What is left beside a sink of 0.99 and more cannot be told from the kernel's output: its rounding would be 100 times larger."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, h, n, 16) for h, n in ((4, queries), (2, 20), (2, 20)))
    key[:, :, 2] = 3.0
    query = query.abs() / 2 + 0.5
    call = Call(*(x.to(dtype).to(DEVICE) for x in (query, key, value)), is_causal=True)
    weights = (call.query[:, :1].double() * call.scaling) @ call.key[:, :1].double().transpose(2, 3)
    held = weights.softmax(dim=3)[..., 2].max()
    assert held > 0.99
    edits = {
        "transfer": Transfer(source=[2]),
        "half": Transfer(source=[2], strength=0.5),
        "gain": Gain(columns=[2], factor=0.0),
        "lift": Lift(columns=[5], share=0.9),
        "bias": KeyBias(bias=torch.where(torch.arange(20) == 2, -9.0, 0.0).to(DEVICE)),
    }
    for name, edit in known(call, edits).items():
        check(call, [edit], name)


@pytest.mark.parametrize("dtype", HALF)
def test_a_score_gain_that_outweighs_all_else(dtype):
    """Rows whose columns grow by more than half precision holds are computed anew, under their gain."""
    torch.manual_seed(0)
    for shape in ("prefill", "one row"):
        call = a_call(shape, dtype)
        call = dataclasses.replace(call, query=3 * call.query)
        check(call, [ScoreGain(factor=torch.where(torch.arange(call.num_keys) % 3 == 0, 2.0, 0.0).to(DEVICE))])


@pytest.mark.parametrize("shape", ["prefill", "one row"])
def test_sets_with_nothing_and_with_all(shape):
    torch.manual_seed(0)
    call = a_call(shape)
    plain = exactly(call, [])
    every = torch.ones(call.num_keys, dtype=torch.bool, device=DEVICE)
    edits = {
        "transfer of all": Transfer(source=every),
        "transfer of nothing": Transfer(source=~every),
        "transfer to nothing": Transfer(source=[0], target=~every),
        "gain of all": Gain(columns=every, factor=0.3),
        "gain of nothing": Gain(columns=~every, factor=0.3),
        "gain of all to nothing": Gain(columns=every, factor=0.0, renormalise=None),
        "lift of nothing": Lift(columns=~every, share=0.5),
        "bias of nothing": KeyBias(bias=torch.zeros(call.num_keys, device=DEVICE)),
        "bias of all": KeyBias(bias=torch.full((call.num_keys,), 3.0, device=DEVICE)),
    }
    for name, edit in known(call, edits).items():
        torch.testing.assert_close(check(call, [edit], name).double().cpu(), plain, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("shape", ["prefill", "one row", "three rows"])
def test_rows_that_stay_keep_their_bits(shape):
    """Rows that are not named, rows of strength 0, and rows that see nothing."""
    torch.manual_seed(0)
    call = a_call(shape, torch.bfloat16)
    before = attend(call.query, call.key, call.value, call.mask, call.is_causal, need_lse=True)[0]
    named = (torch.arange(call.num_queries) % 2 == 1)[None].to(DEVICE)
    each = named.to(torch.float32)
    for edit in (
        Transfer(source=[0], rows=named),
        Transfer(source=[0], strength=each),
        Gain(columns=[0], factor=1 - each),
        Gain(columns=[0], factor=1 - each, renormalise=[1, 2]),
        Lift(columns=[0], share=0.9 * each),
        Mix(target="identity", strength=each),
        KeyBias(bias=torch.ones(call.num_keys, device=DEVICE).cumsum(0), rows=named),
    ):
        found = check(call, [edit])
        assert torch.equal(found[:, :, ~named[0]], before[:, :, ~named[0]])


def test_rows_that_see_nothing_stay_finite():
    call = a_call("padding")
    assert not seen(call).all()
    for name, edit in edits_of(call).items():
        check(call, [edit], name)


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("additive", [True, False])
def test_rows_that_do_not_see_themselves_are_mixed_all_the_same(additive, kernel, monkeypatch):
    monkeypatch.setattr(op, "has_triton", lambda device: kernel)
    monkeypatch.setattr(one_kernel, "has_triton", lambda device: True)
    call = a_call("prefill")
    rows = call.num_queries
    mask = (torch.eye(rows, dtype=torch.bool).logical_not() | (torch.arange(rows) < 1)[:, None])[None, None].to(DEVICE)
    mask = torch.zeros(mask.shape, device=DEVICE).masked_fill(~mask, float("-inf")) if additive else mask
    check(Call(call.query, call.key, call.value, mask), [Mix(target="identity", strength=0.6)])


@pytest.mark.parametrize("queries", [1, 18])
def test_rows_of_a_batch_equal_each_alone(queries):
    torch.manual_seed(0)
    query, key, value = (torch.randn(3, h, n, 16, device=DEVICE) for h, n in ((4, queries), (2, 18), (2, 18)))
    columns = (torch.rand(3, 4, 18) > 0.7).to(DEVICE)
    together = edited(Call(query, key, value, is_causal=True), [Transfer(source=columns, strength=0.9)])
    for i in range(3):
        own = Call(query[i : i + 1], key[i : i + 1], value[i : i + 1], is_causal=True)
        torch.testing.assert_close(together[i : i + 1], edited(own, [Transfer(source=columns[i : i + 1], strength=0.9)]))


@pytest.mark.parametrize("queries", [1, 20])
def test_slices_of_a_static_cache_and_heads_inside_tokens(queries):
    torch.manual_seed(0)
    key, value = (torch.randn(2, 2, 64, 16, device=DEVICE)[:, :, :20] for _ in range(2))
    query = torch.randn(2, queries, 4, 16, device=DEVICE).transpose(1, 2)
    call = Call(query, key, value, is_causal=True)
    for name in ("gain", "gain over a set", "exact lift", "transfer of all", "mix with itself", "bias that hides"):
        if name in (edits := edits_of(call)):
            check(call, [edits[name]], name)


def test_values_of_another_size():
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, h, n, d, device=DEVICE) for h, n, d in ((2, 17, 16), (1, 17, 16), (1, 17, 40)))
    call = Call(query, key, value, is_causal=True)
    for name in ("gain", "transfer to a set", "mix with itself"):
        check(call, [edits_of(call)[name]], name)


@pytest.mark.parametrize("kernel", [True, False])
def test_the_op_attends_by_itself(kernel, monkeypatch):
    """Without an output it computes the call's own, as compiled graphs want it; without a kernel the tensor code gives the same."""
    monkeypatch.setattr(op, "has_triton", lambda device: kernel)
    torch.manual_seed(0)
    for shape in ("prefill", "one row"):
        call = a_call(shape)
        for name in (
            "gain",
            "exact lift",
            "transfer to a set",
            "gain over a set with it",
            "mix with itself",
            "score gain",
            "give back",
        ):
            edit = edits_of(call)[name]
            found = one_kernel.restated(edit, call.num_keys, call.key.shape[1], call.query.device)
            given = op.columns(
                call.query, call.key, call.value, None, None, call.mask, call.is_causal, call.scaling, None, None, None, *numbers(found),
                call.num_keys - call.num_queries,
            )  # fmt: skip
            torch.testing.assert_close(given.double().cpu(), exactly(call, [edit]), atol=2e-5, rtol=2e-5)


def numbers(found) -> tuple:
    return (
        found.marks, found.index, found.count, found.amounts, found.rows, found.kind, found.rest, found.number, found.second, found.third
    )  # fmt: skip


def test_ops_are_what_torch_asks_of_ops():
    torch.manual_seed(0)
    call = a_call("prefill")
    for name in ("transfer", "bias"):
        found = one_kernel.restated(edits_of(call)[name], call.num_keys, call.key.shape[1], call.query.device)
        arguments = (
            call.query,
            call.key,
            call.value,
            None,
            None,
            call.mask,
            True,
            call.scaling,
            None,
            None,
            None,
            *numbers(found),
            0,
        )
        torch.library.opcheck(torch.ops.reattend.columns.default, arguments)
    lse = attend(call.query, call.key, call.value, is_causal=True, need_lse=True)[1]
    torch.library.opcheck(
        torch.ops.reattend.column_statistics.default, (call.query, call.key, lse, None, True, call.scaling, None, None)
    )


class Counted(TorchDispatchMode):
    """Counts operations; views are none."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        first = out[0] if isinstance(out, tuple) else out
        if not (isinstance(first, Tensor) and first._is_view()):
            self.names.append(str(func))
        return out


@pytest.mark.parametrize("queries", [1, 20])
def test_nothing_is_asked_of_the_device_and_an_edit_is_one_operation(queries):
    """The table takes the kernel, at decode for what is no additive row, and asks nothing.

    Tensors on the meta device have no values: whoever asks for one fails.
    """
    query, key, value = (
        torch.empty(2, h, n, 16, device="meta", dtype=torch.bfloat16) for h, n in ((4, queries), (2, 20), (2, 20))
    )
    columns = torch.zeros(2, 4, 20, dtype=torch.bool, device="meta")
    edits = [
        Gain(columns=columns, factor=0.5, renormalise=~columns),
        Lift(columns=columns, share=0.3),
        Transfer(source=columns, target=~columns),
    ]
    if queries > FEW_ROWS:
        edits += [
            Gain(columns=columns, factor=0.5),
            Transfer(source=columns, strength=torch.rand(queries).to("meta")),
            Mix(target="identity", strength=0.3),
            KeyBias(bias=torch.zeros(2, 20, device="meta")),
        ]
    for edit in edits:
        counts = []
        for _ in range(2):
            call = Call(query, key, value, is_causal=True, ways=Counter(), original=lambda: torch.empty_like(query))
            known = attend(query, key, value, is_causal=True, need_lse=True)
            call.attended[0, 1, 2, 3] = (known[0], known[1])  # type: ignore[assignment]
            with Counted() as counted:
                assert fused(call, [edit]).shape == query.shape
            assert list(call.ways or ()) == ["columns in one kernel"]
            counts.append(counted.names)
        # what the columns are is found once for each edit, whatever layers share it
        own = [name for name in counts[1] if "empty" not in name]
        assert own == ["reattend.columns.default"]


@pytest.mark.parametrize("shape", SHAPES)
def test_column_statistics(shape):
    torch.manual_seed(0)
    dtype = list(HALF)[list(SHAPES).index(shape) % 3]
    call = a_call(shape, dtype)
    rows = (torch.rand(call.batch, call.num_queries) > 0.3).to(DEVICE) if "padding" in shape or "chunk" in shape else None
    lse = attend(call.query, call.key, call.value, call.mask, call.is_causal, None, call.softcap, call.sinks, True)[1]
    arguments = (call.query, call.key, lse, call.mask, call.is_causal, call.scaling, call.softcap, rows)
    found = op_statistics(*arguments)
    statistics.has_triton = lambda device: False  # the fixture takes it back
    wanted = op_statistics(*arguments)
    torch.testing.assert_close(found[0], wanted[0], atol=1e-5, rtol=1e-4)
    assert torch.equal(found[1], wanted[1])


op_statistics = torch.ops.reattend.column_statistics


def test_only_kernels_are_interpreted():
    interpreted = DEVICE == "cpu"
    assert correction.INTERPRETED == kernels_statistics.INTERPRETED == interpreted
