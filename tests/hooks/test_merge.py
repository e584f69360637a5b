"""The merge door against hand-written loops: in encoders, with all tokens given back, inside LLaVA, and around single modules."""

from __future__ import annotations

import pytest
import reattend
import tiny_denoisers
import tiny_encoders
import tiny_models
import torch
from reattend.hooks import Capture, Merge, Plan, attach, sites
from reattend.hooks.trackers.caches import cache_name, cache_of
from reattend.interventions import ReattendError, ReattendWarning, UnsupportedError, reference
from reattend.interventions.families.merging import Regroup, into_nearest, taken
from tiny_encoders import ENCODERS, features, inputs_of, pixels
from tiny_llama import traces

NAMES = ["vit", "deit", "clip_vision", "siglip_vision", "dinov2", "dinov2_registers", "ijepa"]
KEPT = 9


def build(name):
    return ENCODERS[name][0]()


def largest(hidden, first, kept=KEPT, fuse=False):
    """The first tokens and those with the largest states, in their order; the others become one, with weights of their own."""
    norms = hidden.float().norm(dim=-1)
    norms[:, :first] = float("inf")
    index = norms.topk(kept + first, dim=1).indices.sort(dim=1).values
    regroup = Regroup.keep(index, hidden.shape[1])
    if not fuse:
        return regroup
    groups = torch.where(regroup.groups < 0, kept + first, regroup.groups)
    weights = torch.where(regroup.groups < 0, 0.1 + 0.01 * torch.arange(hidden.shape[1]), 1.0)
    return Regroup(torch.nn.functional.pad(index, (0, 1), value=-1), groups, weights)


def steps_of(model, name, layers=(1, 2), fuse=False, table=None, **more):
    table = sites(model).stack("vision").kind("self") if table is None else table
    first = len(ENCODERS[name][1])

    def reduce(passing):
        return largest(passing.hidden, first, KEPT - passing.site.layer, fuse)

    return [Merge(table.only(layers), reduce, **more)]


def layers_of(model):
    table = sites(model).stack("vision").kind("self")
    return [model.get_submodule(site.name.rpartition(".")[0]) for site in table]


def part(layer, *names):
    return next((getattr(layer, name) for name in names if hasattr(layer, name)), torch.nn.Identity())


def first_half(layer, hidden):
    attention = part(layer, "self_attn", "attention")
    out = attention(part(layer, "layernorm_before", "layer_norm1", "norm1")(hidden), attention_mask=None)[0]
    return hidden + part(layer, "layer_scale1")(out)


def second_half(layer, hidden):
    out = layer.mlp(part(layer, "layernorm_after", "layer_norm2", "norm2")(hidden))
    return hidden + part(layer, "layer_scale2")(out)


@torch.no_grad()
def by_hand(model, name, entering, fuse=False):
    """States after each layer, merged after the attention of layers 1 and 2."""
    hidden, found = entering, []
    for number, layer in enumerate(layers_of(model)):
        hidden = first_half(layer, hidden)
        if number in (1, 2):
            hidden = merged_by_hand(hidden, len(ENCODERS[name][1]), KEPT - number, fuse)
        hidden = second_half(layer, hidden)
        found.append(hidden)
    return found


def merged_by_hand(hidden, first, kept, fuse):
    rows = []
    for row in hidden:
        norms = row.norm(dim=-1)
        stay = sorted([*range(first), *(norms[first:].topk(kept).indices + first).tolist()])
        gone = [i for i in range(len(row)) if i not in stay]
        new = [row[i] for i in stay]
        if fuse:
            new.append(sum((0.1 + 0.01 * i) * row[i] for i in gone))
        rows.append(torch.stack(new))
    return torch.stack(rows)


