"""Language recipes in batches: other prompts, paddings and passages per row, shared key heads, windows, beams, sampling, drafts."""

from __future__ import annotations

import functools

import pytest
import reattend
import torch
from reattend.recipes import Profile, recipe_class
from reattend.recipes.kit.profile import fingerprint
from tiny_language import language_model, tokenizer

PROMPTS = [
    "Please: Answer in French. The capital of Italy is Rome. What is the capital?",
    "Anna has a red house. Answer in one word.",
]
PASSAGES = [["Answer in French."], ["red house", "one word"]]
SEGMENTS = [["Answer in French.", " The capital of Italy is Rome."], [" a red", " house."]]
HEADS = [[0, 1], [1, 0], [1, 3], [2, 2], [3, 1]]
MODELS = {
    "Llama": {},
    "Mistral": {"sliding_window": 12},
    "Mistral, filling": {"sliding_window": 26},  # the prompt does not fill its window, the answer does
    "Gemma3": {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"] * 2},
}
# what goes with a row of the batch, by parameter
ROWS = {"text": PASSAGES, "segments": SEGMENTS}
RECIPES = {
    "act": dict(heads=[[layer, head] for layer in (0, 2) for head in range(4)], threshold=0.05, beta=0.1),
    "emphasise": dict(text=PASSAGES, alpha=0.05, heads=HEADS),
    "instaboost": dict(text=PASSAGES, multiplier=20),
    "spotlight": dict(text=PASSAGES, target=0.6),
    "spa": dict(text=PASSAGES, strength=3.0),
    "seka": dict(text=PASSAGES, layers="all", gain=2.0),
    "pine": dict(segments=SEGMENTS),
    "soft-injection": dict(),
    "streaming": dict(sinks=2, window=5),
    "streaming, last rows": dict(sinks=2, window=8, last_rows=4, start_layer=1),
    "mask": dict(mode="mask", heads=HEADS),
    "mask from the last row on": dict(mode="mask", heads=HEADS, where="last_row"),
    "sink_down": dict(mode="sink_down", heads=HEADS, strength=1.0),
}
BEAMS, SAMPLING = dict(num_beams=2), dict(do_sample=True, temperature=1.5, num_return_sequences=2)
CASES = [
    pytest.param(name, kind, way, id=f"{name}-{kind}-{'sampling' if way is SAMPLING else 'beams'}")
    for name in RECIPES
    for kind, way in (("Llama", BEAMS), ("Llama", SAMPLING), ("Mistral", BEAMS), ("Gemma3", SAMPLING))
    if name != "pine" or kind == "Llama"  # it refuses windows that do not cover the prompt
]


@functools.cache
def model_of(kind):
    return language_model(kind.split(",")[0], **MODELS[kind])


@pytest.fixture(scope="module")
def steered(tmp_path_factory):
    """A function (kind, recipe, rows) -> (model, session)."""
    folder, known = tmp_path_factory.mktemp("profiles"), {}

    def profile(kind, model, slug):
        path = folder / f"{kind}-{slug}.safetensors"
        if not path.exists() and slug == "seka":
            recipe_class("seka").profile(model, tokenizer(), pairs=2, experts=False).save(path)
        elif not path.exists():
            torch.manual_seed(2)
            tensors = {"task_embedding": torch.randn(1, 4, 4, 8), "alpha": torch.rand(4, 4)}
            Profile(slug, fingerprint(model), tensors, {"tasks": ["made up"]}).save(path)
        return {"profile_path": str(path)}

    def start(kind, name, rows=(0, 1)):
        if kind not in known:
            known[kind] = model_of(kind)
        slug = name.split(",")[0] if name.split(",")[0] in reattend.list_recipes() else "retrieval-heads"
        given = {k: [v[r] for r in rows] if k in ROWS else v for k, v in RECIPES[name].items()}
        if slug in ("seka", "soft-injection"):
            given |= profile(kind, known[kind], slug)
        return known[kind], reattend.apply(known[kind], slug, tokenizer=tokenizer(), **given)

    return start


def written(model, prompts, **options):
    """(new tokens [rows, steps], logits of the first step [rows, V], of the last one)."""
    x = tokenizer()(prompts, return_tensors="pt", padding=True)
    torch.manual_seed(5)
    out = model.generate(
        **x, max_new_tokens=6, **{"do_sample": False, **options}, return_dict_in_generate=True, output_logits=True
    )  # fmt: skip
    return out.sequences[:, x["input_ids"].shape[1] :], torch.stack(out.logits)


@pytest.mark.filterwarnings("ignore:the borders of the segments")
@pytest.mark.parametrize(("name", "kind", "way"), CASES)
def test_a_cache_changes_nothing_and_rows_are_as_alone(name, kind, way, steered):
    model, session = steered(kind, name)
    with session:
        tokens, logits = written(model, PROMPTS, **way)
        again, recomputed = written(model, PROMPTS, **way, use_cache=False)
    assert session.applied and torch.equal(tokens, again)
    torch.testing.assert_close(logits, recomputed, atol=3e-4, rtol=1e-3)
    plain = written(model, PROMPTS, **way)[1]
    changed = (plain[:2] - logits[:2]).abs().amax(dim=(0, 2))
    assert (changed > 1e-3).all(), "every row must be steered"
    if "do_sample" in way:
        return  # rows share the random numbers
    for row, prompt in enumerate(PROMPTS):
        with steered(kind, name, (row,))[1]:
            alone, _ = written(model, [prompt], **way)
        assert torch.equal(tokens[row], alone[0])


@pytest.mark.filterwarnings("ignore:the borders of the segments")
@pytest.mark.parametrize("name", RECIPES)
def test_drafted_tokens_change_nothing(name, steered):
    """The pass that reads the prompt holds drafts too, and rows of drafts are rows of generated tokens."""
    model, session = steered("Llama", name, (0,))
    with session:
        tokens, _ = written(model, PROMPTS[:1])
        before = session.forwards
        drafted, _ = written(model, PROMPTS[:1], assistant_model=language_model())
        assert session.forwards - before < 6, "some drafts were accepted"
    assert torch.equal(tokens, drafted)
