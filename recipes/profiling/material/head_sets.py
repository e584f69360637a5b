"""Pictures of which each is guided by heads of its own, drawn together, and the file in which their scores are noted."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....hooks import Edits, Plan, SiteTable, attach
from ....interventions import Call, Edit, ReattendError, ReattendWarning
from ...kit.checks import check_output, read_json, read_text, shown, writing
from ...kit.heads import Head

# (heads that are weakened in a picture's branch, number of the pair of prompt and seed)
Job = tuple[tuple[Head, ...], int]


class Painter:
    """Draws pictures of (prompt, seed) pairs, each with a branch in which other heads are weakened.

    settings: a recipe of perturbed-attention guidance, whose heads do not matter. numbered: the layers whose heads are meant. given:
    further arguments of the pipeline. A picture's first latents are those of its seed, whatever is drawn beside it.
    """

    def __init__(
        self,
        pipe: Any,
        settings: Any,
        numbered: Mapping[int, SiteTable],
        pairs: Sequence[tuple[str, int]],
        given: dict[str, Any],
    ) -> None:
        self.pipe, self.settings, self.numbered, self.pairs, self.given = pipe, settings, numbered, pairs, given
        self.branch: Tensor | None = None
        self.order = torch.zeros(0)

    def draw(self, jobs: Sequence[Job], steps: int) -> list[Any]:
        """PIL pictures. Pictures without heads are drawn without guidance, and not beside others."""
        prompts, seeds = zip(*(self.pairs[pair] for _, pair in jobs))
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        guided = any(heads for heads, _ in jobs)
        with torch.no_grad(), self.quiet(), self.perturbed(jobs) if guided else contextlib.nullcontext():
            drawn = self.pipe(list(prompts), generator=generators, num_inference_steps=steps, output_type="pil", **self.given)
        found = getattr(drawn, "images", None)
        if found is None or len(found) != len(jobs):
            what = "no pictures" if found is None else f"{len(found)} pictures"
            raise ReattendError(f"{type(self.pipe).__name__} drew {what} of {len(jobs)} prompts")
        return list(found)

    @contextlib.contextmanager
    def perturbed(self, jobs: Sequence[Job]) -> Iterator[None]:
        """The pipeline with its heads weakened. Many heads change nothing visible: their scores say so, and no warning does."""
        with attach(self.pipe, [self.plan(jobs)]) as session:
            yield
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "recipe .* changed nothing visible", ReattendWarning)
                session.remove()

    def plan(self, jobs: Sequence[Job]) -> Plan:
        """Edits at each layer, by which pictures weaken a head there; one guide."""
        where: dict[int, dict[int, list[int]]] = {}
        for number, (heads, _) in enumerate(jobs):
            for layer, head in heads:
                where.setdefault(layer, {}).setdefault(head, []).append(number)
        steps: list[Any] = []
        for layer, of_heads in sorted(where.items()):
            groups: dict[tuple[int, ...], list[int]] = {}
            for head, numbers in sorted(of_heads.items()):
                groups.setdefault(tuple(numbers), []).append(head)
            steps.append(Edits(self.numbered[layer], partial(self.weaken, groups, len(jobs))))
        return Plan(self.settings.slug, [*steps, self.settings.guide()])

    def weaken(self, groups: Mapping[tuple[int, ...], list[int]], count: int, call: Call) -> list[Edit]:
        """groups: {numbers of pictures: heads that are weakened in their rows of the branch}; count: of pictures."""
        edits = []
        for pictures, heads in groups.items():
            edit = self.settings.weaken(heads, call)
            if edit is not None:
                whole = len(pictures) == count
                edits.append(edit if whole else replace(edit, rows=edit.rows & self.rows(pictures, count, call)))
        return edits

    def rows(self, pictures: Sequence[int], count: int, call: Call) -> Tensor:
        """Bool [B, 1]: the branch's rows of these pictures. The branch copies the conditional rows, which are in the prompts' order."""
        branch = call.clock.branches[self.settings.slug]
        if branch is not self.branch:  # once for all layers of a pass
            if int(branch.sum()) != count:
                raise ReattendError(
                    f"this pipeline does not draw its {count} pictures in one batch, so their heads cannot differ: batch_size=1"
                )
            self.branch, self.order = branch, torch.where(branch, branch.cumsum(0) - 1, -1)
        mine = torch.isin(self.order, torch.tensor(pictures, device=branch.device))
        return mine.repeat_interleave(call.batch // len(mine))[:, None]

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Around a call of the pipeline: without its own progress bar."""
        kept = getattr(self.pipe, "_progress_bar_config", None)
        self.pipe.set_progress_bar_config(**{**(kept or {}), "disable": True})
        try:
            yield
        finally:
            if kept is None:
                del self.pipe._progress_bar_config
            else:
                self.pipe._progress_bar_config = kept


class Ledger:
    """{(steps, heads, pair): score}, noted in a file as they come, one JSON value a line; the first one says which search they belong to.

    Raises ReattendError for a file that cannot be written, or belongs to another search.
    """

    def __init__(self, path: str | Path | None, search: dict[str, Any]) -> None:
        self.known: dict[tuple[int, frozenset[Head], int], float] = {}
        self.path = None if path is None else check_output(path, "resume")
        if self.path is None:
            return
        search = json.loads(json.dumps(search))
        if self.path.is_file():
            self.read(self.path, search)
        else:
            with writing(self.path, "resume"):
                self.path.write_text(json.dumps(search) + "\n", encoding="utf-8")

    def read(self, path: Path, search: dict[str, Any]) -> None:
        lines = read_text(path, "resume file").split("\n")
        # whoever was cut off may have left half a line
        if lines[-1]:
            with writing(path, "resume"):
                path.write_text("".join(line + "\n" for line in lines[:-1]), encoding="utf-8")
        known, *noted = [read_json(line, f"resume: {str(path)!r}") for line in lines[:-1]] or [None]
        if not isinstance(known, dict) or known.keys() != search.keys():
            raise ReattendError(f"resume: {str(path)!r} holds no search of heads: name a file that is not there yet")
        other = next((key for key in search if known[key] != search[key]), None)
        if other is not None:
            raise ReattendError(
                f"resume: {str(path)!r} belongs to another search: its {other} is {shown(known[other])}, not {shown(search[other])}"
            )
        try:
            for line in noted:
                heads = tuple((layer, head) for layer, head in line["heads"])
                self.known[self.key(line["steps"], heads, line["pair"])] = float(line["score"])
        except (KeyError, TypeError, ValueError):
            raise ReattendError(f"resume: {str(path)!r} is broken: remove it, or name another file") from None

    @staticmethod
    def key(steps: int, heads: tuple[Head, ...], pair: int) -> tuple[int, frozenset[Head], int]:
        return steps, frozenset(heads), pair

    def get(self, steps: int, heads: tuple[Head, ...], pair: int) -> float | None:
        return self.known.get(self.key(steps, heads, pair))

    def __getitem__(self, asked: tuple[int, tuple[Head, ...], int]) -> float:
        return self.known[self.key(*asked)]

    def add(self, steps: int, jobs: Sequence[Job], scores: Sequence[float]) -> None:
        lines = []
        for (heads, pair), score in zip(jobs, scores, strict=True):
            self.known[self.key(steps, heads, pair)] = score
            lines.append(json.dumps({"steps": steps, "heads": sorted(heads), "pair": pair, "score": score}) + "\n")
        if self.path is not None:
            with writing(self.path, "resume"), self.path.open("a", encoding="utf-8") as file:
                file.writelines(lines)
