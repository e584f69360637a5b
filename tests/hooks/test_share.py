"""The share door: what a site is given of other rows, steps and runs is what hand-written hooks find there, and nothing stays."""

import gc

import pytest
import reattend
import torch
from diffusers import WanTransformer3DModel
from reattend.hooks import Edits, Guide, Plan, Share, attach, sites
from reattend.interventions import AppendKV, HeadGain, Instead, ReattendError, ScaleQuery, Second, TakeOutput, UnsupportedError
from tiny_denoisers import build
from tiny_llama import tiny_llama, traces
from tiny_runs import STEPS, draw, flux, stable_diffusion, stable_diffusion_3

# steps that only look
pytestmark = pytest.mark.filterwarnings("ignore:recipe .* never acted")


def seeing(model):
    """The sites at which image tokens see each other."""
    return sites(model).stack("denoiser").kind("self", "joint")


def append(call, shared):
    return AppendKV(key=shared.key, value=shared.value)


def watched(model, seen):
    """A session that notes the keys of every call: {(step, site): [keys of its calls]}."""

    def note(call):
        seen.setdefault((call.clock.step, call.site.name), []).append((call.key.clone(), call.clock))

    return attach(model, [Plan("watch", [Edits(seeing(model), note)])])


@torch.no_grad()
def predict(model, inputs):
    return model(**inputs)[0]


def test_other_rows_of_each_half_and_of_a_guides_branch():
    """Row 0 of each part is given to all rows of the same part, in one call that has all of them."""
    pipe, call, _, _ = stable_diffusion()
    found = []

    def look(at, shared):
        found.append((at, shared))

    table = seeing(pipe)
    steps = [Share(table, look, rows=lambda n: [0] * n), Guide("further", 1.0)]
    with attach(pipe, [Plan("look", steps)]):
        draw(pipe, call)
    assert len(found) == STEPS * len(table)
    for at, shared in found:
        # [negative of two prompts, both prompts, copies of both]
        assert shared.rows.tolist() == [0, 0, 2, 2, 4, 4]
        assert torch.equal(shared.key, at.key[shared.rows]) and torch.equal(shared.value, at.value[shared.rows])
        assert shared.query is None and shared.output is None


def test_rows_of_another_part():
    pipe, call, _, _ = stable_diffusion()
    given = []
    share = Share(seeing(pipe), lambda at, shared: given.append(shared.rows.tolist()), part="conditional")
    with attach(pipe, [Plan("look", [share])]):
        draw(pipe, call)
    assert given and all(rows == [2, 3, 2, 3] for rows in given)


def test_appended_rows_are_those_of_a_hand_written_attention():
    model, inputs = build("FluxTransformer2DModel")
    table, outputs = seeing(model), []

    def use(call, shared):
        image = call.columns("image")[0]
        assert torch.equal(shared.key, call.key[[1, 1]][:, :, image])
        key, value = (torch.cat([own, other], dim=2) for own, other in ((call.key, shared.key), (call.value, shared.value)))
        wanted = torch.nn.functional.scaled_dot_product_attention(call.query, key, value)
        call.then.append(lambda output: outputs.append((output, wanted)))
        return append(call, shared)

    with attach(model, [Plan("append", [Share(table, use, rows=lambda n: [1] * n, role="image")])]) as session:
        predict(model, inputs)
    assert len(outputs) == 4 and session.stats == {"append": {site.name: 1 for site in table}}
    for found, wanted in outputs:
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make", [stable_diffusion, flux], ids=["one batch", "two calls"])
def test_an_earlier_step_by_half(make):
    """Guidance in one batch and in two calls: each half is given what the same half had one step before."""
    pipe, call, _, _ = make()
    keys, given = {}, []

    def look(at, shared):
        given.append((at.clock.step, at.site.name, at.clock, shared))

    table = seeing(pipe)
    share = Share(table, look, of="step", keep=("key",))
    with watched(pipe, keys), attach(pipe, [Plan("look", [share])]) as session:
        draw(pipe, call)
        most = share.bytes
        assert session.applied == 0  # nothing was edited
    assert len(given) == sum(len(calls) for (step, _), calls in keys.items() if step)
    for step, name, clock, shared in given:
        assert shared.step == step - 1 and shared.value is None
        wanted = [key for key, when in keys[step - 1, name] if list(when.branches) == list(clock.branches)]
        assert len(wanted) == 1 and torch.equal(shared.key, wanted[0])
    size = sum(key.numel() * key.element_size() for (step, _), calls in keys.items() if step for key, _ in calls)
    assert most == size  # of two steps of three: the last one, and the one before it
    gc.collect()
    assert share.bytes == 0


