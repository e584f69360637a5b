"""Every denoiser family: its sites, pass-through, one edit against the reference, and a restore that leaves nothing behind."""

from __future__ import annotations

from typing import Any

import pytest
import reattend
import tiny_pipelines
import torch
from reattend.hooks import Branch, Edits, Exit, Lookahead, Observe, Plan, Probe, Question, Segments, Spans, attach
from reattend.hooks.sites.denoisers import turned_by_position
from reattend.interventions import Call, HeadGain, ReattendError, ReattendWarning, UnsupportedError, reference
from tiny_denoisers import DENOISERS, TEXT, build, unet
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack as modes

FOUND = {  # {family: {(stack, kind): sites}}
    "UNet2DConditionModel": {
        ("denoiser.down", "self"): 1, ("denoiser.down", "cross"): 1, ("denoiser.mid", "self"): 1, ("denoiser.mid", "cross"): 1,
        ("denoiser.up", "self"): 2, ("denoiser.up", "cross"): 2,
    },
    "UNetMotionModel": {
        ("denoiser.down", "self"): 1, ("denoiser.down", "cross"): 1, ("denoiser.mid", "self"): 1, ("denoiser.mid", "cross"): 1,
        ("denoiser.up", "self"): 2, ("denoiser.up", "cross"): 2, ("denoiser.down.motion", "temporal"): 4,
        ("denoiser.mid.motion", "temporal"): 2, ("denoiser.up.motion", "temporal"): 8,
    },
    "SD3Transformer2DModel": {("denoiser", "joint"): 3},
    "SD3Transformer2DModel (3.5)": {("denoiser", "joint"): 3, ("denoiser.dual", "self"): 2},
    "FluxTransformer2DModel": {("denoiser.double", "joint"): 2, ("denoiser.single", "joint"): 2},
    "PixArtTransformer2DModel": {("denoiser", "self"): 2, ("denoiser", "cross"): 2},
    "HunyuanDiT2DModel": {("denoiser", "self"): 2, ("denoiser", "cross"): 2},
    "SanaTransformer2DModel": {("denoiser", "self"): 2, ("denoiser", "cross"): 2},
    "Lumina2Transformer2DModel": {
        ("denoiser.text_refiner", "self"): 1, ("denoiser.image_refiner", "self"): 1, ("denoiser", "joint"): 2,
    },
    "AuraFlowTransformer2DModel": {("denoiser.double", "joint"): 2, ("denoiser.single", "joint"): 2},
    "CogVideoXTransformer3DModel": {("denoiser", "joint"): 2},
    "HunyuanVideoTransformer3DModel": {
        ("denoiser.text_refiner", "self"): 1, ("denoiser.double", "joint"): 2, ("denoiser.single", "joint"): 2,
    },
    "LTXVideoTransformer3DModel": {("denoiser", "self"): 2, ("denoiser", "cross"): 2},
    "WanTransformer3DModel": {("denoiser", "self"): 2, ("denoiser", "cross"): 2},
    "MochiTransformer3DModel": {("denoiser.pool", "self"): 1, ("denoiser", "joint"): 3},
    "QwenImageTransformer2DModel": {("denoiser", "joint"): 2},
}  # fmt: skip

# number of image tokens where image and text share a stream, and which part comes first
STREAMS = {
    "SD3Transformer2DModel": (16, "image"), "SD3Transformer2DModel (3.5)": (16, "image"), "FluxTransformer2DModel": (16, "text"),
    "Lumina2Transformer2DModel": (16, "text"), "AuraFlowTransformer2DModel": (16, "text"),
    "CogVideoXTransformer3DModel": (48, "text"), "HunyuanVideoTransformer3DModel": (32, "image"),
    "MochiTransformer3DModel": (32, "image"), "QwenImageTransformer2DModel": (16, "text"),
}  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast")


def run(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**inputs)[0]


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def assert_restored(model: nn.Module, inputs: dict[str, Any], before: Tensor) -> None:
    assert hooks_of(model) == 0
    assert modes() == []
    assert torch.equal(run(model, inputs), before)