def hidden_states(model, **more):
    with torch.no_grad():
        return model(**inputs_of(model), output_hidden_states=True, **more).hidden_states


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_encoders_run_on_fewer_tokens(name, fuse):
    model = build(name)
    plain, before = features(model), traces(model)
    entering = hidden_states(model)[0]  # transformers' own hooks are there from now on, before ours
    before = traces(model)
    with attach(model, [Plan("fewer", steps_of(model, name, fuse=fuse))]) as session:
        states = hidden_states(model)
        features(model)
    first, more = len(ENCODERS[name][1]), int(fuse)
    assert [h.shape[1] - first for h in states[1:]] == [16, 8 + more, 7 + more, 7 + more]
    for found, wanted in zip(states[1:], by_hand(model, name, entering, fuse), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert list(session.stats["fewer"].values()) == [2, 2]
    assert traces(model) == before and torch.equal(features(model), plain)


def test_after_a_layer_and_with_its_roles():
    model = build("dinov2_registers")
    table, kept = sites(model).stack("vision"), {}
    look = Capture(table, lambda call, edits: kept.update({call.site.layer: call}))
    steps = steps_of(model, "dinov2_registers", (0, 2), fuse=True, place="layer")
    entering = hidden_states(model)
    with attach(model, [Plan("fewer", [*steps, look])]):
        states = hidden_states(model)
    wanted = largest(entering[1], 4, KEPT, True)
    assert torch.equal(states[1][:, :-1], taken(entering[1], wanted.index[:, :-1])), "what stays keeps its bits"
    torch.testing.assert_close(states[1], wanted.merge(entering[1]))
    call = kept[1]
    roles = {role: call.columns(role).sum(dim=1).tolist() for role in ("cls", "register", "patch", "merged", "padding")}
    assert roles == {"cls": [1, 1], "register": [3, 3], "patch": [9, 9], "merged": [1, 1], "padding": [0, 0]}
    assert call.tokens.grids == [] and kept[3].num_keys == 4 + 7 + 1


# -- sizes ---------------------------------------------------------------------------------------------------------------


def nearest(passing, count, first):
    """Token merging: patches at even places become part of those at odd ones."""
    places = torch.arange(first, passing.hidden.shape[1])
    return into_nearest(passing.hidden, places[::2], places[1::2], count, passing.size)


@pytest.mark.parametrize("materialise", [False, True])
@pytest.mark.parametrize("restore", [False, True])
def test_equal_tokens_weighed_by_size_are_as_before(restore, materialise, monkeypatch):
    """A picture of equal patches without positions: one token of size 16 is worth sixteen."""
    model = build("vit")
    model.vit.embeddings.position_embeddings.data[:, 1:] = 0.3
    inputs = {"pixel_values": torch.full((2, 3, 24, 24), 0.7)}
    if materialise:
        monkeypatch.setattr("reattend.hooks.steering.fused_as_it_is", reference)

    def reduce(passing):
        index = torch.tensor([[0, 1]]).expand(2, -1)
        groups = torch.tensor([[0, *[1] * 16]]).expand(2, -1)
        return Regroup(index, groups)

    plain = features(model, inputs)
    table = sites(model)
    for weigh in (True, False):
        with attach(model, [Plan("one", [Merge(table.only([0]), reduce, weigh=weigh, restore=restore)])]) as session:
            got = features(model, inputs)
            whole = model(**inputs, output_hidden_states=True).hidden_states[-1]
        assert session.stats["one"] == {table[0].name: 2} and whole.shape[1] == (17 if restore else 2)
        assert torch.allclose(got, plain, atol=1e-5) == weigh


def test_sizes_and_places_add_up():
    model, seen = build("deit"), []

    def reduce(passing):
        seen.append(passing)
        return nearest(passing, 3, 2)

    with attach(model, [Plan("three", [Merge(sites(model), reduce, weigh=True)])]):
        features(model)
    assert [p.hidden.shape[1] for p in seen] == [18, 15, 12, 9]
    assert all(p.size.sum(dim=1).tolist() == [18, 18] for p in seen) and seen[-1].size.max() > 1
    for passing in seen:  # a target keeps its place
        assert bool((passing.position >= 0).all()) and bool(
            ((passing.position < 2) == (passing.tokens.roles["cls"] | passing.tokens.roles["distillation"])).all()
        )
        assert bool((passing.tokens.roles.get("merged", torch.tensor(False)) == (passing.size > 1)).all())


def test_rows_that_keep_different_numbers_are_as_alone():
    model = build("dinov2")
    inputs = {"pixel_values": pixels(3)}
    counts = torch.tensor([3, 5, 7])

    def steps(rows, **more):
        return [Merge(sites(model).only([1]), lambda p: nearest(p, counts[rows], 1), **more)]

    with attach(model, [Plan("x", steps([0, 1, 2], weigh=True, restore=True))]):
        whole = model(**inputs).last_hidden_state
    assert whole.shape[1] == 17
    for row in range(3):
        with attach(model, [Plan("x", steps([row], weigh=True))]):
            alone = model(pixel_values=inputs["pixel_values"][row : row + 1]).last_hidden_state
        assert alone.shape[1] == 17 - int(counts[row])
        torch.testing.assert_close(whole[row, 0], alone[0, 0], atol=2e-5, rtol=1e-4)
    with attach(model, [Plan("x", steps([0, 1, 2]))]), pytest.raises(ReattendError, match="keep different numbers"):
        model(**inputs)


# -- all tokens given back -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit", "siglip_vision", "dinov2_registers"])
def test_given_back_after_every_layer(name):
    """Tokens that stay are as in the short run; one that left keeps the state in which it did."""
    model, first = build(name), len(ENCODERS[name][1])
    hidden_states(model)
    with attach(model, [Plan("fewer", steps_of(model, name))]):
        short = hidden_states(model)
    with attach(model, [Plan("fewer", steps_of(model, name, restore=True))]):
        whole = hidden_states(model)
    assert {h.shape[1] for h in whole} == {16 + first} and torch.equal(whole[1], short[1])
    middle = first_half(layers_of(model)[1], short[1])
    index = largest(middle, first, KEPT - 1).index
    torch.testing.assert_close(taken(whole[2], index), short[2])
    left = torch.ones(2, 16 + first, dtype=torch.bool).scatter(1, index, False)
    torch.testing.assert_close(whole[2][left], middle[left])
    torch.testing.assert_close(whole[4][left], middle[left])


def test_backbones_get_pictures():
    import transformers as T

    torch.manual_seed(0)
    config = T.Dinov2Config(**tiny_encoders.SIZES, mlp_ratio=2, out_features=["stage2", "stage4"])
    model = T.Dinov2Backbone(config).eval()
    plain = model(pixels()).feature_maps
    with pytest.raises(UnsupportedError, match="restore=True"):
        attach(model, [Plan("fewer", steps_of(model, "dinov2"))])
    with attach(model, [Plan("fewer", steps_of(model, "dinov2", restore=True))]), torch.no_grad():
        maps = model(pixels()).feature_maps
    assert [m.shape for m in maps] == [p.shape for p in plain] and not torch.allclose(maps[1], plain[1])


# -- inside a vision-language model --------------------------------------------------------------------------------------

PROMPTS = [[1, 5, 6, "image", 7, 8], [1, 9, "image", 10, 11, 12, "image", 13], [1, 14, 15]]
HOW = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}


