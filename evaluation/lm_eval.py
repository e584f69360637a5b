"""The bridge to lm-eval (EleutherAI's language model evaluation harness): its tasks, asked of a model under recipes.

lm-eval's class HFLM is handed the model object as it stands, so whatever session is active on the model acts on every pass.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import importlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..interventions import ReattendError
from .subject import Subject

# how lm-eval makes one number of its documents' values, where sums suffice for that
BY_SUMS = ("mean", "nanmean", "perplexity", "weighted_perplexity", "bits_per_byte")


@functools.lru_cache(maxsize=8)
def load_tasks(task: str, folder: str | None, shots: int | None) -> dict[str, Any]:
    """{name: lm-eval Task} of a task, group or tag. folder: YAML task files of one's own; shots: examples in the prompt.

    Raises ReattendError where lm-eval is not installed, does not know the task, or cannot get its data.
    """
    with _quiet():
        manager = _manager(folder)
        if folder is not None and task not in manager.all_tasks:
            own, manager = manager.all_tasks, _manager(None)
        else:
            own = []
        if task not in manager.all_tasks:
            near = difflib.get_close_matches(task, [*own, *manager.all_tasks], n=3, cutoff=0.5)
            hint = f"did you mean {', '.join(near)}?" if near else "`lm-eval ls tasks` lists what it knows"
            raise ReattendError(f"lm-eval has no task {task!r}: {hint}")
        try:
            tasks = manager.load([task])["tasks"]
            for one in tasks.values():
                if shots is not None and one.get_config("num_fewshot") != 0:
                    one.set_config(key="num_fewshot", value=shots)
                elif one.get_config("num_fewshot") is None:
                    one.set_config(key="num_fewshot", value=0)
                one.set_fewshot_seed(seed=1234)
        except Exception as error:  # lm-eval, datasets and the hub each have errors of their own
            raise ReattendError(f"lm-eval cannot load task {task!r}: {_first_line(error)}") from error
    return dict(tasks)


@functools.lru_cache(maxsize=8)
def _manager(folder: str | None) -> Any:
    """lm-eval's index of task files: its own, of which there are thousands (seconds to read), or those of a folder."""
    try:
        from lm_eval.tasks import TaskManager  # type: ignore[import-not-found]
    except ImportError:
        raise ReattendError('lm-eval is not installed: pip install "lm-eval>=0.4.13"') from None
    if folder is not None and not Path(folder).is_dir():
        raise ReattendError(f"include_path: there is no folder {folder!r}")
    return TaskManager(include_path=folder, include_defaults=folder is None)


def aggregation(task: Any, metric: str) -> str:
    """The name of the function with which lm-eval aggregates a metric of a task."""
    found = task.aggregation().get(metric)
    return getattr(found, "__name__", "mean") if found is not None else "mean"


def run(
    subject: Subject, tasks: dict[str, Any], documents: Mapping[str, Sequence[int]], chat: bool, batch: int
) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """{(task, document): lm-eval's samples of it, one per filter}. documents: which of each task. Raises ReattendError as lm-eval does."""
    evaluate: Any = importlib.import_module("lm_eval.evaluator").evaluate

    wanted = {name: sorted(numbers) for name, numbers in documents.items()}
    with _quiet():
        try:
            result = evaluate(
                lm=_model(subject, batch),
                task_dict={"tasks": {name: tasks[name] for name in wanted}, "groups": {}, "group_map": {}},
                samples=wanted,
                bootstrap_iters=0,
                apply_chat_template=chat,
                fewshot_as_multiturn=chat,
            )
        except ValueError as error:
            if isinstance(error, ReattendError):
                raise
            raise ReattendError(f"lm-eval: {_first_line(error)}") from error
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for name, samples in (result or {})["samples"].items():
        for sample in samples:
            found.setdefault((name, sample["doc_id"]), []).append(sample)
    return found


def _model(subject: Subject, batch: int) -> Any:
    HFLM: Any = importlib.import_module("lm_eval.models.huggingface").HFLM

    class Quiet(HFLM):
        """HFLM without progress bars: the runner shows its own."""

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().generate_until(requests, disable_tqdm=True)

    # HFLM gives the tokenizer a padding token and a side of its own
    return Quiet(pretrained=subject.module, tokenizer=copy.deepcopy(subject.tokenizer), backend="causal", batch_size=batch)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:300] or type(error).__name__
