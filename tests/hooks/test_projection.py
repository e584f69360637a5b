"""The projection door: queries, keys and values as the model projects them, against what attention then sees and against hooks by hand."""

from __future__ import annotations

import pytest
import tiny_denoisers
import torch
from reattend.hooks import Capture, Guide, Plan, Probe, Projection, Rotary, attach, sites
from reattend.hooks import rows as named
from reattend.hooks.sites.projections import last_module
from reattend.interventions import ProjectKey, ReattendError, UnsupportedError
from tiny_llama import IDS, hooks_on, logits, tiny_llama

ALL = ("query", "key", "value")
JOINED = {
    "UNet2DConditionModel", "UNetMotionModel", "SD3Transformer2DModel", "SD3Transformer2DModel (3.5)", "PixArtTransformer2DModel",
    "AuraFlowTransformer2DModel",
}  # fmt: skip
FAMILIES = [name for name in tiny_denoisers.DENOISERS if not name.startswith("Mochi")]


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


def projection(where, edit, **options):
    return [Plan("test", [Projection(where, edit, **options)])]


def supported(model):
    return sites(model).where(lambda s: s.supported and s.stack != "denoiser.pool")


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_read_is_what_attention_sees(family):
    """Values, and queries and keys where no RoPE lies between, are the calls'; RoPE keeps the length of every pair, so of every vector."""
    model, inputs = tiny_denoisers.build(family)
    where, read, called = supported(model), {}, {}

    def reader(seen):
        read.setdefault((seen.site.name, seen.which), []).append((seen.added, seen.states))

    def look(call, _):
        called[call.site.name] = dict(zip(ALL, (call.query, call.key, call.value), strict=True))

    steps = [Projection(where, reader=reader, of=ALL), Capture(where, look)]
    with torch.no_grad():
        plain = model(**inputs)[0]
        with attach(model, [Plan("read", steps)]):
            assert torch.equal(model(**inputs)[0], plain)
    assert called.keys() == {s.name for s in where}
    for name, call in called.items():
        for which, expected in call.items():
            parts = [states for _, states in sorted(read[name, which], key=lambda part: part[0])]
            orders = [torch.cat(parts, dim=2), torch.cat(parts[::-1], dim=2)]
            orders = [o.repeat_interleave(expected.shape[1] // o.shape[1], dim=1) for o in orders]
            if which != "value" and family not in JOINED:
                # Lumina 2's RoPE makes padded text zero
                orders, expected = [o.norm(dim=-1) * expected.any(dim=-1) for o in orders], expected.norm(dim=-1)
                assert any(torch.allclose(o, expected, atol=1e-5) for o in orders), (name, which)
            else:
                assert any(torch.equal(o, expected) for o in orders), (name, which)


@pytest.mark.parametrize("which", ALL)
def test_an_edit_on_a_language_model_is_a_hooks_by_hand_and_stays_in_the_cache(model, which):
    base, heads = logits(model), 4 if which == "query" else 2
    shapes, options = [], {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}

    def edit(seen):
        shapes.append((seen.which, seen.states.shape, seen.places("generated").any().item()))
        new = seen.states.clone()
        new[1, 1] *= 3
        return new

    with torch.no_grad(), attach(model, projection(sites(model).layers(1, 1), edit, of=[which])) as session:
        found = logits(model)
        assert session.stats == {"test": {"model.layers.1.self_attn": 1}}
        text = model.generate(IDS, **options)
    assert shapes[0] == (which, (2, heads, 12, 16), False) and shapes[-1] == (which, (2, heads, 1, 16), True)
    factor = torch.ones(2, 1, heads, 1)
    factor[1, :, 1] = 3
    target = getattr(model.model.layers[1].self_attn, f"{which[0]}_proj")
    hook = target.register_forward_hook(lambda _, args, out: (out.unflatten(2, (heads, -1)) * factor).flatten(2))
    with torch.no_grad():
        torch.testing.assert_close(logits(model), found, atol=0, rtol=0)
        assert torch.equal(model.generate(IDS, **options), text)
    hook.remove()
    assert torch.equal(found[0], base[0]) and not torch.allclose(found[1], base[1])
    assert torch.equal(logits(model), base) and hooks_on(model) == 0


@pytest.mark.parametrize("family", ["FluxTransformer2DModel", "SD3Transformer2DModel (3.5)", "QwenImageTransformer2DModel"])
def test_both_streams_of_a_joint_block(family):
    model, inputs = tiny_denoisers.build(family)
    met = []

    def edit(seen):
        met.append((seen.which, seen.added, seen.places("text").any().item(), seen.places("image").any().item()))
        return 2 * seen.states if seen.added else None

    where = sites(model).layers(0, 0).where(lambda s: not s.stack.endswith((".single", ".dual")))
    with torch.no_grad():
        plain = model(**inputs)[0]
        with attach(model, projection(where, edit, of=ALL)):
            found = model(**inputs)[0]
        block = sites(model).module(where[0])
        last = {"query": "norm_added_q", "key": "norm_added_k"}
        targets = [getattr(block, last.get(w, "add_v_proj")) for w in ALL]
        hooks = [target.register_forward_hook(lambda _, args, out: 2 * out) for target in targets]
        expected = model(**inputs)[0]
        for hook in hooks:
            hook.remove()
    assert sorted(met) == sorted((which, added, added, not added) for which in ALL for added in (False, True))
    assert torch.equal(found, expected) and not torch.allclose(found, plain)


def test_rows_of_a_guides_branch_alone():
    model, inputs = tiny_denoisers.build("HunyuanDiT2DModel")
    where = sites(model).layers(0, 0).kind("self").stack("denoiser").where(lambda s: s.name.endswith("attn1"))

    def edit(seen):
        rows = seen.clock.rows("weak", seen.states.shape[0])
        return torch.where(rows[:, None, None, None], seen.states.mean(dim=2, keepdim=True), seen.states)

    with torch.no_grad(), named("conditional"):
        plain = model(**inputs).sample
        with attach(model, [Plan("weak", [Projection(where, edit, of=["query"]), Guide("weak", 2.0)])]):
            found = model(**inputs).sample
        norm = sites(model).module(where[0]).norm_q
        hook = norm.register_forward_hook(lambda _, args, out: out.mean(dim=2, keepdim=True).expand_as(out))
        weak = model(**inputs).sample
        hook.remove()
    # the other channels are its variance, which is not guided
    found, plain, weak = (x.chunk(2, dim=1)[0] for x in (found, plain, weak))
    torch.testing.assert_close(found, plain + 2 * (plain - weak), atol=1e-5, rtol=1e-5)


def test_before_and_after_the_norm():
    model, inputs = tiny_denoisers.build("WanTransformer3DModel")
    where = sites(model).layers(0, 0).kind("self")
    found = {}
    for normed in (True, False):

        def reader(seen, normed=normed):
            found[normed] = seen.states

        with torch.no_grad(), attach(model, [Plan("read", [Projection(where, reader=reader, of=["query"], normed=normed)])]):
            model(**inputs)
    norm = sites(model).module(where[0]).norm_q
    flat = {n: x.transpose(1, 2).flatten(2) for n, x in found.items()}
    assert torch.equal(norm(flat[False]), flat[True]) and not torch.allclose(flat[False], flat[True])


def test_the_last_of_several_knows_the_others(model):
    met = []

    def reader(seen):
        met.append({w: w in seen.known for w in ALL})
        if seen.which == "value":
            assert seen.query.shape[2] == seen.key.shape[2] == seen.value.shape[2] == 12
        elif seen.which == "query":
            with pytest.raises(ReattendError, match="its key is not known when its query is projected"):
                assert seen.key is None

    with attach(model, [Plan("read", [Projection(sites(model).layers(0, 0), reader=reader, of=ALL)])]):
        logits(model)
        logits(model)
    assert met == [dict(zip(ALL, known, strict=True)) for known in ((1, 0, 0), (1, 1, 0), (1, 1, 1))] * 2


def test_a_probe_reads_projections_and_ends_with_the_last(model):
    met, ran = [], []
    hook = model.model.layers[2].register_forward_pre_hook(lambda *_: ran.append(2))
    reader = Projection(sites(model).layers(0, 1), reader=lambda seen: met.append(seen.which), of=("query", "value"))
    with attach(model, [Plan("probe", [Probe([reader])])]):
        logits(model)
    hook.remove()
    assert met == ["query", "value"] * 2 and ran == [2]


def test_errors_and_interrupts_leave_nothing(model):
    base = logits(model)
    for error in (ValueError, KeyboardInterrupt):

        def edit(seen, error=error):
            raise error

        with pytest.raises(error), attach(model, projection(sites(model), edit, of=ALL)):
            logits(model)
        assert torch.equal(logits(model), base) and hooks_on(model) == 0


def test_gradients_pass_through(model):
    shift = torch.zeros(16, requires_grad=True)
    with attach(model, projection(sites(model).layers(1, 1), lambda seen: seen.states + shift, of=["value"])):
        model(IDS).logits.sum().backward()
    assert shift.grad is not None and bool(shift.grad.any())


def test_refusals(model):
    def keep(seen):
        return seen.states

    for of in ("key", (), ("keys",), ("key", "key")):
        with pytest.raises(ReattendError, match='of must name some of "query", "key" and "value"'):
            Projection(sites(model), keep, of=of)
    with (
        pytest.raises(ReattendError, match="must keep its shape"),
        attach(model, projection(sites(model), lambda s: s.states[:1])),
    ):
        logits(model)
    for answer in (5, [1]):
        wrong = projection(sites(model), lambda s, answer=answer: answer)
        with pytest.raises(ReattendError, match="must return states, ProjectKey or None"), attach(model, wrong):
            logits(model)
    for step in (
        Projection(sites(model), reader=lambda s: s.states.detach().mul_(2)),
        Projection(sites(model), lambda s: s.states.detach().mul_(2)),
    ):
        with pytest.raises(ReattendError, match="changed a key in place"), attach(model, [Plan("test", [step])]):
            logits(model)
    moved = ProjectKey(projection=torch.eye(16))
    wrong = projection(sites(model), lambda s: moved, of=["query"])
    with pytest.raises(ReattendError, match="ProjectKey changes keys, and this is its query"), attach(model, wrong):
        logits(model)
    flux, _ = tiny_denoisers.build("FluxTransformer2DModel")
    flux.fuse_qkv_projections()
    with pytest.raises(UnsupportedError, match="projections fused: call unfuse_qkv_projections"):
        attach(flux, projection(sites(flux), keep))
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32))
    with pytest.raises(UnsupportedError, match="has no q_proj of its own"):
        attach(gpt, projection(sites(gpt), keep, of=["query"]))


