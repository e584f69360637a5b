"""VAR on whole models: images in different places of a batch, caches, beams, chunks, precision; weights read inside the model."""

from __future__ import annotations

import pytest
import reattend
import torch
from planted_sinks import DIM, OPEN, PROMPTS, Planted, planted, tiny_models
from reattend.hooks import Edits, Plan, attach, sites
from reattend.interventions import WeightMap
from reattend.recipes import recipe


@pytest.mark.parametrize(
    "family", ["llava", "qwen2_vl", "llava_next", "gemma3", "paligemma", "qwen3_vl", "mistral3", "smolvlm"]
)
def test_batch_equals_single_samples(family):
    """Left-padded prompts with one image, two images and none, against each alone; the one without stays as it was."""
    model, sinks = planted(family)
    inputs = sinks.inputs(PROMPTS)
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    base = torch.stack(model.generate(**inputs, **options).logits, dim=1)
    with reattend.apply(model, "var", **OPEN) as session:
        steered = torch.stack(model.generate(**inputs, **options).logits, dim=1)
        assert session.stats["var"] and all(n == 4 for n in session.stats["var"].values())
        assert len(session.stats["var"]) == 3, "layers 1 to 3 of 4"
    assert ((steered - base)[:2].abs().amax(dim=(1, 2)) > 1e-4).all()
    torch.testing.assert_close(steered[2], base[2], atol=2e-6, rtol=1e-5)
    after = torch.stack(model.generate(**inputs, **options).logits, dim=1)
    assert torch.equal(after, base), "detached, the model is what it was"
    if family in ("smolvlm", "paligemma"):
        return  # their inputs of one sample are not a slice of the batch's (tiles are shared out; the prefix is not causal)
    pictures = 0
    for row, prompt in enumerate(PROMPTS[:2]):
        full = inputs["input_ids"][row : row + 1]
        single = {"input_ids": full[:, inputs["attention_mask"][row].bool()]}
        single["attention_mask"] = torch.ones_like(single["input_ids"])
        count = prompt.count("image")
        sizes = inputs["image_grid_thw"].prod(dim=1).tolist() if "image_grid_thw" in inputs else None
        for name in ("pixel_values", "image_sizes", "image_grid_thw"):
            if name in inputs:
                patches = sizes is not None and name == "pixel_values"
                first, last = (
                    (sum(sizes[:pictures]), sum(sizes[: pictures + count])) if patches else (pictures, pictures + count)
                )
                single[name] = inputs[name][first:last]
        for name in ("mm_token_type_ids", "token_type_ids"):
            if name in inputs:
                single[name] = (single["input_ids"] == tiny_models.IMAGE).int()
        pictures += count
        sinks.mark(single)
        with reattend.apply(model, "var", **OPEN):
            alone = torch.stack(model.generate(**single, **options).logits, dim=1)
        torch.testing.assert_close(steered[row], alone[0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3", "qwen3_vl"])
def test_cache_equals_no_cache(family):
    """generate with a cache (Gemma 3: one that drops old keys) against whole passes over the grown sequence."""
    model, sinks = planted(family)
    inputs = sinks.inputs(
        [[1, 5, 6, "image", 7, 8], [1, 9, 4, "image", 10, 11]][: 1 if family in ("qwen2_vl", "qwen3_vl") else 2]
    )
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with reattend.apply(model, "var", **OPEN):
        cached = model.generate(**inputs, **options)
    base = model.generate(**inputs, **options)
    assert not torch.allclose(torch.stack(base.logits), torch.stack(cached.logits), atol=1e-4)
    step = dict(inputs)
    with reattend.apply(model, "var", **OPEN) as session, torch.no_grad():
        for n, expected in enumerate(cached.logits):
            logits = model(**step, use_cache=False).logits[:, -1]
            torch.testing.assert_close(logits, expected, atol=3e-5, rtol=1e-4, msg=lambda m, n=n: f"step {n}: {m}")
            new = cached.sequences[:, inputs["input_ids"].shape[1] + n, None]
            step["input_ids"] = torch.cat([step["input_ids"], new], dim=1)
            step["attention_mask"] = torch.ones_like(step["input_ids"])
            for name in ("mm_token_type_ids", "token_type_ids"):
                if name in step:
                    step[name] = torch.nn.functional.pad(step[name], (0, 1))
        assert session.applied == 18


@pytest.mark.parametrize(
    "options", [{"prefill_chunk_size": 7}, {"prompt_lookup_num_tokens": 3}, {"cache_implementation": "static"}]
)
def test_other_ways_to_generate(options):
    model, sinks = planted("llava")
    inputs = sinks.inputs([[1, 5, 6, "image", 7, 8, 7, 8]])
    if "prefill_chunk_size" in options:
        # the planting hook counts from the start of a pass: plant in the embeddings' place instead, chunk by chunk
        sinks.plant = None
        positions, seen = sinks.positions, []
        layer = model.model.language_model.layers[1]
        layer._forward_pre_hooks.clear()

        def plant(module, args):
            hidden = args[0].clone()
            start = sum(seen)
            seen.append(hidden.shape[1])
            if start < positions.shape[1]:
                rows = positions[:, start : start + hidden.shape[1]]
                hidden[..., DIM] = torch.where(rows, 400.0, hidden[..., DIM])
            return (hidden, *args[1:])

        layer.register_forward_pre_hook(plant)
        whole_model = model
        with reattend.apply(whole_model, "var", **OPEN), torch.no_grad():
            expected = model.generate(
                **inputs, max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
            seen.clear()
            got = model.generate(
                **inputs, max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True, **options
            )
        for a, b in zip(expected.logits[1:], got.logits[1:], strict=True):
            torch.testing.assert_close(a, b, atol=3e-5, rtol=1e-4)
        return
    with reattend.apply(model, "var", **OPEN) as session:
        expected = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        got = model.generate(**inputs, max_new_tokens=8, do_sample=False, **options)
        assert session.applied > 0
    assert torch.equal(expected, got)


def test_beams_and_their_rows():
    model, sinks = planted("llava")
    inputs = sinks.inputs(PROMPTS)
    options = {"max_new_tokens": 4, "do_sample": False}
    base = model.generate(**inputs, **options, num_beams=3, output_scores=True, return_dict_in_generate=True)
    with reattend.apply(model, "var", **OPEN) as session:
        steered = model.generate(**inputs, **options, num_beams=3, output_scores=True, return_dict_in_generate=True)
        greedy = model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)
    assert len(session.stats["var"]) == 3
    first = steered.scores[0].view(3, 3, -1)
    torch.testing.assert_close(first, first[:, :1].expand_as(first), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(first[:, 0], greedy.logits[0].log_softmax(dim=-1), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(base.scores[0][:6], steered.scores[0][:6], atol=1e-4)


def test_planted_sinks_give_their_weight_to_the_image():
    """Masses read inside the model right before and right after the edit."""
    model, sinks = planted("llava")
    inputs = sinks.inputs(PROMPTS)
    before, after = {}, {}

    def spy(store):
        def intervention(call):
            def record(weights, rows):
                store.setdefault((call.site.layer, call.clock.phase), weights.detach().clone())
                return weights

            return WeightMap(function=record)

        return intervention

    chosen = recipe("var", **OPEN)
    table = sites(model)
    decoder = table.stack("decoder").layers(1)
    plans = [
        Plan("before", [Edits(decoder, spy(before))]), Plan("var", chosen.plan(table)), Plan("after", [Edits(decoder, spy(after))]),
    ]  # fmt: skip
    with attach(model, plans) as session:
        model.generate(**inputs, max_new_tokens=2)
    assert set(session.stats["var"]) == {s.name for s in decoder}
    image = inputs["input_ids"] == tiny_models.IMAGE
    planted_columns = sinks.positions & inputs["attention_mask"].bool()
    behind = image.flip(1).cumsum(1).flip(1) == 0
    behind &= image.any(1, keepdim=True)
    assert len(before) == 6
    most = 0.0
    for key, old in before.items():
        new = after[key]
        torch.testing.assert_close(new.sum(-1), old.sum(-1), atol=1e-5, rtol=0)
        rows = behind if key[1] == "prefill" else image.any(1, keepdim=True)
        width = image.shape[1]
        moved = (new != old).any(dim=-1)
        assert not (moved & ~rows[:, None]).any(), "rows inside and before the image, and samples without one"
        assert (moved.all(dim=1) == rows).all()
        for b, h, r in moved.nonzero().tolist():
            sink, rest = planted_columns[b], image[b] & ~planted_columns[b]
            torch.testing.assert_close(new[b, h, r, :width][sink], 0.6 * old[b, h, r, :width][sink], atol=1e-7, rtol=1e-4)
            taken = 0.4 * old[b, h, r, :width][sink].sum()
            torch.testing.assert_close(new[b, h, r, :width][rest].sum(), old[b, h, r, :width][rest].sum() + taken)
            most = max(most, float(taken))
            kept = ~sink & ~image[b]
            assert torch.equal(new[b, h, r, :width][kept], old[b, h, r, :width][kept])
    assert most > 0.05


def test_layers_without_a_sink_stay_untouched():
    tiny = tiny_models.llava()
    sinks = Planted(tiny, layer=2)
    inputs = sinks.inputs(PROMPTS)
    with reattend.apply(tiny.model, "var", **{**OPEN, "first_layer": 0}) as session:
        tiny.model.generate(**inputs, max_new_tokens=2)
    assert [name.split(".")[3] for name in session.stats["var"]] == ["2", "3"]
    with reattend.apply(tiny.model, "var", **{**OPEN, "first_layer": 0}, skip_last_layer=True) as session:
        tiny.model.generate(**inputs, max_new_tokens=2)
    assert [name.split(".")[3] for name in session.stats["var"]] == ["2"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model, sinks = planted("llava")
    inputs = sinks.inputs(PROMPTS)
    model.to(dtype)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    with reattend.apply(model, "var", **OPEN) as session, torch.no_grad():
        logits = model(**inputs).logits
    assert logits.isfinite().all() and session.applied == 3
