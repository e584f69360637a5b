"""Numbers and findings in words, the same in the terminal and on the page. Nothing is said that the report does not hold."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

from ..recipes.kit.checks import abridged
from .outcome import Outcome
from .shares import marked, of_all, on_prompt

ROLES = {
    "bos": "first token",
    "prompt": "rest of the prompt",
    "generated": "answer so far",
    "user": "user's message",
    "system": "system message",
    "assistant": "earlier answers",
    "image": "image",
    "text": "text",
    "other": "other tokens",
    "padding": "padding",
}

# Changes of a share below this, and of its ratio, are not spoken of.
STILL, AS_BEFORE = 0.0005, 0.02
# Values of parameters in headings are cut here.
WIDEST_VALUE = 28
WHOLE = "of the attention on the prompt after its first token"


def role_words(role: str) -> str:
    return ROLES.get(role, role)


def number(value: float | None) -> str:
    if value is None:
        return "not known"
    if math.isinf(value):
        return "infinite"
    if value == 0:
        return "0"
    if abs(value) < 0.001:
        return f"{value:.1e}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def percent(share: float) -> str:
    if 0 < share < 0.001:
        return "<0.1 %"
    return f"{100 * share:.1f} %"


def points(change: float) -> str:
    """A change of a share in percentage points, with its sign."""
    value = 100 * change
    if abs(value) < 0.005:
        return "0"
    return f"{value:+.2f}" if abs(value) < 0.995 else f"{value:+.1f}"


def count(value: int | None) -> str:
    return "not known" if value is None else f"{value:,}"


def duration(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def size(count: int) -> str:
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} B"


def short(value: Any) -> str:
    """A parameter's value on one line."""
    value = abridged(value)
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= WIDEST_VALUE else text[: WIDEST_VALUE - 1] + "…"


def summary(report: Outcome) -> str:
    """One or two sentences on what changed."""
    return {"text": _text, "prediction": _prediction, "image": _image}[report.kind](report)


def _text(report: Outcome) -> str:
    place = report.first_difference
    if place is None:
        count = len(report.before.tokens)
        return f"Both texts are the same, all {count} tokens." if count != 1 else "Both texts are the same token."
    if place == 0:
        return "The texts differ from the first token on."
    return f"The texts share {place} token{'s' if place != 1 else ''} and then part."


def _prediction(report: Outcome) -> str:
    m = report.metrics
    if m["identical"]:
        return "Both predictions are bit-identical."
    first = report.before.predictions[0][0].strip()
    same = m["same_top_prediction"]
    lead = (
        f"Both predict {first!r}"
        if same
        else f"The prediction moves from {first!r} to {report.after.predictions[0][0].strip()!r}"
    )
    a, b = percent(m["probability_of_first_before"]), percent(m["probability_of_first_after"])
    return f"{lead}; the probability of {first!r} goes from {a} to {b}."


def _image(report: Outcome) -> str:
    m = report.metrics
    if m["identical"]:
        return "The pictures are identical."
    return (
        f"SSIM {number(m['ssim'])}, PSNR {number(m['psnr'])} dB; a pixel changes by {percent(m['mean_absolute_difference'])} of the "
        f"full range on average, by {percent(m['largest_difference'])} at most."
    )


def attention_summary(report: Outcome) -> str:
    """A sentence on what moved: the marked passage, or the image, or else what changed most of all attention; "" where it is not known."""
    before, after = (on_prompt(side.mass) for side in (report.before, report.after))
    for roles, one, several in (
        (marked(after) or marked(before), "The marked passage gets", "The marked passages together get"),
        (["image"] if len(after) > 1 and "image" in after else [], "The image gets", ""),
    ):
        if roles and before and after:
            a, b = (sum(shares.get(role, 0.0) for role in roles) for shares in (before, after))
            return f"{one if len(roles) == 1 else several} {_times(a, b)} {WHOLE}."
    return _of_all(report)


def _times(a: float, b: float) -> str:
    """What became of a share, in words."""
    if a <= 0:
        return f"{percent(b)} instead of none"
    if abs(b / a - 1) < AS_BEFORE:
        return (
            f"the same share as before, {percent(a)}" if percent(a) == percent(b) else f"{percent(b)} instead of {percent(a)}"
        )
    return f"{ratio(b / a)} times its share: {percent(a)} to {percent(b)}"


def _of_all(report: Outcome) -> str:
    before, after = of_all(report.before.mass), of_all(report.after.mass)
    if not before or not after:
        return ""
    moved = {role: after.get(role, 0.0) - before.get(role, 0.0) for role in {**before, **after}}
    role = max(moved, key=lambda name: abs(moved[name]))
    if abs(moved[role]) < STILL:
        return "No kind of token gets more or less of the attention than before, to 0.1 percentage points."
    a, b = percent(before.get(role, 0.0)), percent(after.get(role, 0.0))
    return f"The {ROLES.get(role, role)} gets {b} of all attention instead of {a}."


def ratio(value: float) -> str:
    """A factor with two digits: 0.061, 0.63, 1.6, 14."""
    return f"{value:.2g}" if value < 99.5 else f"{value:,.0f}"


def tiles(report: Outcome) -> list[dict[str, str]]:
    """The headline numbers: label, value, and what it means."""
    m = report.metrics
    found: list[dict[str, Any]] = []

    def tile(label: str, value: str, help: str) -> None:
        found.append({"label": label, "value": value, "help": help})

    if report.kind == "text":
        place = report.first_difference
        tile("First difference", "none" if place is None else f"token {place + 1}", "where the two texts part")
        if report.kl:
            tile(
                "KL, mean",
                f"{number(m['kl_mean'])} nats",
                "how far the next-token distributions lie apart on the shared prefix",
            )
    elif report.kind == "prediction":
        tile("KL", f"{number(m['kl'])} nats", "how far the two predictions lie apart")
        tile("Total variation", percent(m["total_variation"]), "how much probability moved")
    else:
        tile("SSIM", number(m["ssim"]), "structural similarity; 1 = the same")
        tile("PSNR", f"{number(m['psnr'])} dB", "higher = closer")
    sites = len({site for counts in report.stats.values() for site in counts})
    tile("Edits applied", f"{report.applied:,}", f"calls of attention changed, at {sites} of {report.model.get('sites')} sites")
    return found


def computed_by(report: Outcome) -> str:
    """How the engine computed attention where it was edited: each way with how often it was taken, the most frequent first."""
    total: Counter[str] = Counter()
    for counts in report.ways.values():
        total.update(counts)
    return ", ".join(f"{name} {count(times)} times" if times > 1 else f"{name} once" for name, times in total.most_common())
