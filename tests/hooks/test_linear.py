"""Linear attention (Sana): edits of outputs and values are served, bit for bit where nothing is named; what needs weights is refused."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import reattend
import torch
from diffusers.models import attention_processor
from reattend.hooks import Edits, Plan, attach
from reattend.interventions import (
    Call,
    Edit,
    Gain,
    HeadGain,
    HeadMix,
    MixValue,
    ReattendError,
    ReattendWarning,
    UnsupportedError,
)
from tiny_denoisers import build
from tiny_families import FURTHER
from torch import Tensor, nn

FIRST = "transformer_blocks.0.attn1"


def sana() -> tuple[nn.Module, dict[str, Any]]:
    return build("SanaTransformer2DModel")


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def predict(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**inputs)[0]


def linear_sites(model: nn.Module) -> Any:
    return reattend.sites(model).where(lambda site: site.route == "linear")


def edited(model: nn.Module, *edits: Edit) -> Any:
    return attach(model, [Plan("own", [Edits(linear_sites(model)[:1], lambda call: list(edits), "own", outputs=True)])])


def heads_at(model: nn.Module, inputs: dict[str, Any], session: Any = None) -> tuple[Tensor, Tensor]:
    """(merged heads as the output projection of the first layer gets them, its values), both [B, T, H * D]."""
    module: Any = model.get_submodule(FIRST)
    kept: dict[str, Tensor] = {}
    hooks = [
        module.to_out[0].register_forward_pre_hook(lambda _, args: kept.__setitem__("merged", args[0].clone())),
        module.to_v.register_forward_hook(lambda _, args, output: kept.__setitem__("value", output.clone())),
    ]
    predict(model, inputs)
    for hook in hooks:
        hook.remove()
    return kept["merged"], kept["value"]


def test_where_nothing_is_named_no_bit_changes() -> None:
    model, inputs = sana()
    before = predict(model, inputs)
    nothing = Edits(linear_sites(model), lambda call: HeadGain(factor=1.0), outputs=True)
    with pytest.warns(ReattendWarning), attach(model, [Plan("none", [nothing])]):
        assert torch.equal(predict(model, inputs), before)
    assert torch.equal(predict(model, inputs), before) and hooks_of(model) == 0


def test_formulas_heads_and_rows() -> None:
    model, inputs = sana()
    merged, value = heads_at(model, inputs)
    before = predict(model, inputs)
    rows = torch.zeros(2, merged.shape[1], dtype=torch.bool)
    rows[1, 3:7] = True
    target = torch.randn(1, 8)
    with edited(
        model,
        MixValue(strength=0.4, heads=[1], rows=rows),
        HeadGain(factor=2.0, heads=[1]),
        HeadMix(target=target, strength=0.3, heads=[0], rows=rows),
    ):
        got, _ = heads_at(model, inputs)
    wanted = merged.clone()
    wanted[1, 3:7, 8:] += 0.4 * (value - merged)[1, 3:7, 8:]
    wanted[..., 8:] *= 2.0
    wanted[1, 3:7, :8] += 0.3 * (target - merged[1, 3:7, :8])
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-5)
    kept = ~rows
    assert torch.equal(got[..., :8][kept], merged[..., :8][kept]) and torch.equal(got[0, :, 8:], 2.0 * merged[0, :, 8:])
    assert torch.equal(predict(model, inputs), before)


@pytest.mark.parametrize("chunks", [2, 3])
def test_the_identity_is_that_of_diffusers_processors(chunks: int) -> None:
    model, _ = sana()
    module: Any = model.get_submodule(FIRST)
    x = torch.randn(chunks, 16, 16)
    official = getattr(
        attention_processor, {2: "PAGIdentitySanaLinearAttnProcessor2_0", 3: "PAGCFGSanaLinearAttnProcessor2_0"}[chunks]
    )()
    rows = (torch.arange(chunks) == chunks - 1)[:, None]
    with torch.no_grad():
        wanted, plain = official(module, x), module(x)
        with edited(model, MixValue(strength=1.0, rows=rows)):
            got = module(x)
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-5)
    assert torch.equal(got[:-1], plain[:-1])


def test_sessions_compose_in_their_order_and_leave_in_any() -> None:
    model, inputs = sana()
    before = predict(model, inputs)
    merged, value = heads_at(model, inputs)
    first = edited(model, MixValue(strength=1.0))
    second = edited(model, HeadGain(factor=3.0))
    got, _ = heads_at(model, inputs)
    torch.testing.assert_close(got, 3.0 * value)
    first.remove()
    got, _ = heads_at(model, inputs)
    torch.testing.assert_close(got, 3.0 * merged)
    second.remove()
    assert torch.equal(predict(model, inputs), before) and hooks_of(model) == 0


def test_what_needs_weights_is_refused() -> None:
    model, inputs = sana()
    with pytest.raises(UnsupportedError, match=f"{FIRST}.* cannot be intercepted: .*linear attention has no softmax"):
        attach(model, [Plan("any", [Edits(linear_sites(model), lambda call: None)])])
    with (
        edited(model, Gain(columns=[0], factor=0.5)),
        pytest.raises(ReattendError, match=f"{FIRST}: Gain changes weights, and linear attention has none"),
    ):
        predict(model, inputs)
    with edited(model, HeadGain(factor=0.5, heads=[2])), pytest.raises(ReattendError, match="head 2 does not exist"):
        predict(model, inputs)
    for slug, parameters in (
        ("softpag", {"perturbation": "mean_query"}),
        ("softpag", {"perturbation": "temperature"}),
        ("seg", {}),
    ):
        with pytest.raises(UnsupportedError, match="linear attention has no softmax"):
            reattend.apply(model, slug, **parameters)
    assert hooks_of(model) == 0


def test_edits_of_ones_own() -> None:
    """What is given as edits shows that it is of outputs; what a function will return does not."""
    model, inputs = sana()
    before = predict(model, inputs)
    with reattend.edit(model, HeadGain(factor=0.5)) as session:
        assert not torch.equal(predict(model, inputs), before)
    assert set(session.stats["edit"]) == {f"transformer_blocks.{n}.attn{kind}" for n in (0, 1) for kind in (1, 2)}
    with reattend.edit(model, lambda call: HeadGain(factor=0.5)) as session:
        predict(model, inputs)
    assert set(session.stats["edit"]) == {f"transformer_blocks.{n}.attn2" for n in (0, 1)}
    for given in (lambda call: HeadGain(factor=0.5), Gain(columns=[0], factor=0.5)):
        with pytest.raises(UnsupportedError, match="linear attention has no softmax"):
            reattend.edit(model, given, sites=linear_sites(model))
    assert torch.equal(predict(model, inputs), before) and hooks_of(model) == 0


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_errors_and_interrupts_leave_nothing(error: type[BaseException]) -> None:
    model, inputs = sana()
    before = predict(model, inputs)

    def fail(call: Call) -> None:
        raise error

    fails = Edits(linear_sites(model), fail, outputs=True)
    with warnings.catch_warnings(action="ignore"), pytest.raises(error), attach(model, [Plan("fails", [fails])]):
        predict(model, inputs)
    assert torch.equal(predict(model, inputs), before) and hooks_of(model) == 0


def test_a_processor_that_goes_elsewhere_is_told() -> None:
    class Elsewhere:
        def __call__(self, attn: Any, hidden_states: Tensor, **more: Any) -> Tensor:
            return hidden_states

    model, inputs = sana()
    module: Any = model.get_submodule(FIRST)
    own = module.processor
    with (
        warnings.catch_warnings(action="ignore"),
        edited(model, HeadGain(factor=0.5)),
        pytest.raises(ReattendError, match=f"{FIRST} ran, but its attention did not come"),
    ):
        module.processor = Elsewhere()
        predict(model, inputs)
    module.processor = own


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    model, _ = sana()
    module: Any = model.get_submodule(FIRST).to(dtype)
    x = torch.randn(2, 16, 16, dtype=dtype)
    with torch.no_grad(), edited(model, MixValue(strength=1.0, rows=torch.tensor([[False], [True]]))):
        got = module(x)
        wanted = module.to_out[1](module.to_out[0](module.to_v(x)))
    assert got.dtype == dtype
    torch.testing.assert_close(got[1], wanted[1])


def test_video_too() -> None:
    model, inputs = build("SanaVideoTransformer3DModel", among=FURTHER)
    before = predict(model, inputs)
    with reattend.apply(model, "pag", layers=[0]) as session:
        assert not torch.equal(predict(model, inputs), before)
    assert session.applied == 1 and torch.equal(predict(model, inputs), before)
