"""GIFT on whole models: against a naive eager implementation, in batches, caches, turns and chunks; profiling."""

from __future__ import annotations

import warnings

import pytest
import reattend
import torch
from asked_images import HOW, NEWLINE, ONE, PROMPTS, WHAT, asked, tiny_models, tokenizer, turn
from by_hand import attention_by_hand
from reattend.hooks.trackers.caches import cache_of
from reattend.interventions import ReattendError, ReattendWarning
from reattend.recipes import Profile, recipe_class

# what is said of prompts in pieces is tested in test_chunked_prompts.py
pytestmark = pytest.mark.filterwarnings("ignore:.*this prompt comes in pieces")

MERGED = {"saliency_layers": [1], "enhance_layers": [1, 3]}
PROBED = {"saliency_layers": [0, 2], "enhance_layers": [0, 1, 3]}
# an edit of the last layer alone leaves keys and values as they are: such runs can be compared with others that see the prompt otherwise
LAST = {"saliency_layers": [1], "enhance_layers": [3]}
FEW = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
CONTENT = (8, 9, 13, 14)


def steer(model, **options):
    return reattend.apply(model, "gift", tokenizer=tokenizer(), **{"words": "content", "alpha": 3.0, **MERGED, **options})


def logits_of(model, inputs, **options):
    return torch.stack(model.generate(**inputs, **{**FEW, **options}).logits, dim=1)


# -- a naive implementation ------------------------------------------------------------------------------------------------


