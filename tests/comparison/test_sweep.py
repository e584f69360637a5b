"""Several variants in one report: the numbers are those of runs by hand, nothing stays attached, and lists that cannot be are refused."""

from __future__ import annotations

import io
import json
import re
import warnings

import pytest
import reattend
import tiny_pipelines
import torch
from PIL import Image
from reattend.comparison.images import ImageJob
from reattend.comparison.sweep_chart import chart_of, drawing
from reattend.comparison.text import kl_divergence
from reattend.hooks.trackers.caches import cache_name, cache_of
from rich.console import Console
from tilt import Tilt

PROMPT = "the red dog sat on a big house and the small cat ran in the garden"
MARKED = "small cat"
OPTIONS = dict(max_new_tokens=6, do_sample=False)
EMPHASIS = [("emphasise", {"alpha": a}) for a in (1.0, 0.3, 0.02)]
WINDOW = ("streaming", {"sinks": 1, "window": 3})


@pytest.fixture
def swept(text_pipe):
    return reattend.wrap(text_pipe).compare(EMPHASIS, prompt=PROMPT, text=MARKED, **OPTIONS)


def test_every_column_is_what_its_own_comparison_gives(text_pipe, swept):
    pairs = [reattend.compare(text_pipe, (n, {**p, "text": MARKED}), text=PROMPT, **OPTIONS) for n, p in EMPHASIS]
    assert [c.side.text for c in swept.columns] == [p.outputs["after"] for p in pairs]
    assert swept.untouched.text == pairs[0].outputs["before"]
    assert [c.stats for c in swept.columns] == [p.stats for p in pairs]
    assert [c.first_difference for c in swept.columns] == [p.first_difference for p in pairs]
    assert [c.same for c in swept.columns] == [p.metrics["identical"] for p in pairs]
    assert swept.columns[0].same and not swept.columns[2].same
    assert [c.label for c in swept.columns] == ["emphasise(alpha=1.0)", "emphasise(alpha=0.3)", "emphasise(alpha=0.02)"]
    assert swept.columns[1].differing == {"alpha": 0.3} and swept.columns[1].recipes[0]["parameters"]["text"] == MARKED


def reading(model, ids, new):
    """Logits [steps, V] of a model that is made to read new tokens one by one."""
    with torch.no_grad():
        output = model(ids, use_cache=True)
        rows = [output.logits[0, -1]]
        for token in new[:-1]:
            output = model(torch.tensor([[token]]), use_cache=True, **{cache_name(model): cache_of(output)})
            rows.append(output.logits[0, -1])
    return torch.stack(rows)


def test_distances_are_measured_on_the_untouched_text(text_pipe, tokenizer, swept):
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    new = text_pipe.model.generate(ids, **OPTIONS)[0, ids.shape[1] :].tolist()
    before = reading(text_pipe.model, ids, new)
    for column, (_, given) in zip(swept.columns, EMPHASIS):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", reattend.ReattendWarning)
            with reattend.apply(text_pipe, "emphasise", text=MARKED, **given):
                after = reading(text_pipe.model, ids, new)
        expected = sum(kl_divergence(a, b) for a, b in zip(before, after)) / len(new)
        assert column.effect["kl"] == pytest.approx(expected, rel=1e-3, abs=1e-9)
        change = (after.log_softmax(-1) - before.log_softmax(-1))[torch.arange(len(new)), torch.tensor(new)].mean()
        assert column.effect["log_probability"] == pytest.approx(float(change), rel=1e-3, abs=1e-6)
    assert swept.columns[0].effect["kl"] == 0 < swept.columns[1].effect["kl"] < swept.columns[2].effect["kl"]


