"""Sessions inside the graphs of torch.compile: one graph a decode step, one compilation a plan, and what is done without a compiler."""

from __future__ import annotations

import logging
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import reattend
import torch
from reattend.hooks import Edits, Plan, attach, sites
from reattend.hooks.trackers.caches import cache_name
from reattend.interventions import Gain, HeadGain, ReattendError, ReattendWarning
from tiny_llama import IDS, drop_first, halve, registered, session_of, tiny_llama
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import (
    CompileConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)

Step = Callable[..., Any]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    logging.disable(logging.DEBUG)  # what torch writes of each guard takes longer than all else
    with torch.no_grad():
        yield
    logging.disable(logging.NOTSET)
    torch._dynamo.reset()


class Graphs:
    """A backend that keeps the graphs it is given, by the operations that stand for attention in them."""

    def __init__(self) -> None:
        self.all: list[list[str]] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        names = [str(getattr(node.target, "__name__", node.target)) for node in graph.graph.nodes if node.op == "call_function"]
        self.all.append([name for name in names if name.startswith(("scaled_dot", "any"))])
        return graph.forward

    def new(self) -> list[list[str]]:
        """Those made since this was asked last, and no break of a graph among them."""
        assert not counters["graph_break"], counters["graph_break"]
        made, self.all = self.all, []
        return made


EDITED, PLAIN = "any", "scaled_dot_product_attention"


# torch before 2.13 or so makes graphs for each static cache, of the untouched model too: a thread's steps of a model share one there
_caches = threading.local()


def static_cache(model: Any) -> StaticCache:
    cache = StaticCache(config=model.config, max_cache_len=32)
    if not hasattr(torch._dynamo.variables, "UserDefinedConstantVariable"):
        cache = vars(_caches).setdefault("of", weakref.WeakKeyDictionary()).setdefault(model, cache)
        cache.reset()
    return cache


def decode(model: Any, step: Step | None = None, count: int = 3) -> Tensor:
    """Logits of a prompt and of some steps after it, in a static cache."""
    cache = static_cache(model)
    out = model(IDS, **{cache_name(model): cache}).logits[:, -1:]
    found = [out]
    for _ in range(count):
        out = (model if step is None else step)(out.argmax(-1), **{cache_name(model): cache}).logits
        found.append(out)
    return torch.stack(found)


def at(model: Any, *layers: int) -> Any:
    return attach(model, [Plan("some", [Edits(sites(model).where(lambda site: site.layer in layers), halve)])])


def one_layer() -> Any:
    config = tiny_llama().config
    config.num_hidden_layers = 1
    return tiny_llama(config)


# -- ways to compile ---------------------------------------------------------------------------------------------------


def wrapped(model: Any, backend: Any) -> Step:
    return torch.compile(model, backend=backend)  # type: ignore[no-any-return]


def call(model: Any, backend: Any) -> Step:
    return torch.compile(model.__call__, backend=backend)  # type: ignore[no-any-return]


def method(model: Any, backend: Any) -> Step:
    model.compile(backend=backend)
    return model  # type: ignore[no-any-return]


def forward(model: Any, backend: Any) -> Step:
    model.forward = torch.compile(model.forward, backend=backend)
    return model  # type: ignore[no-any-return]


def full(model: Any, backend: Any) -> Step:
    model.forward = torch.compile(model.forward, backend=backend, fullgraph=True)
    return model  # type: ignore[no-any-return]


def inner(model: Any, backend: Any) -> Step:
    model.model.forward = torch.compile(model.model.forward, backend=backend)
    return model  # type: ignore[no-any-return]


SLOW = [pytest.param(way, marks=pytest.mark.slow) for way in (wrapped, method, inner)]


@pytest.mark.parametrize("way", [call, full, *SLOW])
def test_one_graph_a_step_one_compilation_a_plan(way: Any) -> None:
    model, graphs = tiny_llama(), Graphs()
    plain = decode(model)
    with session_of(model) as session:
        wanted, applied = decode(model), session.applied
    step = way(model, graphs)
    prompts = 0 if way in (wrapped, call) else 1  # the others compile the prompt's pass too
    torch.testing.assert_close(decode(model, step), plain)
    assert graphs.new() == [[PLAIN] * 3] * (1 + prompts)
    with session_of(model) as session:
        torch.testing.assert_close(decode(model, step), wanted, atol=1e-4, rtol=0)
        assert graphs.new() == [[EDITED] * 3] * (1 + prompts) and session.applied == applied
        decode(model, step)
        assert graphs.new() == []
    torch.testing.assert_close(decode(model, step), plain)
    with session_of(model, drop_first) as session:
        decode(model, step)
        assert session.applied == applied
    with session_of(model):
        torch.testing.assert_close(decode(model, step), wanted, atol=1e-4, rtol=0)
    assert graphs.new() == [], "the code of a plan and of the model without one is found again"


