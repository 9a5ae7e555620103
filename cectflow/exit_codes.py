"""Exit codes of every door: command line and entry points alike."""

from __future__ import annotations

__all__ = ["BAD_INPUT", "INTERRUPTED", "REFUSED"]

BAD_INPUT = 2
"""What the user gave cannot be used; the message says what to give instead."""
REFUSED = 3
"""The work was done and its answer is no: a promotion refused, a dataset found faulty."""
INTERRUPTED = 130
"""Ctrl-C; what was finished is kept."""