def usable(model: nn.Module) -> Any:
    return reattend.sites(model).where(lambda s: s.supported)


def test_every_family_has_a_row() -> None:
    assert set(FOUND) == set(DENOISERS)


@pytest.mark.parametrize("name", DENOISERS)
def test_sites(name: str) -> None:
    table = reattend.sites(build(name)[0])
    found: dict[tuple[str, str], int] = {}
    for site in table:
        found[site.stack, site.kind] = found.get((site.stack, site.kind), 0) + 1
        assert site.num_heads and site.num_kv_heads and site.route in ("sdpa", "linear") and not site.causal
    assert found == FOUND[name]
    for stack in {s.stack for s in table}:
        layers = [s.layer for s in table if s.stack == stack]
        assert layers == sorted(layers) and set(layers) == set(range(max(layers) + 1))


@pytest.mark.parametrize("name", DENOISERS)
def test_pass_through_edit_and_restore(name: str) -> None:
    model, inputs = build(name)
    before = run(model, inputs)
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def nothing(call: Call) -> None:
        assert call.site is not None
        seen.setdefault(call.site.name, [])

    table = usable(model)
    with pytest.warns(ReattendWarning, match="never acted"), attach(model, [Plan("watch", [Edits(table, nothing)])]):
        assert torch.equal(run(model, inputs), before)
    assert set(seen) == {s.name for s in table}, "a site was never reached"
    assert_restored(model, inputs, before)

    for site in table:
        seen = {}

        def halve(call: Call, site: Any = site, seen: dict[str, Any] = seen) -> HeadGain:
            edit = HeadGain(heads=[0], factor=0.5)
            plain = reference(call, [])
            seen.setdefault(site.name, []).append((plain, reference(call, [edit])))
            torch.testing.assert_close(call.original(), plain, atol=1e-5, rtol=1e-5)  # type: ignore[misc]
            return edit

        with attach(model, [Plan("halve", [Edits(table.where(lambda s, site=site: s.name == site.name), halve)])]) as session:
            changed = run(model, inputs)
            calls = 2 if name.startswith("Mochi") and site.stack == "denoiser" else 1
            assert session.stats == {"halve": {site.name: calls}}
        plain, edited = seen[site.name][0]
        torch.testing.assert_close(edited[:, 0], plain[:, 0] / 2)
        torch.testing.assert_close(edited[:, 1:], plain[:, 1:])
        assert changed.isfinite().all() and not torch.equal(changed, before)
    assert_restored(model, inputs, before)


@pytest.mark.parametrize("name", DENOISERS)
def test_restored_after_an_exception_in_mid_forward(name: str) -> None:
    model, inputs = build(name)
    before = run(model, inputs)

    def fail(call: Call) -> None:
        raise ValueError("from inside")

    with pytest.raises(ValueError, match="from inside"), attach(model, [Plan("fail", [Edits(usable(model), fail)])]):
        run(model, inputs)
    assert_restored(model, inputs, before)


@pytest.mark.parametrize("name", ["UNet2DConditionModel", "FluxTransformer2DModel", "MochiTransformer3DModel"])
def test_restored_after_an_interrupt(name: str) -> None:
    model, inputs = build(name)
    before = run(model, inputs)
    stop = True

    def interrupt(call: Call) -> HeadGain | None:
        if stop:
            raise KeyboardInterrupt
        return HeadGain(factor=0.5)

    query = torch.randn(2, 2, 6, 4)
    expected = nn.functional.scaled_dot_product_attention(query, query, query)
    session = attach(model, [Plan("interrupt", [Edits(usable(model)[:1], interrupt)])])
    with pytest.raises(KeyboardInterrupt):
        run(model, inputs)
    assert len(modes()) == 1, "torch runs no hooks on an interrupt; if that has changed, the clearing can go"
    stop = False
    assert torch.equal(nn.functional.scaled_dot_product_attention(query, query, query), expected), "a stale mark took a call"
    assert not torch.equal(run(model, inputs), before)
    assert modes() == [], "the next forward must clear what the interrupt left"
    session.remove()
    assert_restored(model, inputs, before)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["wrapper", "in place", "blocks"])
