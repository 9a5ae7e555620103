"""Memory of a cectflow command: run it, and note its peak at its end."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from cectflow.timing import own_peak

__all__ = ["main"]


def main() -> None:
    """``python -m benchmarks.memory FILE ARGUMENT...``: run cectflow, write its peak to FILE."""
    note = Path(sys.argv.pop(1))
    try:
        runpy.run_module("cectflow", run_name="__main__", alter_sys=True)
    finally:
        note.write_text(str(own_peak()), encoding="ascii")


if __name__ == "__main__":
    main()
