"""Attention pictures: their numbers are those of the model's own eager attention, and each square lies where its token looks."""

from __future__ import annotations

import json
import re

import pytest
import reattend
import torch
from PIL import Image, ImageDraw
from reattend.comparison import looks as looks_module
from reattend.comparison.looks import Cell, Looks
from reattend.comparison.pictures import heat_picture, level, moved_picture, strip
from reattend.comparison.text import prompt_pieces
from reattend.comparison.words import points
from reattend.hooks import Edits, Support
from reattend.interventions import KeyBias, TokenGrid, TokenMap
from reattend.recipes import Info, Recipe

PROMPT = "the red dog sat on a big house and the small cat ran in the garden"
WINDOW = ("streaming", {"sinks": 1, "window": 3})
OPTIONS = dict(max_new_tokens=5, do_sample=False)


class Tilt(Recipe):
    """A recipe for models of every kind: a bias on column 0."""

    slug = ""
    info = Info("Tilts.", "None", 2026, "0000.00000", ("calibration",), ("llm",), "free")

    def supports(self, sites):
        return Support(True)

    def plan(self, sites):
        bias = lambda call: KeyBias(bias=torch.zeros(call.num_keys).index_fill(0, torch.tensor([0]), 3.0))  # noqa: E731
        return [Edits(sites.where(lambda s: s.supported), bias, "tilt")]


def picture(size=(96, 64)) -> Image.Image:
    made = Image.new("RGB", size, "white")
    ImageDraw.Draw(made).ellipse((30, 10, 66, 46), fill="red")
    return made


@pytest.fixture
def seen(look_pipe):
    return reattend.compare(look_pipe, WINDOW, image=picture(), text="the red dog is on the house", **OPTIONS)


def by_hand(model, inputs) -> dict[int, torch.Tensor]:
    """{layer: [prompt]}: the weights of the rows that predict the new tokens, from eager attention."""
    model.set_attn_implementation("eager")
    output = model.generate(**inputs, **OPTIONS, output_attentions=True, return_dict_in_generate=True)
    model.set_attn_implementation("sdpa")
    size = inputs["input_ids"].shape[1]
    layers = range(len(output.attentions[0]))
    rows = {n: [step[n][0, :, -1, :size].mean(dim=0) for step in output.attentions] for n in layers}
    return {n: torch.stack(every).mean(dim=0) for n, every in rows.items()}


def test_text_weights_are_those_of_the_model(text_pipe, tokenizer):
    report = reattend.compare(text_pipe, WINDOW, text=PROMPT, **OPTIONS)
    expected = by_hand(text_pipe.model, dict(tokenizer(PROMPT, return_tensors="pt")))
    found = report.looks
    assert found.layers == [0, 1] and found.answer == (5, 5) and not any(found.image) and found.grids == []
    assert "".join(found.pieces) == PROMPT
    for layer in (0, 1):
        torch.testing.assert_close(found.before[layer], expected[layer], atol=1e-5, rtol=1e-4)
        # sixteen tokens of prompt, one sink and a window of three: the rest is out of sight
        assert (found.after[layer][1:13] == 0).all() and found.after[layer][0] > 0
    assert report.attention_map().tobytes() == report.attention_strip().tobytes()
    shown = json.loads(report.json())["attention_on_prompt"]["prompt"]
    assert [c["text"].strip() for c in shown] == PROMPT.split()
    assert shown[3]["before"] == pytest.approx(float(sum(expected[n][3] for n in (0, 1))) / 2, rel=1e-4)


def test_image_weights_are_those_of_the_model(look_pipe, seen):
    messages = [
        {
            "role": "user",
            "content": [{"type": "image", "image": picture()}, {"type": "text", "text": "the red dog is on the house"}],
        }
    ]
    inputs = look_pipe.processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    expected = by_hand(look_pipe.model, dict(inputs))
    assert seen.looks.grids[0].tolist() == [[0, 1], [2, 3]] and sum(seen.looks.image) == 4
    for layer in (0, 1):
        torch.testing.assert_close(seen.looks.before[layer], expected[layer], atol=1e-5, rtol=1e-4)
    cell = seen.looks.cells()[0]
    assert cell.text == "image" and cell.tokens == 4
    assert cell.before == pytest.approx(float((expected[0][:4] + expected[1][:4]).sum() / 2), rel=1e-4)


