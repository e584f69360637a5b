"""The reuse door: blocks that do not run at a step give what they gave before, against a loop by hand; and nothing stays on the model."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import warnings

import pytest
import tiny_denoisers
import torch
from reattend.hooks import Edits, Guide, Inject, Plan, Reuse, attach, sites
from reattend.hooks import rows as named
from reattend.hooks.sites.discovery import layer_module
from reattend.interventions import HeadGain, ReattendError, UnsupportedError
from tiny_llama import tiny_llama
from torch.utils.flop_counter import FlopCounterMode

TIMES = (0.9, 0.7, 0.5, 0.3)


def second(moment):
    return moment.clock.step % 2 == 1


def plan(where, when=second, name="skip", **options):
    return [Plan(name, [Reuse(where, when, **options)])]


def at(inputs, time):
    """The inputs of a step; other latents at each."""
    timestep = inputs["timestep"]
    scale = 1000 if float(timestep.flatten()[0]) > 1 else 1
    name = "sample" if "sample" in inputs else "hidden_states"
    return {**inputs, "timestep": torch.full_like(timestep, time * scale), name: inputs[name] * (1 + time)}


def run(model, inputs, times=TIMES):
    with torch.no_grad():
        return [model(**at(inputs, time))[0] for time in times]


def loop(model, inputs, **around):
    with named("conditional"):
        return run(model, inputs, **around)


def inner(model):
    """Blocks of which every family has two or more in a row."""
    table = sites(model).where(lambda s: not s.stack.endswith((".pool", "_refiner", ".motion")))
    stack = max({s.stack for s in table}, key=lambda name: len({s.layer for s in table if s.stack == name}))
    return table.stack(stack)


def untouched(model):
    return not any("forward" in vars(m) or m._forward_hooks or m._forward_pre_hooks for m in model.modules())


FAMILIES = [
    "FluxTransformer2DModel", "SD3Transformer2DModel", "CogVideoXTransformer3DModel", "WanTransformer3DModel",
    "PixArtTransformer2DModel", "Lumina2Transformer2DModel", "HunyuanVideoTransformer3DModel", "QwenImageTransformer2DModel",
    "MochiTransformer3DModel", "AuraFlowTransformer2DModel", "UNet2DConditionModel",
]  # fmt: skip


@pytest.mark.parametrize("keep", ["change", "output"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_of_blocks_against_a_loop_by_hand(family, keep):
    """By hand: hooks that note what enters the first block and leaves the last one, and put that in the place of the last one's output."""
    model, inputs = tiny_denoisers.build(family)
    where = inner(model)
    blocks = list(dict.fromkeys(layer_module(model, s.name) for s in where))
    # of a UNet only blocks of one list are neighbours
    blocks = blocks[:1] if family.startswith("UNet") else blocks
    where = where.where(lambda s: layer_module(model, s.name) in blocks)
    plain = loop(model, inputs)
    calls = []
    with attach(model, plan(where, keep=keep)) as session:
        ran = [block.register_forward_hook(lambda *_: calls.append(1)) for block in blocks]
        found = loop(model, inputs)
        for hook in ran:
            hook.remove()
    assert sum(session.stats["skip"].values()) == 2 * len(blocks)
    assert all(torch.equal(found[n], plain[n]) for n in (0, 2)), "steps that compute are the model's"
    entered, kept = {}, {}

    def enter(_, args, kwargs):
        entered["hidden"] = args[0] if args else kwargs[next(iter(kwargs))]
        entered["text"] = args[1] if len(args) > 1 else kwargs.get("encoder_hidden_states")

    def by_hand(step):
        def leave(_, args, output):
            items = output if isinstance(output, tuple) else (output,)
            ins = [next((x for x in (entered["hidden"], entered["text"]) if _like(x, item)), None) for item in items]
            if (
                len(items) > 1
                and items[0] is not None
                and _like(entered["text"], items[0])
                and items[0].shape == items[1].shape
            ):
                ins = [entered["text"], entered["hidden"]]
            if step % 2 == 0:
                kept["parts"] = [item if x is None or keep == "output" else item - x for x, item in zip(ins, items)]
                return None
            new = [part if x is None or keep == "output" else x + part for x, part in zip(ins, kept["parts"])]
            return tuple(new) if isinstance(output, tuple) else new[0]

        return leave

    expected = []
    for step, time in enumerate(TIMES):
        hooks = [blocks[0].register_forward_pre_hook(enter, with_kwargs=True), blocks[-1].register_forward_hook(by_hand(step))]
        expected += run(model, inputs, (time,))
        for hook in hooks:
            hook.remove()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found[1], plain[1], atol=1e-4) or family.startswith("UNet")
    assert untouched(model) and all(torch.equal(a, b) for a, b in zip(loop(model, inputs), plain, strict=True))