class Naive:
    """The card's algorithm with whole matrices, in float32, prompt by prompt: what it makes of the weights of each layer."""

    def __init__(self, model, inputs, prompts, saliency_layers, enhance_layers, alpha):
        self.enhance, ids = enhance_layers, inputs["input_ids"]
        self.image = ids == tiny_models.IMAGE
        self.question = torch.stack([asked(p, row) for p, row in zip(prompts, ids, strict=True)])
        self.attentions, self.factor = {}, torch.ones(ids.shape)
        with attention_by_hand(model, weights=self.attentions.setdefault), torch.no_grad():
            model(**inputs)
        for b, row in enumerate(ids):
            image = self.image[b]
            if image.any():
                m = self.map(b, [n for n in range(len(row)) if self.question[b, n] and int(row[n]) in CONTENT], saliency_layers)
                self.factor[b, image] = (alpha * m).exp()

    def map(self, b, rows, layers):
        kept = []
        for layer in layers:
            weights = self.attentions[layer][b]
            shift = torch.stack([(weights[:, i] - weights[:, i - 1]).clamp_min(0) for i in rows], dim=1)[..., self.image[b]]
            top = shift.sum(dim=(1, 2)).topk(len(weights) // 2).indices
            kept.append(shift[top])
        m = torch.stack(kept).mean(dim=(0, 1, 2))
        m = m.clamp(m.mean() - 3 * m.std(), m.mean() + 3 * m.std())
        return (m - m.min()) / (m.max() - m.min())

    def __call__(self, layer, weights):
        if layer in self.enhance:
            for b in range(len(weights)):
                if self.image[b].any():
                    self.change(weights[b, :, -1], b)
        return weights

    def change(self, w, b):
        image, question = self.image[b].nonzero()[:, 0], self.question[b].nonzero()[:, 0]
        looking = w[:, image].sum(dim=1).topk(len(w) // 2).indices
        reading = w[:, question].sum(dim=1).topk(len(w) // 2).indices
        before = w[looking][:, image].sum()
        w[looking[:, None], image] *= self.factor[b, image]
        w[reading[:, None], question] *= w[looking][:, image].sum() / before
        w /= w.sum(dim=1, keepdim=True)


@pytest.mark.parametrize("layers", [MERGED, PROBED], ids=["merged", "probed"])
@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "internvl", "smolvlm", "pixtral", "qwen3_vl", "paligemma"])
def test_equals_a_naive_implementation(family, layers):
    """Prompts with one image, with two in two turns, and with none, left-padded: every logit of prefill and decode."""
    tiny = tiny_models.build(family)
    prompts = [ONE] if family == "paligemma" else PROMPTS
    inputs = tiny.inputs(prompts)
    base = logits_of(tiny.model, inputs)
    by_card = Naive(tiny.model, inputs, prompts, layers["saliency_layers"], layers["enhance_layers"], 3.0)
    with attention_by_hand(tiny.model, weights=by_card):
        expected = logits_of(tiny.model, inputs)
    with steer(tiny.model, **layers) as session:
        steered = logits_of(tiny.model, inputs)
        assert sorted(session.stats["gift"].values()) == [4] * len(layers["enhance_layers"])
    torch.testing.assert_close(steered, expected, atol=3e-5, rtol=1e-4)
    assert ((steered - base)[:2].abs().amax(dim=(1, 2)) > 1e-3).all()
    assert torch.equal(logits_of(tiny.model, inputs), base), "detached, the model is what it was"


# -- batches -----------------------------------------------------------------------------------------------------------------


def test_newline_features_of_an_image_get_no_factor():
    tiny = tiny_models.build("llava_next")
    inputs = tiny.inputs([ONE])
    with steer(tiny.model) as session, torch.no_grad():
        cache = cache_of(tiny.model(**inputs))
        focus = memory_of(session, cache)["focus"][1]
    assert int((inputs["input_ids"] == tiny_models.IMAGE).sum()) > int(focus.groups[0, 1].sum()) > 16


def memory_of(session, cache):
    """What the recipe knows of the sequence in this cache."""
    return session.attachment.tracker.by_cache[cache].memory[session.plans[0].memory_key]


# -- ways to run --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [5, 20, 23])
def test_chunked_prefill(size):
    tiny = tiny_models.llava()
    inputs = tiny.inputs([[1, *turn("image", *WHAT, 8, 9, 16)]])
    with steer(tiny.model, **LAST, words="all"):
        expected, got = (logits_of(tiny.model, inputs, **more) for more in ({}, {"prefill_chunk_size": size}))
    torch.testing.assert_close(got, expected, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    tiny = tiny_models.llava()
    inputs = tiny.inputs(PROMPTS)
    tiny.model.to(dtype)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    with steer(tiny.model, **PROBED, alpha=20.0) as session:
        assert logits_of(tiny.model, inputs).isfinite().all()
        assert session.applied == 12


# -- which question -----------------------------------------------------------------------------------------------------------


def run(model, inputs, **options):
    with steer(model, **options), torch.no_grad():
        return model(**inputs).logits[:, -1]


def test_named_questions():
    """By passage, by token range (which needs no tokenizer), and as the last turn: the same."""
    tiny = tiny_models.llava()
    inputs = tiny.inputs([ONE])
    expected = run(tiny.model, inputs, words="all")
    text = "what is the red dog doing ?"
    torch.testing.assert_close(run(tiny.model, inputs, words="all", question=text), expected)
    start = 18
    torch.testing.assert_close(run(tiny.model, inputs, words="all", ranges=[(start, start + 7)]), expected)
    options = {**MERGED, "alpha": 3.0, "ranges": [(start, start + 7)]}
    with reattend.apply(tiny.model, "gift", **options), torch.no_grad():
        torch.testing.assert_close(tiny.model(**inputs).logits[:, -1], expected)
    assert (run(tiny.model, inputs, words="all", question="red dog") - expected).abs().max() > 1e-3
    assert (run(tiny.model, inputs, words="content") - expected).abs().max() > 1e-4
    with (
        reattend.apply(tiny.model, "gift", **{**options, "words": "content"}),
        pytest.raises(ReattendError, match="tokenizer="),
    ):
        tiny.model(**inputs)
    with (
        reattend.apply(tiny.model, "gift", **MERGED),
        pytest.raises(ReattendError, match="tokenizer=.*or name its tokens by ranges"),
    ):
        tiny.model(**inputs)
    with steer(tiny.model, question="how many"), pytest.raises(ReattendError, match="'how many' is not in prompt 0"):
        tiny.model(**inputs)


def test_a_question_before_its_image_is_reported():
    tiny = tiny_models.llava()
    inputs = tiny.inputs([[1, *turn(*WHAT, "image")]])
    with torch.no_grad():
        base = tiny.model(**inputs).logits
        with pytest.warns(ReattendWarning, match="stands before it"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*never acted.*")
            with steer(tiny.model):
                assert torch.equal(tiny.model(**inputs).logits, base)
    with pytest.warns(ReattendWarning, match="never acted"), steer(tiny.model), torch.no_grad():
        tiny.model(**tiny.inputs([[1, *turn(*WHAT)]]))


# -- profiling ---------------------------------------------------------------------------------------------------------------


def test_profile(tmp_path):
    tiny = tiny_models.llava()
    samples = [tiny.inputs([[1, *turn("image", NEWLINE, *text)]]) for text in (WHAT, HOW, [8, 9, 10, 20])]
    learned = recipe_class("gift").profile(tiny.model, tokenizer(), samples=samples, words="all", enhance_layers=[3, 2])
    totals, image, question = torch.zeros(4), torch.zeros(4, 3), torch.zeros(4, 3)
    tiny.model.set_attn_implementation("eager")
    for n, inputs in enumerate(samples):
        with torch.no_grad():
            maps = tiny.model(**inputs, output_attentions=True).attentions
        where = (inputs["input_ids"] == tiny_models.IMAGE)[0]
        for layer, weights in enumerate(maps):
            end = weights.shape[2] - 1  # where ASSISTANT stands; the question begins at 18, with a newline
            totals[layer] += (weights[0, :, 18:end] - weights[0, :, 17 : end - 1]).clamp_min(0)[..., where].sum() / 3
            image[layer, n], question[layer, n] = (
                weights[0, :, end, where].sum(-1).mean(),
                weights[0, :, end, 18:end].sum(-1).mean(),
            )
    tiny.model.set_attn_implementation("sdpa")
    torch.testing.assert_close(learned.tensors["shift"], totals, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(learned.tensors["image_share"], image.mean(dim=1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(learned.tensors["question_share"], question.mean(dim=1), atol=1e-5, rtol=1e-4)
    assert learned.tensors["saliency_layers"].tolist() == [int(totals.argmax())] == learned.facts["saliency_layers"]
    path = str(learned.save(tmp_path / "gift.safetensors"))
    inputs = tiny.inputs(PROMPTS)
    layers = {k: learned.facts[k] for k in ("saliency_layers", "enhance_layers")}
    with steer(tiny.model, **layers), torch.no_grad():
        expected = tiny.model(**inputs).logits
    profiled = {"saliency_layers": None, "enhance_layers": None, "profile_path": path}
    with steer(tiny.model, **profiled) as session, torch.no_grad():
        assert torch.equal(tiny.model(**inputs).logits, expected)
        assert session.applied == len(layers["enhance_layers"])
    with pytest.raises(ReattendError, match="made for another model"):
        steer(tiny_models.build("qwen2_vl").model, **profiled)
    assert Profile.load(path).facts["samples"] == 3


def test_layers_that_move_together():
    from reattend.recipes.profiling.gift import moving_together

    image = torch.tensor([0.1, 0.2, 0.1, 0.2, 0.3, 0.4, 0.2, 0.3])[:, None]
    question = torch.tensor([0.1, 0.0, 0.1, 0.2, 0.4, 0.5, 0.1, 0.0])[:, None]
    assert moving_together(image, question) == (2, 6)
    with pytest.raises(ReattendError, match="never moves together"):
        moving_together(image, -image)


def test_profiling_says_what_is_wrong(tmp_path):
    tiny, learn = tiny_models.llava(), recipe_class("gift").profile
    with pytest.raises(ReattendError, match="samples are needed"):
        learn(tiny.model, tokenizer())
    with pytest.raises(ReattendError, match="a sample must be"):
        learn(tiny.model, tokenizer(), samples=["a picture"])
    with pytest.raises(ReattendError, match="no (data|samples) file"):
        learn(tiny.model, tokenizer(), samples=str(tmp_path / "none.jsonl"))
    (tmp_path / "bad.jsonl").write_text('{"image": "a.png"}\n')
    with pytest.raises(ReattendError, match="must hold lines"):
        learn(tiny.model, tokenizer(), samples=str(tmp_path / "bad.jsonl"))
    with pytest.raises(ReattendError, match="takes samples, words and enhance_layers"):
        learn(tiny.model, tokenizer(), samples=[], top=3)
    with pytest.raises(ReattendError, match="enhance_layers must name layers of the decoder, 0 to 3"):
        learn(tiny.model, tokenizer(), samples=[{}], enhance_layers=[4])
    with pytest.raises(ReattendError, match="cross-attention"):
        learn(tiny_models.mllama().model, tokenizer(), samples=[{}])
    with pytest.raises(ReattendError, match="every sample needs an image"):
        learn(tiny.model, tokenizer(), samples=[tiny.inputs([[1, *turn(*WHAT)]])])
    with steer(tiny.model), pytest.raises(ReattendError, match="plain model"):
        learn(tiny.model, tokenizer(), samples=[tiny.inputs([ONE])])