@pytest.mark.parametrize("name", ["UNet2DConditionModel", "FluxTransformer2DModel"])
def test_compiled_denoisers_run_uncompiled_under_a_session(name: str, how: str) -> None:
    model, inputs = build(name)
    before = run(model, inputs)
    with attach(model, [Plan("halve", [Edits(usable(model), lambda call: HeadGain(factor=0.5))])]):
        expected = run(model, inputs)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager") if how == "wrapper" else model
    if how == "in place":
        model.compile(backend="eager")
    elif how == "blocks":
        model.compile_repeated_blocks(backend="eager")  # type: ignore[operator]
    torch.testing.assert_close(run(compiled, inputs), before)
    table = usable(compiled)
    with pytest.warns(ReattendWarning, match="denoiser is compiled"):
        session = attach(compiled, [Plan("halve", [Edits(table, lambda call: HeadGain(factor=0.5))])])
    torch.testing.assert_close(run(compiled, inputs), expected)
    session.remove()
    assert session.applied == len(table)
    frames = torch._dynamo.utils.counters["frames"]["total"]
    torch.testing.assert_close(run(compiled, inputs), before)
    assert torch._dynamo.utils.counters["frames"]["total"] == frames, "the compiled graphs must still be good"
    assert hooks_of(model) == 0 and modes() == []


@pytest.mark.parametrize("name", DENOISERS)
def test_token_roles(name: str) -> None:
    model, inputs = build(name)
    maps: dict[str, list[tuple[Any, ...]]] = {}

    def note(call: Call) -> None:
        assert call.site is not None and call.tokens is not None
        found = call.query_rows("image"), call.columns("image"), call.columns("text"), call.columns("padding")
        maps.setdefault(call.site.name, []).append((call, *found))

    table = usable(model)
    with pytest.warns(ReattendWarning), attach(model, [Plan("note", [Edits(table, note)])]):
        run(model, inputs)
    for site in table:
        for index, (call, rows, image, text, padding) in enumerate(maps[site.name]):
            assert not (image & text).any() and not (image & padding).any() and not (text & padding).any()
            if site.kind == "cross":
                assert rows.all() and not image.any() and (text | padding).all()
            elif site.kind in ("self", "temporal"):
                is_text = site.stack in ("denoiser.text_refiner", "denoiser.pool")
                assert (text | padding).all() if is_text else image.all()
            else:
                count, first = STREAMS[name]
                assert image.sum(dim=1).tolist() == [count] * call.batch and torch.equal(rows, image)
                registers = 8 if name.startswith("AuraFlow") else 0
                assert (image | text | padding)[:, registers:].all()
                if registers:
                    assert call.columns("register").nonzero()[:, 1].tolist() == list(range(registers)) * call.batch
                starts = [int(row.long().argmax()) for row in (image if first == "text" else text)]
                if name.startswith("Lumina2"):
                    assert starts == [3, 5] and padding.sum(dim=1).tolist() == [2, 0]
                elif name.startswith("Mochi"):
                    assert starts == [count] and int(text.sum()) == (3, 5)[index]
                elif first == "text":
                    assert starts == [TEXT + registers] * 2
                else:
                    assert starts == [count] * 2
            for grid in call.tokens.grids:
                assert grid.index.flatten().tolist() == image[grid.row].nonzero()[:, 0].tolist()


def test_unknown_token_order_is_an_error_only_where_a_role_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from reattend.hooks.sites import families

    model, inputs = build("SD3Transformer2DModel")
    monkeypatch.setitem(families.FAMILIES, "SD3Transformer2DModel", families.Family())
    with attach(model, [Plan("all", [Edits(usable(model), lambda call: HeadGain(factor=0.5, rows=call.query_rows("all")))])]):
        run(model, inputs)
    with (
        pytest.raises(ReattendError, match="the order of image and text tokens in SD3Transformer2DModel is not known"),
        attach(
            model, [Plan("image", [Edits(usable(model), lambda call: HeadGain(factor=0.5, rows=call.query_rows("image")))])]
        ),
    ):
        run(model, inputs)


