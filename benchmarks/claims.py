"""From the answers to one suite to the rows of a table: values, changes against the plain model, and which changes to believe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from reattend.evaluation.metrics.intervals import Counts, Metrics, Resamples, group_sums
from reattend.evaluation.metrics.significance import false_discovery, swap_tests

RESAMPLES = 2000
BELIEVED = 0.05  # share of false discoveries in a table


@dataclass
class Row:
    """One line of a table. recipe: its slug, "" for none. role: "plain", "default", "tried", "other" or "baseline".

    groups, counts: of every record, in the order of the plain model's. applied: how often edits were applied.
    """

    label: str
    role: str
    recipe: str
    groups: list[str]
    counts: list[Counts]
    applied: int = 0


def table(rows: Sequence[Row], metrics: Metrics, columns: Sequence[str], seed: int) -> dict[str, Any]:
    """Rows as data; the first one is the plain model.

    Each has its metrics with intervals, and the others their changes with interval, p value and q value (`false_discovery` over all
    changes of the table). counts: what they follow from, by group, as `restored` reads it.
    """
    plain, draws = rows[0], Resamples(rows[0].groups, count=RESAMPLES)

    def shown(sums: Any) -> dict[str, Any]:
        return {name: value for name, value in metrics(sums).items() if name in columns}

    lines: list[dict[str, Any]] = []
    for row in rows:
        if row.groups != plain.groups:
            raise ValueError(f"{row.label}: other scenes or texts than the plain model's")
        line: dict[str, Any] = {"label": row.label, "role": row.role, "recipe": row.recipe, "applied": row.applied}
        line["metrics"] = {name: _rounded(one.as_dict()) for name, one in draws.intervals(row.counts, shown).items()}
        if row is not plain:
            chances = swap_tests(row.groups, plain.counts, row.counts, shown)
            changes = draws.changes(plain.counts, row.counts, shown)
            line["changes"] = {name: _rounded({**one.as_dict(), "p": chances[name]}) for name, one in changes.items()}
        lines.append(line)
    believe(lines)
    return {"seed": seed, "groups": draws.size, "rows": lines, **kept(rows)}


def believe(lines: Sequence[dict[str, Any]]) -> None:
    """Gives every change its q value, over all lines and metrics."""
    changes = [change for line in lines for change in line.get("changes", {}).values()]
    for change, q in zip(changes, false_discovery([change["p"] for change in changes])):
        change["q"] = round(q, 5)


def believed(change: dict[str, float]) -> bool:
    return change["q"] <= BELIEVED


def kept(rows: Sequence[Row]) -> dict[str, Any]:
    """{"names", "counts": {label: for every group [place of a name, its sum, ...]}} without zeros: what intervals need, and no more."""
    *tables, names = group_sums(rows[0].groups, *(row.counts for row in rows))
    return {
        "names": names,
        "counts": {
            row.label: [
                [part for i, value in enumerate(line) if value for part in (i, _short(value))] for line in sums.tolist()
            ]
            for row, sums in zip(rows, tables)
        },
    }


def restored(found: dict[str, Any]) -> dict[str, list[Counts]]:
    """{label: counts of every group} from the data of a `table`."""
    names = found["names"]
    return {
        label: [{names[i]: value for i, value in zip(line[::2], line[1::2])} for line in groups]
        for label, groups in found["counts"].items()
    }


def _short(value: float) -> float:
    return int(value) if value == int(value) else round(value, 4)


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 5) for name, value in values.items()}
