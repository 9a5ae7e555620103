"""Memory of a process: its own peak, and a cectflow command that notes it at its end."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

__all__ = ["own_peak"]


def own_peak() -> float:
    """Largest resident memory of this process in GB.

    Not ``ru_maxrss``, which a process takes over from the one that started it.
    """
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e9
    msg = "/proc/self/status names no VmHWM: memory is measured on Linux only"
    raise OSError(msg)


def main() -> None:
    """``python -m benchmarks.memory FILE ARGUMENT...``: run cectflow, write its peak to FILE."""
    note = Path(sys.argv.pop(1))
    try:
        runpy.run_module("cectflow", run_name="__main__", alter_sys=True)
    finally:
        note.write_text(str(own_peak()), encoding="ascii")


if __name__ == "__main__":
    main()
