"""The inject door: what enters chosen layers, for chosen rows, against the same written by hand; other rows keep their bits."""

from __future__ import annotations

import pytest
import tiny_denoisers
import torch
from reattend.hooks import Capture, Guide, Inject, Plan, Probe, attach, sites
from reattend.hooks import rows as named
from reattend.hooks.sites.discovery import layer_module
from reattend.interventions import ReattendError, UnsupportedError
from tiny_llama import IDS, hooks_on, logits, tiny_llama
from transformers import SamConfig, SamModel, ViTConfig, ViTModel


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


def inject(where, write, **options):
    return [Plan("test", [Inject(where, write, **options)])]


def by_hand(module, change):
    """A hook of the user's own that changes the first argument or `hidden_states`."""

    def before(_, args, kwargs):
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    return module.register_forward_pre_hook(before, with_kwargs=True)


def test_a_decoder_layers_input_is_what_was_written_and_other_rows_keep_their_bits(model):
    base, seen = logits(model), []

    def write(entering):
        seen.append((entering.site.layer, entering.clock.phase, entering.rows.tolist(), entering.places("bos").shape))
        return 2 * entering.hidden

    with attach(model, inject(sites(model).layers(1, 1), write, rows=[1])) as session:
        found = logits(model)
        assert session.stats == {"test": {"model.layers.1.self_attn": 1}}
    hook = by_hand(model.model.layers[1], lambda hidden: torch.stack([hidden[0], 2 * hidden[1]]))
    assert torch.equal(found, logits(model)) and not torch.allclose(found[1], base[1])
    hook.remove()
    assert torch.equal(found[0], base[0]) and torch.equal(logits(model), base) and hooks_on(model) == 0
    assert seen == [(1, "prefill", [False, True], (2, 12))]


def test_it_acts_while_text_is_written_and_knows_the_tokens(model):
    phases = []

    def write(entering):
        phases.append((entering.clock.phase, entering.places("generated").tolist()))
        return entering.hidden + 1

    with torch.no_grad(), attach(model, inject(sites(model).layers(2, 2), write)):
        model.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert [phase for phase, _ in phases] == ["prefill", "decode", "decode"]
    assert not any(map(any, phases[0][1])) and phases[1][1] == [[True], [True]]


def test_nothing_written_is_bit_identical_and_errors_leave_nothing(model):
    base = logits(model)
    with attach(model, inject(sites(model), lambda entering: None)) as session, pytest.warns(match="never acted"):
        assert torch.equal(logits(model), base)
        session.remove()
    for error in (ValueError, KeyboardInterrupt):

        def fail(entering, error=error):
            raise error("no")

        with pytest.raises(error), attach(model, inject(sites(model), fail)):
            logits(model)
        assert torch.equal(logits(model), base) and hooks_on(model) == 0


def test_halves_of_an_encoders_batch_feed_one_another():
    """HybridGL: from a layer on, the second half's patches are added twice to the first half's tokens."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8
    )
    vit, pixels = ViTModel(config, add_pooling_layer=False).eval(), torch.randn(4, 3, 16, 16)
    keep = torch.tensor([1.0, 1, 0, 1, 0])[:, None]

    def add(entering):
        ours, other = entering.hidden.chunk(2)
        return torch.cat([ours + 2 * keep * other, other])

    with torch.no_grad():
        plain = vit(pixels).last_hidden_state
        layers = layers_of(vit)
        hooks = [by_hand(layer, lambda h: torch.cat([h[:2] + 2 * keep * h[2:], h[2:]])) for layer in layers[1:]]
        expected = vit(pixels).last_hidden_state
        for hook in hooks:
            hook.remove()
        with attach(vit, inject(sites(vit).layers(1), add, rows=[0, 1])):
            found = vit(pixels).last_hidden_state
        assert torch.equal(found, expected) and torch.equal(found[2:], plain[2:])
        assert torch.equal(vit(pixels).last_hidden_state, plain)


def layers_of(vit):
    return [layer_module(vit, site.name) for site in sites(vit)]


FAMILIES = [
    "UNet2DConditionModel", "UNetMotionModel", "SD3Transformer2DModel", "FluxTransformer2DModel", "PixArtTransformer2DModel",
    "Lumina2Transformer2DModel", "CogVideoXTransformer3DModel", "WanTransformer3DModel", "MochiTransformer3DModel",
    "SanaTransformer2DModel", "HunyuanVideoTransformer3DModel", "QwenImageTransformer2DModel",
]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_of_denoisers(family):
    """The written rows are a hand-written hook's, in every block; the others keep their bits."""
    model, inputs = tiny_denoisers.build(family)
    with torch.no_grad():
        plain = model(**inputs)[0]
        where = sites(model).where(lambda s: not s.stack.endswith((".pool", "_refiner")))
        blocks = list(dict.fromkeys(layer_module(model, s.name) for s in where))
        shapes = {}

        def write(entering):
            shapes[entering.site.name] = entering.hidden.shape
            if entering.site.kind != "temporal":
                image = entering.places("image")
                assert image.shape == entering.hidden.shape[:2] and image.any()
            return entering.hidden.flip(1)

        with attach(model, inject(where, write, rows=[1])) as session:
            found = model(**inputs)[0]
        assert sum(session.stats["test"].values()) == len(blocks)

        def half(hidden):
            part = hidden.shape[0] // 2
            return torch.cat([hidden[:part], hidden[part:].flip(1)])

        hooks = [by_hand(block, half) for block in blocks]
        expected = model(**inputs)[0]
        for hook in hooks:
            hook.remove()
        assert torch.equal(found, expected) and not torch.allclose(found[1], plain[1])
        assert torch.equal(found[0], plain[0]) and torch.equal(model(**inputs)[0], plain)


