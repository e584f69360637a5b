"""diffusers' other attention backends under sessions: a backend that computes with its own numbers, and may give its log-sum-exp."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import reattend
import tiny_denoisers
import torch
import torch.nn.functional as F
from example import examples
from reattend.hooks import Edits, Plan, attach
from reattend.hooks.routes import dispatch
from reattend.interventions import Call, Gain, HeadGain, KeyBias, ReattendError, Site, Transfer, UnsupportedError
from torch import Tensor, nn

diffusers = pytest.importorskip("diffusers")
from diffusers.models import attention_dispatch  # noqa: E402

REGISTRY = attention_dispatch._AttentionBackendRegistry
FLASH = attention_dispatch.AttentionBackendName.FLASH
pytestmark = pytest.mark.filterwarnings("ignore:recipe 'test' never acted")
# denoisers whose processors call dispatch_attention_fn: joint with RoPE, self and cross, grouped heads and masks
MODELS = ["FluxTransformer2DModel", "WanTransformer3DModel", "QwenImageTransformer2DModel", "LTXVideoTransformer3DModel"]


class Kernel:
    """A flash backend that does not exist: attention in float64, so that its bits are its own. calls: the options of each call."""

    def __init__(self, lse: str | None) -> None:
        self.lse, self.calls, self.during = lse, [], lambda: None

    def run(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None, asked: bool) -> Any:
        self.calls.append(asked)
        self.during()
        q, k, v = (x.transpose(1, 2).double() for x in (query, key, value))
        if mask is not None and mask.dim() == 2:
            mask = mask[:, None, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2).to(query.dtype)
        if not asked:
            return out
        if self.lse == "refused":
            raise ValueError("no `return_lse=True`")
        scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
        assert mask is None
        lse = scores.logsumexp(-1).float()
        shaped = {"heads first": lse, "rows first": lse.transpose(1, 2), "cudnn's": lse[..., None], "base two": lse / 0.6931}
        return out, shaped[self.lse or ""]

    def function(self) -> Callable[..., Any]:
        if self.lse is None:

            def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
                return self.run(query, key, value, attn_mask, scale, False)
        else:

            def attention(
                query, key, value, attn_mask=None, is_causal=False, scale=None, window_size=(-1, -1), return_lse=False
            ):
                return self.run(query, key, value, attn_mask, scale, return_lse)

        return attention


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Kernel]:
    """Installed as diffusers' backend "flash"; what was there, and the process-wide choice, come back."""
    kernel = Kernel(getattr(request, "param", None))
    with monkeypatch.context() as patch:
        patch.setattr(REGISTRY, "_active_backend", REGISTRY._active_backend)
        patch.setattr(attention_dispatch, "_check_attention_backend_requirements", lambda backend: None)
        function = kernel.function()
        names = set(function.__code__.co_varnames[: function.__code__.co_argcount])
        for table, own in ((REGISTRY._backends, function), (REGISTRY._constraints, []), (REGISTRY._supported_arg_names, names)):
            patch.setitem(table, FLASH, own)
        yield kernel
    assert not [name for name in REGISTRY.list_backends() if name.startswith(dispatch.PREFIX)]
    assert not dispatch._loans and not dispatch._entries and not dispatch._seeing()


def build(name: str = MODELS[0], flash: bool = True) -> tuple[nn.Module, Callable[..., Tensor]]:
    model, inputs = tiny_denoisers.build(name)
    if flash:
        model.set_attention_backend("flash")  # type: ignore[operator]

    def run(of: nn.Module = model) -> Tensor:
        with torch.no_grad():
            output = of(**inputs)
        return output[0] if isinstance(output, tuple) else output.sample

    return model, run


def acting(model: nn.Module, edit: Callable[[Call], Any], **options: Any) -> Any:
    return attach(model, [Plan("test", [Edits(reattend.sites(model), edit)])], **options)


def backends(model: nn.Module) -> list[Any]:
    processors = [getattr(module, "processor", None) for module in model.modules()]
    return [vars(p).get("_attention_backend", "class") for p in processors if hasattr(p, "_attention_backend")]


def columns(call: Call) -> Tensor:
    chosen = torch.zeros(1, call.num_keys, dtype=torch.bool)
    chosen[:, 1:3] = True
    return chosen


def identity(call: Call) -> HeadGain:
    return HeadGain(factor=1.0)


