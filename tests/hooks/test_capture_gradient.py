"""Capture with a gradient: sums of edited weights without the matrix, and gradients that equal those of a loop written by hand."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import tiny_models
import tiny_pipelines
import torch
from reattend.hooks import AtStep, Capture, Edits, Latents, Plan, Probe, attach, sites
from reattend.interventions import (
    AppendKV,
    Call,
    Gain,
    HeadGain,
    KeyBias,
    ReattendError,
    UnsupportedError,
    block_sums,
    column_sums,
    column_weights,
    reference_with_weights,
    row_maxima,
    weighted,
    weights_gradient,
)
from reattend.interventions.engine import kernels
from tiny_llama import IDS, tiny_llama
from torch import Tensor


def onto(column: int, bias: float, keys: int) -> Tensor:
    return torch.zeros(keys).index_fill(0, torch.tensor([column]), bias)


EDITS: dict[str, list[Any]] = {
    "none": [],
    "a bias": [KeyBias(bias=onto(1, 1.5, 40))],
    "some heads": [
        KeyBias(heads=[1], bias=onto(2, 2.0, 40)),
        Gain(heads=[0, 3], columns=[0], factor=0.25, renormalise=list(range(40))),
    ],
}


def call(seed: int = 0, queries: int = 40, keys: int = 40, causal: bool = True, grad: bool = False) -> Call:
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, heads, n, 8, generator=g).double() for heads, n in ((4, queries), (2, keys), (2, keys)))
    return Call(*(x.requires_grad_(grad) for x in (q, k, v)), is_causal=causal)


@pytest.fixture(params=[1, 1 << 30])
def chunks(request, monkeypatch):
    """Rows are read 16 at a time, or all at once."""
    monkeypatch.setattr(kernels, "CHUNK_VALUES", request.param)


def summed(one: Call, edits: list[Any], vector: Tensor) -> list[Tensor]:
    rows = torch.tensor([0, 7, 39])
    return [
        column_weights(one, edits, torch.tensor([0, 3, 5])),
        column_weights(one, edits, torch.tensor([[0, 3], [2, 5]]), rows),
        column_sums(one, edits),
        column_sums(one, edits, rows),
        row_maxima(one, edits),
        weighted(one, edits, vector),
        weighted(one, edits, vector[:, :1], rows),
        block_sums(one, edits, 16),
        block_sums(one, edits, (7, 11)),
    ]


def by_hand(weights: Tensor, vector: Tensor) -> list[Tensor]:
    rows, both = torch.tensor([0, 7, 39]), torch.tensor([[0, 3], [2, 5]])

    def blocks(down: int, across: int) -> Tensor:
        parts = [[piece.sum(dim=(2, 3)) for piece in strip.split(across, dim=3)] for strip in weights.split(down, dim=2)]
        return torch.stack([torch.stack(strip, dim=2) for strip in parts], dim=2)

    return [
        weights[..., [0, 3, 5]],
        torch.stack([weights[b][:, rows][..., both[b]] for b in range(2)]),
        weights.sum(dim=2),
        weights[:, :, rows].sum(dim=2),
        weights.amax(dim=3),
        weights @ vector.repeat_interleave(2, dim=1),
        weights[:, :, rows] @ vector[:, :1],
        blocks(16, 16),
        blocks(7, 11),
    ]


@pytest.mark.parametrize("name", EDITS)
def test_sums_of_edited_weights_and_their_gradients_are_those_of_the_matrix(name, chunks):
    vector, edits = torch.randn(2, 2, 40, 3).double(), EDITS[name]
    ours, theirs = call(grad=True), call(grad=True)
    found, wanted = summed(ours, edits, vector), by_hand(reference_with_weights(theirs, edits)[1], vector)
    for number, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert torch.allclose(a, b, atol=1e-10), number
        slopes = [
            torch.autograd.grad(x.square().sum(), (one.query, one.key), retain_graph=True)
            for x, one in ((a, ours), (b, theirs))
        ]
        assert all(torch.allclose(x, y, atol=1e-9) and x.any() for x, y in zip(*slopes, strict=True)), number


def test_the_gradient_of_weights_is_that_of_the_matrix():
    edits = [AppendKV(key=torch.ones(2, 2, 1, 8).double(), value=torch.ones(2, 2, 1, 8).double()), *EDITS["some heads"]]
    one, target = call(), torch.randn(2, 4, 40, 8).double()
    output, weights = reference_with_weights(one, edits)
    weights = weights.detach().requires_grad_()
    values = torch.cat([one.value, torch.ones(2, 2, 1, 8).double()], dim=2).repeat_interleave(2, dim=1)
    assert torch.allclose(weights @ values, output)
    wanted = torch.autograd.grad(((weights @ values) * target).sum(), weights)[0]
    assert torch.allclose(weights_gradient(one, edits, target), wanted)
    assert torch.allclose(weights_gradient(one, edits, target, torch.tensor([3, -1])), wanted[:, :, [3, -1]])
    with pytest.raises(ReattendError, match="outputs that were edited"):
        weights_gradient(one, [HeadGain(factor=2.0)], target)
    with pytest.raises(ReattendError, match="size must be 1 or more"):
        block_sums(one, [], 0)


# -- language models -------------------------------------------------------------------------------------------------------


def eager(model: Any, embeds: Tensor) -> tuple[Any, Tensor, list[Tensor]]:
    """The output, the last position's loss, and the weights of all layers, with a gradient."""
    model.set_attn_implementation("eager")
    output = model(inputs_embeds=embeds, output_attentions=True)
    model.set_attn_implementation("sdpa")
    return output, output.logits[:, -1].log_softmax(-1).amax(dim=-1).sum(), list(output.attentions)