def test_linear_attention_is_reported() -> None:
    model, _ = build("SanaTransformer2DModel")
    bad = reattend.sites(model).problems
    assert [s.name for s in bad] == ["transformer_blocks.0.attn1", "transformer_blocks.1.attn1"]
    assert all("linear attention has no softmax" in (s.problem or "") for s in bad)
    with pytest.raises(UnsupportedError, match="transformer_blocks.0.attn1.*linear attention"):
        attach(model, [Plan("any", [Edits(reattend.sites(model), lambda call: None)])])
    assert hooks_of(model) == 0


def test_a_processor_that_needs_a_backend_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = build("FluxTransformer2DModel")
    before = run(model, inputs)
    processor = reattend.sites(model).module(reattend.sites(model)[1]).processor
    monkeypatch.setattr(type(processor), "_attention_backend", "flex")
    for site in reattend.sites(model):
        assert "it needs the backend 'flex', which never reaches torch's SDPA" in (site.problem or "")
    with pytest.raises(UnsupportedError, match="flex"):
        attach(model, [Plan("any", [Edits(reattend.sites(model), lambda call: None)])])
    monkeypatch.undo()
    assert not reattend.sites(model).problems
    assert_restored(model, inputs, before)


@pytest.mark.parametrize("kind", ["SlicedAttnProcessor", "XFormersAttnProcessor", "AttnProcessor"])
def test_processors_that_bypass_sdpa_are_reported(kind: str) -> None:
    from diffusers.models import attention_processor

    torch.manual_seed(0)
    model, _ = unet()
    if kind == "SlicedAttnProcessor":
        model.set_attention_slice(1)  # type: ignore[operator]
    else:
        model.set_attn_processor(getattr(attention_processor, kind)())  # type: ignore[operator]
    table = reattend.sites(model)
    assert len(table) == len(table.problems) == 8
    assert all(kind in (s.problem or "") and "never calls torch's SDPA" in (s.problem or "") for s in table)


@pytest.mark.parametrize(
    "make",
    [
        lambda t: Spans("s", texts=[["a fox"]]),
        lambda t: Segments("s", texts=[["a", "b"]]),
        lambda t: Question("s"),
        lambda t: Exit(t[:1], ["image"]),
        lambda t: Branch([lambda prompt: None], lambda fusion: fusion.logits),
        lambda t: Lookahead(2, t[:1], lambda call: call.query, lambda trials: trials.logits),
        lambda t: Probe([Observe(t[:1], lambda seen: None)]),
    ],
)
@pytest.mark.parametrize("kind", ["denoiser", "pipeline", "image encoder"])
def test_steps_that_need_a_prompt_are_refused_where_none_is_read(make: Any, kind: str) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    if kind == "image encoder":
        config = CLIPVisionConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
        )
        model: Any = CLIPVisionModel(config).eval()
    else:
        model = build("SD3Transformer2DModel")[0] if kind == "denoiser" else tiny_pipelines.stable_diffusion()
    step = make(reattend.sites(model))
    with pytest.raises(ReattendError, match="reads no tokens|needs a model that reads tokens"):
        attach(model, [Plan("text", [step])])
    parts = [model] if isinstance(model, nn.Module) else [model.unet]
    assert not any(m._forward_pre_hooks for part in parts for m in part.modules())


TURNED = {
    "FluxTransformer2DModel", "HunyuanDiT2DModel", "Lumina2Transformer2DModel", "CogVideoXTransformer3DModel",
    "HunyuanVideoTransformer3DModel", "LTXVideoTransformer3DModel", "WanTransformer3DModel", "MochiTransformer3DModel",
    "QwenImageTransformer2DModel",
}  # fmt: skip


@pytest.mark.parametrize("name", DENOISERS)
def test_which_denoisers_turn_queries_by_position(name):
    table = reattend.sites(build(name)[0])
    chosen = table.kind("self", "joint").where(
        lambda s: not s.stack.endswith("_refiner") and s.name.endswith(("attn", "attn1"))
    )
    assert {turned_by_position(table.module(site)) for site in chosen} == {name in TURNED}