def llava_steps(model, **more):
    """Two layers: 16 patches become 6 and one that stands for the rest, after the class token."""
    return [Merge(sites(model).stack("vision").only([0]), lambda p: largest(p.hidden, 1, 6, True), **more)]


@torch.no_grad()
def short_features(model, given):
    entering = model.model.vision_tower(given, output_hidden_states=True).hidden_states[0]
    hidden, tower = entering, layers_of(model)
    hidden = second_half(tower[0], merged_by_hand(first_half(tower[0], hidden), 1, 6, True))
    hidden = second_half(tower[1], first_half(tower[1], hidden))
    return model.model.multi_modal_projector(hidden[:, 1:])


@torch.no_grad()
def short_prompt(model, inputs):
    """Embeddings and mask of the prompts with seven features per image, padded on the left."""
    rows, at, found = [], 0, short_features(model, inputs["pixel_values"])
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        ids, pieces, i = ids[mask.bool()], [], 0
        while i < len(ids):
            if ids[i] == tiny_models.IMAGE:
                pieces.append(found[at])
                at, i = at + 1, i + 16
            else:
                pieces.append(model.get_input_embeddings()(ids[i : i + 1]))
                i += 1
        rows.append(torch.cat(pieces))
    longest = max(map(len, rows))
    embeds = torch.stack([torch.nn.functional.pad(row, (0, 0, longest - len(row), 0)) for row in rows])
    mask = torch.stack([torch.tensor([0] * (longest - len(row)) + [1] * len(row)) for row in rows])
    return embeds, mask