def test_the_share_of_the_marked_passage_leaves_the_first_token_out(text_pipe, tokenizer, swept):
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    new = text_pipe.model.generate(ids, **OPTIONS)[0, ids.shape[1] :].tolist()
    place = ids.shape[1]
    text_pipe.model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = text_pipe.model(torch.cat([ids, torch.tensor([new])], dim=1), output_attentions=True).attentions
    rows = torch.stack(weights)[:, 0, :, place - 1 : place - 1 + len(new), 1:place].mean(dim=(0, 1, 2))
    words = PROMPT.split()
    first = words.index("small") - 1
    expected = float(rows[first : first + 2].sum() / rows.sum())
    share = next(m for m in swept.measures if m.key == "share")
    assert share.untouched == pytest.approx(expected, rel=1e-4)
    values = [c.effect["share"] for c in swept.columns]
    assert values[0] == pytest.approx(expected, rel=1e-4) and values[0] < values[1] < values[2] < 1


def test_variants_that_mark_different_passages_are_measured_on_their_own(text_pipe):
    given = [("instaboost", {"text": "red dog"}), ("instaboost", {"text": MARKED}), WINDOW]
    report = reattend.compare(text_pipe, given, text=PROMPT, **OPTIONS)
    share = next(m for m in report.measures if m.key == "share")
    assert share.untouched is None and "on its own" in share.explains
    for column in report.columns[:2]:
        assert column.effect["share"] > column.effect["share_untouched"] > 0
    assert [c.label for c in report.columns] == [
        "instaboost(text=red dog)",
        "instaboost(text=small cat)",
        "streaming(sinks=1, window=3)",
    ]


def test_the_model_runs_once_per_variant_and_nothing_stays(text_pipe, tokenizer, monkeypatch):
    from reattend.comparison.text import TextJob

    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    before = text_pipe.model(ids).logits
    runs = []
    real = TextJob.run
    monkeypatch.setattr(TextJob, "run", lambda job, tick: (runs.append(1), real(job, tick))[1])
    reattend.compare(text_pipe, [WINDOW, "streaming:sinks=1:window=5"], text=PROMPT, **OPTIONS)
    assert len(runs) == 3, "the untouched run and two variants"
    assert torch.equal(text_pipe.model(ids).logits, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in text_pipe.model.modules())


def test_all_variants_have_the_same_seed(text_pipe):
    options = dict(text=PROMPT, max_new_tokens=6, do_sample=True, temperature=2.0)
    report = reattend.compare(text_pipe, [Tilt(strength=0.0), Tilt(strength=4.0), WINDOW], seed=3, **options)
    assert report.columns[0].same and not report.columns[2].same
    assert reattend.compare(text_pipe, [WINDOW], seed=3, **options).columns[0].side.text == report.columns[2].side.text
    assert reattend.compare(text_pipe, [WINDOW], seed=4, **options).outputs != report.outputs


def test_lists_in_the_list_compose(text_pipe):
    given = [[("instaboost", {"text": MARKED}), WINDOW], "streaming:sinks=1:window=3+instaboost:multiplier=5"]
    report = reattend.compare(text_pipe, given, prompt=PROMPT, text=MARKED, **OPTIONS)
    by_hand = reattend.compare(text_pipe, ("instaboost", {"text": MARKED}), WINDOW, text=PROMPT, **OPTIONS)
    assert report.columns[0].side.text == by_hand.outputs["after"]
    assert [c.label for c in report.columns] == [
        "instaboost(multiplier=3.0) + streaming",
        "streaming + instaboost(multiplier=5.0)",
    ]
    assert set(report.columns[1].stats) == {"streaming", "instaboost"}


def test_beams(text_pipe):
    report = reattend.compare(text_pipe, [WINDOW, Tilt()], text=PROMPT, max_new_tokens=4, num_beams=2, do_sample=False)
    assert "beam search" in report.notes[0]
    assert report.columns[0].effect["kl"] > 0, "all variants read the beams' untouched text, token by token"
    assert "beam search" in report._repr_html_()