@pytest.mark.parametrize("way", [wrapped, forward])
def test_compiled_inside_a_session(way: Any) -> None:
    model, graphs = tiny_llama(), Graphs()
    plain = decode(model)
    with session_of(model) as session:
        wanted, applied = decode(model), session.applied
        step = way(model, graphs)
        torch.testing.assert_close(decode(model, step), wanted, atol=1e-4, rtol=0)
        assert session.applied == 2 * applied and all(graph == [EDITED] * 3 for graph in graphs.new())
    torch.testing.assert_close(decode(model, step), plain)
    assert all(graph == [PLAIN] * 3 for graph in graphs.new())


def generated(model: Any, config: CompileConfig | None) -> Tensor:
    if config is not None:
        config._compile_all_devices = True
    out = model.generate(
        IDS, max_new_tokens=6, min_new_tokens=6, do_sample=False, cache_implementation="static", output_logits=True,
        return_dict_in_generate=True, disable_compile=config is None, compile_config=config,
    )  # fmt: skip
    return torch.stack(out.logits)


@pytest.mark.parametrize(
    "backend",
    ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow), pytest.param("reduce-overhead", marks=pytest.mark.slow)],
)
def test_generate_with_its_own_compilation(backend: str) -> None:
    model = tiny_llama()
    config = CompileConfig(backend="inductor") if backend == "reduce-overhead" else CompileConfig(backend=backend, mode=None)
    plain = generated(model, None)
    with session_of(model, drop_first) as session:
        wanted, applied = generated(model, None), session.applied
    untouched = generated(model, config)
    torch.testing.assert_close(untouched, plain, atol=1e-4, rtol=0)
    assert counters["stats"]["unique_graphs"] == 1
    with session_of(model, drop_first) as session, warnings.catch_warnings():
        warnings.simplefilter("error", ReattendWarning)
        for times in (1, 2):
            torch.testing.assert_close(generated(model, config), wanted, atol=1e-4, rtol=0)
            assert session.applied == times * applied
        assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
    assert torch.equal(generated(model, config), untouched), "the untouched model's own compiled code"
    assert counters["stats"]["unique_graphs"] == 2


def test_layers_without_edits_stay_traced() -> None:
    model, graphs = tiny_llama(), Graphs()
    with at(model, 1):
        wanted = decode(model)
        torch.testing.assert_close(decode(model, call(model, graphs)), wanted, atol=1e-4, rtol=0)
    assert graphs.new() == [[PLAIN, EDITED, PLAIN]]


def softcapped() -> Any:
    config = Gemma2Config(**SMALL, query_pre_attn_scalar=16, attn_logit_softcapping=2.0)
    return Gemma2ForCausalLM(config), {"input_ids": IDS}


def with_sinks() -> Any:
    return GptOssForCausalLM(GptOssConfig(**SMALL, num_local_experts=2, num_experts_per_tok=1)), {"input_ids": IDS}


def with_position_bias() -> Any:
    config = T5Config(vocab_size=64, d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config), {"input_ids": IDS, "decoder_input_ids": IDS[:, :5]}


SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 63,
}  # fmt: skip


@pytest.mark.parametrize("build", [softcapped, with_sinks, with_position_bias])
def test_what_a_family_gives_attention_besides_comes_along(build: Any) -> None:
    torch.manual_seed(0)
    model, inputs = build()
    model.eval().set_attn_implementation("eager" if build is not with_position_bias else "sdpa")
    graphs = Graphs()
    step = torch.compile(model, backend=graphs)
    with session_of(model, drop_first if build is not with_position_bias else halve) as session:
        wanted, applied = model(**inputs).logits, session.applied
        torch.testing.assert_close(step(**inputs).logits, wanted, atol=1e-4, rtol=0)
        assert session.applied == 2 * applied
    assert graphs.new() == [[EDITED] * applied]


def test_under_autocast_and_in_inference_mode() -> None:
    model = one_layer()
    step = torch.compile(model, backend="aot_eager")
    with session_of(model), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        wanted, found = model(IDS).logits, step(IDS).logits
    assert found.dtype == wanted.dtype
    torch.testing.assert_close(found, wanted, atol=2e-2, rtol=0)


@pytest.mark.filterwarnings("ignore:recipe 'test' never acted")  # older torch begins a pass of the model for it
def test_no_exported_program_holds_a_session() -> None:
    model = one_layer()
    with session_of(model, drop_first), pytest.raises(torch._dynamo.exc.Unsupported):
        torch.export.export(model, (IDS,), strict=True)


