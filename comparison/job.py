"""What `compare` runs twice: a job knows one kind of input, how to run it and how to put two results into a report."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..hooks import SiteTable
from ..interventions import ReattendError
from ..recipes import Recipe
from .outcome import Outcome

Tick = Callable[[], None]


@contextmanager
def generators_kept() -> Iterator[None]:
    """Torch's own random generators, on the CPU and on every GPU in use, go on afterwards as if nothing had run inside."""
    gpus = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=gpus):
        yield


def noise_of(recipes: Sequence[Recipe]) -> bool:
    """Whether prompts are a picture's and those of its edits. Raises ReattendError for recipes that need two runs for a picture."""
    for recipe in recipes:
        if recipe.follows == "run":
            raise ReattendError(
                f"recipe {recipe.slug!r} edits the picture of an earlier run, and a command or comparison draws every run from the start: "
                'give both prompts at once, prompt=[source, edited], without source="run"'
            )
    return any(recipe.follows == "batch" for recipe in recipes)


class Job(ABC):
    """model: what recipes attach to. tokenizer: what finds tokens by text, or None. seed: set before every run."""

    kind = ""

    def __init__(self, model: Any, tokenizer: Any, seed: int) -> None:
        self.model, self.tokenizer, self.seed = model, tokenizer, seed

    @property
    @abstractmethod
    def module(self) -> nn.Module:
        """A module that says on which device and in which dtype the job runs."""

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.module.parameters()), torch.device("cpu"))

    @property
    def ticks(self) -> int:
        """How often `run` calls tick, about."""
        return 1

    @abstractmethod
    def warm(self) -> None:
        """The shortest run that touches everything once."""

    @abstractmethod
    def run(self, tick: Tick) -> Any:
        """The run that is compared."""

    @property
    def glance_ticks(self) -> int:
        """How often `glance` calls tick, about."""
        return 1

    @abstractmethod
    def glance(self, tick: Tick, untouched: Any) -> None:
        """A short run for looking at the attention. untouched: the result of the untouched model; both looks read its text."""

    def watched(self, table: SiteTable) -> SiteTable:
        """The sites whose attention is looked at."""
        return table.where(lambda s: s.supported)

    def pieces(self) -> list[str]:
        """The text of each token of the prompt, for pictures of the attention on it; [] where there is no row of tokens."""
        return []

    @property
    def sees_centre(self) -> bool:
        """Whether the model sees only the centre square of a picture."""
        return False

    def roles_tell(self, watched: SiteTable) -> bool:
        """Whether the attention mass per token role says anything at these sites."""
        return True

    def steps(self, result: Any) -> int | None:
        """How many steps (tokens, denoising steps) a result took."""
        return None

    @abstractmethod
    def show(self, result: Any) -> Any:
        """A result as people read it: a text, a list of (label, probability), or a list of pictures."""

    @abstractmethod
    def request(self) -> dict[str, Any]:
        """What was asked, for the report."""

    @abstractmethod
    def fill(self, report: Outcome, before: Any, after: Any) -> None:
        """Puts outputs and metrics into the report."""

    def reseed(self) -> None:
        torch.manual_seed(self.seed)