@pytest.mark.parametrize(
    "variants, words",
    [
        ([], "list of variants is empty"),
        ([WINDOW, "none"], "variant 2: 'none' is the untouched model"),
        ([None], "variant 1: None is the untouched model"),
        ([[]], "variant 1: .* is the untouched model"),
        ([WINDOW, "streaming", "streaming:window=3:sinks=1"], "variants 1 and 3 are the same"),
        ([WINDOW, "streeming"], "variant 2: unknown recipe 'streeming': did you mean 'streaming'"),
        ([WINDOW, ("streaming", {"window": 0})], "variant 2: recipe 'streaming': window"),
        ([WINDOW, 7], "variant 2: a recipe must be a name"),
        ([WINDOW, "softpag"], "variant 2, softpag: recipe 'softpag' does not fit this model"),
        (
            [WINDOW, "instaboost"],
            "variant 2: recipe 'instaboost': text is required.*give the passage for all recipes as text=",
        ),
    ],
)
def test_lists_that_cannot_be_are_refused_before_anything_runs(text_pipe, monkeypatch, variants, words):
    monkeypatch.setattr(text_pipe.model, "generate", lambda *_, **__: pytest.fail("ran"))
    with pytest.raises(reattend.ReattendError, match=words):
        reattend.compare(text_pipe, variants, text=PROMPT, **OPTIONS)


def test_a_list_goes_alone(text_pipe):
    for given in ([WINDOW], "streaming"), ("streaming", [WINDOW]):
        with pytest.raises(reattend.ReattendError, match="a list of variants goes alone"):
            reattend.compare(text_pipe, *given, text=PROMPT)


def test_a_passage_that_is_not_there_names_its_variant_and_leaves_nothing(text_pipe):
    given = [("instaboost", {"text": MARKED}), ("instaboost", {"text": "blue key"})]
    with pytest.raises(reattend.ReattendError, match=r"variant 2, instaboost\(text=blue key\): .*blue key"):
        reattend.compare(text_pipe, given, text=PROMPT, **OPTIONS)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in text_pipe.model.modules())


def test_a_vision_language_model(look_pipe):
    picture = Image.effect_noise((16, 16), 90).convert("RGB")
    given = [("vhr", {"layers": (0, 1), "alpha": a}) for a in (1.5, 4.0)]
    report = reattend.compare(look_pipe, given, image=picture, text="the red dog is on", **OPTIONS)
    alone = reattend.compare(look_pipe, given[1], image=picture, text="the red dog is on", **OPTIONS)
    assert report.columns[1].side.text == alone.outputs["after"] and report.inputs == [picture]
    share = next(m for m in report.measures if m.key == "share")
    assert share.short == "image" and 0 < share.untouched < 1
    assert chart_of(report).parameter == "alpha" and report._repr_html_().count("<svg") == 3


def test_predictions(fill_pipe):
    report = reattend.compare(
        fill_pipe, [Tilt(strength=0.0), Tilt(strength=2.0), Tilt(strength=6.0)], text="the red <mask> sat"
    )
    alone = reattend.compare(fill_pipe, Tilt(strength=6.0), text="the red <mask> sat")
    last = report.columns[2]
    assert last.side.predictions == alone.outputs["after"] and last.effect["kl"] == alone.metrics["kl"] > 0
    assert last.effect["probability"] == alone.metrics["probability_of_first_after"]
    assert report.measures[1].untouched == alone.metrics["probability_of_first_before"]
    assert [c.effect["kl"] for c in report.columns] == sorted(c.effect["kl"] for c in report.columns)


# -- pictures ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn():
    pipe = tiny_pipelines.stable_diffusion()
    given = [("softpag", {"layers": [0], "strength": s, "scale": 20.0}) for s in (0.0, 0.5, 1.0)]
    calls = []
    real = ImageJob.run
    with pytest.MonkeyPatch.context() as patch, pytest.warns(reattend.ReattendWarning, match="never acted"):
        patch.setattr(ImageJob, "run", lambda job, tick: (calls.append(1), real(job, tick))[1])
        report = reattend.compare(pipe, given, prompt="a dog", num_inference_steps=3, guidance_scale=2.0, seed=5)
    assert len(calls) == 4, "once untouched and once per variant"
    alone = reattend.compare(pipe, given[2], prompt="a dog", num_inference_steps=3, guidance_scale=2.0, seed=5)
    return report, alone


