"""Knows where a denoising run stands, and opens the guide door: further denoiser branches in the same batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .sequence import Forward

if TYPE_CHECKING:
    from .session import Attachment


class DenoiserDoor:
    def __init__(self, attachment: Attachment) -> None:
        self.attachment = attachment

    def install(self) -> None: ...

    def uninstall(self) -> None: ...

    def current(self) -> Forward | None:
        return None
