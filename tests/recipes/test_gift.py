"""GIFT: golden tensors of the official code, the invariants of the method, what is refused, and which layers are known."""

from __future__ import annotations

import json
import math

import pytest
import torch
from asked_images import tiny_models
from golden_files import golden_file
from reattend.hooks import SiteTable, sites
from reattend.interventions import Call, Clock, ReattendError, TokenGrid, TokenMap, fused, reference
from reattend.interventions.families.gaze import Focus, focused_rows, image_columns, positive_shift, refocus, saliency_map
from reattend.recipes import Profile, recipe
from reattend.recipes.kit.profile import cached_path, table_fingerprint
from reattend.recipes.kit.words import chooser, content_words

SALIENCY = ["saliency_one_layer", "saliency_two_layers", "saliency_odd_heads"]
ENHANCE = ["enhance_prefill", "enhance_decode_gqa"]


def golden(name):
    data, facts = golden_file("gift", name)
    return data, {k: json.loads(v) for k, v in facts.items()}


def between(facts, what, length):
    places = torch.arange(length)[None]
    return (places >= facts[f"{what}_start_idx"]) & (places <= facts[f"{what}_end_idx"])


def some_sites(count):
    return sites(tiny_models.llava().model).stack("decoder")[:count]


# -- golden ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SALIENCY)
def test_golden_saliency(name):
    """The official map, through the recipe's own reading of calls whose weights are the golden ones."""
    data, facts = golden(name)
    layers, _, heads, length, _ = data["attentions"].shape
    image = between(facts, "vision", length)
    words = torch.zeros(1, length, dtype=torch.bool)
    words[0, [facts["query_start_idx"] + i for i in facts["content_tokens"]]] = True
    tokens = TokenMap(1, length, length, {"image": image, "q": between(facts, "query", length), "q-words": words})
    chosen, memory, table = recipe("gift", saliency_layers=[0], enhance_layers=[1]), {}, some_sites(layers)
    for site, weights in zip(table, data["attentions"], strict=True):
        zeros = torch.zeros(1, heads, length, 8)
        chosen.learn("q", Call(zeros, zeros, zeros, weights.log(), site=site, tokens=tokens, memory=memory))
    shifts = [memory["shifts"][site.name] for site in table]
    for shift, official in zip(shifts, data["selected_positive_shift"], strict=True):
        order = shift.total[0].argsort(descending=True)[: heads // 2]
        torch.testing.assert_close(shift.sums[0, order][:, image[0]], official.sum(dim=1), atol=1e-6, rtol=1e-5)
    call = Call(zeros, zeros, zeros, site=table[0], tokens=tokens, memory=memory)
    focus = chosen._focus("q", facts["alpha"], [site.name for site in table], call)
    torch.testing.assert_close(1 + focus.groups[0, 2][image[0]], data["saliency_factor"], atol=0, rtol=1e-5)


@pytest.mark.parametrize("execute", [fused, reference])
@pytest.mark.parametrize("name", ENHANCE)
def test_golden_enhancement(name, execute):
    data, facts = golden(name)
    length, queries = data["key"].shape[2], data["query"].shape[2]
    image, question = between(facts, "vision", length), between(facts, "query", length)
    prompt = length if queries > 1 else length - 3
    tokens = TokenMap(1, prompt, length, {n: x[:, :prompt] for n, x in (("image", image), ("q", question))})
    tokens.roles["padding"] = torch.zeros(1, prompt, dtype=torch.bool)
    saliency = torch.zeros(1, length)
    saliency[image] = data["saliency_factor"].log() / facts["alpha"]
    focus = Focus.of(saliency[:, :prompt], image[:, :prompt], question[:, :prompt], facts["alpha"])
    (site,) = some_sites(1)
    memory = {"shifts": {"read": type("Shift", (), {"rows": prompt})}, "focus": ((prompt, prompt), focus)}
    clock = Clock("prefill" if queries > 1 else "decode")
    call = Call(
        data["query"], data["key"], data["value"], data["attention_mask"], scale=facts["scaling"], site=site, clock=clock,
        tokens=tokens, memory=memory,
    )  # fmt: skip
    edit = recipe("gift", saliency_layers=[0], enhance_layers=[1]).enhance("q", facts["alpha"], ["read"], call)
    output = execute(call, [edit]).transpose(1, 2)
    torch.testing.assert_close(output[:, -1], data["output_gift"][:, -1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output[:, :-1], data["output_plain"][:, :-1], atol=1e-5, rtol=1e-5)
    groups = focus.columns(0, length, torch.device("cpu"), torch.float32)
    weights = refocus(data["weights_plain"][:, :, -1:], groups)
    torch.testing.assert_close(weights, data["weights_gift"][:, :, -1:], atol=1e-6, rtol=0)
    assert (output[:, -1] - data["output_plain"][:, -1]).abs().max() > 1e-2


# -- the map -------------------------------------------------------------------------------------------------------------


def read(weights, rows, columns, **options):
    """positive_shift of a call with these weights [B, H, S, S]."""
    zeros = torch.zeros(*weights.shape[:3], 4)
    return positive_shift(Call(zeros, zeros, zeros, weights.log()), rows, columns, **options)


def case(seed, batch=2, heads=4, length=20):
    torch.manual_seed(seed)
    visible = torch.ones(length, length, dtype=torch.bool).tril()
    weights = torch.randn(batch, heads, length, length).masked_fill(~visible, -torch.inf).softmax(dim=-1)
    places = torch.arange(length)[None]
    image = ((places >= 3) & (places < 11)).repeat(batch, 1)
    image[1:, 3:5] = False
    rows = (places >= 12) & (places % 3 != 2) & (places < 19)
    return weights, rows.repeat(batch, 1), image


@pytest.mark.parametrize("seed", range(3))
def test_map_lies_between_0_and_1_and_is_0_elsewhere(seed):
    weights, rows, image = case(seed)
    found = saliency_map([read(weights, rows, image)], image)
    assert (found[~image] == 0).all()
    for b in range(2):
        assert float(found[b][image[b]].min()) == 0
        assert float(found[b].max()) == 1
    factor = 1 + Focus.of(found, image, rows, 3.0).groups[:, 2][image]
    assert factor.min() == 1
    torch.testing.assert_close(factor.max(), torch.tensor(math.exp(3)))


def test_a_constant_sink_stays_at_the_minimum():
    """A column that draws the same large weight in every row never rises."""
    weights, rows, image = case(0, batch=1)
    weights[..., 5] = 0
    weights *= 0.4 / weights.sum(dim=-1, keepdim=True)
    weights[..., 5] = 0.6
    found = saliency_map([read(weights, rows, image)], image)
    assert found[0, 5] == 0 and found[0].max() == 1


def test_what_does_not_vary_gives_no_map():
    weights, rows, image = case(1)
    flat = torch.full_like(weights, 1 / 20)
    assert (saliency_map([read(flat, rows, image)], image) == 0).all()
    one = torch.zeros_like(image)
    one[:, 4] = True
    assert (saliency_map([read(weights, rows, one)], one) == 0).all(), "one image token has no spread"
    nothing = saliency_map([read(weights, rows, image & False)], image & False)
    assert (nothing == 0).all() and nothing.isfinite().all()
    assert not Focus.of(nothing, image, rows, 5.0).acting.any()


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("cut", [1, 12, 13, 16])
def test_chunks_add_up(cut, every):
    weights, rows, image = case(2)
    rows[:, 12:19] |= every
    whole = read(weights, rows, image)
    first = read(weights[:, :, :cut, :cut], rows[:, :cut], image)
    zeros = torch.zeros(2, 4, 20, 4)
    rest = Call(zeros[:, :, cut:], zeros, zeros, weights[:, :, cut:].log())
    both = positive_shift(rest, rows[:, cut:], image, first)
    torch.testing.assert_close(both.sums, whole.sums)
    assert whole.sums.sum() > 0.1
    again = positive_shift(rest, rows[:, cut:], image, None)
    assert (again.sums - whole.sums).abs().max() > 1e-3 or cut == 1, "without the first chunk something is missing"


def test_separators_are_no_image():
    """Newline features lie inside a run of image tokens; an image without a known grid stays whole."""
    image = torch.zeros(2, 16, dtype=torch.bool)
    image[0, 2:8] = image[0, 10:14] = image[1, 3:6] = True
    grid = TokenGrid.of_image(0, torch.tensor([[2, 3], [5, 6]]))
    found = image_columns(TokenMap(2, 16, 16, {"image": image}, [grid]))
    assert found[0].nonzero()[:, 0].tolist() == [2, 3, 5, 6, 10, 11, 12, 13]
    assert torch.equal(found[1], image[1])


# -- one row -------------------------------------------------------------------------------------------------------------


def row_case(seed, heads=4, batch=2, keys=24, rows=1, alpha=5.0):
    torch.manual_seed(seed)
    weights = (2 * torch.randn(batch, heads, rows, keys)).softmax(dim=-1)
    places = torch.arange(keys)[None]
    image = ((places >= 2) & (places < 12)).repeat(batch, 1)
    question = ((places >= 14) & (places < 18)).repeat(batch, 1)
    saliency = torch.rand(batch, keys) * image
    return weights, image, question, saliency, Focus.of(saliency, image, question, alpha)


def groups_of(focus, keys=24):
    return focus.columns(0, keys, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("heads", [2, 3, 4, 5])
@pytest.mark.parametrize("seed", range(3))
def test_enhancement_step_by_step(heads, seed):
    """Against the card's steps 5a to 5d, written out for one row of the batch at a time; equal to log factors as score biases."""
    weights, image, question, saliency, focus = row_case(seed, heads, rows=2)
    new = refocus(weights, groups_of(focus))
    for b in range(2):
        for r in range(2):
            w = weights[b, :, r].clone()
            looking = w[:, image[b]].sum(dim=1).topk(heads // 2).indices.tolist()
            reading = w[:, question[b]].sum(dim=1).topk(heads // 2).indices.tolist()
            assert len(looking) == len(reading) == heads // 2
            old = w[looking][:, image[b]].sum()
            bias = torch.zeros_like(w)
            for h in looking:
                bias[h, image[b]] += 5.0 * saliency[b, image[b]]
            ratio = (w * bias.exp())[looking][:, image[b]].sum() / old
            for h in reading:
                bias[h, question[b]] += ratio.log()
            torch.testing.assert_close(new[b, :, r], (w.log() + bias).softmax(dim=-1), atol=1e-6, rtol=1e-5)
            for h in set(range(heads)) - {*looking, *reading}:
                assert torch.equal(new[b, h, r], w[h]), "heads that are not chosen stay bit for bit"
            best = int((saliency[b] * image[b]).argmax())
            assert all(new[b, h, r, best] > w[h, best] for h in looking)
    torch.testing.assert_close(new.sum(dim=-1), weights.sum(dim=-1), atol=1e-5, rtol=0)


def test_beta_0_changes_the_image_only_and_shares_change_the_number_of_heads():
    weights, image, question, _, focus = row_case(4)
    new = refocus(weights, groups_of(focus), beta=0.0)
    for b in range(2):
        looking = set(weights[b, :, 0][:, image[b]].sum(dim=1).topk(2).indices.tolist())
        changed = {h for h in range(4) if not torch.equal(new[b, h], weights[b, h])}
        assert changed == looking
        for h in looking:
            ratio = new[b, h, 0][~image[b]] / weights[b, h, 0][~image[b]]
            torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))
    every = refocus(weights, groups_of(focus), share=1.0)
    assert (every != weights).any(dim=-1).all()


def test_rows_of_the_batch_that_do_not_act_stay():
    weights, image, question, saliency, _ = row_case(5)
    saliency[0] = 0
    focus = Focus.of(saliency, image, question, 5.0)
    assert focus.acting.tolist() == [False, True]
    new = refocus(weights, groups_of(focus))
    assert torch.equal(new[0], weights[0]) and (new[1] != weights[1]).any()


def test_extremes_are_finite_and_masses_of_zero_do_no_harm():
    weights, image, question, saliency, _ = row_case(6, alpha=20.0)
    strong = refocus(weights, groups_of(Focus.of(saliency, image, question, 20.0)))
    assert strong.isfinite().all()
    blind = weights.masked_fill(image[:, None, None], 0)
    groups = groups_of(Focus.of(saliency, image, question, 5.0))
    assert torch.equal(refocus(blind, groups), blind), "without any image weight r is 1"
    assert torch.equal(refocus(torch.zeros_like(weights), groups), torch.zeros_like(weights))
    leaky = 0.7 * weights  # learned sinks take the rest
    torch.testing.assert_close(refocus(leaky, groups), 0.7 * refocus(weights, groups))


def test_last_rows():
    padding = torch.tensor([[1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1]], dtype=torch.bool)
    tokens = TokenMap(2, 6, 8, {"padding": padding})
    x = torch.zeros(2, 2, 8, 4)
    assert [r.nonzero()[:, 0].tolist() for r in focused_rows(Call(x, x, x, tokens=tokens))] == [[5, 6, 7], [3, 6, 7]]
    tokens.length = 6
    x = x[:, :, :3]
    assert [r.nonzero()[:, 0].tolist() for r in focused_rows(Call(x, x, x, tokens=tokens))] == [[2], [0]]


# -- words ---------------------------------------------------------------------------------------------------------------


def test_words():
    text = "What's the red dog doing on Mary\u2019s two-seat couch? Don't guess: answer Yes or No."
    assert [text[a:b] for a, b in content_words(text)] == [
        "red",
        "dog",
        "Mary\u2019s",
        "two",
        "seat",
        "couch",
        "guess",
        "answer",
    ]
    assert content_words("\u7ea2\u8272\u7684\u72d7\u5728\u54ea\u91cc\uff1f"), "no word of another language is in the list"
    assert content_words("Is it?") == []
    assert chooser("all") is None
    assert chooser("content") is content_words


def test_spacy_is_optional(monkeypatch):
    from reattend.recipes.kit import words as question_words

    if not question_words.has_spacy():
        assert chooser("auto") is content_words
        with pytest.raises(ReattendError, match="pip install spacy"):
            chooser("spacy")
    monkeypatch.setattr(question_words, "has_spacy", lambda: True)

    class Tagged:
        def __init__(self, text, idx, pos):
            self.text, self.idx, self.pos_ = text, idx, pos

    tags = [Tagged("is", 0, "AUX"), Tagged("red", 3, "ADJ"), Tagged("?", 6, "PUNCT"), Tagged("Ann", 8, "PROPN")]
    monkeypatch.setattr(question_words, "_tagger", lambda: lambda text: tags)
    assert chooser("auto")("is red? Ann") == [(3, 6), (8, 11)]


# -- what it fits ----------------------------------------------------------------------------------------------------------


def shape(kind, text, hidden, layers, intermediate):
    import transformers

    names = {"hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": intermediate}
    if kind == "llava":
        return transformers.LlavaConfig(text_config={"model_type": text, **names})
    return transformers.Qwen2VLConfig(text_config=names)


@pytest.mark.parametrize(
    "given, expected",
    [
        (("llava", "llama", 4096, 32, 11008), ((11,), tuple(range(12, 23)), 5.0)),
        (("llava", "llama", 5120, 40, 13824), ((10,), tuple(range(14, 21)), 5.0)),
        (("qwen2_vl", "", 3584, 28, 18944), ((14,), tuple(range(5, 19)), 4.0)),
        (("llava", "mistral", 4096, 32, 11008), None),
        (("qwen2_vl", "", 1536, 28, 8960), None),
    ],
)
def test_published_layers(given, expected):
    table = SiteTable([], {}, "Model", shape(*given))
    found = recipe("gift").layers(table)
    assert (found is None) if expected is None else tuple(found) == expected
    if expected is not None:
        assert recipe("gift", alpha=2).layers(table).alpha == 2


def test_a_kept_profile_serves_a_model_whose_layers_are_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr("reattend.recipes.kit.profile.cache_folder", lambda: tmp_path)
    table = sites(tiny_models.llava().model)
    assert recipe("gift").layers(table) is None
    layers = {"saliency_layers": torch.tensor([1]), "enhance_layers": torch.tensor([2, 3])}
    Profile("gift", table_fingerprint(table), layers).save(cached_path("gift", table))
    for chosen in (recipe("gift"), recipe("gift", profile_path="cached")):
        assert chosen.layers(table) == ((1,), (2, 3), 5.0)