@torch.no_grad()
def generated_by_hand(model, inputs, tokens):
    """Logits [B, n, V] of a run over embeddings alone, with these tokens written."""
    embeds, mask = short_prompt(model, inputs)
    found = []
    for n in range(tokens.shape[1]):
        positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
        found.append(model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions).logits[:, -1])
        embeds = torch.cat([embeds, model.get_input_embeddings()(tokens[:, n : n + 1])], dim=1)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    return torch.stack(found, dim=1)


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"prompt_lookup_num_tokens": 2}])
def test_fewer_image_tokens_reach_the_decoder(options):
    tiny = tiny_models.build("llava")
    model, inputs = tiny.model, tiny.inputs(PROMPTS if "prompt_lookup_num_tokens" not in options else PROMPTS[:1])
    how = {**HOW, "suppress_tokens": [tiny_models.IMAGE], **options}
    plain, width = model.generate(**dict(inputs), **how), inputs["input_ids"].shape[1]
    lengths, maps, before = [], [], traces(model)
    look = Capture(
        sites(model).stack("decoder").only([3]), lambda call, e: (lengths.append(call.num_keys), maps.append(call.tokens))
    )
    with attach(model, [Plan("fewer", [*llava_steps(model), look])]) as session:
        out = model.generate(**dict(inputs), **how)
        passed = model(**inputs)
    new = out.sequences[:, width:]
    wanted = generated_by_hand(model, inputs, new)
    got = torch.stack(out.logits, dim=1)
    possible = (got > -900) & (wanted > -900)
    torch.testing.assert_close(got[possible], wanted[possible], atol=1e-4, rtol=1e-4)
    short = short_prompt(model, inputs)[0].shape[1]
    assert lengths[0] == short < width and passed.logits.shape[1] == short
    torch.testing.assert_close(passed.logits[:, -1], wanted[:, 0], atol=1e-4, rtol=1e-4)
    assert session.stats["fewer"] == {sites(model).stack("vision")[0].name: 2}
    assert maps[0].grids == [] and maps[0].roles["image"].sum(dim=1).tolist()[:2] == [7, 14][: len(inputs["input_ids"])]
    if "use_cache" not in options:
        assert cache_of(out).get_seq_length() == short + 3
    assert traces(model) == before
    again = model.generate(**dict(inputs), **how)
    assert torch.equal(torch.stack(again.logits), torch.stack(plain.logits))


