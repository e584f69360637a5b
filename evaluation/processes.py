"""Several processes that share the work, as `accelerate launch` or `torchrun` start them; one process alone needs nothing."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

# a process that has done its share waits this long for the slowest
PATIENCE = timedelta(hours=12)


@dataclass(frozen=True)
class Team:
    """rank: which of `size` processes this is; 0 is the one that reports. state: accelerate's, where there are several."""

    rank: int = 0
    size: int = 1
    state: Any = None

    @classmethod
    def current(cls) -> Team:
        """The team that the environment describes: WORLD_SIZE says how many processes there are."""
        if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
            return cls()
        import torch
        from accelerate import PartialState

        state = PartialState() if PartialState._shared_state else PartialState(cpu=_on_cpu(torch), timeout=PATIENCE)
        return cls(state.process_index, state.num_processes, state)

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def device(self) -> str | None:
        """The device of this process, or None where there is only one process."""
        return str(self.state.device) if self.state is not None else None

    def gather(self, items: list[Any]) -> list[Any]:
        """The items of all processes, in the order of their ranks."""
        if self.size == 1:
            return items
        from accelerate.utils import gather_object

        return gather_object(items)

    def wait(self) -> None:
        """Until every process has come here."""
        if self.state is not None:
            self.state.wait_for_everyone()


def _on_cpu(torch: Any) -> bool:
    return not (torch.cuda.is_available() or os.environ.get("ACCELERATE_TORCH_DEVICE"))
