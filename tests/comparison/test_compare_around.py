"""What is around a comparison: sessions that act already, and the caller's random numbers."""

from __future__ import annotations

import io
import json

import pytest
import reattend
import torch
from rich.console import Console

PROMPT = "the red dog sat on a big house and the small cat ran in the garden"
WINDOW = ("streaming", {"sinks": 1, "window": 3})
OPTIONS = dict(text=PROMPT, max_new_tokens=4, do_sample=False)
OTHER = ("streaming", {"sinks": 2, "window": 4})


@pytest.mark.parametrize("given", [WINDOW, [WINDOW, OTHER]], ids=["one", "several"])
def test_a_report_says_that_a_session_acts_already(text_pipe, given):
    with reattend.apply(text_pipe, "streaming", sinks=1, window=8):
        report = reattend.compare(text_pipe, given, **OPTIONS)
    note = "This ran inside a session of 'streaming': 'untouched' and 'before' mean the model under it."
    assert report.notes == [note] and json.loads(report.json())["notes"] == [note]
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(report)
    assert note in console.export_text()
    assert note.replace("'", "&#39;") in report._repr_html_()
    assert reattend.compare(text_pipe, given, **OPTIONS).notes == []


@pytest.mark.parametrize("given", [WINDOW, [WINDOW, OTHER]], ids=["one", "several"])
def test_the_callers_random_numbers_go_on_as_without_a_comparison(text_pipe, given):
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    first = torch.rand(1)
    reattend.compare(text_pipe, given, **{**OPTIONS, "do_sample": True}, seed=3)
    assert torch.equal(torch.cat([first, torch.rand(1)]), expected)