def test_right_padding_and_rows_alone():
    tiny = tiny_models.build("llava")
    model, inputs = tiny.model, tiny.inputs(PROMPTS, "right")
    with attach(model, [Plan("fewer", llava_steps(model))]), torch.no_grad():
        logits = model(**inputs).logits
        alone = model(**tiny.inputs(PROMPTS[2:], "right") | {"pixel_values": None}).logits
    embeds, mask = short_prompt(model, inputs)
    with torch.no_grad():
        wanted = model(inputs_embeds=embeds, attention_mask=mask, position_ids=(mask.cumsum(dim=1) - 1).clamp_min(0)).logits
    for row in range(3):
        n = int(mask[row].sum())
        torch.testing.assert_close(logits[row, :n], wanted[row, -n:], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(alone[0], logits[2, :3], atol=1e-5, rtol=1e-4)


def test_each_image_keeps_as_many_as_it_needs():
    """Images of one batch are merged to different numbers: the prompts are as alone."""
    tiny = tiny_models.build("llava")
    model, counts, maps = tiny.model, torch.tensor([2, 5, 7]), []
    look = Capture(sites(model).stack("decoder").only([0]), lambda call, edits: maps.append(call.tokens))

    def steps(images):
        return [Merge(sites(model).stack("vision").only([0]), lambda p: nearest(p, counts[images], 1), weigh=True), look]

    inputs = tiny.inputs(PROMPTS[:2])
    with attach(model, [Plan("x", steps([0, 1, 2]))]), torch.no_grad():
        both = model(**inputs).logits
    assert maps[0].roles["image"].sum(dim=1).tolist() == [14, 20]
    second = {**tiny.inputs(PROMPTS[1:2]), "pixel_values": inputs["pixel_values"][1:]}
    for row, images, given in ((0, [0], tiny.inputs(PROMPTS[:1])), (1, [1, 2], second)):
        with attach(model, [Plan("x", steps(images))]), torch.no_grad():
            alone = model(**given).logits
        torch.testing.assert_close(both[row, -3:], alone[0, -3:], atol=2e-5, rtol=1e-4)


def test_what_cannot_go_on_with_fewer_tokens_says_so():
    """A static cache, a prompt in chunks, a further turn on a cache whose length generate takes for that of the text."""
    from transformers import DynamicCache

    tiny = tiny_models.build("llava")
    model, inputs = tiny.model, tiny.inputs(PROMPTS[:1])
    how = {"max_new_tokens": 2, "do_sample": False, "suppress_tokens": [tiny_models.IMAGE]}
    with attach(model, [Plan("fewer", llava_steps(model))]):
        with pytest.raises(UnsupportedError, match="a cache that grows"):
            model.generate(**dict(inputs), **how, cache_implementation="static")
        with pytest.raises(ReattendError, match="pass the whole prompt at once"):
            model.generate(**dict(inputs), **how, prefill_chunk_size=8)
        cache = DynamicCache(config=model.config.get_text_config())
        out = model.generate(**dict(inputs), **how, **{cache_name(model): cache})
        more = torch.cat([out, torch.tensor([[5, 6, 7]])], dim=1)
        with pytest.raises(ReattendError, match="9 fewer than its caller knows of"):
            model.generate(input_ids=more, attention_mask=torch.ones_like(more), **how, **{cache_name(model): cache})


def test_a_loop_and_features_made_beforehand():
    tiny = tiny_models.build("llava")
    model, inputs = tiny.model, tiny.inputs(PROMPTS[:1])
    with attach(model, [Plan("fewer", llava_steps(model))]), torch.no_grad():
        features = model.get_image_features(inputs["pixel_values"])
        assert [len(f) for f in features.pooler_output] == [16]
        rest = {key: value for key, value in inputs.items() if key != "pixel_values"}
        out = model(**rest, mm_encoder_outputs={"image": features}, use_cache=True)
        new = out.logits[:, -1:].argmax(dim=-1)
        after = model(input_ids=new, **{cache_name(model): cache_of(out)}).logits
    tokens = torch.cat([new, after.argmax(dim=-1)], dim=1)
    wanted = generated_by_hand(model, inputs, tokens)
    torch.testing.assert_close(out.logits[:, -1], wanted[:, 0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(after[:, -1], wanted[:, 1], atol=1e-4, rtol=1e-4)


def test_an_interrupt_in_the_decoder_leaves_nothing_to_the_next_prompt():
    """An encoder that generate runs beforehand belongs to no pass that was interrupted."""
    tiny = tiny_models.build("llava")
    model, inputs = tiny.model, tiny.inputs([[1, 5, "image", 6]])

    def fail(*_):
        raise KeyboardInterrupt

    with attach(model, [Plan("merge", llava_steps(model))]):
        wanted = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        hook = model.model.language_model.layers[1].register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            model.generate(**inputs, max_new_tokens=3, do_sample=False)
        hook.remove()
        assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False), wanted)


def test_beams():
    tiny = tiny_models.build("llava")
    model, inputs = tiny.model, tiny.inputs(PROMPTS[:2])
    how = {**HOW, "suppress_tokens": [tiny_models.IMAGE], "num_beams": 3, "output_logits": False, "output_scores": True}
    with attach(model, [Plan("fewer", llava_steps(model))]):
        both = model.generate(**dict(inputs), **how)
        alone = model.generate(**tiny.inputs(PROMPTS[:1]), **how)
    new = alone.sequences.shape[1] - tiny.inputs(PROMPTS[:1])["input_ids"].shape[1]
    assert torch.equal(both.sequences[0, -new:], alone.sequences[0, -new:])


@pytest.mark.parametrize("family", ["llava", "llava_next", "paligemma", "gemma3"])
def test_given_back_a_decoder_sees_as_many_features(family):
    tiny = tiny_models.build(family)
    model, inputs = tiny.model, tiny.inputs(PROMPTS[:2])
    first = int("llava" in family)
    with torch.no_grad():
        plain = model(**inputs).logits
    step = Merge(sites(model).stack("vision").kind("self").only([0]), lambda p: largest(p.hidden, first, 12), restore=True)
    with attach(model, [Plan("fewer", [step])]) as session, torch.no_grad():
        got = model(**inputs).logits
        model.generate(**dict(inputs), max_new_tokens=2)
    assert got.shape == plain.shape and (got - plain).abs().max() > 1e-5 and session.applied >= 2
    if family != "llava":
        with pytest.raises(UnsupportedError, match="restore=True"):
            attach(model, [Plan("fewer", [Merge(step.sites, step.reduce)])])


# -- around a module -----------------------------------------------------------------------------------------------------


def test_around_attention_of_a_denoiser():
    """As a processor written by hand does it: merged at the input of one module, each source gets its target's output."""
    model, inputs = tiny_denoisers.build("UNet2DConditionModel")
    table = sites(model).stack("denoiser.down").kind("self")[:1]
    module, seen, maps = table.module(table[0]), [], []

    def regroup(hidden, size=None):
        places = torch.arange(hidden.shape[1])
        return into_nearest(hidden, places[1::2], places[::2], hidden.shape[1] // 4, size)

    def reduce(passing):
        seen.append(passing)
        return regroup(passing.hidden)

    look = Capture(table, lambda call, edits: maps.append(call))
    with torch.no_grad():
        plain = model(**inputs).sample
        with attach(model, [Plan("around", [Merge(table, reduce, place="around"), look])]) as session:
            got = model(**inputs).sample
        own = module.forward
        module.forward = lambda hidden, *args, **kwargs: (
            lambda r: own(r.merge(hidden), *args, **kwargs).gather(1, r.groups[..., None].expand_as(hidden))
        )(regroup(hidden))
        wanted = model(**inputs).sample
        del module.forward
        assert torch.equal(model(**inputs).sample, plain)
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-6)
    assert session.stats["around"] == {table[0].name: 1} and not torch.allclose(got, plain)
    (passing,), (call,) = seen, maps
    assert (
        passing.clock.phase == "denoise"
        and passing.tokens.grids[0].shape[1] * passing.tokens.grids[0].shape[2] == passing.hidden.shape[1]
    )
    assert call.num_keys == passing.hidden.shape[1] * 3 // 4 and call.tokens.grids == [] and "merged" in call.tokens


def test_repeated_around_attention_is_as_before():
    model = build("vit")
    table = sites(model)

    def twice(passing):
        return Regroup(torch.arange(17).repeat_interleave(2).expand(2, -1))

    plain = features(model)
    with attach(model, [Plan("twice", [Merge(table.only([1, 2]), twice, place="around")])]) as session:
        got = features(model)
    torch.testing.assert_close(got, plain, atol=1e-5, rtol=1e-5)
    assert session.applied == 2


def test_around_with_rows_that_keep_different_numbers():
    """Fillers are seen by nobody."""
    model, counts = build("vit"), torch.tensor([2, 6])

    def step(rows):
        return [Merge(sites(model).only([1]), lambda p: nearest(p, counts[rows], 1), place="around")]

    with attach(model, [Plan("x", step([0, 1]))]):
        both = features(model)
    for row in (0, 1):
        with attach(model, [Plan("x", step([row]))]):
            alone = features(model, {"pixel_values": pixels()[row : row + 1]})
        torch.testing.assert_close(alone[0], both[row], atol=1e-5, rtol=1e-4)


# -- what may go wrong ---------------------------------------------------------------------------------------------------


class Stopped(BaseException):
    pass


@pytest.mark.parametrize("error", [ValueError, Stopped])
@pytest.mark.parametrize("place", ["attention", "layer", "around"])
def test_after_an_error_nothing_is_left(place, error):
    model = build("vit")
    plain, before = features(model), traces(model)
    steps = steps_of(model, "vit", (1,), place=place)
    last = layers_of(model)[2].mlp if place != "around" else layers_of(model)[1].attention

    def fails(*_):
        raise error("stop")

    with attach(model, [Plan("fewer", steps)]):
        wanted = features(model)
        broken = last.register_forward_pre_hook(fails)
        with pytest.raises(error):
            features(model)
        broken.remove()
        assert torch.equal(features(model), wanted), "the session goes on as it was"
    assert traces(model) == before and torch.equal(features(model), plain)


def test_where_all_tokens_stay_no_bit_changes():
    for place in ("attention", "layer", "around"):
        model = build("siglip_vision")
        plain = features(model)
        table = sites(model).stack("vision").kind("self")
        session = attach(model, [Plan("none", [Merge(table, lambda p: None, place=place, weigh=True, restore=True)])])
        assert torch.equal(features(model), plain) and session.applied == 0
        with pytest.warns(ReattendWarning, match="never acted"):
            session.remove()


def test_gradients_pass():
    model = build("vit")
    given = pixels().requires_grad_()
    with attach(model, [Plan("fewer", steps_of(model, "vit", fuse=True, weigh=True, restore=True))]):
        model(pixel_values=given).logits.square().sum().backward()
    assert given.grad.isfinite().all() and given.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("name", "steps", "said"),
    [
        ("sam", lambda table: [Merge(table.stack("vision"), len)], "cannot be merged between its layers"),
        ("dinov3", lambda table: [Merge(table, len)], "cannot be merged between its layers"),
        ("clip", lambda table: [Merge(table.stack("text_encoder"), len)], "text_model.*cannot be merged"),
        ("vit", lambda table: [Merge(table[:1], len), Merge(table[1:2], len, place="layer")], "both merge tokens"),
    ],
)
def test_refused_when_a_session_begins(name, steps, said):
    model = tiny_encoders.sam() if name == "sam" else build(name)
    with pytest.raises(UnsupportedError, match=said):
        attach(model, [Plan("x", steps(sites(model)))])