def test_pictures(drawn):
    report, alone = drawn
    zero, half, full = report.columns
    assert zero.same and zero.side.pictures[0].tobytes() == report.untouched.pictures[0].tobytes()
    assert zero.effect["pixels"] == zero.effect["structure"] == 0 and zero.applied == 0 and "never acted" in zero.notes[0]
    assert full.side.pictures[0].tobytes() == alone.after.pictures[0].tobytes() and not full.same
    assert full.effect["pixels"] == alone.metrics["mean_absolute_difference"] > half.effect["pixels"] > 0
    assert full.effect["structure"] == 1 - alone.metrics["ssim"]
    assert report.title.startswith("softpag at 3 values of strength on ")


def test_the_grid_as_png(drawn, tmp_path):
    report, _ = drawn
    file = report.png(tmp_path / "grid.png")
    shown = Image.open(file)
    assert shown.size == report.grid().size and shown.width > 4 * 160
    colours = {report.untouched.pictures[0].getpixel((0, 0)), report.columns[2].side.pictures[0].getpixel((0, 0))}
    assert colours <= {colour for _, colour in shown.convert("RGB").getcolors(1 << 20)}, "pictures are enlarged, not blurred"
    with pytest.raises(reattend.ReattendError, match="is there already|exists"):
        report.png(file, overwrite=False)
    with pytest.raises(reattend.ReattendError, match="must end in .png"):
        report.png(tmp_path / "grid.jpg")


def test_one_comparison_as_png(drawn, text_pipe, tmp_path):
    _, alone = drawn
    file = alone.png(tmp_path / "pair.png")
    shown = Image.open(file).convert("RGB")
    assert shown.size == alone.grid().size and 2 * 160 < shown.width < 3 * 192
    for side in (alone.before, alone.after):
        assert side.pictures[0].getpixel((0, 0)) in {colour for _, colour in shown.getcolors(1 << 20)}
    with pytest.raises(reattend.ReattendError, match="must end in .png"):
        alone.png(tmp_path / "pair.jpg")
    with pytest.raises(reattend.ReattendError, match="exists already|is there already"):
        alone.png(file, overwrite=False)
    texts = reattend.compare(text_pipe, WINDOW, text=PROMPT, attention=False, **OPTIONS)
    with pytest.raises(reattend.ReattendError, match="only pictures make a grid, and these variants gave texts"):
        texts.png(tmp_path / "x.png")


def test_joint_attention_shows_its_share_on_the_text():
    pipe = tiny_pipelines.stable_diffusion_3()
    report = reattend.compare(
        pipe, [Tilt(strength=1.0), Tilt(strength=4.0)], prompt="a dog", num_inference_steps=2, height=8, width=8
    )
    share = next(m for m in report.measures if m.key == "text_share")
    assert 0 < share.untouched < 1 and all(0 < c.effect["text_share"] < 1 for c in report.columns)
    assert report.columns[0].effect["text_share"] != report.columns[1].effect["text_share"]


# -- how it shows itself -----------------------------------------------------------------------------------------------


def test_texts_make_no_png(swept, tmp_path):
    with pytest.raises(reattend.ReattendError, match="only pictures make a grid"):
        swept.png(tmp_path / "x.png")


def test_page(swept, drawn, tmp_path):
    for report in (swept, drawn[0]):
        page = report.html(tmp_path / "page.html").read_text()
        assert page.startswith("<!doctype html>") and "<script" not in page and "prefers-color-scheme:dark" in page
        assert page.count("<svg") == len(report.measures)
        assert not re.findall(r'(?:src|href)="(?!data:|https://arxiv\.org/)', page)
        assert all(measure.title.replace("'", "&#39;") in page for measure in report.measures)
        assert "<html" not in report._repr_html_() and "<section" in report._repr_html_()
    with pytest.raises(reattend.ReattendError):
        swept.html(tmp_path / "page.html", overwrite=False)


