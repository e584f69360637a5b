"""The two errors of reattend. Both are `ValueError`s with one sentence that names what was wrong and what would be right."""

from __future__ import annotations


class ReattendError(ValueError):
    """Bad input: a parameter, text, image, profile or recipe that cannot be used as given."""


class UnsupportedError(ReattendError):
    """A model or one of its attention sites cannot be intercepted or does not fit the recipe; names the site and the reason."""


class ReattendWarning(UserWarning):
    """Something that was asked for had no effect, or only part of it; says where and what to do."""