@pytest.mark.parametrize("inference", [False, True])
def test_a_loss_on_the_logits_with_respect_to_weights_and_an_input(inference):
    """The gradients of weights (with the weights themselves: Grad-CAM) and of the embeddings, from a probe before a prefill."""
    model, found = tiny_llama(), {}
    table = sites(model)

    def inputs(prompt: Any) -> dict[str, Any]:
        arguments = dict(prompt.arguments)
        found["x"] = model.get_input_embeddings()(arguments.pop("input_ids")).detach().requires_grad_()
        return {**arguments, "inputs_embeds": found["x"]}

    def at_end(kept: Any, output: Any) -> None:
        loss = output.logits[:, -1].log_softmax(-1).amax(dim=-1).sum()
        calls = [one for calls in kept.values() for one in calls]
        slopes = torch.autograd.grad(loss, [found["x"], *(one.output for one in calls)])
        found["input"] = slopes[0]
        found["weights"] = [one.weights_gradient(slope) for one, slope in zip(calls, slopes[1:], strict=True)]

    probe = Probe([Capture(table, at_end=at_end, grad=True)], inputs=inputs, early_exit=False, grad=True)
    with torch.inference_mode(inference):
        plain = model(IDS).logits
        with attach(model, [Plan("grad", [probe])]):
            assert torch.equal(model(IDS).logits, plain)
    x = model.get_input_embeddings()(IDS).detach().requires_grad_()
    _, loss, weights = eager(model, x)
    wanted = torch.autograd.grad(loss, [x, *weights])
    assert torch.allclose(found["input"], wanted[0], atol=1e-5) and found["input"].any()
    causal = torch.ones(IDS.shape[1], IDS.shape[1]).tril().bool()
    assert len(found["weights"]) == len(weights)
    for a, b in zip(found["weights"], wanted[1:], strict=True):
        assert torch.allclose(a[:, :, causal], b[:, :, causal], atol=1e-5) and a.any()
    assert not any(p.grad is not None for p in model.parameters())


def test_a_loss_on_weights_under_edits_in_a_pass_of_the_users_own():
    """q, k and the edited weights of one layer, with respect to the embeddings; with edits of another session."""
    model, found = tiny_llama(), {}
    table = sites(model).layers(1, 1)

    def read(one: Call, edits: Any) -> None:
        found["columns"] = column_weights(one, edits, torch.tensor([0, 2]))

    x = model.get_input_embeddings()(IDS).detach().requires_grad_()
    edit = Edits(sites(model), lambda one: KeyBias(bias=onto(2, 1.0, IDS.shape[1])), "bias")
    with attach(model, [Plan("bias", [edit])]), attach(model, [Plan("read", [Capture(table, read, grad=True)])]):
        model(inputs_embeds=x)
        (slope,) = torch.autograd.grad(found["columns"].square().sum(), x)
        with torch.no_grad(), pytest.raises(ReattendError, match="the pass has no gradient"):
            model(inputs_embeds=x)
    with attach(model, [Plan("bias", [edit])]):
        weights = eager(model, x)[2][1][..., [0, 2]]
    assert torch.allclose(found["columns"], weights, atol=1e-6)
    assert torch.allclose(slope, torch.autograd.grad(weights.square().sum(), x)[0], atol=1e-5) and slope.any()


