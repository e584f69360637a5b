"""`reattend demo`: recipes on a small language model from its package, compared on real prompts, offline, in one page."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..recipes.kit.checks import check_output
from .compare import compare
from .demo_texts import EARLY_QUESTION, NEEDLE, QUESTION, STORY
from .outcome import Check
from .report import Report, write_page

# The heads of SmolLM2-135M-Instruct that copy most from the context, as `reattend profile retrieval-heads smollm2` ranks them.
COPYING_HEADS = [[18, 6], [17, 3], [23, 2], [17, 4], [18, 7]]

# Measured: a minute and a half on one thread of a CPU that had little else to do.
MINUTES = "one to three minutes"

TITLE = "reattend demo: the same model, looking elsewhere"
INTRO = (
    "Each section runs one small language model twice on the same prompt: as it is, and with a recipe that changes its attention while "
    "it runs. No weight is changed. Everything on this page was computed in this run, on this machine. The prompts were chosen because "
    "this model shows something on them; docs/results.md holds the measurements over many prompts."
)


@dataclass
class Case:
    """One comparison. start: the beginning of the answer, put into the model's mouth. expects: (what the check asks, the check)."""

    title: str
    recipe: str
    parameters: dict[str, Any]
    intro: str
    prompt: str
    expects: tuple[str, Callable[[str], bool]]
    start: str = ""
    tokens: int = 12

    def messages(self) -> list[dict[str, str]]:
        said = [{"role": "assistant", "content": self.start}] if self.start else []
        return [{"role": "user", "content": self.prompt}, *said]


def story(needle: str = "") -> str:
    """The story with a sentence planted in it, lines joined to paragraphs."""
    paragraphs = STORY.format(needle=needle).split("\n\n")
    return "\n\n".join(" ".join(p.split()) for p in paragraphs if p.strip())


def cases() -> list[Case]:
    in_json = "Write the list as JSON."
    needle: dict[str, Any] = {
        "prompt": f"{story(NEEDLE)}\n\n{QUESTION}",
        "start": "The secret code that opens the door of the lighthouse is",
    }
    finds = ("the answer holds the code 7294", lambda text: "7294" in text)
    return [
        Case(
            "An overlooked instruction, emphasised",
            "emphasise",
            {"text": in_json, "alpha": 0.3, "keep_sink": True},
            f"The prompt asks for three things, one of them: “{in_json}” With the recipe, every head gives the rest of the prompt 0.3 of "
            "the weight relative to this sentence; the first token, on which models park attention, keeps its own.",
            f"List three animals that live on an island. {in_json} Do not add any other explanation, and choose animals that children know.",
            ("the answer opens a JSON object or list", _looks_like_json),
            tokens=40,
        ),
        Case(
            "A fact in a long text, without the heads that fetch it",
            "retrieval-heads",
            {"mode": "mask", "heads": COPYING_HEADS},
            "One sentence of a long story holds a code. The recipe makes five of the model's 270 heads, those that copied most in a "
            "profiling run, attend evenly to everything while the answer is written.",
            expects=finds,
            **needle,
        ),
        Case(
            "The control: five other heads",
            "retrieval-heads",
            {"mode": "mask", "heads": COPYING_HEADS, "random_heads": True},
            "The same prompt and the same treatment, but of five heads drawn at random from the others. If the answer survives here and "
            "not above, it is these heads that matter, and not the disturbance.",
            expects=finds,
            **needle,
        ),
        Case(
            "A long prompt through a window",
            "streaming",
            {"sinks": 4, "window": 256},
            "The question is about the first lines of a long prompt. The recipe lets each token see the first 4 tokens and the 256 most "
            "recent ones only: cost per token stays bounded, and what has left the window is out of direct reach.",
            f"{story()}\n\n{EARLY_QUESTION}",
            ("the answer names seven and four", lambda text: "seven" in text and "four" in text),
            start="The ferry to Ostermoor leaves the old harbour",
            tokens=20,
        ),
    ]


def demo(folder: Path, quiet: bool = False, overwrite: bool = True) -> tuple[list[Report], Path]:
    """Runs the comparisons, writes report.html into the folder and returns (reports, its path). Takes one to three minutes on a CPU.

    Raises ReattendError without the package, and before anything runs for a report that is there, unless overwrite.
    """
    from .loading import packaged_smollm2

    check_output(folder / "report.html", "--out", overwrite=overwrite, remedy="--force")
    chosen = cases()
    _say(f"{len(chosen)} comparisons on a small language model, {MINUTES} on a CPU. Loading the model ...")
    model, tokenizer = packaged_smollm2()
    reports = []
    for place, case in enumerate(chosen, start=1):
        _say(f"{place}/{len(chosen)} {case.title} ({case.recipe})")
        start = time.perf_counter()
        reports.append(run_case(case, model, tokenizer))  # with a bar of its own where somebody is watching
        _say(f"    done in {time.perf_counter() - start:.0f} s")
    file = write_page(reports, folder / "report.html", TITLE, INTRO)
    if not quiet:
        show(reports, file)
    return reports, file


def run_case(case: Case, model: Any, tokenizer: Any) -> Report:
    report = compare(
        model,
        (case.recipe, case.parameters),
        text=case.messages(),
        tokenizer=tokenizer,
        title=case.title,
        max_new_tokens=case.tokens,
        do_sample=False,
    )
    what, check = case.expects
    given = f" The beginning of the answer is given: “{case.start} …”; the model goes on from there." if case.start else ""
    report.intro = case.intro + given
    report.checks = [Check(what, check(report.before.text or ""), check(report.after.text or ""))]
    return report


def show(reports: list[Report], file: Path) -> None:
    """The summary in the terminal."""
    from rich.console import Console

    from .terminal import brief

    console = Console()
    for report in reports:
        console.print(brief(report))
    console.print(f"The whole comparison, with attention and cost: {file.resolve()}", soft_wrap=True, highlight=False)


def _say(line: str) -> None:
    """To stderr: what goes to stdout is the result."""
    print(line, file=sys.stderr, flush=True)


def _looks_like_json(text: str) -> bool:
    return text.lstrip().removeprefix("```json").removeprefix("```").lstrip().startswith(("{", "["))