@pytest.mark.parametrize("name", ["Mochi, a call for each sample", "Wan, a call to the text and one to a picture"])
def test_sites_of_several_calls_are_given_what_the_same_call_had(name):
    if name.startswith("Mochi"):
        model, inputs = build("MochiTransformer3DModel")
        chosen = seeing(model).kind("joint").where(lambda site: site.stack == "denoiser")
    else:
        torch.manual_seed(0)
        model = WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8, freq_dim=16,
            ffn_dim=32, num_layers=2, rope_max_seq_len=32, image_dim=8, added_kv_proj_dim=24,
        ).eval()  # fmt: skip
        inputs = {**build("WanTransformer3DModel")[1], "encoder_hidden_states_image": torch.randn(2, 257, 8)}
        chosen = sites(model).stack("denoiser").kind("cross")
    keys, given = {}, []

    def note(call):
        keys.setdefault((call.clock.step, call.site.name), []).append(call.key.clone())

    def look(call, shared):
        given.append((shared.step, call.site.name, len(keys.get((call.clock.step, call.site.name), ())), shared.key))

    plan = Plan("look", [Share(chosen, look, of="step"), Edits(chosen, note)])
    with reattend.rows("conditional"), attach(model, [plan]):
        for number, time in enumerate((500, 400, 300)):
            text = inputs["encoder_hidden_states"] * (1 + number)
            predict(model, {**inputs, "timestep": torch.tensor([time, time]), "encoder_hidden_states": text})
    assert len(given) == 2 * 2 * len(chosen)
    for step, site, number, key in given:
        assert torch.equal(key, keys[step, site][number])


def test_outputs_of_some_steps_stand_in_at_the_others():
    """FreeSwim's cache: attention is computed at every other step, and its output serves at the next one."""
    pipe, call, _, _ = stable_diffusion_3()
    computed = []

    def reuse(at, shared):
        if at.clock.step % 2:
            return Instead(compute=lambda x, scale: shared.output)
        return None

    def note(at):
        at.then.append(lambda output: computed.append((at.clock.step, at.site.name, output)))

    share = Share(seeing(pipe), reuse, of="step", keep=("output",), when=lambda clock: clock.step % 2 == 0)
    with attach(pipe, [Plan("reuse", [share]), Plan("note", [Edits(seeing(pipe), note)])]) as session:
        draw(pipe, call, num_inference_steps=4)
    found = {(step, name): output for step, name, output in computed}
    for step in (1, 3):
        for site in share.sites:
            assert torch.equal(found[step, site.name], found[step - 1, site.name])
    assert set(session.stats["reuse"].values()) == {2}


def test_a_reference_run_gives_its_steps_to_the_next_ones():
    pipe, call, _, _ = stable_diffusion()
    keys, given = {}, []

    def look(at, shared):
        given.append((at.clock.step, at.site.name, shared))
        return Second(key=shared.key, value=shared.value, combine=0.5)

    call = {**call, "prompt": ["a fox"]}
    base, other = draw(pipe, call), draw(pipe, {**call, "prompt": ["a map", "a cat"]})
    share = Share(seeing(pipe), look, of="run")
    with watched(pipe, keys):
        draw(pipe, call)
    with attach(pipe, [Plan("style", [share])]):
        assert torch.equal(draw(pipe, call), base) and not given and share.bytes > 0
        kept = share.bytes
        styled = draw(pipe, {**call, "prompt": ["a map", "a cat"]})
        assert share.bytes == kept and len(given) == STEPS * len(share.sites)
        for step, name, shared in given:
            [(key, _)] = keys[step, name]  # [negative, prompt]: one picture's, for each of two
            assert torch.equal(shared.key, key[[0, 0, 1, 1]])
        assert (styled - other).abs().max() > 1e-3
        with pytest.raises(ReattendError, match=f"reference run had {STEPS} steps, this one has 2"):
            draw(pipe, call, num_inference_steps=2)
        assert torch.equal(draw(pipe, {**call, "prompt": ["a map", "a cat"]}), styled)
    gc.collect()
    assert share.bytes == 0 and torch.equal(draw(pipe, call), base)


def test_a_reference_run_that_was_left_is_followed_by_another_one():
    pipe, call, _, _ = stable_diffusion()
    share = Share(seeing(pipe), append, of="run", offload=True)

    def leave(pipe, step, timestep, kwargs):
        raise KeyboardInterrupt

    base = draw(pipe, call)
    with attach(pipe, [Plan("style", [share])]) as session:
        with pytest.raises(KeyboardInterrupt):
            draw(pipe, call, callback_on_step_end=leave)
        assert torch.equal(draw(pipe, call), base) and session.applied == 0
        assert not torch.equal(draw(pipe, call), base)


def test_a_reference_run_of_which_some_steps_are_kept():
    pipe, call, _, _ = stable_diffusion()
    given = []

    def look(at, shared):
        given.append(shared.step)
        return append(at, shared)

    share = Share(seeing(pipe), look, of="run", when=lambda clock: clock.step < STEPS - 1)
    base = draw(pipe, call)
    with attach(pipe, [Plan("style", [share])]):
        assert torch.equal(draw(pipe, call), base) and not given
        assert not torch.equal(draw(pipe, call), base)
        assert given == [step for step in range(STEPS - 1) for _ in share.sites]
        with pytest.raises(ReattendError, match=f"reference run had {STEPS} steps, this one has 2"):
            draw(pipe, call, num_inference_steps=2)