def test_calls_are_kept_until_the_pass_ends_and_no_longer():
    model, alive = tiny_llama(), []
    table = sites(model)

    def at_end(kept: Any, output: Any) -> None:
        assert list(kept) == [site.name for site in table] and output.logits is not None
        alive.extend(weakref.ref(one) for calls in kept.values() for one in calls)
        assert all(ref().output.shape == ref().call.query.shape and not ref().output.requires_grad for ref in alive)

    with torch.no_grad(), attach(model, [Plan("keep", [Capture(table, at_end=at_end)])]):
        model(IDS)
        gc.collect()
        assert len(alive) == len(table) and all(ref() is None for ref in alive)

        def fail(*_: Any) -> None:
            raise ValueError("in the middle")

        handle = model.lm_head.register_forward_pre_hook(fail)
        with pytest.raises(ValueError, match="in the middle"):
            model(IDS)
        handle.remove()
        gc.collect()
        assert len(alive) == len(table) and not [x for x in gc.get_objects() if type(x).__name__ == "Kept"]


def test_a_pass_stops_at_the_last_site_with_its_gradient():
    model, ran, found = tiny_llama(), [], {}
    table = sites(model).layers(0, 0)
    handle = model.model.layers[1].register_forward_hook(lambda *_: ran.append(1))

    def at_end(kept: Any, output: Any) -> None:
        assert output is None
        (one,) = kept[table[0].name]
        found["slope"] = torch.autograd.grad(one.output.sum(), one.call.value)[0]

    with torch.no_grad(), attach(model, [Plan("early", [Probe([Capture(table, at_end=at_end, grad=True)], grad=True)])]):
        model(IDS)
    handle.remove()
    # of the layer after the last site only the real pass ran
    assert len(ran) == 1 and found["slope"].any()


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_features_of_images_that_generate_computes_beforehand(family):
    tiny, found = tiny_models.build(family), []
    model, inputs = tiny.model, tiny.inputs([[1, "image", 5, 6], [1, 7, "image", 8]])

    def at_end(kept: Any, output: Any) -> None:
        calls = [one for calls in kept.values() for one in calls]
        slopes = torch.autograd.grad(output.logits[:, -1].sum(), [one.output for one in calls])
        found.append(torch.stack([one.weights_gradient(slope) for one, slope in zip(calls, slopes, strict=True)]))

    decoder = sites(model).stack("decoder").kind("self")
    probe = Probe([Capture(decoder, at_end=at_end, grad=True)], early_exit=False, grad=True)
    with torch.inference_mode():
        plain = model.generate(**inputs, max_new_tokens=2, do_sample=False)
        with attach(model, [Plan("grad", [probe])]):
            assert torch.equal(model.generate(**inputs, max_new_tokens=2, do_sample=False), plain)
            model(**inputs)
    assert len(found) == 2 and found[0].any() and torch.allclose(*found, atol=1e-6)


