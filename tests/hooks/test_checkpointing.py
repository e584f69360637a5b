"""Gradient checkpointing under sessions: backward computes parts of a pass anew, edited as they were, so gradients are those without it."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import reattend
import tiny_denoisers
import tiny_pipelines
import torch
from reattend.hooks import Edits, Plan, attach
from reattend.interventions import Call, Gain, HeadGain, ReattendError, ScaleQuery, Transfer
from tiny_llama import tiny_llama
from torch import Tensor
from torch.utils.checkpoint import checkpoint


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """Backward inside backward, over tensors this small, waits for torch's threads for most of its time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


REENTRANT = pytest.mark.parametrize("reentrant", [False, True])


def denoiser(name: str) -> tuple[Any, dict[str, Any], str]:
    model, inputs = tiny_denoisers.build(name)
    inputs = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    return model.double(), inputs, "sample" if "sample" in inputs else "hidden_states"


def checkpointed(model: Any, how: bool | None) -> None:
    """how: whether reentrant; None: not at all."""
    if how is None:
        model.disable_gradient_checkpointing()
    else:
        model.enable_gradient_checkpointing(lambda module, *args: checkpoint(module.__call__, *args, use_reentrant=how))


def gradient(model: Any, inputs: dict[str, Any], name: str) -> Tensor:
    x = inputs[name].clone().requires_grad_(True)
    model(**{**inputs, name: x}, return_dict=False)[0].square().sum().backward()
    assert x.grad is not None
    return x.grad


def by_the_clock(call: Call) -> Any:
    """Needs the clock, the roles and what was remembered of the pass: how many sites came before this one."""
    assert call.clock.phase == "denoise" and call.tokens is not None
    rows = call.clock.rows("conditional", call.batch)
    before = call.memory.setdefault("sites", 0)
    call.memory["sites"] = before + 1
    if rows is None or before % 2:
        return None
    return ScaleQuery(factor=1 / (1 + before), rows=rows[:, None])


@REENTRANT
@pytest.mark.parametrize("name", ["UNet2DConditionModel", "SD3Transformer2DModel", "FluxTransformer2DModel"])
def test_the_gradient_of_an_edited_denoiser_is_that_without_checkpointing(name: str, reentrant: bool) -> None:
    model, inputs, argument = denoiser(name)
    found = []
    for how in (None, reentrant):
        checkpointed(model, how)
        with attach(model, [Plan("late", [Edits(reattend.sites(model), by_the_clock)])]):
            found.append(gradient(model, inputs, argument))
    plain = gradient(model, inputs, argument)
    assert not torch.allclose(found[0], plain)
    torch.testing.assert_close(found[1], found[0], atol=1e-12, rtol=1e-9)


@REENTRANT
def test_the_gradient_under_a_guide_is_that_without_checkpointing(reentrant: bool) -> None:
    model, inputs, argument = denoiser("SD3Transformer2DModel")
    found = []
    for how in (None, reentrant):
        checkpointed(model, how)
        with reattend.apply(model, "softpag"):
            found.append(gradient(model, inputs, argument))
    torch.testing.assert_close(found[1], found[0], atol=1e-12, rtol=1e-9)


@REENTRANT
def test_two_passes_of_one_loss_are_computed_anew_each_as_it_was(reentrant: bool) -> None:
    model, inputs, argument = denoiser("SD3Transformer2DModel")
    found = []

    def by_step(call: Call) -> HeadGain:
        return HeadGain(factor=0.25 if call.clock.timestep == 500 else 3.0)

    for how in (None, reentrant):
        checkpointed(model, how)
        x = inputs[argument].clone().requires_grad_(True)
        with attach(model, [Plan("by step", [Edits(reattend.sites(model), by_step)])]):
            for timestep in (500.0, 100.0):
                given = {**inputs, "timestep": torch.full((2,), timestep), argument: x if timestep == 500 else y}  # noqa: F821
                y = model(**given, return_dict=False)[0]
            y.square().sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(found[1], found[0], atol=1e-12, rtol=1e-9)


def test_a_backward_twice_and_in_another_thread() -> None:
    model, inputs, argument = denoiser("SD3Transformer2DModel")
    checkpointed(model, None)
    plan = Plan("late", [Edits(reattend.sites(model), by_the_clock)])
    with attach(model, [plan]):
        wanted = gradient(model, inputs, argument)
    checkpointed(model, False)
    with attach(model, [plan], isolated=True):
        x = inputs[argument].clone().requires_grad_(True)
        loss = model(**{**inputs, argument: x}, return_dict=False)[0].square().sum()
        found: list[Tensor] = list(torch.autograd.grad(loss, x, retain_graph=True))
        # as on a GPU, where backward has threads of its own: nothing of this thread is known there, nor that the session is this one's
        thread = threading.Thread(target=lambda: found.extend(torch.autograd.grad(loss, x)))
        thread.start()
        thread.join()
    assert len(found) == 2
    for one in found:
        torch.testing.assert_close(one, wanted, atol=1e-12, rtol=1e-9)


