"""VHR: the rule that chooses heads, whole models against hooks written by hand, generation, and what is refused.

There is no golden data: the official code was not at hand. `ByHand` below is the method once more, with forward hooks on o_proj, text
prompts that never held an image, and loops over samples and heads.
"""

from __future__ import annotations

import pytest
import reattend
import torch
from asked_images import FAMILIES, build, inputs_of
from reattend.hooks import Edits, Plan, attach, sites
from reattend.hooks.trackers.caches import cache_name, cache_of
from reattend.interventions import HeadGain, KeyBias, ReattendError, ReattendWarning, UnsupportedError
from reattend.interventions.families.heads import divergence, vision_aware_heads
from reattend.recipes import recipe, recipe_class

PROMPTS = [[1, 5, 6, "image", 7, 8], [1, "image", 9, "image", 11, 12, 13], [1, 21, 22]]
GREEDY = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}


# -- the rule --------------------------------------------------------------------------------------------------------------


def chosen_by_loops(image, text, outliers=True, squared=False):
    """One layer of one sample: bool [H], with Python's own numbers."""
    heads, width = image.shape
    distance = [sum((float(image[h, d]) - float(text[h, d])) ** 2 for d in range(width)) ** 0.5 for h in range(heads)]
    activation = [sum(float(text[h, d]) ** 2 for d in range(width)) ** (1.0 if squared else 0.5) for h in range(heads)]

    def limit(values):
        mean = sum(values) / heads
        return mean + (sum((v - mean) ** 2 for v in values) / (heads - 1)) ** 0.5

    if outliers and heads > 1:
        limits = limit(distance), limit(activation)
        distance = [0.0 if d > limits[0] and a > limits[1] else d for d, a in zip(distance, activation)]
    median = sorted(distance)[(heads - 1) // 2]
    return torch.tensor([d > median for d in distance])


@pytest.mark.parametrize("heads", [1, 2, 7, 8, 32])
@pytest.mark.parametrize("options", [{}, {"outliers": False}, {"squared": True}])
def test_rule(heads, options):
    torch.manual_seed(heads)
    removed = 0
    for _ in range(30):
        image, text = torch.randn(3, heads, 6), torch.randn(3, heads, 6)
        text[:, 0] *= 20  # surges without the image
        got = vision_aware_heads(image, text, options.get("outliers", True), options.get("squared", False))
        assert torch.equal(got, torch.stack([chosen_by_loops(i, t, **options) for i, t in zip(image, text)]))
        assert (got.sum(dim=1) <= heads // 2).all()
        order = torch.randperm(heads)
        assert torch.equal(vision_aware_heads(image[:, order], text[:, order], options.get("outliers", True),
                                              options.get("squared", False)), got[:, order])  # fmt: skip
        removed += int((~got[:, 0]).sum())
    if heads > 2:
        assert removed == (0 if options.get("outliers") is False else 90)


def test_rule_chooses_nothing_where_nothing_differs():
    text = torch.randn(2, 4, 8)
    assert not vision_aware_heads(text, text).any()
    image = text.clone()
    image[0, :2] += 1  # two equal distances, and two of 0
    assert vision_aware_heads(image, text, False)[0].tolist() == [True, True, False, False]
    image[0, 2] += 1  # three equal ones: the median is one of them, and ties are not chosen
    assert not vision_aware_heads(image, text, False).any()


def test_distance_is_measured_in_full_precision():
    one, other = torch.full((1, 1, 4), 300.0, dtype=torch.float16), torch.full((1, 1, 4), -300.0, dtype=torch.float16)
    assert divergence(one, other).item() == 1200 and divergence(one, other).dtype == torch.float32


# -- whole models ------------------------------------------------------------------------------------------------------------


class ByHand:
    """VHR on a model through hooks on its o_proj modules, for a batch of prompts as `Tiny.inputs` takes them."""

    def __init__(self, tiny, prompts, inputs, alpha=2.0, layers=None, outliers=True):
        self.alpha, self.outliers, self.prompts = alpha, outliers, prompts
        self.chosen, self.cosines = {}, []
        self.last = [int(row.nonzero()[-1]) for row in inputs["attention_mask"]]
        decoder = sites(tiny.model).stack("decoder").kind("self")
        wanted = [s for s in decoder if layers is None or s.layer in layers]
        self.outputs = {s.layer: (decoder.module(s).o_proj, s.num_heads) for s in wanted}
        self.text = {}
        for row, prompt in enumerate(prompts):
            alone = inputs_of(tiny, [[t for t in prompt if t != "image"]])
            handles = [
                module.register_forward_pre_hook(
                    lambda m, args, key=(row, layer), n=heads: self.text.update({key: args[0][0, -1].float().view(n, -1)})
                )
                for layer, (module, heads) in self.outputs.items()
            ]
            with torch.no_grad():
                tiny.model(**alone)
            for handle in handles:
                handle.remove()

    def __enter__(self):
        self.handles = [
            module.register_forward_pre_hook(lambda m, args, layer=layer, n=heads: self.scale(m, args[0], layer, n))
            for layer, (module, heads) in self.outputs.items()
        ]
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()

    def scale(self, module, x, layer, heads):
        if layer not in self.chosen:
            self.chosen[layer] = torch.zeros(len(self.prompts), heads, dtype=torch.bool)
            for row in range(len(self.chosen[layer])):
                if "image" in self.prompts[row]:
                    image = x[row, self.last[row]].float().view(heads, -1)
                    self.chosen[layer][row] = chosen_by_loops(image, self.text[row, layer], self.outliers)
        result = x.clone().view(*x.shape[:2], heads, -1)
        for row, picked in enumerate(self.chosen[layer]):
            for head in range(heads):
                if picked[head]:
                    result[row, :, head] *= self.alpha
        return (result.view(x.shape),)


def steered(model, inputs, options=GREEDY, **parameters):
    with reattend.apply(model, "vhr", **parameters) as session:
        out = model.generate(**inputs, **options)
    return torch.stack(out.logits, dim=1), session


@pytest.mark.parametrize("family", [*FAMILIES, "mllama"])
def test_equals_hooks_by_hand(family):
    """Left-padded prompts with one image, two images and none, through prefill and decoding."""
    prompts = [[1, 5, 6, "image", 7, 8], [1, "image", 9, 11, 12, 13]] if family == "mllama" else PROMPTS
    tiny = build(family)
    inputs = inputs_of(tiny, prompts)
    base = torch.stack(tiny.model.generate(**inputs, **GREEDY).logits, dim=1)
    with ByHand(tiny, prompts, inputs) as hand:
        expected = torch.stack(tiny.model.generate(**inputs, **GREEDY).logits, dim=1)
    got, session = steered(tiny.model, inputs)
    assert all(picked[:2].any() for picked in hand.chosen.values())
    assert session.stats["vhr"] == {s.name: 4 for s in sites(tiny.model).stack("decoder").kind("self")}
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)
    assert ((got - base)[:2].abs().amax(dim=(1, 2)) > 1e-3).all()
    if family != "mllama":
        assert torch.equal(got[2], base[2]), "a sample without an image stays as it was, bit for bit"
    after = torch.stack(tiny.model.generate(**inputs, **GREEDY).logits, dim=1)
    assert torch.equal(after, base), "detached, the model is what it was"


@pytest.mark.parametrize("options", [{"layers": (1, 3)}, {"alpha": 3.0}, {"alpha": 0.5, "remove_outliers": False}])
@pytest.mark.parametrize("side", ["left", "right"])
def test_parameters_and_padding(options, side):
    tiny = build("llava", num_attention_heads=8, num_key_value_heads=2, head_dim=4)
    inputs = inputs_of(tiny, PROMPTS, side)
    hand = ByHand(
        tiny, PROMPTS, inputs, options.get("alpha", 2.0), options.get("layers"), outliers=options.get("remove_outliers", True)
    )
    with hand, torch.no_grad():
        expected = tiny.model(**inputs).logits
    with reattend.apply(tiny.model, "vhr", **options) as session:
        got = tiny.model(**inputs).logits
    assert session.applied == len(options.get("layers", range(4)))
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(got[real], expected[real], atol=2e-5, rtol=1e-4)


def edits_of(model, inputs, **parameters):
    """{layer: bool [B, H] of the heads that were chosen} in one pass."""
    chosen = {}
    plan = recipe("vhr", **parameters).plan(sites(model))

    def spy(act):
        def look(call):
            edit = act.intervention(call)
            if edit is not None:
                chosen[call.site.layer] = edit.factor != 1
            return edit

        return Edits(act.sites, look)

    with attach(model, [Plan("vhr", [spy(s) if isinstance(s, Edits) else s for s in plan])]), torch.no_grad():
        model(**inputs)
    return chosen


def test_later_layers_are_judged_with_earlier_ones_strengthened():
    tiny = build("llava", num_attention_heads=8, num_key_value_heads=2, head_dim=4)
    inputs = inputs_of(tiny, PROMPTS[:2])
    alone, together = edits_of(tiny.model, inputs, layers=(3,), alpha=3), edits_of(tiny.model, inputs, alpha=3)
    assert not torch.equal(alone[3], together[3])
    first = edits_of(tiny.model, inputs, layers=(0, 3), alpha=3)
    assert torch.equal(first[0], together[0]), "the first layer has nothing before it"


def test_chosen_heads_are_scaled_exactly_and_others_not_at_all():
    tiny = build("llava")
    inputs, seen = inputs_of(tiny, PROMPTS), {}
    decoder = sites(tiny.model).stack("decoder")
    handle = decoder.module(decoder[1]).o_proj.register_forward_pre_hook(lambda m, args: seen.setdefault(len(seen), args[0]))
    with torch.no_grad():
        tiny.model(**inputs)
        chosen = edits_of(tiny.model, inputs, layers=(1,))[1]
    handle.remove()
    before, after = seen[0].unflatten(2, (4, 8)), seen[len(seen) - 1].unflatten(2, (4, 8))
    factor = torch.where(chosen, 2.0, 1.0)[:, None, :, None]
    assert torch.equal(after, before * factor) and chosen[:2].any(dim=1).all() and not chosen[2].any()
    # the layer's output leans towards what the chosen heads write
    weight = decoder.module(decoder[1]).o_proj.weight.detach().T.unflatten(0, (4, 8))
    for row in range(2):
        written = [torch.einsum("hd,hdw->hw", x[row, -1], weight) for x in (before, after)]
        theirs = written[0][chosen[row]].sum(dim=0)
        cosines = [torch.cosine_similarity(theirs, heads.sum(dim=0), dim=0) for heads in written]
        assert cosines[1] > cosines[0] + 0.01


def test_without_strength_or_images_there_is_no_further_pass():
    tiny, ran = build("llava"), []
    inputs, text = inputs_of(tiny, PROMPTS), tiny.inputs([[1, 5, 6, 7], [1, 8]])
    tiny.model.model.language_model.layers[0].register_forward_pre_hook(lambda *_: ran.append(1))
    for alpha, given in ((1.0, inputs), (2.0, text)):
        ran.clear()
        with pytest.warns(ReattendWarning, match="never acted"), reattend.apply(tiny.model, "vhr", alpha=alpha):
            tiny.model(**given)
        assert ran == [1]


def test_other_recipes_before_it_are_seen():
    """Heads are judged by what they hand on under the recipes before, and the text-only pass is the plain model."""
    tiny = build("llava")
    inputs = inputs_of(tiny, PROMPTS[:2])
    decoder = sites(tiny.model).stack("decoder")
    off = Plan("off", [Edits(decoder.only([2]), lambda call: HeadGain(heads=[1], factor=0.0))])
    bias = Plan("bias", [Edits(decoder, lambda call: KeyBias(bias=torch.linspace(0, 2, call.num_keys)))])
    plain = edits_of(tiny.model, inputs, layers=(2,), remove_outliers=False)
    with attach(tiny.model, [off]), attach(tiny.model, [bias]):
        changed = edits_of(tiny.model, inputs, layers=(2,), remove_outliers=False)
    outputs, texts = {}, {}
    module = decoder.module(decoder[2]).o_proj
    with attach(tiny.model, [off]), attach(tiny.model, [bias]), torch.no_grad():
        handle = module.register_forward_pre_hook(lambda m, args: outputs.update({0: args[0][:, -1]}))
        tiny.model(**inputs)
        handle.remove()
    for row, prompt in enumerate(PROMPTS[:2]):
        with torch.no_grad():
            handle = module.register_forward_pre_hook(lambda m, args, r=row: texts.update({r: args[0][0, -1]}))
            tiny.model(**tiny.inputs([[t for t in prompt if t != "image"]]))
            handle.remove()
        expected = chosen_by_loops(outputs[0][row].view(4, 8), texts[row].view(4, 8), outliers=False)
        assert torch.equal(changed[2][row], expected)
    assert not torch.equal(changed[2], plain[2])


def test_fixed_heads():
    tiny = build("llava")
    inputs = inputs_of(tiny, PROMPTS)
    chosen = edits_of(tiny.model, inputs, heads={1: [0, 2], 3: [3]})
    assert {n: c.tolist() for n, c in chosen.items()} == {
        1: [[True, False, True, False]] * 2 + [[False] * 4], 3: [[False, False, False, True]] * 2 + [[False] * 4],
    }  # fmt: skip


@pytest.mark.parametrize("how", ["eager", "bfloat16"])
def test_eager_and_half_precision(how):
    tiny = build("llava")
    inputs = inputs_of(tiny, PROMPTS)
    if how == "eager":
        tiny.model.set_attn_implementation("eager")
    else:
        tiny.model.bfloat16()
        inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    with ByHand(tiny, PROMPTS, inputs) as hand, torch.no_grad():
        expected = tiny.model(**inputs).logits
    chosen = edits_of(tiny.model, inputs)
    assert all(torch.equal(chosen[layer], picked) for layer, picked in hand.chosen.items())
    with reattend.apply(tiny.model, "vhr"), torch.no_grad():
        got = tiny.model(**inputs).logits
    # bfloat16 on purpose without tolerance: factors of 2 are exact, and nothing else is done to the outputs
    torch.testing.assert_close(got, expected, **({"atol": 0, "rtol": 0} if how == "bfloat16" else {"atol": 2e-5, "rtol": 1e-4}))


def test_a_conversation_keeps_its_heads():
    """The next turn, behind the cache of the first: the same as one pass with the heads of the first turn."""
    tiny = build("llava")
    first, later = inputs_of(tiny, [[1, 5, "image", 7]]), torch.tensor([[20, 21, 22]])
    with reattend.apply(tiny.model, "vhr") as session, torch.no_grad():
        out = tiny.model(**first, use_cache=True)
        token = out.logits[:, -1:].argmax(dim=-1)
        tiny.model(input_ids=token, **{cache_name(tiny.model): cache_of(out)})
        last = tiny.model(input_ids=later, **{cache_name(tiny.model): cache_of(out)}).logits
        assert session.applied == 3 * 4
    whole = {**first, "input_ids": torch.cat([first["input_ids"], token, later], dim=1)}
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    chosen = edits_of(tiny.model, first)
    with (
        reattend.apply(tiny.model, "vhr", heads=[(n, h) for n, c in chosen.items() for h in c[0].nonzero()[:, 0].tolist()]),
        torch.no_grad(),
    ):
        torch.testing.assert_close(last, tiny.model(**whole).logits[:, -3:], atol=2e-5, rtol=1e-4)


# -- T-VHD -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3", "paligemma", "mllama"])
def test_divergence_equals_two_branches_with_caches(family):
    """One pass per branch over the whole answer, against both branches generating it token by token with a cache each."""
    prompts = [[1, 5, 6, "image", 7, 8], [1, "image", 9, 11, 12, 13]]
    tiny = build(family)
    inputs, answer = inputs_of(tiny, prompts), torch.tensor([[20, 21, 22], [30, 31, 32]])
    decoder = sites(tiny.model).stack("decoder").kind("self")
    seen = {}

    def generate(name, given, rows):
        handles = [
            decoder.module(s).o_proj.register_forward_pre_hook(
                lambda m, args, key=(name, s.layer): seen.setdefault(key, []).append(args[0][:, -1].unflatten(1, (4, 8)))
            )
            for s in decoder
        ]
        start = given["input_ids"].shape[1]
        tiny.model.generate(  # made to choose the answer's tokens
            **given, max_new_tokens=3, do_sample=False,
            logits_processor=[lambda ids, scores: torch.nn.functional.one_hot(rows[:, ids.shape[1] - start], 100).float()],
        )  # fmt: skip
        for handle in handles:
            handle.remove()

    generate("image", inputs, answer)
    for row, prompt in enumerate(prompts):
        generate(f"text {row}", inputs_of(tiny, [[t for t in prompt if t != "image"]]), answer[row : row + 1])
    found = recipe_class("vhr").measure(tiny.model, inputs, answer, k=2)
    total = torch.zeros(2, 3)
    for site in decoder:
        for row in range(2):
            for step in range(3):
                image, text = seen["image", site.layer][step][row], seen[f"text {row}", site.layer][step][0]
                expected = (image - text).norm(dim=1)
                torch.testing.assert_close(found.heads[site.layer][row, step], expected, atol=1e-5, rtol=1e-4)
                total[row, step] += sum(sorted(expected.tolist())[-2:])
    torch.testing.assert_close(found.tokens, total, atol=1e-4, rtol=1e-4)


def test_divergence_refuses():
    tiny = build("llava")
    inputs, answer = inputs_of(tiny, PROMPTS), torch.tensor([[20, 21]] * 3)
    measure = recipe_class("vhr").measure
    assert (measure(tiny.model, inputs, answer).tokens[2] < 1e-5).all(), "a sample without an image owes nothing to it"
    with pytest.raises(ReattendError, match="padded on the left"):
        measure(tiny.model, inputs_of(tiny, PROMPTS, "right"), answer)
    with pytest.raises(ReattendError, match=r"answer must be token ids \[3, steps\]"):
        measure(tiny.model, inputs, answer[:2])
    with pytest.raises(ReattendError, match="k must be 1 or more"):
        measure(tiny.model, inputs, answer, k=0)
    session = reattend.apply(tiny.model, "vhr")
    with pytest.raises(ReattendError, match="end the session"):
        measure(tiny.model, inputs, answer)
    session.remove()


# -- what is refused -----------------------------------------------------------------------------------------------------------


def test_prompts_in_pieces_are_refused():
    tiny = build("llava")
    inputs = inputs_of(tiny, PROMPTS[:1])
    with reattend.apply(tiny.model, "vhr", alpha=1.0) as session:
        tiny.model.generate(**inputs, max_new_tokens=2, prefill_chunk_size=10)
        session.counts.clear()
    # a text first, answered, and then an image
    with reattend.apply(tiny.model, "vhr") as session, torch.no_grad():
        cache = cache_of(tiny.model(input_ids=torch.tensor([[1, 5, 6]]), use_cache=True))
        tiny.model(input_ids=torch.tensor([[8]]), **{cache_name(tiny.model): cache})
        with pytest.raises(ReattendError, match="pass the whole conversation"):
            tiny.model(
                input_ids=inputs["input_ids"][:, 1:],
                pixel_values=inputs["pixel_values"],
                **{cache_name(tiny.model): cache},
                use_cache=True,
            )
        session.counts.clear()
    assert not tiny.model._forward_pre_hooks


def test_refused_models():
    tiny = build("mllama")
    with pytest.raises(UnsupportedError, match=r"layers names 1, but the self-attention layers of .* are 0 to 2 without \[1\]"):
        reattend.apply(tiny.model, "vhr", layers=[1])

    class Table:
        class config:
            model_type, image_token_id, is_encoder_decoder = "instructblip", 5, False

        model_name = "InstructBlip"

    assert "cannot be run without an image" in recipe("vhr").supports(Table).reason  # type: ignore[arg-type]


def test_default_layers():
    from reattend.hooks import SiteTable
    from reattend.interventions import Site

    def table(depth):
        return SiteTable([Site(f"layers.{n}", n, "decoder", "self", 4, 4, 8, True) for n in range(depth)], {})

    assert [s.layer for s in recipe("vhr").chosen(table(32))] == [1, *range(18, 32)]
    assert [s.layer for s in recipe("vhr").chosen(table(15))] == list(range(1, 15))
    assert [s.layer for s in recipe("vhr").chosen(table(4))] == [0, 1, 2, 3]