@pytest.mark.parametrize("family", ["FluxTransformer2DModel", "SD3Transformer2DModel"])
def test_the_text_stream_of_joint_blocks_is_written_too(family):
    model, inputs = tiny_denoisers.build(family)
    met = []

    def write(entering):
        met.append((entering.site.stack, entering.text.shape[1], entering.places("image").all().item()))
        return {"encoder_hidden_states": torch.zeros_like(entering.text)}

    with torch.no_grad():
        plain = model(**inputs)[0]
        with attach(model, inject(sites(model).layers(0, 0), write, rows=[0])):
            found = model(**inputs)[0]
    assert torch.equal(found[1], plain[1]) and not torch.allclose(found[0], plain[0])
    stacks = ["denoiser.double", "denoiser.single"] if family.startswith("Flux") else ["denoiser"]
    assert met == [(stack, tiny_denoisers.TEXT, True) for stack in stacks]


def test_rows_of_a_guides_branch_alone():
    """Token perturbation guidance by hand: the branch is a further row of the batch whose tokens are turned around at a block."""
    model, inputs = tiny_denoisers.build("UNet2DConditionModel")
    where = sites(model).stack("denoiser.mid")
    with torch.no_grad(), named("conditional"):
        plain = model(**inputs).sample
        steps = [Inject(where, lambda entering: entering.hidden.flip(1), rows="tpg"), Guide("tpg", 2.0)]
        with attach(model, [Plan("tpg", steps)]):
            found = model(**inputs).sample
        hook = by_hand(layer_module(model, where[0].name), lambda hidden: hidden.flip(1))
        weak = model(**inputs).sample
        hook.remove()
        torch.testing.assert_close(found, plain + 2 * (plain - weak), atol=1e-5, rtol=1e-5)
        # of a row that is named, the copy in a guide's branch is written too
        for rows, written in (([1], [False, True, False, True]), (None, None)):
            met = []
            look = Inject(where, lambda entering, met=met: met.append(entering.rows), rows=rows)
            with attach(model, [Plan("look", [look, Guide("g", 1.0)])]) as session:
                model(**inputs)
                session.counts.clear()
            assert [None if m is None else m.tolist() for m in met] == [written] * len(met) and met


def test_an_attention_module_outside_every_layer():
    """PerSAM: the target's embedding joins the queries of each block and of the final attention, their positional embedding too."""
    torch.manual_seed(0)
    small = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
        "mlp_dim": 16,
    }
    decoder = {"hidden_size": 16, "num_attention_heads": 2, "mlp_dim": 16, "iou_head_hidden_dim": 16}
    config = SamConfig(
        vision_config={**small, "output_channels": 16, "num_pos_feats": 8, "global_attn_indexes": [0], "window_size": 2},
        prompt_encoder_config={"hidden_size": 16, "image_size": 32, "patch_size": 8, "mask_input_channels": 8},
        mask_decoder_config=decoder,
    )
    sam = SamModel(config).eval()
    given = {"pixel_values": torch.randn(1, 3, 32, 32), "input_points": torch.tensor([[[[4.0, 9.0]]]])}
    table = sites(sam).where(lambda s: s.name.startswith("mask_decoder"))
    final = table.where(lambda s: s.name.endswith("final_attn_token_to_image"))
    with pytest.raises(UnsupportedError, match='final_attn_token_to_image does not lie in a list of layers.*at="attention"'):
        attach(sam, inject(final, lambda entering: None))

    def join(entering):
        return {
            name: value + 1 for name, value in entering.given.items() if name in ("query", "queries", "query_point_embedding")
        }

    transformer = sam.mask_decoder.transformer

    def hand(module, names):
        def before(_, args, kwargs):
            return args, {name: value + 1 if name in names else value for name, value in kwargs.items()}

        return module.register_forward_pre_hook(before, with_kwargs=True)

    with torch.no_grad():
        plain = sam(**given).pred_masks
        blocks = table.where(lambda s: ".layers." in s.name)
        steps = [Inject(blocks, join), Inject(final, join, at="attention")]
        with attach(sam, [Plan("persam", steps)]) as session:
            found = sam(**given).pred_masks
        assert sum(session.stats["persam"].values()) == len(transformer.layers) + 1
        hooks = [hand(layer, ("queries", "query_point_embedding")) for layer in transformer.layers]
        hooks.append(hand(transformer.final_attn_token_to_image, ("query",)))
        expected = sam(**given).pred_masks
        for hook in hooks:
            hook.remove()
        assert torch.equal(found, expected) and not torch.allclose(found, plain)
        assert torch.equal(sam(**given).pred_masks, plain)