def test_what_the_model_writes_is_escaped(swept):
    swept.columns[2].side.tokens = ["<b>", "x"]
    swept.columns[2].first_difference = 0
    assert "<b>x" not in swept._repr_html_() and "&lt;b&gt;" in swept._repr_html_()


def test_json(swept):
    data = json.loads(swept.json())
    assert [v["label"] for v in data["variants"]] == [c.label for c in swept.columns]
    assert data["variants"][1]["effect"]["kl"] == swept.columns[1].effect["kl"]
    assert data["variants"][1]["edits_applied"] == swept.columns[1].applied > 0
    assert data["measures"][2]["key"] == "share" and data["untouched"]["text"] == swept.untouched.text


def test_terminal_in_80_columns(swept, drawn):
    for report in (swept, drawn[0]):
        console = Console(width=80, record=True, file=io.StringIO())
        console.print(report)
        lines = console.export_text().splitlines()
        assert max(map(len, lines)) <= 80
        for column in report.columns:
            assert any(column.label in line for line in lines)
        assert any("edits applied" in line or "edits" in line for line in lines)


def test_a_column_by_its_label(swept):
    assert swept.column("emphasise(alpha=0.3)") is swept.columns[1]
    with pytest.raises(reattend.ReattendError, match="has no variant 'x'"):
        swept.column("x")


# -- the chart ---------------------------------------------------------------------------------------------------------


def test_chart_of_one_recipe(swept):
    chart = chart_of(swept)
    assert (chart.recipe, chart.parameter, chart.others) == ("emphasise", "alpha", [])
    (line,) = chart.lines
    assert [x for x, _ in line.points] == [0.02, 0.3, 1.0]
    kl = drawing(chart, swept.measures[0])
    assert kl["log"], "50 times as large"
    (drawn_line,) = kl["lines"]
    heights = [dot["y"] for dot in drawn_line["dots"]]
    assert heights == sorted(heights) and heights[-1] == kl["untouched"]["y"], "the smallest alpha moves most, 1 nothing"
    assert [tick["text"] for tick in kl["ticks"]] == ["0.02", "0.3", "1"]
    assert "alpha 0.3" in swept._repr_html_()


def test_chart_with_two_lines_and_others(text_pipe):
    given = [("instaboost", {"multiplier": m, "first_token": f}) for m in (2.0, 3.0) for f in (True, False)]
    report = reattend.compare(text_pipe, [*given, WINDOW], prompt=PROMPT, text=MARKED, **OPTIONS)
    chart = chart_of(report)
    assert (chart.parameter, len(chart.lines), [c.label for c in chart.others]) == (
        "multiplier",
        2,
        ["streaming(sinks=1, window=3)"],
    )
    assert [line.label for line in chart.lines] == ["instaboost(first_token=true)", "instaboost(first_token=false)"]
    page = report._repr_html_()
    assert "Not drawn" in page and 'class="key s2"' in page
    assert not drawing(chart, report.measures[0])["log"]


def test_no_chart_where_two_things_differ(text_pipe):
    given = ["streaming:sinks=1:window=3", "streaming:sinks=2:window=4"]
    report = reattend.compare(text_pipe, given, text=PROMPT, **OPTIONS)
    assert chart_of(report) is None and "<svg" not in report._repr_html_()
    assert "KL divergence" in report._repr_html_()


def test_a_mean_over_one_token_is_said_in_the_singular(text_pipe):
    report = reattend.compare(text_pipe, [WINDOW], text=PROMPT, attention=False, max_new_tokens=1, do_sample=False)
    assert "mean over the first token of the untouched text" in report.measures[0].explains


def test_the_table_fits_a_narrow_page(swept):
    (narrow,) = re.findall(r"@media \(max-width:560px\)\{.*", swept._repr_html_())
    assert ".scroll td{padding:4px 8px 4px 0;white-space:normal" in narrow, "cells wrap instead of being cut off"
