"""Scores of questions that belong together: MME (two per image) and HallusionBench (per figure, per question)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from .sums import ratio


def all_right(groups: Sequence[Hashable], right: Sequence[bool]) -> float:
    """Share of groups of which every question is answered right; 0 without questions."""
    whole: dict[Hashable, bool] = {}
    for group, is_right in zip(groups, right, strict=True):
        whole[group] = whole.get(group, True) and bool(is_right)
    return float(ratio(sum(whole.values()), len(whole)))


def mme(subtasks: Sequence[str], images: Sequence[Hashable], right: Sequence[bool]) -> dict[str, dict[str, float]]:
    """{subtask: {"accuracy", "accuracy_plus", "score"}} of MME (Fu et al. 2023, arXiv 2306.13394), and their sum as "total".

    One entry per question. accuracy_plus: share of images with all questions right. score: both as percentages, added (at most 200).
    """
    found: dict[str, dict[str, float]] = {}
    for subtask in dict.fromkeys(subtasks):
        mine = [place for place, name in enumerate(subtasks) if name == subtask]
        those = [bool(right[place]) for place in mine]
        share, plus = float(ratio(sum(those), len(those))), all_right([images[place] for place in mine], those)
        found[subtask] = {"accuracy": share, "accuracy_plus": plus, "score": 100 * (share + plus)}
    found["total"] = {"score": sum(one["score"] for one in found.values())}
    return found


def hallusion(figures: Sequence[Hashable | None], questions: Sequence[Hashable], right: Sequence[bool]) -> dict[str, float]:
    """accuracy, figure_accuracy and question_accuracy of HallusionBench (Guan et al. 2024, arXiv 2310.14566).

    figures: one per question, None where it is asked without a picture (these are left out of figure_accuracy). questions: what is
    asked, the same for all figures that it is asked about.
    """
    seen = [place for place, figure in enumerate(figures) if figure is not None]
    return {
        "accuracy": float(ratio(sum(map(bool, right)), len(right))),
        "figure_accuracy": all_right([figures[place] for place in seen], [right[place] for place in seen]),
        "question_accuracy": all_right(questions, right),
    }
