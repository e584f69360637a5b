"""cmai: against a naive implementation, what blocked pairs look like, and whole models."""

from __future__ import annotations

import pytest
import reattend
import tiny_models
import torch
from asked_images import ONE, PROMPTS
from reattend.interventions import Call, TokenMap
from reattend.interventions.families.inhibition import TextAndImage, focus_scores

FEW = dict(max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True)


def steer(model, **parameters):
    return reattend.apply(model, "cmai", **{"first_layer": 1, **parameters})


def maps(model, inputs, **parameters):
    """Weights [layers, B, H, T, T] of an eager model under the recipe."""
    model.set_attn_implementation("eager")
    with torch.no_grad(), steer(model, **parameters) as session:
        found = torch.stack(model(**inputs, output_attentions=True).attentions)
    model.set_attn_implementation("sdpa")
    return found, session


def naive_cut(weights, is_image, is_text, gamma):
    """Bool [T, T]: pairs that the head-mean weights [T, T] of a layer leave out of focus, token by token."""
    cut = torch.zeros_like(weights, dtype=torch.bool)
    image = is_image.nonzero()[:, 0].tolist()
    for i in is_text.nonzero()[:, 0].tolist():
        there = [j for j in image if j < i]
        text = [k for k in is_text.nonzero()[:, 0].tolist() if k <= i]
        share = weights[i, text] / weights[i, text].sum()
        focus = torch.tensor([sum(share[n] * weights[k, j] for n, k in enumerate(text)) for j in there])
        if not there:
            continue
        limit = focus.sort().values[int(gamma * len(there) + 1e-6)]
        for j, value in zip(there, focus):
            cut[i, j] = value < limit
    return cut


@pytest.mark.parametrize("lag", [0, 1])
def test_equals_a_naive_implementation(lag):
    tiny = tiny_models.llava()
    inputs = tiny.inputs(PROMPTS)
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    is_image = ids == tiny_models.IMAGE
    is_text = (is_image.cumsum(1) > 0) & ~is_image & real
    plain, _ = maps(tiny.model, inputs, gamma=0)
    found, session = maps(tiny.model, inputs, gamma=0.5, lag=lag)
    assert list(session.stats["cmai"].values()) == [1, 1, 1]
    torch.testing.assert_close(found[0], plain[0])
    for layer in (1, 2, 3):
        if lag:  # the weights that the layer before ended with
            cuts = [naive_cut(found[layer - 1, b].mean(0), is_image[b], is_text[b], 0.5) for b in range(3)]
        else:
            if layer > 1:
                break  # below, the model's states are the plain ones
            cuts = [naive_cut(plain[layer, b].mean(0), is_image[b], is_text[b], 0.5) for b in range(3)]
        cut = torch.stack(cuts)[:, None]
        assert cut[0].sum() == 8 * is_text[0].sum() and not cut[2].any()
        assert found[layer].masked_select(cut).abs().max() == 0
        open_pairs = ~cut & is_text[:, None, :, None] & is_image[:, None, None]
        seen = found[layer].masked_select(open_pairs & torch.ones_like(open_pairs).tril())
        assert seen.min() > 0
        if layer == 1:  # same states as the plain model: the rest of each row keeps its ratios
            kept = plain[1].masked_fill(cut, 0)
            wanted = torch.where(is_text[:, None, :, None], kept / kept.sum(-1, keepdim=True), plain[1])
            torch.testing.assert_close(found[1][real[:, None].expand(-1, 4, -1)], wanted[real[:, None].expand(-1, 4, -1)])


def test_image_mass_falls_with_gamma_and_rows_stay_whole():
    tiny = tiny_models.llava()
    inputs = tiny.inputs([ONE])
    is_image = (inputs["input_ids"] == tiny_models.IMAGE)[0]
    masses = []
    for gamma in (0.0, 0.3, 0.6, 0.9):
        weights, _ = maps(tiny.model, inputs, gamma=gamma, first_layer=3)
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)))
        masses.append(weights[3, 0, :, 18:, is_image].sum())
        assert (weights[3, 0, :, 18:, is_image] > 0).any(-1).all()  # one image token stays
    assert masses[0] > masses[1] > masses[2] > masses[3] > 0


def test_it_says_that_it_is_a_reconstruction():
    info = reattend.list_recipes()["cmai"]
    assert info.status == "experiment" and "reconstruction" in info.does


def test_focus_of_a_generated_row_counts_its_own_look_at_the_image():
    """F[i, j] of a row after the prompt: the prompt's text it sees, each with what that looks at, and itself with its own look."""
    torch.manual_seed(0)
    length, image = 9, [2, 3, 4]
    query, key, value = (torch.randn(1, 2, length + 2, 8) for _ in range(3))
    places = torch.arange(length)[None]
    weights = (
        ((query @ key.transpose(2, 3)) / 8**0.5 + torch.full((length + 2, length + 2), -torch.inf).triu(1))
        .softmax(-1)
        .mean(1)[0]
    )
    text, known, where = [5, 6, 7, 8], None, None
    for start, stop in ((0, length), (length, length + 1), (length + 1, length + 2)):
        tokens = TokenMap(1, length, stop, {"image": (places >= 2) & (places < 5), "padding": torch.zeros_like(places).bool()})
        where = where or TextAndImage.of(tokens, torch.device("cpu"))
        call = Call(query[:, :, start:stop], key[:, :, :stop], value[:, :, :stop], is_causal=stop == length)
        index = torch.arange(5, length) if stop == length else torch.tensor([0])
        scores, looks = focus_scores(call, [], index, known, where)
        known = (where, looks)
        for row, i in enumerate((index + start).tolist()):
            seen = [k for k in (*text, i) if k <= i] if i >= length else [k for k in text if k <= i]
            wanted = sum(weights[i, k] * weights[k, image] for k in seen)
            torch.testing.assert_close(scores[0, row], wanted)
            if i >= length:
                assert float((weights[i, i] * weights[i, image]).max()) > 1e-3, "else nothing would be seen of it"