def test_what_a_probe_meets_is_written_too_and_the_pass_after_it_is_not(model):
    base, seen = logits(model), []
    where = sites(model).stack("decoder")
    steps = [
        Inject(where.layers(0, 0), lambda entering: torch.zeros_like(entering.hidden)),
        Capture(where.layers(1, 1), lambda call, _: seen.append(call.query)),
    ]
    ran = []
    hook = model.model.layers[2].register_forward_pre_hook(lambda *_: ran.append(2))
    with attach(model, [Plan("probe", [Probe(steps)])]):
        assert torch.equal(logits(model), base)
    hook.remove()
    plain = []
    with attach(model, [Plan("look", [Capture(where.layers(1, 1), lambda call, _: plain.append(call.query))])]):
        logits(model)
    assert not torch.allclose(seen[0], plain[0]) and ran == [2], "the probe stops after its last step has acted"


def test_gradients_pass_through(model):
    shift = torch.zeros(64, requires_grad=True)
    with attach(model, inject(sites(model).layers(1, 1), lambda entering: entering.hidden + shift, rows=[0])):
        model(IDS).logits.sum().backward()
    assert shift.grad is not None and bool(shift.grad.any())


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}, {"num_beams": 2, "use_cache": False}]
)
def test_the_rows_of_a_users_prompt_are_all_its_beams_and_answers(model, options):
    copies, seen = max(options.get("num_beams", 1), options.get("num_return_sequences", 1)), []

    def write(entering):
        seen.append(entering.rows.tolist())
        return 2 * entering.hidden

    with torch.no_grad(), attach(model, inject(sites(model).layers(1, 1), write, rows=[1])):
        model.generate(IDS, max_new_tokens=3, min_new_tokens=3, **{"do_sample": False, **options})
        with (
            pytest.raises(ReattendError, match="row 2 does not exist .* rows 0 to 1"),
            attach(model, inject(sites(model).layers(2, 2), write, rows=[2])),
        ):
            model.generate(IDS, max_new_tokens=3, **{"do_sample": False, **options})
        seen.pop()
        model(IDS)
    assert seen == [[False] * copies + [True] * copies] * 3 + [[False, True]]


def refused(model, match, where=None, run=None, **options):
    with pytest.raises(ReattendError, match=match):
        write = options.pop("write", lambda entering: entering.hidden)
        with attach(model, inject(sites(model) if where is None else where, write, **options)):
            (run or (lambda: logits(model)))()
    assert hooks_on(model) == 0


def test_refusals(model):
    refused(model, "names a branch of a denoiser's batch", rows="conditional")
    refused(model, "rows must be", rows=[])
    refused(model, "rows must be", rows=[-1])
    refused(model, "rows must be", rows="")
    refused(model, "row 2 does not exist .* rows 0 to 1", rows=[2])
    refused(model, 'at must be "layer" or "attention"', at="block")
    refused(model, "no attention site", where=sites(model).stack("decoder").kind("cross"))
    refused(model, "must keep its shape", write=lambda entering: entering.hidden[:, :1])
    refused(model, "no tensor 'text'", write=lambda entering: {"text": entering.hidden})
    refused(model, "changed an input in place", write=lambda entering: entering.hidden.requires_grad_(False).add_(1))
    with torch.inference_mode():
        refused(model, "changed an input in place", write=lambda entering: entering.hidden.add_(1), run=lambda: model(IDS))
    refused(model, "rows must be", rows=torch.tensor([0, 1]))
    refused(model, "rows must be", rows=1)
    for answer in (5, [1], {"hidden_states": None}):
        refused(model, "its function must return hidden states", write=lambda entering, answer=answer: answer)
    unet, inputs = tiny_denoisers.build("UNet2DConditionModel")
    where = sites(unet).stack("denoiser.mid")
    with pytest.raises(ReattendError, match="row 7 does not exist"), attach(unet, inject(where, lambda e: None, rows=[7])):
        unet(**inputs)


@pytest.mark.parametrize("rows", [[1], "conditional"])
def test_rows_of_a_block_that_takes_its_tokens_first_are_refused(rows):
    from denoiser_classes import BUILDERS

    torch.manual_seed(0)
    model, inputs = BUILDERS["ErnieImageTransformer2DModel"]()
    with torch.no_grad(), named("conditional"):
        plain = model(**inputs)[0]
        with attach(model, inject(sites(model), lambda entering: 2 * entering.hidden)):  # all rows need no axis
            model(**inputs)
        write = inject(sites(model), lambda entering: 2 * entering.hidden, rows=rows)
        with pytest.raises(UnsupportedError, match="no axis can be told to be the 2 rows of the batch"), attach(model, write):
            model(**inputs)
        assert torch.equal(model(**inputs)[0], plain) and hooks_on(model) == 0
