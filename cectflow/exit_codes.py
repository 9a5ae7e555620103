"""Exit codes of every door: command line and entry points alike."""

from __future__ import annotations

__all__ = ["BAD_INPUT", "INCOMPLETE", "INTERRUPTED", "REFUSED", "is_foreseen"]

BAD_INPUT = 2
"""What the user gave cannot be used; the message says what to give instead."""
REFUSED = 3
"""The work was done and its answer is no: a promotion refused, a dataset found faulty."""
INCOMPLETE = 4
"""The work was done but for some particles or tomograms; a file beside the output lists them, with
the reason."""
INTERRUPTED = 130
"""Ctrl-C; what was finished is kept."""


def is_foreseen(error: Exception) -> bool:
    """Whether an error is the user's to mend, so that its message is enough.

    ``ValueError`` and ``OSError`` are raised for what was given; MLflow's own errors are known by
    their module, without importing it. Anything else is our mistake and keeps its traceback.
    """
    return isinstance(error, ValueError | OSError) or type(error).__module__.startswith("mlflow.")