# -- denoisers ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inference", [False, True])
def test_a_loss_on_cross_attention_with_respect_to_the_latents(inference):
    """Three steps down the gradient of a token's best pixel, as by a loop with attention written out."""
    pipe, seen = tiny_pipelines.stable_diffusion(), {}
    table = sites(pipe.unet).kind("cross")[:1]

    def read(one: Call, edits: Any) -> None:
        one.memory["map"] = column_weights(one, edits, torch.tensor([1, 2])).mean(dim=1)

    def loss(at: AtStep, x: Tensor) -> Tensor:
        at.look(x, text="conditional", grad=True)
        return (1 - at.memory.pop("map").amax(dim=1)).amax(dim=1).sum()

    def before(at: AtStep) -> Tensor | None:
        if at.clock.step != 1:
            return None
        x, seen["start"] = at.latents, at.latents
        for _ in range(3):
            value, slope = at.gradient(lambda y: loss(at, y), x)
            x = x - 0.5 * slope
            seen.setdefault("losses", []).append(float(value))
        seen["end"] = x
        return x

    plan = Plan("down", [Latents(before, steps=[Capture(table, read, grad=True)])])
    with torch.inference_mode(inference), attach(pipe, [plan]) as session:
        pipe("a b", negative_prompt="c", num_inference_steps=3, guidance_scale=3.0, output_type="latent",
             generator=torch.Generator().manual_seed(1))  # fmt: skip
    assert session.stats == {"down": {"latents": 1}}

    site, kept = table.module(table[0]), {}
    text = pipe.encode_prompt("a b", "cpu", 1, False)[0].detach()
    hook = site.register_forward_hook(lambda m, args, kwargs, out: kept.update(x=args[0], kwargs=kwargs), with_kwargs=True)
    t, x, losses = pipe.scheduler.timesteps[1], seen["start"].clone(), []
    for _ in range(3):
        x = x.detach().requires_grad_()
        pipe.unet(x, t, encoder_hidden_states=text)
        q, k = (site.head_to_batch_dim(f) for f in (site.to_q(kept["x"]), site.to_k(text)))
        weights = (q @ k.transpose(1, 2) * site.scale).softmax(-1).unflatten(0, (1, -1))[..., [1, 2]].mean(dim=1)
        value = (1 - weights.amax(dim=1)).amax(dim=1).sum()
        x, value = x - 0.5 * torch.autograd.grad(value, x)[0], float(value.detach())
        losses.append(value)
    hook.remove()
    assert seen["losses"] == pytest.approx(losses, abs=1e-6) and losses[0] != losses[2]
    assert torch.allclose(seen["end"], x, atol=1e-6) and not torch.equal(seen["start"], seen["end"])


# -- what cannot be ----------------------------------------------------------------------------------------------------------


def test_a_gradient_through_quantised_parameters_is_refused():
    model = tiny_llama()
    step = Capture(sites(model), lambda one, edits: None, grad=True)
    attach(model, [Plan("x", [step])]).remove()
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    for steps in ([step], [Probe([step], grad=True)]):
        with pytest.raises(UnsupportedError, match="gradient cannot pass through .*up_proj.weight.* quantised to torch.int8"):
            attach(model, [Plan("x", steps)])
    # without a gradient they are as good as any
    attach(model, [Plan("x", [Capture(sites(model), lambda one, edits: None)])]).remove()

    pipe = tiny_pipelines.stable_diffusion()
    pipe.unet.conv_norm_out.register_parameter(
        "bits", torch.nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False)
    )
    cross = sites(pipe.unet).kind("cross")
    with pytest.raises(UnsupportedError, match="bits of UNet2DConditionModel.* quantised to torch.uint8"):
        attach(pipe, [Plan("x", [Latents(lambda at: None, steps=[Capture(cross, lambda one, edits: None, grad=True)])])])
    ask = Latents(lambda at: at.predict(at.latents, grad=True) and None)
    with pytest.raises(ReattendError, match="quantised"), attach(pipe, [Plan("x", [ask])]):
        pipe("a", num_inference_steps=1, output_type="latent")


def test_a_capture_that_does_nothing_is_refused():
    with pytest.raises(ReattendError, match="needs a reader, or at_end"):
        Capture(sites(tiny_llama()))


def test_column_weights_of_a_column_set():
    torch.manual_seed(0)
    call = Call(*(torch.randn(2, 2, 5, 4) for _ in range(3)))
    marked = torch.tensor([[0, 1, 0, 1, 0], [1, 0, 0, 0, 1]]).bool()
    numbers = torch.tensor([[1, 3], [0, 4]])
    assert torch.equal(column_weights(call, [], marked), column_weights(call, [], numbers))
    assert torch.equal(column_weights(call, [], marked[0]), column_weights(call, [], numbers[0]))
    with pytest.raises(ReattendError, match="as many in every row"):
        column_weights(call, [], torch.tensor([[0, 1, 0, 1, 0], [1, 0, 0, 0, 0]]).bool())