@REENTRANT
def test_a_whole_denoiser_computed_anew(reentrant: bool) -> None:
    """As in training through a loop of steps: the pass is begun again, with its step, its halves and its guides."""
    pipe = tiny_pipelines.stable_diffusion()
    pipe.unet.double()
    text = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(3), dtype=torch.double)
    start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7), dtype=torch.double)

    def drawn(how: bool | None) -> Tensor:
        x = latents = start.clone().requires_grad_(True)
        pipe.scheduler.set_timesteps(4)
        with reattend.rows("unconditional", "conditional"):
            for t in pipe.scheduler.timesteps:
                call = functools.partial(predict, t)
                noise = call(latents) if how is None else checkpoint(call, latents, use_reentrant=how)
                latents = pipe.scheduler.step(noise, t, latents).prev_sample
        (found,) = (
            torch.autograd.grad(latents.square().sum(), x) if not how else (latents.square().sum().backward(), x.grad)[1:]
        )
        return found

    def predict(t: Tensor, latents: Tensor) -> Tensor:
        u, c = pipe.unet(torch.cat([latents, latents]), t, encoder_hidden_states=text).sample.chunk(2)
        return u + 4 * (c - u)

    with reattend.apply(pipe, "softpag", stop=0.5):
        wanted, found = drawn(None), drawn(reentrant)
    torch.testing.assert_close(found, wanted, atol=1e-8, rtol=1e-6)


def test_a_forward_before_the_session_is_computed_anew_without_it() -> None:
    model, inputs, argument = denoiser("SD3Transformer2DModel")
    plain = gradient(model, inputs, argument)
    checkpointed(model, False)
    x = inputs[argument].clone().requires_grad_(True)
    loss = model(**{**inputs, argument: x}, return_dict=False)[0].square().sum()
    with attach(model, [Plan("half", [Edits(reattend.sites(model), lambda call: HeadGain(factor=0.5))])]):
        (found,) = torch.autograd.grad(loss, x)
        model(**inputs)
    torch.testing.assert_close(found, plain, atol=1e-12, rtol=1e-9)


# -- language models --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@REENTRANT
def test_the_gradient_of_an_edited_language_model(reentrant: bool) -> None:
    model = tiny_llama().double().train()
    ids, found = torch.arange(3, 11)[None], []

    def first(call: Call) -> Gain:
        assert call.tokens is not None and call.clock.phase == "prefill"
        before = call.memory.setdefault("sites", 0)
        call.memory["sites"] = before + 1
        return Gain(columns=call.columns("bos") if "bos" in call.tokens else [0], factor=1 / (2 + before))

    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        embeds = model.get_input_embeddings()(ids).detach().requires_grad_(True)
        with attach(model, [Plan("first", [Edits(reattend.sites(model), first)])]):
            model(inputs_embeds=embeds, use_cache=False).logits.square().sum().backward()
        found.append(embeds.grad)
    torch.testing.assert_close(found[1], found[0], atol=1e-12, rtol=1e-9)


def test_a_whole_language_model_in_a_checkpoint_is_refused_before_it_runs() -> None:
    model, ids = tiny_llama(), torch.arange(3, 11)[None]
    with (
        attach(model, [Plan("half", [Edits(reattend.sites(model), lambda call: HeadGain(factor=0.5))])]),
        pytest.raises(ReattendError, match="checkpoint its layers instead"),
    ):
        checkpoint(lambda ids: model(ids).logits, ids, use_reentrant=False)
    model(ids)


def test_a_recomputation_by_other_means_is_refused() -> None:
    model, inputs, argument = denoiser("SD3Transformer2DModel")

    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
            ctx.run = run
            ctx.save_for_backward(x)
            return run(x)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            (x,) = ctx.saved_tensors
            x = x.detach().requires_grad_(True)
            with torch.enable_grad():
                return None, torch.autograd.grad(ctx.run(x), x, grad)[0]

    block = model.transformer_blocks[0].attn
    x = torch.randn(2, 16, 16, dtype=torch.double, requires_grad=True)
    with attach(model, [Plan("half", [Edits(reattend.sites(model), lambda call: HeadGain(factor=0.5))])]):
        out = Own.apply(lambda x: block(x, encoder_hidden_states=x[:, :5])[0], x)
        with pytest.raises(ReattendError, match="not by torch.utils.checkpoint"):
            out.sum().backward()
        model(**inputs)


# -- backward through masked columns ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "edit", [Gain(columns=[0, 3], factor=0.5), Transfer(source=[0], target=[2, 3], strength=0.5)], ids=["Gain", "Transfer"]
)
@pytest.mark.parametrize("additive", [False, True])
def test_backward_through_columns_that_a_mask_hides(edit: Any, additive: bool) -> None:
    """The fused executor's gradient is the reference's, also where columns of the edit are hidden in some rows."""
    from reattend.interventions import fused, reference

    source = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 6, 8, generator=source, dtype=torch.double) for _ in range(3))
    seen = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
    seen[1, :, :, 3] = False
    seen[1, :, 0, 0] = True
    mask = torch.zeros(seen.shape, dtype=torch.double).masked_fill(~seen, float("-inf")) if additive else seen
    grads = []
    for executor in (fused, reference):
        inputs = [x.clone().requires_grad_(True) for x in (q, k, v)]
        out = executor(Call(*inputs, mask), [edit])
        grads.append(torch.autograd.grad(out.square().sum(), inputs))
    for found, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-10, rtol=1e-8)
