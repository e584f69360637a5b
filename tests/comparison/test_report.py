"""The four forms of a report; above all: the page asks nothing of the network, and no text of the user's becomes markup."""

from __future__ import annotations

import io
import json
import math
import re
from html.parser import HTMLParser

import pytest
import reattend
import torch
from PIL import Image
from reattend.comparison import Report, write_page
from reattend.comparison.cost import Cost
from reattend.comparison.looks import Looks
from reattend.comparison.outcome import Check, Side
from reattend.comparison.words import duration, number, percent, size
from rich.console import Console

EVIL = '<script>alert("x")</script><img src=x onerror=alert(1)> & "quotes" \' {{ 7 * 7 }}'


def text_report(**changes) -> Report:
    recipe = {
        "name": "streaming", "parameters": {"window": 3, "note": EVIL}, "chosen": ["window"], "does": "Does " + EVIL,
        "paper": "A paper", "year": 2023, "arxiv": "2309.17453",
    }  # fmt: skip
    values = dict(
        kind="text", title="Title " + EVIL, intro=EVIL, seed=1, recipes=[recipe],
        model={"class": "Llama", "name": EVIL, "parameters": 12e6, "dtype": "float32", "device": "cpu", "attention": "sdpa",
               "sites": 2},
        request={"prompt": EVIL, "prompt_tokens": 9, "settings": {"stop": EVIL}},
        before=Side(text="a b c", tokens=["a", " b", EVIL], cost=Cost(1.0, 0.4, 1 << 20, "process", 3, 3, 11, 3),
                    mass={"bos": 0.75, EVIL: 0.25},
                    mass_by_layer={i: {"bos": 0.75, EVIL: 0.25} for i in range(4)}),
        after=Side(text="a x", tokens=["a", " x"], cost=Cost(1.5, 0.5, 1 << 21, "process", 2, 4, 21, 4),
                   mass={"bos": 0.5, EVIL: 0.5},
                   mass_by_layer={i: {"bos": 0.5, EVIL: 0.5} for i in range(4)}),
        kl=[0.01, 1.5], first_difference=1, notes=[EVIL], stats={"streaming": {"m.0": 4, "m.1": 4}},
        metrics={"identical": False, "kl_mean": 0.755, "kl_max": 1.5, "kl_at_first_difference": 1.5},
        environment={"torch": "2"},
    )  # fmt: skip
    return Report(**{**values, **changes})


def image_report() -> Report:
    pictures = [Image.new("RGB", (12, 12), color) for color in ("red", "blue")]
    return text_report(
        kind="image", kl=[], first_difference=None,
        before=Side(pictures=pictures[:1], cost=Cost(1.0, 0.5, 0, "accelerator", 2)),
        after=Side(pictures=pictures[1:], cost=Cost(1.0, 0.5, 0, "accelerator", 2)),
        difference=[Image.new("L", (12, 12))], inputs=pictures[:1],
        metrics={"identical": False, "ssim": 0.5, "psnr": 10.0, "mean_absolute_difference": 0.1, "largest_difference": 1.0},
    )  # fmt: skip


def prediction_report() -> Report:
    return text_report(
        kind="prediction", kl=[0.2], first_difference=None,
        before=Side(predictions=[(EVIL, 0.9), ("dog", 0.1)]), after=Side(predictions=[("dog", 0.6), (EVIL, 0.4)]),
        metrics={"identical": False, "same_top_prediction": False, "kl": 0.2, "total_variation": 0.5,
                 "probability_of_first_before": 0.9, "probability_of_first_after": 0.4},
    )  # fmt: skip


REPORTS = [text_report, image_report, prediction_report]