EDITS: dict[str, Callable[[Call], Any]] = {
    "head gain": lambda call: HeadGain(factor=0.5, heads=[0]),
    "gain": lambda call: Gain(columns=columns(call), factor=0.2),
    "key bias": lambda call: KeyBias(bias=columns(call).float()),
    "transfer": lambda call: Transfer(source=columns(call), strength=0.7, heads=[1]),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_session_without_edits_is_the_users_backend_bit_for_bit(kernel: Kernel, name: str) -> None:
    model, run = build(name)
    before, calls, named = run(), len(kernel.calls), backends(model)
    with acting(model, identity):
        assert torch.equal(run(), before)
    assert len(kernel.calls) == 2 * calls and backends(model) == named
    assert torch.equal(run(), before)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("kernel", [None, "heads first"], indirect=True)
def test_edits_equal_those_on_the_native_backend(kernel: Kernel, name: str, edit: str) -> None:
    model, run = build(name)
    before = run()
    native, run_native = build(name, flash=False)
    native.set_attention_backend("native")  # type: ignore[operator]
    with acting(native, EDITS[edit]):
        wanted = run_native()
    model.set_attention_backend("flash")  # type: ignore[operator]
    with acting(model, EDITS[edit]) as session:
        found = run()
        assert session.applied == len(reattend.sites(model))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    assert not torch.equal(found, before) and torch.equal(run(), before)


@pytest.mark.parametrize("kernel", ["heads first", "rows first", "cudnn's", "base two", "refused"], indirect=True)
def test_a_log_sum_exp_is_used_where_it_is_one(kernel: Kernel) -> None:
    model, run = build()
    native, run_native = build(flash=False)
    native.set_attention_backend("native")  # type: ignore[operator]
    with acting(native, EDITS["gain"]):
        wanted = run_native()
    model.set_attention_backend("flash")  # type: ignore[operator]
    with acting(model, EDITS["gain"]):
        run()
        kernel.calls.clear()
        torch.testing.assert_close(run(), wanted, atol=1e-5, rtol=1e-4)
        served = kernel.lse not in ("base two", "refused")
        assert kernel.calls == ([True] * 4 if served else []), "one call of the user's kernel for each layer, or ours alone"


@pytest.mark.parametrize("kernel", ["heads first"], indirect=True)
def test_a_quantised_backend_gives_no_log_sum_exp(kernel: Kernel) -> None:
    assert dispatch.Backend("_sage_qk_int8_pv_fp16_cuda").with_lse({"query": torch.ones(1, 4, 2, 8)}) is None
    assert not kernel.calls


@pytest.mark.parametrize("kernel", ["heads first"], indirect=True)
def test_gradients_flow_through_edits(kernel: Kernel) -> None:
    model, inputs = tiny_denoisers.build(MODELS[0])
    model.set_attention_backend("flash")  # type: ignore[operator]
    inputs["hidden_states"].requires_grad_()
    with acting(model, EDITS["gain"]):
        model(**inputs).sample.sum().backward()
    assert inputs["hidden_states"].grad.abs().sum() > 0 and not any(kernel.calls)


def test_rows_of_the_batch_that_no_edit_names_keep_their_bits(kernel: Kernel) -> None:
    model, run = build()
    before = run()

    def first(call: Call) -> HeadGain:
        return HeadGain(factor=0.5, rows=torch.tensor([[True], [False]]).expand(2, call.num_queries))

    with acting(model, first):
        after = run()
    assert torch.equal(after[1], before[1]) and not torch.equal(after[0], before[0])


def test_heads_that_no_edit_names_keep_their_bits(kernel: Kernel) -> None:
    model, run = build()
    seen: dict[str, list[Tensor]] = {"plain": [], "edited": []}
    target = model.transformer_blocks[0].attn  # type: ignore[union-attr,index]
    into = "plain"
    handle = target.to_out[0].register_forward_pre_hook(lambda module, args: seen[into].append(args[0].clone()))
    run()
    into = "edited"
    with acting(model, EDITS["transfer"]):
        run()
    handle.remove()
    plain, edited = seen["plain"][0].unflatten(-1, (2, 8)), seen["edited"][0].unflatten(-1, (2, 8))
    assert torch.equal(plain[:, :, 0], edited[:, :, 0]) and not torch.equal(plain[:, :, 1], edited[:, :, 1])


METHODS = examples("diffusion")
FITTING = [(name, place) for name, (_, example) in METHODS.items() for place in MODELS if not example.refusal(place)]


@pytest.mark.matrix
@pytest.mark.parametrize(("method", "place"), FITTING, ids=[f"{name}-{place}" for name, place in FITTING])
@pytest.mark.parametrize("kernel", ["heads first"], indirect=True)
def test_every_method_for_pictures_is_as_on_the_native_backend(kernel: Kernel, method: str, place: str, tmp_path: Path) -> None:
    model, run = build(place, flash=False)
    slug, example = METHODS[method]
    given = example.on(model, tmp_path)
    with reattend.apply(model, slug, **given):
        wanted = run()
    model.set_attention_backend("flash")  # type: ignore[operator]
    before = run()
    with reattend.apply(model, slug, **given):
        found = run()
    scale = wanted.abs().max()
    torch.testing.assert_close(found / scale, wanted / scale, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found, before) and torch.equal(run(), before)


# -- the user's choices --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["context", "process", "model", "processor"])
def test_a_backend_that_is_chosen_inside_a_session(kernel: Kernel, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, run = build(flash=False)
    before = run()
    with acting(model, EDITS["gain"]):
        native = run()
        assert not kernel.calls
        if how == "context":
            with attention_dispatch.attention_backend("flash"):
                found = run()
        elif how == "process":
            monkeypatch.setattr(REGISTRY, "_active_backend", FLASH)
            found = run()
            monkeypatch.undo()
        elif how == "model":
            model.set_attention_backend("flash")  # type: ignore[operator]
            found = run()
            assert backends(model) == [FLASH] * 4
            model.set_attention_backend("native")  # type: ignore[operator]
        else:
            processors = [block.attn.processor for block in (*model.transformer_blocks, *model.single_transformer_blocks)]
            for processor in processors:
                processor._attention_backend = "flash"
            found = run()
            assert backends(model) == ["flash"] * 4
            for processor in processors:
                processor._attention_backend = None
        torch.testing.assert_close(found, native, atol=1e-5, rtol=1e-4)
        assert torch.equal(run(), native)
    assert torch.equal(run(), before)


def test_a_switch_in_mid_pass_stands(kernel: Kernel) -> None:
    model, run = build()
    kernel.during = lambda: model.set_attention_backend("native")  # type: ignore[operator]
    with acting(model, identity):
        run()
        assert len(kernel.calls) == 1 and all(b == "native" for b in backends(model))
    assert all(b == "native" for b in backends(model))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_in_the_backend_leaves_nothing(kernel: Kernel, error: type[BaseException]) -> None:
    model, run = build()
    before, named = run(), backends(model)

    def fail() -> None:
        raise error("in the middle")

    with acting(model, EDITS["head gain"]):
        wanted = run()
        kernel.during = fail
        with pytest.raises(error, match="in the middle"):
            run()
        kernel.during = lambda: None
        assert torch.equal(run(), wanted), "the session goes on"
        kernel.during = fail
        with pytest.raises(error, match="in the middle"):
            run()
        kernel.during = lambda: None
        if error is KeyboardInterrupt:
            assert torch.equal(run(copy.deepcopy(model)), before)
    assert backends(model) == named and torch.equal(run(), before)


def test_copies_and_files_made_in_mid_pass_name_the_users_backend(kernel: Kernel) -> None:
    model, run = build()
    made: list[Any] = []

    def during() -> None:
        processor = model.transformer_blocks[0].attn.processor  # type: ignore[union-attr,index]
        made.extend([copy.deepcopy(processor), pickle.loads(pickle.dumps(processor))])

    with acting(model, identity):
        kernel.during = during
        run()
        kernel.during = lambda: None
    assert [p._attention_backend for p in made] == [FLASH] * len(made) and len(made) == 8
    assert all(type(p._attention_backend) is type(FLASH) and p._attention_backend is FLASH for p in made)


# -- several at once -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_several_sessions_end_in_any_order(kernel: Kernel, order: tuple[int, int]) -> None:
    model, run = build()
    before = run()
    sessions = [acting(model, EDITS["gain"]), acting(model, EDITS["head gain"])]
    both = run()
    sessions[order[0]].remove()
    one = run()
    sessions[order[1]].remove()
    assert torch.equal(run(), before) and len({both.sum().item(), one.sum().item(), before.sum().item()}) == 3


def test_sessions_of_two_models(kernel: Kernel) -> None:
    (model, run), (other, run_other) = build(), build(MODELS[1])
    before = run(), run_other()
    with acting(model, EDITS["gain"]):
        edited = run()
        with acting(other, EDITS["gain"]):
            assert torch.equal(run(), edited) and not torch.equal(run_other(), before[1])
        assert torch.equal(run(), edited) and torch.equal(run_other(), before[1])
    assert torch.equal(run(), before[0])


def test_a_thread_without_the_session_shares_the_processor(kernel: Kernel) -> None:
    """Both threads are inside the same processor at once; only one runs under the isolated session."""
    model, run = build()
    before = run()
    found: dict[str, Tensor] = {}
    both = threading.Barrier(2, timeout=60)

    def meet() -> None:
        if getattr(here, "waits", False):
            here.waits = False
            both.wait()

    here = threading.local()

    def work(name: str, inside: bool) -> None:
        here.waits = True
        if inside:
            with acting(model, EDITS["head gain"], isolated=True):
                found[name] = run()
        else:
            found[name] = run()

    kernel.during = meet
    threads = [threading.Thread(target=work, args=("in", True)), threading.Thread(target=work, args=("out", False))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with acting(model, EDITS["head gain"]):
        wanted = run()
    assert torch.equal(found["out"], before) and torch.equal(found["in"], wanted) and torch.equal(run(), before)


def test_a_compiled_denoiser(kernel: Kernel) -> None:
    model, run = build()
    with acting(model, EDITS["gain"]):
        wanted = run()
    compiled = torch.compile(model, backend="eager")
    before = run(compiled)
    with pytest.warns(reattend.ReattendWarning, match="compiled"), acting(model, EDITS["gain"]):
        assert torch.equal(run(compiled), wanted)
    assert torch.equal(run(compiled), before)


# -- what is refused -----------------------------------------------------------------------------------------------------


def test_context_parallelism_is_refused(kernel: Kernel) -> None:
    model, run = build()
    attention = model.transformer_blocks[1].attn  # type: ignore[union-attr,index]
    with acting(model, identity):
        attention.processor._parallel_config = object()
        with pytest.raises(ReattendError, match="context parallelism was switched on inside a session"):
            run()
        with pytest.raises(UnsupportedError, match="transformer_blocks.1.attn.*context parallelism"):
            acting(model, identity)
        attention.processor._parallel_config = None
        run()


def test_processors_that_ask_for_their_backend_or_have_none_are_refused(kernel: Kernel) -> None:
    ace_step = pytest.importorskip("diffusers.models.transformers.ace_step_transformer", reason="not in this diffusers")
    from diffusers.models.transformers.transformer_cosmos import CosmosAttnProcessor2_0
    from reattend.hooks.sites.backends import problem_of
    from reattend.hooks.sites.source import source_of

    def problem(processor: Any) -> str | None:
        return problem_of(processor, source_of(type(processor).__call__).names)

    asks, has_none = ace_step.AceStepAttnProcessor2_0(), CosmosAttnProcessor2_0()
    assert problem(asks) is None and problem(has_none) is None
    with attention_dispatch.attention_backend("flash"):
        assert "makes its masks for the backend 'flash': call set_attention_backend('native')" in (problem(asks) or "")
        assert "its calls of 'flash' cannot be told apart: call set_attention_backend('native')" in (problem(has_none) or "")
    asks._attention_backend = "sage"
    assert "'sage'" in (problem(asks) or "")


def site_call(**arguments: Any) -> Call:
    site = Site("blocks.0", 0, "denoiser", "self", 2, 2, 4, False, "sdpa")
    given = {name: torch.randn(2, 5, 2, 4) for name in ("query", "key", "value")} | arguments
    return dispatch.call_of(dispatch.Backend("flash"), given, site)


def test_what_a_backend_is_given_is_read(kernel: Kernel) -> None:
    padding = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    assert torch.equal(site_call(attn_mask=padding).mask, padding[:, None, None])
    assert site_call(attn_mask=torch.zeros(5, 5)).mask.shape == (1, 1, 5, 5)
    seen = site_call(window_size=(1, 0)).mask
    assert torch.equal(seen[0, 0], torch.ones(5, 5, dtype=torch.bool).tril() & torch.ones(5, 5, dtype=torch.bool).triu(-1))
    assert torch.equal(site_call(window_size=(1, 0), attn_mask=padding).mask, padding[:, None, None] & seen)
    additive = site_call(window_size=(-1, 0), attn_mask=torch.ones(2, 1, 1, 5)).mask
    assert torch.equal(additive.isinf()[0, 0], torch.ones(5, 5, dtype=torch.bool).triu(1)) and additive[0, 0, 0, 0] == 1
    assert (
        site_call(softcap=30.0).softcap == 30.0 and site_call(softcap=0.0).softcap is None and site_call(scale=0.3).scale == 0.3
    )


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"attn_mask": object()}, "a mask of type object"),
        ({"is_causal": True, "key": torch.randn(2, 7, 2, 4)}, "causal attention of queries over other keys"),
        ({"learnable_sink": torch.ones(2)}, "the argument 'learnable_sink'"),
        ({"return_lse": True}, "the argument 'return_lse'"),
    ],
)
def test_what_cannot_be_read_is_refused(kernel: Kernel, arguments: dict[str, Any], what: str) -> None:
    with pytest.raises(ReattendError, match=f"blocks.0: attention backend 'flash' was given {what}.*set_attention_backend"):
        site_call(**arguments)
