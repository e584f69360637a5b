"""docs/support.md, from the two records beside it: which language models were verified, and which versions were run.

tests/architectures.py and tests/versions.py each write their record and then this page; it needs nothing but the standard library.
"""

from __future__ import annotations

import json
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"
MODELS, VERSIONS, PAGE = DOCS / "support.json", DOCS / "versions.json", DOCS / "support.md"
NAMED = ("torch", "transformers", "diffusers")


def write() -> None:
    lines = ["# Which models and which versions were run", "", *models(json.loads(MODELS.read_text(encoding="utf-8")))]
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