def test_a_change_of_plan_is_seen_and_an_earlier_one_found_again() -> None:
    model, graphs = tiny_llama(), Graphs()
    step = call(model, graphs)
    first, second = at(model, 0), at(model, 2)
    both = decode(model)
    torch.testing.assert_close(decode(model, step), both, atol=1e-4, rtol=0)
    assert graphs.new() == [[EDITED, PLAIN, EDITED]]
    first.remove()
    alone = decode(model)
    assert not torch.allclose(alone, both)
    torch.testing.assert_close(decode(model, step), alone, atol=1e-4, rtol=0)
    assert graphs.new() == [[PLAIN, PLAIN, EDITED]]
    first = at(model, 0)
    torch.testing.assert_close(decode(model, step), decode(model), atol=1e-4, rtol=0)
    second.remove()
    torch.testing.assert_close(decode(model, step), decode(model), atol=1e-4, rtol=0)
    assert graphs.new() == [[EDITED, PLAIN, PLAIN]]
    first.remove()
    assert not [name for name in registered() if "reattend" in name]


def test_changes_of_plan_where_graphs_end_at_attention() -> None:
    """Our function is a frame of its own there, to which a number that changes is a size that varies: none of ours is one."""
    model = tiny_llama()
    model.set_attn_implementation("eager")
    step = torch.compile(model, backend="eager")
    with torch._dynamo.config.patch(recompile_limit=64):
        for layers in ((0,), (1,), (0, 2), (2,), (0,), (0, 1, 2)):
            with at(model, *layers) as session:
                wanted, applied = model(IDS, output_attentions=True), session.applied
                found = step(IDS, output_attentions=True)
                assert session.applied == 2 * applied
            torch.testing.assert_close(found.logits, wanted.logits, atol=1e-4, rtol=0)
            torch.testing.assert_close(found.attentions, wanted.attentions, atol=1e-4, rtol=0)
    torch.testing.assert_close(step(IDS).logits, model(IDS).logits, atol=1e-4, rtol=0)


def test_a_name_that_the_user_has_kept_is_that_of_the_plan_at_work() -> None:
    model = tiny_llama()
    with at(model, 0):
        old = model.config._attn_implementation
        with at(model, 2):
            name = model.config._attn_implementation
            for kept in (old, str(old)):
                model.config._attn_implementation = kept
                decode(model)
                assert model.config._attn_implementation == name != old
    assert model.config._attn_implementation == "sdpa"


def test_the_state_of_a_plan_is_no_part_of_the_graph() -> None:
    """One graph for edits that come and go, for other ones, and for none."""
    model, graphs, now = tiny_llama(), Graphs(), [halve]
    step = call(model, graphs)
    with session_of(model, lambda call: now[0](call)):
        for do in (halve, drop_first, lambda call: None, lambda call: Gain(columns=[2], factor=0.5)):
            now[0] = do
            torch.testing.assert_close(decode(model, step), decode(model), atol=1e-4, rtol=0)
    assert graphs.new() == [[EDITED] * 3]


def test_isolated_sessions_of_threads_on_one_compiled_model() -> None:
    model, graphs = tiny_llama(), Graphs()
    step = call(model, graphs)
    plain = decode(model)
    wanted: dict[str, Tensor] = {}
    found: dict[str, Tensor] = {}
    for name, do in (("halve", halve), ("drop", drop_first)):
        with session_of(model, do):
            wanted[name] = decode(model)
    began, leave = threading.Barrier(3), threading.Barrier(3)

    @torch.no_grad()
    def work(name: str, do: Any) -> None:
        with session_of(model, do, isolated=True):
            began.wait(60)
            found[name] = decode(model, step)
            leave.wait(60)

    threads = [threading.Thread(target=work, args=pair) for pair in (("halve", halve), ("drop", drop_first))]
    for thread in threads:
        thread.start()
    began.wait(60)
    mine = decode(model, step)
    leave.wait(60)
    for thread in threads:
        thread.join()
    torch.testing.assert_close(mine, plain, atol=1e-4, rtol=0)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], atol=1e-4, rtol=0)
    assert all(graph == [EDITED] * 3 for graph in graphs.new())


# -- where the graph ends ----------------------------------------------------------------------------------------------


def test_gradients_flow_where_they_are_wanted() -> None:
    model = one_layer()
    with torch.enable_grad(), session_of(model, drop_first):
        model(IDS).logits.square().sum().backward()
        wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        torch.compile(model, backend="aot_eager")(IDS).logits.square().sum().backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad, wanted[name], atol=1e-4, rtol=1e-4)


