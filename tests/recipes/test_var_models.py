"""VAR on whole models: images in different places of a batch, caches, beams, chunks, precision; weights read inside the model."""

from __future__ import annotations

import reattend
import torch
from planted_sinks import OPEN, PROMPTS, Planted, planted, tiny_models
from reattend.hooks import Edits, Plan, attach, sites
from reattend.interventions import WeightMap
from reattend.recipes import recipe


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