def built(name):
    from denoiser_classes import BUILDERS

    torch.manual_seed(0)
    model, inputs = BUILDERS[name]()
    return model.eval().requires_grad_(False), inputs


def test_what_is_added_to_cross_attention_are_images_to_look_at():
    model, inputs = built("WanTransformer3DModel (image)")
    met = []

    def reader(seen):
        met.append((seen.which, seen.added, *(seen.places(r).all().item() for r in ("text", "reference") if r in seen.tokens)))

    where = sites(model).kind("cross").layers(0, 0)
    with torch.no_grad(), attach(model, [Plan("read", [Projection(where, reader=reader, of=("key", "value"))])]):
        model(**inputs)
    assert {(which, added) for which, added, *_ in met} == {(w, a) for w in ("key", "value") for a in (False, True)}
    assert all(roles[-1] is True if added else roles[0] is True for _, added, *roles in met)


def test_norms_of_every_stream_are_found_or_refused():
    model, _ = built("HiDreamImageTransformer2DModel")
    attention = sites(model).module(sites(model)[0])
    for which, norm in (("query", "q_rms_norm"), ("key", "k_rms_norm")):
        for added, name in ((False, norm), (True, f"{norm}_t")):
            assert last_module(attention, which, added=added) is getattr(attention, name)
    assert last_module(attention, "value", added=True) is attention.to_v_t

    class Odd:
        def __call__(self, attn, hidden):
            return attn.norm_of_its_own(attn.to_q(hidden))

    odd = torch.nn.Module()
    odd.to_q, odd.norm_of_its_own, odd.processor = torch.nn.Linear(2, 2), torch.nn.LayerNorm(2), Odd()
    with pytest.raises(ReattendError, match="has a norm_of_its_own of which it is not known"):
        last_module(odd, "query")


@pytest.mark.filterwarnings("ignore:recipe .* never acted")
@pytest.mark.parametrize("door", ["projection", "rotary"])
@pytest.mark.parametrize("how", ["an adapter", "fused"])
def test_other_projections_than_when_the_session_began(how, door):
    """A new run of a denoiser is refused, whose attention sees more than the hooks would."""
    model, inputs = tiny_denoisers.build("FluxTransformer2DModel")
    table = sites(model)
    step = Projection(table, reader=lambda seen: None, of=("query",)) if door == "projection" else Rotary(table)

    def at(*times):
        with torch.no_grad():
            for time in times:
                model(**{**inputs, "timestep": torch.tensor([time, time])})

    with attach(model, [Plan("x", [step])]):
        at(0.9, 0.5, 0.9)
        if how == "fused":
            model.fuse_qkv_projections()
        else:
            attention = model.transformer_blocks[1].attn
            attention.norm_q = torch.nn.Sequential(attention.norm_q)
        with pytest.raises(ReattendError, match="another module that projects its query than when the session began"):
            at(0.5, 0.9)