class Page(HTMLParser):
    """Collects every tag with its attributes, and the text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.words: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)


@pytest.mark.parametrize("make", REPORTS)
@pytest.mark.parametrize("form", ["page", "cell"])
def test_the_page_asks_nothing_of_the_network(make, form, tmp_path):
    report = make()
    source = report.html(tmp_path / "deep" / "report.html").read_text() if form == "page" else report._repr_html_()
    page = Page(source)
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "form", "video", "audio"), tag
        assert not [name for name in attributes if name.startswith("on")], attributes
        assert attributes.get("src", "data:image/png;base64,").startswith("data:image/png;base64,")
        if "href" in attributes:
            assert tag == "a" and re.match(r"#|https://arxiv\.org/abs/", attributes["href"])
    styles = " ".join(re.findall(r"<style>(.*?)</style>", source, re.S)) + " ".join(a.get("style") or "" for _, a in page.tags)
    assert "url(" not in styles and "@import" not in styles and "http" not in styles


@pytest.mark.parametrize("make", REPORTS)
def test_texts_of_the_user_are_text(make):
    source = make()._repr_html_()
    assert "<script" not in source and "<img src=x" not in source and "49" not in Page(source).words
    assert "{{ 7 * 7 }}" in "".join(Page(source).words)
    assert EVIL in "".join(Page(source).words)


def test_the_first_difference_is_marked_and_shared_text_is_not(tmp_path):
    source = text_report().html(tmp_path / "r.html").read_text()
    marks = re.findall(r"<mark>(.*?)</mark>", source)
    assert marks == [" b", " x"]
    assert source.count('class="cell') == 2 and source.count("cell differs") == 1
    shorter = text_report(first_difference=2, kl=[0.0, 0.0])
    shorter.after.tokens = ["a", " b"]
    assert "(ends here)" in shorter._repr_html_()


def test_numbers_of_cells_need_no_mouse():
    looks = Looks(
        ["<s>", "a", " b"], [False] * 3, before={0: torch.tensor([0.5, 0.3, 0.1])}, after={0: torch.tensor([0.6, 0.1, 0.3])}
    )
    source = text_report(looks=looks)._repr_html_()
    rows = [re.findall(r">([^<]+)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", source, re.S)]
    assert ["a", "75.0 %", "25.0 %", "-50.0"] in rows and ["b", "25.0 %", "75.0 %", "+50.0"] in rows, (
        "the first token is left out"
    )
    assert any(row[1:] == ["75.0 % → 50.0 %", "25.0 % → 50.0 %"] for row in rows), "shares by layer"
    assert source.count('class="scroll" tabindex="0"') == 3, "what scrolls can be reached by the keyboard"


def test_what_matters_comes_first():
    words = "".join(Page(text_report(checks=[Check("is it so", True, False)])._repr_html_()).words)
    order = ["Output", "Checked", "Prompt", "What changed in the attention", "Cost", "Settings", "All parameters", "nats"]
    places = [words.index(word) for word in order]
    assert places == sorted(places) and "nats" not in words[: places[-2]]
    null = text_report(
        recipes=[{**text_report().recipes[0], "parameters": {"window": 3, "top": None}, "chosen": ["window", "top"]}]
    )
    shown, folded = "".join(Page(null._repr_html_()).words).split("All parameters")
    assert "window = 3" in shown and "null" not in shown and "top = null" in folded


def test_whole_page_and_cell_differ_by_the_page_only(tmp_path):
    report = text_report()
    page = report.html(tmp_path / "r.html").read_text()
    cell = report._repr_html_()
    assert page.lstrip().startswith("<!doctype html>") and "<html" not in cell and "<body" not in cell
    assert "prefers-color-scheme:dark" in page and 'name="viewport"' in page
    both = write_page([report, image_report()], tmp_path / "both.html", "Both", "An intro").read_text()
    assert both.count("<section") == 2 and both.count("<nav>") == 1 and "An intro" in both


def test_json_is_whole_and_finite():
    data = json.loads(text_report().json())
    assert data["before"]["tokens"] == ["a", " b", EVIL] and data["kl_per_token"] == [0.01, 1.5]
    assert data["metrics"]["edits_applied"] == 8
    assert not [key for key in data["metrics"] if "time" in key], "two single runs say nothing about time"
    assert data["before"]["cost"]["forward_passes"] == 3 and data["attention_shares"]["after"] == {EVIL: 1.0}
    same = image_report()
    same.metrics.update(identical=True, psnr=math.inf)
    assert json.loads(same.json())["metrics"]["psnr"] is None
    assert "identical" in same._repr_html_()


@pytest.mark.parametrize("make", REPORTS)
def test_the_terminal_shows_outputs_and_findings(make):
    console = Console(width=110, record=True, file=io.StringIO())
    report = make()
    console.print(report)
    text = " ".join(console.export_text().split())
    assert "before" in text and "after" in text and "edits applied 8 times" in text and "note:" in text
    assert "[/" not in EVIL  # rich markup in a user's text would be read as style: texts are Text objects
    markup = text_report()
    markup.before.tokens = ["[bold]no[/bold]", " b"]
    console.print(markup)
    assert "[bold]no[/bold]" in console.export_text()


def test_numbers_in_words():
    assert [number(v) for v in (0, 0.0000123, 0.1234, 12.345, 12345.6, math.inf, None)] == [
        "0", "1.2e-05", "0.123", "12.3", "12,346", "infinite", "not known",
    ]  # fmt: skip
    assert [percent(v) for v in (0, 0.0001, 0.1234)] == ["0.0 %", "<0.1 %", "12.3 %"]
    assert [duration(v) for v in (0.0123, 2.5)] == ["12.3 ms", "2.50 s"]
    assert [size(v) for v in (5, 2048, 3 << 20, 5 << 30)] == ["5 B", "2.0 KiB", "3.0 MiB", "5.0 GiB"]


def test_the_template_is_in_the_package():
    from pathlib import Path

    import reattend.comparison.report as module

    assert (Path(module.__file__).parent / module.TEMPLATE).is_file()
    assert reattend.compare is not None