def test_sheet_and_page_show_the_same_panels(seen, tmp_path):
    sheet = seen.attention_map()
    assert seen.attention_map(picture()).tobytes() == sheet.tobytes()
    assert seen.attention_map(groups=1).height < sheet.height
    assert seen.attention_strip().width <= 980
    page = seen.html(tmp_path / "report.html").read_text()
    assert "Where the answer looks in the picture" in page and page.count("attention on the picture") == 6
    assert "From which tokens of the prompt to which" in page
    assert not re.search(r'(src|href)="(?!data:|#|https://arxiv)', page)
    seen.looks = None
    assert "Where the answer looks" not in seen.html(tmp_path / "again.html").read_text()
    with pytest.raises(reattend.ReattendError, match="attention=True"):
        seen.attention_map()


def test_share_inside_a_box(seen):
    left, right = seen.attention_inside((16, 0, 48, 64)), seen.attention_inside((48, 0, 80, 64))
    for side in ("before", "after"):
        assert left[side] + right[side] == pytest.approx(1)
    grid = seen.looks.grids[0]
    before, after = seen.looks.weights()
    assert left["before"] == pytest.approx(float(before[grid][:, 0].sum() / before[grid].sum()), rel=1e-5)
    # outside the centre square, the model sees nothing
    assert seen.attention_inside((0, 0, 16, 64)) == {"before": 0, "after": 0}
    half = seen.attention_inside((16, 0, 80, 16), layers=[1])
    assert half["before"] == pytest.approx(float(seen.looks.before[1][:2].sum() / seen.looks.before[1][:4].sum()) / 2, rel=1e-4)


@pytest.mark.parametrize(
    "ask, message",
    [
        (lambda r: r.attention_map(3), "0 to 0"),
        (lambda r: r.attention_map("a.png"), "got 'a.png'"),
        (lambda r: r.attention_map(groups=0), "groups"),
        (lambda r: r.attention_inside((5, 5, 5, 9)), "left < right"),
        (lambda r: r.attention_inside((1, 2, 3)), "left < right"),
    ],
)
def test_bad_input(seen, ask, message):
    with pytest.raises(reattend.ReattendError, match=message):
        ask(seen)


def test_no_picture_in_the_prompt(text_pipe):
    report = reattend.compare(text_pipe, WINDOW, text=PROMPT, **OPTIONS)
    with pytest.raises(reattend.ReattendError, match="no picture"):
        report.attention_map(0)
    with pytest.raises(reattend.ReattendError, match="attention=True"):
        reattend.compare(text_pipe, WINDOW, text=PROMPT, attention=False, **OPTIONS).attention_map()


def test_kinds_without_a_prompt_of_tokens_have_no_looks(class_pipe, fill_pipe):
    assert reattend.compare(class_pipe, Tilt(), image=picture((32, 32))).looks is None
    assert reattend.compare(fill_pipe, Tilt(), text="the red <mask> sat").looks is None


# -- parts -----------------------------------------------------------------------------------------------------------


def made(grids=(), image=(), n=8) -> Looks:
    torch.manual_seed(0)
    sides = [{layer: torch.rand(n).softmax(0) for layer in range(7)} for _ in range(2)]
    return Looks([str(i) for i in range(n)], [i in image for i in range(n)], list(grids), False, *sides)


def test_groups_of_layers():
    looks = made()
    assert [g.label for g in looks.groups()] == ["layers 0 to 2", "layers 3 to 4", "layers 5 to 6"]
    assert [len(g.layers) for g in looks.groups(50)] == [1] * 7 and looks.groups(50)[3].label == "layer 3"
    del looks.after[6]
    assert looks.layers == list(range(6))


def test_shares_leave_the_first_token_out():
    looks = made(image=(2, 3, 4))
    before, after = looks.shares(layers=[1])
    raw = looks.after[1]
    assert after[0] == 0 and after.sum() == pytest.approx(1) and after[5] == pytest.approx(float(raw[5] / raw[1:].sum()))
    cells = looks.shared_cells(layers=[1])
    assert [(c.text, c.tokens) for c in cells] == [("1", 1), ("image", 3), ("5", 1), ("6", 1), ("7", 1)]
    assert sum(c.before for c in cells) == pytest.approx(1) and cells[1].before == pytest.approx(float(before[2:5].sum()))
    assert made(n=1).shared_cells() == []


def test_which_grid_shows_a_picture():
    tile, wide = torch.zeros(2, 2, dtype=torch.long), torch.zeros(2, 3, dtype=torch.long)
    over = torch.ones(2, 2, dtype=torch.long)
    assert made([tile, wide]).grid(0, 1) is wide, "the largest of an overview and a picture in full"
    assert made([tile, tile, over]).grid(0, 1) is over, "the overview comes last"
    assert made([tile, over]).grid(1, 2) is over
    with pytest.raises(reattend.ReattendError, match="3 known grids for 2 pictures"):
        made([tile, tile, over]).grid(0, 2)
    with pytest.raises(reattend.ReattendError, match="0 known grids"):
        made().grid(0, 1)