def test_refused_in_a_pass():
    model = build("vit")
    with pytest.raises(ReattendError, match="place must be"):
        Merge(sites(model), None, place="before")
    with pytest.raises(ReattendError, match="a regrouping takes index"):
        Regroup(torch.zeros(2, 3).long(), torch.zeros(3, 17).long())
    for wrong in (torch.zeros(2, 3), Regroup.keep(torch.zeros(2, 3).long(), 11), Regroup.keep(torch.zeros(1, 3).long(), 17)):
        step = Merge(sites(model), lambda passing, wrong=wrong: wrong)
        with pytest.raises(ReattendError, match="must say what becomes"), attach(model, [Plan("x", [step])]):
            features(model)
    with pytest.raises(ReattendError, match="model.eval"), attach(model, [Plan("x", steps_of(model, "vit"))]):
        model.train()(**inputs_of(model))
    tiny = tiny_models.build("llava")
    causal = Merge(sites(tiny.model).stack("decoder").only([1]), lambda p: largest(p.hidden, 1, 4), place="around")
    with pytest.raises(UnsupportedError, match="is causal"), attach(tiny.model, [Plan("x", [causal])]):
        tiny.model(**tiny.inputs(PROMPTS[:1]))
    late = Merge(sites(tiny.model).stack("vision").only([1]), lambda p: largest(p.hidden, 1, 4))
    tiny.model.config.vision_feature_layer = -2
    with pytest.raises(UnsupportedError, match="reads what layer 0 of its encoder gives"):
        attach(tiny.model, [Plan("x", [late])])


