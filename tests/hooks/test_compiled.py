"""torch.compile inside a session: the model runs as it is written while the session lasts, from the very next call, and compiled after it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import reattend
import tiny_denoisers
import tiny_pipelines
import torch
from reattend.hooks import Edits, Observe, Plan, attach
from reattend.interventions import HeadGain, ReattendError, ReattendWarning
from tiny_llama import tiny_llama
from torch import Tensor, nn

Ran = list[str]


def whole(model: nn.Module, backend: Any) -> Any:
    model.compile(backend=backend)
    return model


def wrapped(model: nn.Module, backend: Any) -> Any:
    return torch.compile(model, backend=backend)


def forward(model: nn.Module, backend: Any) -> Any:
    model.forward = torch.compile(model.forward, backend=backend)  # type: ignore[method-assign]
    return model


def blocks(model: nn.Module, backend: Any) -> Any:
    for block in model.modules():
        if type(block).__name__ in ("BasicTransformerBlock", "LlamaDecoderLayer"):
            block.compile(backend=backend)
    return model


def attention(model: nn.Module, backend: Any) -> Any:
    for module in model.modules():
        if type(module).__name__ in ("Attention", "LlamaAttention"):
            module.compile(backend=backend)
    return model


def counting(ran: Ran) -> Any:
    """A backend that notes every run of a compiled graph."""

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            ran.append("compiled")
            return graph.forward(*given)

        return run

    return backend


def unet() -> tuple[nn.Module, Callable[[Any], Tensor]]:
    model, inputs = tiny_denoisers.build("UNet2DConditionModel")
    return model, lambda model: model(**inputs)[0]


def llama() -> tuple[nn.Module, Callable[[Any], Tensor]]:
    ids = torch.arange(3, 11)[None]
    return tiny_llama(), lambda model: model(ids).logits


def halves(model: nn.Module) -> Any:
    return attach(model, [Plan("half", [Edits(reattend.sites(model), lambda call: HeadGain(factor=0.5))])])


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("build", "way"),
    [(unet, whole), (unet, wrapped), (unet, forward), (unet, blocks), (unet, attention)],
)
def test_a_compile_begun_inside_a_session(build: Any, way: Any) -> None:
    model, call = build()
    before, ran = call(model), []
    with halves(model) as session:
        wanted, acts = call(model), session.applied
        compiled = way(model, counting(ran))
        with pytest.warns(ReattendWarning, match="run uncompiled until the session ends") as said:
            first = call(compiled)
            # at most what came before the first hook was compiled
            ran.clear()
            second = call(compiled)
        assert len(said) == 1 and ran == []
        assert torch.equal(first, wanted) and torch.equal(second, wanted) and session.applied == 3 * acts
    torch.testing.assert_close(call(compiled), before)
    assert ran and torch.compiler.is_compiling() is False


def test_a_language_model_compiled_inside_a_session_stays_compiled() -> None:
    """Its attention is edited between the graphs; a step with hooks inside runs it as it is written."""
    model, call = llama()
    before, ran, seen = call(model), [], []
    with halves(model) as session:
        wanted, acts = call(model), session.applied
        whole(model, counting(ran))
        found = [call(model), call(model)]
        assert ran and all(torch.allclose(one, wanted, atol=1e-6) for one in found) and session.applied == 3 * acts
        look = Observe(reattend.sites(model), lambda seen_here: seen.append(seen_here.site.layer))
        with pytest.warns(ReattendWarning, match="run uncompiled"), attach(model, [Plan("look", [look])]):
            assert torch.equal(call(model), wanted)
    assert seen == [0, 1, 2]
    torch.testing.assert_close(call(model), before)


def test_the_denoiser_of_a_pipeline_exchanged_for_a_compiled_one() -> None:
    pipe, ran = tiny_pipelines.stable_diffusion(), []
    source = torch.Generator().manual_seed(5)
    text = {name: torch.randn(1, 5, 16, generator=source) for name in ("prompt_embeds", "negative_prompt_embeds")}

    def draw() -> Tensor:
        seed = torch.Generator().manual_seed(7)
        return pipe(**text, num_inference_steps=1, generator=seed, output_type="latent").images

    before = draw()
    with reattend.apply(pipe, "softpag"):
        wanted = draw()
        pipe.unet = torch.compile(pipe.unet, backend=counting(ran))
        with pytest.warns(ReattendWarning, match="run uncompiled"):
            assert torch.equal(draw(), wanted)
        assert ran == []
    torch.testing.assert_close(draw(), before)
    assert ran


def test_the_last_of_two_sessions_lets_the_model_run_compiled_again() -> None:
    model, call = unet()
    ran: Ran = []
    with halves(model):
        with halves(model):
            model.compile(backend=counting(ran))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ReattendWarning)
                twice = call(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ReattendWarning)
            once = call(model)
        assert ran == [] and not torch.equal(once, twice)
    call(model)
    assert ran


def test_an_error_inside_leaves_nothing_behind() -> None:
    model, call = unet()
    ran: Ran = []

    def fails(call: Any) -> HeadGain:
        raise ReattendError("on purpose")

    with (
        pytest.raises(ReattendError, match="on purpose"),
        pytest.warns(ReattendWarning, match="uncompiled"),
        attach(model, [Plan("fails", [Edits(reattend.sites(model), fails)])]),
    ):
        model.compile(backend=counting(ran))
        call(model)
    call(model)
    assert ran


def test_layers_of_a_language_model_compiled_inside_a_session_are_edited() -> None:
    """Their attention is called by name, outside of every graph: they may run compiled."""
    model, call = llama()
    with halves(model):
        wanted = call(model)
        torch.testing.assert_close(call(blocks(model, "eager")), wanted)


@pytest.mark.parametrize("environment", [False, True])
def test_another_backend_of_diffusers_for_a_while_is_followed(environment: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a context, or as DIFFUSERS_ATTN_BACKEND sets it when diffusers is imported: attention does not reach torch's SDPA then."""
    from diffusers.models import attention_dispatch

    model, inputs = tiny_denoisers.build("FluxTransformer2DModel")
    before = model(**inputs)[0]
    registry = attention_dispatch._AttentionBackendRegistry
    with halves(model):
        wanted = model(**inputs)[0]
        if environment:
            monkeypatch.setattr(registry, "_active_backend", attention_dispatch.AttentionBackendName("flex"))
            found = model(**inputs)[0]
        else:
            with attention_dispatch.attention_backend("flex"):
                found = model(**inputs)[0]
        torch.testing.assert_close(found, wanted)
    monkeypatch.undo()
    assert torch.equal(model(**inputs)[0], before)


def test_the_names_of_a_session_on_the_denoiser_beside_one_on_the_pipeline() -> None:
    pipe = tiny_pipelines.stable_diffusion()
    text, x = torch.randn(1, 5, 16), torch.randn(1, 4, 8, 8)
    names = []

    def note(call: Any) -> HeadGain:
        names.append(call.site.name)
        return HeadGain(factor=0.5)

    def run() -> None:
        pipe.unet(x, 500, encoder_hidden_states=text)

    site = reattend.sites(pipe.unet)[:1]
    with attach(pipe.unet, [Plan("a", [Edits(site, note)])]) as session:
        run()
        with attach(pipe, [Plan("b", [Edits(reattend.sites(pipe).stack("denoiser")[:1], lambda call: HeadGain(factor=0.9))])]):
            run()
        run()
    assert set(names) == {site[0].name} and session.stats == {"a": {site[0].name: 3}}
