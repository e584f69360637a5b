"""docs/support.md, from the three records beside it: which language models and denoisers were verified, and which versions were run.

tests/architectures.py, tests/denoiser_classes.py and tests/versions.py each write their record and then this page; it needs nothing but the
standard library.
"""

from __future__ import annotations

import json
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"
MODELS, DENOISERS, VERSIONS = (DOCS / f"{name}.json" for name in ("support", "denoisers", "versions"))
PAGE = DOCS / "support.md"
NAMED = ("torch", "transformers", "diffusers")


def write() -> None:
    lines = ["# Which models and which versions were run", "", *models(json.loads(MODELS.read_text(encoding="utf-8")))]
    if DENOISERS.exists():
        lines += ["", *denoisers(json.loads(DENOISERS.read_text(encoding="utf-8")))]
    if VERSIONS.exists():
        lines += ["", *versions(json.loads(VERSIONS.read_text(encoding="utf-8")))]
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")


def models(record: dict) -> list[str]:
    rows = record["models"]
    count = {s: sum(r["status"] == s for r in rows.values()) for s in ("verified", "refused", "failed", "not built")}
    lines = [
        "## Language models",
        "",
        f"Written by `python tests/architectures.py` with transformers {record['transformers']} and torch {record['torch']}.",
        "Each model type of transformers' causal language models was built small with random weights; a session was attached, passed",
        "through bit-identically, edited every decoder self-attention as the reference executor says, and was detached bit-identically.",
        "",
        f"{count['verified']} verified, {count['refused']} refused with a reason, {count['failed']} failed, {count['not built']} could not be",
        "built from small settings (nothing is said about those).",
        "",
        "| model type | class | result | sites edited | remarks |",
        "|---|---|---|---|---|",
    ]
    for model_type, row in rows.items():
        remarks = row.get("reason") or "; ".join(row.get("problems", []))
        edited = row.get("edited", "")
        lines.append(f"| {model_type} | {row.get('class', '')} | {row['status']} | {edited} | {remarks.replace('|', '/')} |")
    return lines


def denoisers(record: dict) -> list[str]:
    rows = record["classes"]
    count = {s: sum(r["status"] == s for r in rows.values()) for s in ("verified", "refused", "failed", "not built")}
    lines = [
        "## Denoisers",
        "",
        f"Written by `python tests/denoiser_classes.py` with diffusers {record['diffusers']} and torch {record['torch']}.",
        "Each transformer, UNet and ControlNet of diffusers that attends was built small with random weights; a session was attached, passed",
        "through bit-identically, edited every site as the reference executor says, and was detached bit-identically. Tokens: what the keys",
        "of each kind of site are known to be, with the grid of the image's; what is unknown is refused to recipes that ask for it.",
        "",
        f"{count['verified']} verified, {count['refused']} refused with a reason, {count['failed']} failed, {count['not built']} were not",
        "built from small settings (nothing is said about those).",
        "",
        "| class | result | sites edited | tokens | remarks |",
        "|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        idle = [f"{row['idle']} of these sites do not run when it is called so"] if row.get("idle") else []
        remarks = row.get("reason") or "; ".join([*row.get("problems", []), *idle])
        kinds = ", ".join(f"{number} {kind}" for kind, number in row.get("kinds", {}).items())
        tokens = "; ".join(f"{kind}: {', '.join(found)}" for kind, found in row.get("tokens", {}).items())
        lines.append(f"| {name} | {row['status']} | {kinds} | {tokens} | {remarks.replace('|', '/')} |")
    return lines


def versions(record: dict) -> list[str]:
    lines = [
        "## Versions",
        "",
        "Written by `make floors` (`tests/versions.py`), which makes each environment and runs the same subset of the tests in it.",
        "The whole suite runs on the versions of constraints.txt (`make test`).",
        "",
        f"| environment | Python | {' | '.join(NAMED)} | the others | passed | skipped | failed |",
        "|---" * (len(NAMED) + 6) + "|",
    ]
    for name, run in record.items():
        named = [run["versions"].get(package, "") for package in NAMED]
        others = ", ".join(f"{package} {version}" for package, version in run["versions"].items() if package not in NAMED)
        failed = "; ".join(run["failed"]) or "0"
        lines.append(
            f"| {name} | {run['python']} | {' | '.join(named)} | {others} | {run['passed']} | {run['skipped']} | {failed} |"
        )
    return lines


if __name__ == "__main__":
    write()