def test_runs_of_image_tokens_are_one_cell():
    looks = made(image=(2, 3, 4))
    cells = looks.cells(layers=[1])
    assert [(c.text, c.tokens) for c in cells] == [("0", 1), ("1", 1), ("image", 3), ("5", 1), ("6", 1), ("7", 1)]
    assert cells[2].after == pytest.approx(float(looks.after[1][2:5].sum()))
    assert sum(c.before for c in cells) == pytest.approx(1)


def test_squares_are_coloured_where_the_weight_is():
    base = Image.new("RGB", (40, 20), "white")
    weights = torch.tensor([[0.0, 0.0], [0.0, 0.4]])
    drawn = heat_picture(base, level(weights, 0.4))
    bright, dark = drawn.getpixel((35, 15)), drawn.getpixel((5, 5))
    assert sum(bright) > sum(dark) and drawn.getpixel((21, 11)) == bright and drawn.getpixel((19, 11)) == dark
    moved = moved_picture(base, torch.tensor([[1.0, -1.0], [0.0, 0.0]]))
    gained, lost, same = (moved.getpixel(at) for at in ((5, 5), (35, 5), (5, 15)))
    assert gained[0] > gained[2] and lost[2] > lost[0] and len(set(same)) == 1
    assert level(torch.tensor([0.0, 0.1, 0.4]), 0.4).tolist() == pytest.approx([0, 0.5, 1])


def test_strip_wraps_and_colours():
    cells = [Cell(" word", 1, 0.2, 0.1), Cell("\n", 1, 0.1, 0.2), Cell("same", 1, 0.1, 0.1)]
    drawn = strip(cells)
    colours = {c for _, c in drawn.getcolors(1 << 16)}
    assert any(c[2] > c[0] + 90 for c in colours) and any(c[0] > c[2] + 90 for c in colours)
    assert strip(cells * 40).height > 4 * drawn.height / 2
    with pytest.raises(reattend.ReattendError, match="no token"):
        strip([])
    assert strip([Cell("a", 1, 0.0, 0.0)]).width > 10, "nothing moved"


def test_points_and_pieces(tokenizer):
    assert [points(x) for x in (0.0, 0.00002, 0.0012, -0.05, 0.5)] == ["0", "0", "+0.12", "-5.0", "+50.0"]
    ids = tokenizer(PROMPT).input_ids
    assert "".join(prompt_pieces(ids, tokenizer)) == PROMPT
    assert prompt_pieces([3, 1], None) == ["3", "1"]


def test_long_prompts_show_start_and_end(seen, monkeypatch, tmp_path):
    from reattend.comparison import page

    monkeypatch.setattr(page, "MOST_TOKENS", 5)
    monkeypatch.setattr(page, "FIRST_TOKENS", 2)
    cells = page._moved(seen)
    assert [c["token"] for c in cells] == ["image (3 tokens)", "the", "… (3 tokens)", "on", "the", "house"]


def test_grids_of_other_rows_are_left_out():
    class Fake:
        table = ()
        readings = {}
        tokens = TokenMap(2, 3, 3, {}, [TokenGrid.of_image(1, torch.zeros(1, 1, dtype=torch.long))])

        def spread_by_layer(self, length, stack):
            return {0: torch.zeros(length)}

    assert looks_module.add_side(None, Fake(), ["a"], False, False) is None, "pieces must fit the prompt"  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["llava_next", "qwen2_vl", "internvl", "idefics3", "gemma3", "pixtral"])
def test_pictures_of_other_families(family):
    from tiny_models import build

    tiny = build(family)
    inputs = tiny.inputs([[5, "image", 6, 7, 8]])
    report = reattend.compare(tiny.model, Tilt(), inputs=inputs, **OPTIONS)
    looks = report.looks
    assert looks is not None and len(looks.pieces) == inputs["input_ids"].shape[1]
    grid = looks.grid(0, 1)
    assert all(looks.image[i] for i in grid.flatten().tolist())
    before, after = looks.weights()
    assert before.sum() <= 1.0001 and not torch.equal(before, after)
    sheet = report.attention_map(picture((60, 60)))
    assert sheet.height > 240 and sheet.width > 3 * 240
    with pytest.raises(reattend.ReattendError, match="does not hold the prompt's pictures"):
        report.attention_map()