def test_nothing_is_left_beside_another_session():
    pipe, call, _, _ = stable_diffusion()
    base = draw(pipe, call)
    with attach(pipe, [Plan("other", [Edits(seeing(pipe), lambda at: HeadGain(factor=1 + 1e-6))])]):
        wanted, before = draw(pipe, call), traces(pipe.unet)
        share = Share(seeing(pipe), append, of="step")
        with attach(pipe, [Plan("earlier", [share])]):
            draw(pipe, call)
            assert share.bytes > 0
        gc.collect()
        assert share.bytes == 0 and traces(pipe.unet) == before and torch.equal(draw(pipe, call), wanted)
    assert torch.equal(draw(pipe, call), base)


def test_restored_after_an_exception():
    model, inputs = build("SD3Transformer2DModel")
    base, before = predict(model, inputs), traces(model)

    def fail(call, shared):
        raise ZeroDivisionError

    with attach(model, [Plan("fail", [Share(seeing(model), fail)])]), pytest.raises(ZeroDivisionError):
        predict(model, inputs)
    assert traces(model) == before and torch.equal(predict(model, inputs), base)


def test_some_heads_and_rows_and_taken_outputs():
    model, inputs = build("SD3Transformer2DModel")
    table, outputs = seeing(model)[:1], []

    def take(call, shared):
        call.then.append(outputs.append)
        return TakeOutput(batch=shared.rows, rows=call.query_rows("image"), heads=[1])

    with attach(model, [Plan("plain", [Edits(table, lambda call: call.then.append(outputs.append))])]):
        predict(model, inputs)
    with attach(model, [Plan("take", [Share(table, take, rows=lambda n: [0, 0])])]):
        predict(model, inputs)
    plain, taken = outputs
    image = slice(0, 16)
    assert torch.equal(taken[1, 1, image], plain[0, 1, image])
    assert torch.equal(taken[:, 0], plain[:, 0]) and torch.equal(taken[1, 1, 16:], plain[1, 1, 16:])


def test_refusals():
    model, inputs = build("UNet2DConditionModel")
    table = seeing(model)
    for wrong, words in (
        ({"of": "row"}, 'of must be "batch", "step" or "run"'),
        ({"keep": ["keys"]}, "keep must name some of query, key, value, got"),
        ({"keep": ["output"]}, "keep must name some of query, key, value, got"),
        ({"keep": "key"}, "keep must name"),
        ({"of": "step", "steps": 0}, "steps must be 1 or more"),
    ):
        with pytest.raises(ReattendError, match=words):
            Share(table, append, **wrong)
    llama = tiny_llama()
    with pytest.raises(UnsupportedError, match="this model has no denoiser"):
        attach(llama, [Plan("x", [Share(sites(llama), append)])])
    mochi, _ = build("MochiTransformer3DModel")
    with pytest.raises(UnsupportedError, match="attends for each sample alone"):
        attach(mochi, [Plan("x", [Share(seeing(mochi), append)])])
    for rows, words in (
        (lambda n: [0], r"rows\(2\) must be 2 numbers from 0 to 1, got \[0\]"),
        (lambda n: [0, 2], "from 0 to 1"),
    ):
        with attach(model, [Plan("x", [Share(table, append, rows=rows)])]), pytest.raises(ReattendError, match=words):
            predict(model, inputs)


def test_a_part_that_was_not_kept_is_an_error():
    model, inputs = build("UNet2DConditionModel")
    one = {name: value[:1] if value.dim() else value for name, value in inputs.items()}
    share = Share(seeing(model), lambda call, shared: ScaleQuery(factor=1.5), of="step")
    later = {**inputs, "timestep": torch.tensor(400)}
    with attach(model, [Plan("x", [share])]):
        with reattend.rows("conditional"):
            predict(model, one)
        with reattend.rows("conditional"):
            predict(model, later)  # one kept row serves both
        three = {name: value[[0, 1, 1]] if value.dim() else torch.tensor(300) for name, value in inputs.items()}
        with reattend.rows("conditional"), pytest.raises(ReattendError, match="3 rows cannot be given 2 kept ones"):
            predict(model, three)
        with reattend.rows("unconditional"), pytest.raises(ReattendError, match="nothing was kept of unconditional rows"):
            predict(model, {**one, "timestep": torch.tensor(300)})


def test_only_at_the_calls_that_are_asked_for():
    """Elsewhere nothing is kept, and nobody is asked."""
    pipe, call, _, _ = stable_diffusion()
    asked, kept = [], []
    places: set[int] = set()
    wishes = (lambda keys: True, lambda keys: keys == min(places), lambda keys: False)
    for wanted in wishes:
        asked.clear()
        share = Share(
            seeing(pipe), lambda at, shared: asked.append(at.num_keys), of="step", at=lambda at, w=wanted: w(at.num_keys)
        )
        held = []
        with attach(pipe, [Plan("share", [share])]):
            draw(pipe, call, callback_on_step_end=lambda *_, s=share, h=held: h.append(s.bytes) or {})
        kept.append(held)
        places |= set(asked)
        assert set(asked) == {keys for keys in places if wanted(keys)}
    assert len(places) > 1 and kept[0][0] > kept[1][0] > 0 and not any(kept[2])