def test_weights_of_eager_attention_are_returned_where_they_are_asked_for() -> None:
    model, graphs = one_layer(), Graphs()
    model.set_attn_implementation("eager")
    with session_of(model, drop_first):
        step, wanted = torch.compile(model, backend=graphs), model(IDS)
        torch.testing.assert_close(step(IDS).logits, wanted.logits, atol=1e-4, rtol=0)
        assert graphs.new() == [[EDITED]]
        wanted = model(IDS, output_attentions=True)
        found = step(IDS, output_attentions=True)
        torch.testing.assert_close(found.logits, wanted.logits, atol=1e-4, rtol=0)
        for one, other in zip(found.attentions, wanted.attentions, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


def test_errors_of_an_intervention_come_out_of_the_graph() -> None:
    model = tiny_llama()

    def fails(call: Any) -> HeadGain:
        raise ReattendError("on purpose")

    step = call(model, "eager")
    with session_of(model) as session:
        decode(model, step)
    with pytest.raises(ReattendError, match="on purpose"), session_of(model, fails):
        step(IDS)
    with session_of(model):
        torch.testing.assert_close(decode(model, step), decode(model), atol=1e-4, rtol=0)
    assert session.applied


def test_an_output_that_is_an_input_is_copied() -> None:
    from reattend.hooks.routes.graphs import Place, plans

    model = tiny_llama()
    module = model.model.layers[0].self_attn
    plans.number([module])
    x = torch.randn(1, 2, 1, 4)

    def attention(name: str, plan: str, module: nn.Module, *tensors: Any, **kwargs: Any) -> Any:
        return tensors[2].transpose(1, 2), None

    token = plans.token(Place(attention, "sdpa", "1", id(module), (), (), None))
    out = torch.ops.reattend.any(x, x, x, None, [], token)
    assert torch.equal(out, x.transpose(1, 2)) and out.data_ptr() != x.data_ptr()


# -- what needs hooks --------------------------------------------------------------------------------------------------


def test_the_warning_names_the_recipe_that_has_hooks_inside() -> None:
    from reattend.hooks import Observe

    model = tiny_llama()
    step = call(model, "aot_eager")
    model._compiled_call = step
    seen: list[int] = []
    plans = [
        Plan("edits", [Edits(sites(model), halve)]),
        Plan("looks", [Observe(sites(model), lambda o: seen.append(o.site.layer))]),
    ]
    with pytest.warns(ReattendWarning, match="hooks of recipe 'looks': compiled models run uncompiled") as said:
        session = attach(model, plans)
    assert len(said) == 1
    with session:
        decode(model, step, count=2)
    assert seen == [0, 1, 2] * 3
    assert reattend.sites(model)[0].name in session.stats["edits"]


def test_hooks_put_on_inside_code_that_was_compiled_from_outside_run() -> None:
    """Nothing on the model shows that it is compiled: the hook before it is called by compiled code, and tells."""
    from reattend.hooks import Observe

    model, seen = tiny_llama(), list[int]()
    step = wrapped(model, "eager")
    plain = decode(model, step)
    plans = [Plan("looks", [Observe(sites(model), lambda o: seen.append(o.site.layer))])]
    with (
        pytest.warns(ReattendWarning, match="hooks of recipe 'looks': compiled models run uncompiled") as said,
        attach(model, plans),
    ):
        decode(model, step)
    assert len(said) == 1 and seen == [0, 1, 2] * 4
    torch.testing.assert_close(decode(model, step), plain)
    assert seen == [0, 1, 2] * 4


@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
@pytest.mark.parametrize("way", [wrapped, call, forward])
def test_hooks_of_prompts_leave_steps_compiled(way: Any, warm: bool) -> None:
    """Passes of prompts run as they are written, also where the model is compiled whole; steps stay compiled where they are alone."""
    from reattend.hooks import Projection

    model, graphs, seen = tiny_llama(), Graphs(), list[str]()

    def double(projected: Any) -> Tensor:
        seen.append(projected.clock.phase)
        return projected.states * 2

    def prompts_alone() -> Any:
        return attach(model, [Plan("doubles", [Projection(sites(model), double, prompts=True)])])

    plain = decode(model)
    with prompts_alone():
        wanted = decode(model)
    assert seen == ["prefill"] * 3 and not torch.allclose(wanted, plain)
    if warm:
        step = way(model, graphs)
        decode(model, step)
        graphs.new()
    with warnings.catch_warnings():
        # where it shows that more than steps is compiled, all of it runs as it is written
        warnings.simplefilter("ignore" if way is forward else "error", ReattendWarning)
        with prompts_alone():
            if not warm:
                step = way(model, graphs)
            torch.testing.assert_close(decode(model, step), wanted, atol=1e-4, rtol=0)
            assert seen == ["prefill"] * 6
            assert len(graphs.new()) == (0 if warm or way is forward else 1)
            if way is not forward:
                # the prompt too through compiled code
                cache = static_cache(model)
                torch.testing.assert_close(step(IDS, **{cache_name(model): cache}).logits[:, -1:], wanted[0], atol=1e-4, rtol=0)
                assert seen == ["prefill"] * 9
    torch.testing.assert_close(decode(model, step), plain)
