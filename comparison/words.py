"""Numbers and findings in words, the same in the terminal and on the page. Nothing is said that the report does not hold."""

from __future__ import annotations

import math
from typing import Any

from .report import Report

ROLES = {
    "bos": "first token",
    "prompt": "rest of the prompt",
    "generated": "generated so far",
    "user": "user's message",
    "system": "system message",
    "assistant": "earlier answers",
    "image": "image",
    "text": "text",
    "other": "other tokens",
    "padding": "padding",
}


def role_words(role: str) -> str:
    return "marked passage" if role.startswith("emphasis") else ROLES.get(role, role)


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


def duration(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def size(count: int) -> str:
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} B"


def summary(report: Report) -> str:
    """One or two sentences on what changed."""
    return {"text": _text, "prediction": _prediction, "image": _image}[report.kind](report)


def _text(report: Report) -> str:
    place = report.first_difference
    if place is None:
        changed = any(value > 0 for value in report.kl)
        inside = f"; the next-token distributions moved by up to {number(max(report.kl))} nats on the way" if changed else ""
        return f"Both texts are the same, all {len(report.before.tokens)} tokens{inside}."
    shared = f"{place} token{'s' if place != 1 else ''}"
    start = "The texts differ from the first token on" if place == 0 else f"The texts share {shared} and then part"
    at = report.metrics.get("kl_at_first_difference")
    return f"{start}." + ("" if at is None else f" There, the next-token distributions lie {number(at)} nats apart.")


def _prediction(report: Report) -> str:
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


def _image(report: Report) -> str:
    m = report.metrics
    if m["identical"]:
        return "The pictures are identical."
    return (
        f"SSIM {number(m['ssim'])}, PSNR {number(m['psnr'])} dB; a pixel changes by {percent(m['mean_absolute_difference'])} of the "
        f"full range on average, by {percent(m['largest_difference'])} at most."
    )


def times_of(report: Report) -> list[tuple[str, float]]:
    """[(of what, seconds after / before)]: a text's two stages apart, because its length may differ; else the whole run."""
    ratios = report.ratios
    if report.kind == "text":
        named = {"to the first token": "first_step", "per further token": "further_step"}
        return [(words, ratios[key]) for words, key in named.items() if key in ratios]
    return [("whole run", ratios["total"])] if "total" in ratios else []


def tiles(report: Report) -> list[dict[str, str]]:
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
    times = times_of(report)
    if times:
        names = ", ".join(name for name, _ in times)
        tile(
            "Time",
            " · ".join(f"{ratio:.2f}x" for _, ratio in times),
            f"after / before: {names}; one run each",
        )
    sites = len({site for counts in report.stats.values() for site in counts})
    tile("Edits applied", f"{report.applied:,}", f"calls of attention changed, at {sites} of {report.model.get('sites')} sites")
    return found