def test_refused_around_a_module():
    model, inputs = tiny_denoisers.build("FluxTransformer2DModel")
    step = lambda: Merge(sites(model), lambda p: largest(p.hidden, 1, 4), place="around")  # noqa: E731
    # its rotary table counts the text too
    with pytest.raises(UnsupportedError, match="takes 'image_rotary_emb' per token"), attach(model, [Plan("x", [step()])]):
        model(**inputs)
    with attach(model, [Plan("x", [step()])]), pytest.raises(UnsupportedError, match="both merge tokens of .*: only one can"):
        attach(model, [Plan("y", [step()])])


def test_what_needs_places_of_images_finds_none():
    tiny = tiny_models.build("llava")
    model = tiny.model
    with (
        pytest.raises(ReattendError, match="cannot tell which places of the image"),
        attach(model, [Plan("fewer", llava_steps(model))]),
        reattend.apply(model, "selective-emphasis", first_layer=1),
    ):
        model.generate(**tiny.inputs(PROMPTS[:1]), max_new_tokens=2)


def test_token_merging_is_what_its_paper_says():
    """Against a loop over tokens; the weighted sum of tokens is kept."""
    hidden = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(3))
    size = torch.randint(1, 4, (2, 9), generator=torch.Generator().manual_seed(4)).float()
    regroup = into_nearest(hidden, torch.tensor([1, 3, 5, 7]), torch.tensor([2, 4, 6, 8]), torch.tensor([1, 3]), size)
    merged, sizes = regroup.merge(hidden), regroup.sizes(size)
    for row, count in ((0, 1), (1, 3)):
        unit = torch.nn.functional.normalize(hidden[row], dim=-1)
        best = sorted(((float((unit[a] * unit[b]).sum()), a, b) for a in (1, 3, 5, 7) for b in (2, 4, 6, 8)), reverse=True)
        into = {}
        for _, a, b in best:
            into.setdefault(a, b)
        gone = list(into)[:count]
        for place, token in enumerate(regroup.index[row].tolist()):
            parts = [token, *(a for a in gone if into[a] == token)] if token >= 0 else []
            total = size[row, parts].sum()
            assert sizes[row, place] == total
            if parts:
                torch.testing.assert_close(merged[row, place], (hidden[row, parts] * size[row, parts, None]).sum(0) / total)
    torch.testing.assert_close((merged * sizes[..., None]).sum(1), (hidden * size[..., None]).sum(1))
    assert merged.shape[1] == 8 and (regroup.index == -1).sum(dim=1).tolist() == [0, 2]


def test_beside_a_session_on_the_model_inside():
    """Whose names for its sites are others than the wrapper's."""
    model, name = build("clip_vision"), "clip_vision"
    around, given = torch.nn.Sequential(model), inputs_of(model)

    def run():
        with torch.no_grad():
            return model(**given).last_hidden_state

    with attach(around, [Plan("merge", steps_of(around, name, restore=True))]):
        alone = run()
    look = Plan("look", [Capture(sites(model), lambda *_: None)])
    with attach(model, [look]), attach(around, [Plan("merge", steps_of(around, name, restore=True))]):
        assert torch.equal(run(), alone)