def _like(x, item):
    return x is not None and item is not None and x.shape == item.shape


def test_skipped_blocks_do_no_work():
    model, inputs = tiny_denoisers.build("FluxTransformer2DModel")
    counts = []
    with named("conditional"), attach(model, plan(sites(model))):
        for time in TIMES:
            with FlopCounterMode(display=False) as counter:
                run(model, inputs, (time,))
            counts.append(counter.get_total_flops())
    assert counts[0] == counts[2] and counts[1] == counts[3] < 0.2 * counts[0]


def test_outputs_of_attention_modules():
    """FreeSwim keeps the output of cross-attention alone, for the conditional call alone."""
    model, inputs = tiny_denoisers.build("WanTransformer3DModel")
    where = sites(model).kind("cross")
    moments = []

    def when(moment):
        moments.append((moment.clock.step, sorted(moment.clock.branches), moment.kept))
        return second(moment) and "conditional" in moment.clock.branches

    negative = {**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"].flip(1)}

    def halves():
        for time in TIMES:
            for name, half in (("conditional", inputs), ("unconditional", negative)):
                with named(name):
                    yield run(model, half, (time,))[0]

    plain = list(halves())
    with attach(model, plan(where, when, at="attention")) as session:
        found = list(halves())
    same = [torch.equal(a, b) for a, b in zip(found, plain, strict=True)]
    assert same == [True, True, False, True, True, True, False, True]
    assert session.stats["skip"] == {site.name: 2 for site in where}
    assert moments[:: len(where)] == [
        (0, ["conditional"], None), (0, ["unconditional"], None), (1, ["conditional"], 0), (1, ["unconditional"], 0),
        (2, ["conditional"], 0), (2, ["unconditional"], 1), (3, ["conditional"], 2), (3, ["unconditional"], 2),
    ]  # fmt: skip
    attention = sites(model).module(where[0])
    kept = []
    hook = attention.register_forward_hook(lambda _, args, out: kept.append(out) if not kept else kept[0])
    with torch.no_grad():
        other = sites(model).module(where[1])
        last = []
        second_hook = other.register_forward_hook(lambda _, args, out: last.append(out) if not last else last[0])
        by_hand = [model(**at(inputs, time))[0] for time in TIMES[:2]]
    hook.remove()
    second_hook.remove()
    assert torch.equal(by_hand[1], found[2])


def test_each_call_has_its_own_and_a_new_run_begins_with_nothing():
    model, inputs = tiny_denoisers.build("FluxTransformer2DModel")
    negative = {**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"].flip(1)}
    with attach(model, plan(sites(model))):
        together = []
        for time in TIMES[:2]:
            for name, half in (("conditional", inputs), ("unconditional", negative)):
                with named(name):
                    together += run(model, half, (time,))
    alone = []
    for name, half in (("conditional", inputs), ("unconditional", negative)):
        with named(name), attach(model, plan(sites(model))):
            alone.append(run(model, half, TIMES[:2])[1])
    assert torch.equal(together[2], alone[0]) and torch.equal(together[3], alone[1])
    kept = []
    with attach(model, plan(sites(model), lambda moment: kept.append(moment.kept) or True)):
        for _ in range(2):
            loop(model, inputs)
    assert kept[: len(kept) // 2] == kept[len(kept) // 2 :] and kept[0] is None


def test_equal_inputs_give_what_computing_gives_and_never_is_bit_identical():
    model, inputs = tiny_denoisers.build("SD3Transformer2DModel")
    with torch.no_grad(), named("conditional"):
        plain = model(**inputs).sample
        for always in (True, False):
            with warnings.catch_warnings(), attach(model, plan(sites(model), lambda moment, always=always: always)):
                warnings.simplefilter("ignore")  # of a step that never acted
                outs = [model(**inputs).sample for _ in range(2)]
            assert torch.equal(outs[0], plain) and torch.allclose(outs[1], plain, atol=1e-5)
            assert always or torch.equal(outs[1], plain)


def test_what_the_model_adds_between_two_blocks_is_added_anew():
    """A ControlNet's residuals are no part of what blocks change: by hand, each block's own change is kept."""
    model, inputs = tiny_denoisers.build("SD3Transformer2DModel")
    residuals = [torch.randn(2, 16, 16) for _ in range(3)]
    blocks = list(model.transformer_blocks)
    where = sites(model)
    with attach(model, plan(where)), torch.no_grad(), named("conditional"):
        for time in TIMES[:2]:
            more = [r * time for r in residuals]
            found = model(**at(inputs, time), block_controlnet_hidden_states=more).sample
    kept = {}

    def by_hand(step):
        def around(index, before):
            def forward(hidden_states, encoder_hidden_states, **rest):
                if step == 0:
                    text, image = before(hidden_states, encoder_hidden_states, **rest)
                    kept[index] = (None if text is None else text - encoder_hidden_states, image - hidden_states)
                    return text, image
                text, image = kept[index]
                return (None if text is None else encoder_hidden_states + text), hidden_states + image

            return forward

        return around

    with torch.no_grad():
        for step, time in enumerate(TIMES[:2]):
            for index, block in enumerate(blocks):
                block.forward = by_hand(step)(index, type(block).forward.__get__(block))
            more = [r * time for r in residuals]
            expected = model(**at(inputs, time), block_controlnet_hidden_states=more).sample
            for block in blocks:
                del block.forward
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_beside_a_guide_and_what_enters_a_block():
    model, inputs = tiny_denoisers.build("UNet2DConditionModel")
    where = sites(model).stack("denoiser.mid")
    steps = [Reuse(where, second), Guide("g", 1.0), Inject(where, lambda seen: seen.hidden * 2, rows="g")]
    plain = loop(model, inputs)
    with attach(model, [Plan("all", steps)]) as session:
        found = loop(model, inputs)
    assert session.stats["all"][where[0].name] == 4 + 2  # written at every step, skipped at two
    assert untouched(model) and all(torch.equal(a, b) for a, b in zip(loop(model, inputs), plain, strict=True))
    assert len(found) == 4


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_errors_and_interrupts_leave_nothing_and_keep_nothing_half(error):
    model, inputs = tiny_denoisers.build("FluxTransformer2DModel")
    plain, kept = loop(model, inputs), []

    def fail(*_):
        raise error

    def when(moment):
        kept.append(moment.kept)
        return False

    with named("conditional"), torch.no_grad(), pytest.raises(error), attach(model, plan(sites(model), when)):
        hook = model.single_transformer_blocks[1].attn.register_forward_hook(fail)
        try:
            with pytest.raises(error):
                model(**at(inputs, 0.9))
            hook.remove()
            model(**at(inputs, 0.7))
            assert kept == [None, None, 0, None], "the double blocks were complete, the single ones were not"
            raise error
        finally:
            hook.remove()
    assert untouched(model) and all(torch.equal(a, b) for a, b in zip(loop(model, inputs), plain, strict=True))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_sessions_that_skip_other_layers_end_in_any_order(order):
    model, inputs = tiny_denoisers.build("FluxTransformer2DModel")
    plain = loop(model, inputs)
    double, single = sites(model).stack("denoiser.double"), sites(model).stack("denoiser.single")
    sessions = [attach(model, plan(double, name="double")), attach(model, plan(single, name="single"))]
    loop(model, inputs)
    assert all(sum(s.stats[n].values()) == 4 for s, n in zip(sessions, ("double", "single"), strict=True))
    for index in order:
        sessions[index].remove()
    assert untouched(model) and all(torch.equal(a, b) for a, b in zip(loop(model, inputs), plain, strict=True))


def test_a_forward_of_somebody_elses_is_put_back():
    model, inputs = tiny_denoisers.build("FluxTransformer2DModel")
    block, calls = model.single_transformer_blocks[0], []
    own = type(block).forward.__get__(block)

    def theirs(*args, **kwargs):
        calls.append(1)
        return own(*args, **kwargs)

    block.forward = theirs
    with attach(model, plan(sites(model))):
        loop(model, inputs)
        assert len(calls) == 2, "it runs where the block is computed"
        later = block.forward
        block.forward = lambda *args, **kwargs: later(*args, **kwargs)
        loop(model, inputs)
    assert vars(block)["forward"] is not later and len(calls) == 4
    loop(model, inputs)
    assert len(calls) == 8, "ours only passes on where somebody has put something around it"
    block.forward = theirs
    with attach(model, plan(sites(model))):
        loop(model, inputs)
    assert vars(block)["forward"] is theirs


def through_torch(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda m: copy.deepcopy([m])[0], through_torch, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_copies_and_files_know_nothing_of_it(way, tmp_path):
    model, inputs = tiny_denoisers.build("FluxTransformer2DModel")
    plain = loop(model, inputs)
    with attach(model, plan(sites(model))):
        skipped = loop(model, inputs)
        twin = way(model)
        assert b"reattend" not in pickle.dumps(model)
        gc.collect()
        assert untouched(twin) and all(torch.equal(a, b) for a, b in zip(loop(twin, inputs), plain, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(loop(model, inputs), skipped, strict=True))
        model.save_pretrained(tmp_path)
    saved = type(model).from_pretrained(tmp_path).eval()
    assert all(torch.equal(a, b) for a, b in zip(loop(saved, inputs), plain, strict=True))


def test_another_thread_in_an_isolated_session_is_untouched():
    model, inputs = tiny_denoisers.build("FluxTransformer2DModel")
    plain, found = loop(model, inputs), []
    with attach(model, plan(sites(model)), isolated=True) as session:
        thread = threading.Thread(target=lambda: found.extend(loop(model, inputs)))
        thread.start()
        thread.join()
        assert session.applied == 0 and all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
        loop(model, inputs)
        assert session.applied == 8


def test_edits_in_a_skipped_block_act_where_it_is_computed():
    model, inputs = tiny_denoisers.build("FluxTransformer2DModel")
    where = sites(model).stack("denoiser.single")
    with (
        attach(model, plan(where)),
        attach(model, [Plan("half", [Edits(where, lambda call: HeadGain(factor=0.5))])]) as session,
    ):
        loop(model, inputs)
    assert session.stats["half"] == {site.name: 2 for site in where}


def test_refusals():
    model, inputs = tiny_denoisers.build("FluxTransformer2DModel")
    single = sites(model).stack("denoiser.single")
    with pytest.raises(UnsupportedError, match="this model has no denoiser"):
        attach(tiny_llama(), plan(sites(tiny_llama())))
    for options in ({"at": "block"}, {"keep": "difference"}):
        with pytest.raises(ReattendError, match="Reuse takes at="):
            plan(single, **options)
    with attach(model, plan(single.layers(0, 0), name="one")):
        for where, options in ((single, {}), (single, {"at": "attention"})):
            with pytest.raises(
                UnsupportedError, match="recipes '(one|two)' and '(one|two)' both skip what is at single_transformer_blocks.0"
            ):
                attach(model, plan(where, name="two", **options))
        with attach(model, plan(single.layers(1, 1), name="two")):
            pass
    assert untouched(model)
    model.enable_gradient_checkpointing()
    with (
        named("conditional"),
        attach(model, plan(single)),
        pytest.raises(ReattendError, match="disable_gradient_checkpointing"),
    ):
        model(**inputs)
    model, inputs = tiny_denoisers.build("CogVideoXTransformer3DModel")
    from diffusers import FirstBlockCacheConfig

    model.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(UnsupportedError, match="FirstBlockCache of diffusers skips them too: call disable_cache"):
        attach(model, plan(sites(model)))
    model.disable_cache()
    with attach(model, plan(sites(model))), named("conditional"):
        model.enable_cache(FirstBlockCacheConfig(threshold=0.1))
        with pytest.raises(ReattendError, match="FirstBlockCache"):
            model(**inputs)
