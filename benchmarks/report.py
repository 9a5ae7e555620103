"""What every benchmark shares: its options, and the flat JSON that it writes."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path

from cectflow.tracking.runs import cectflow_commit

__all__ = ["parse_options", "write_report"]


def parse_options(
    description: str, extend: Callable[[argparse.ArgumentParser], object] = lambda _: None
) -> argparse.Namespace:
    """Options ``--quick`` and ``--json FILE`` of a benchmark, and those that ``extend`` adds."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="at most 20 minutes on 2 cores; no evidence for a claim",
    )
    parser.add_argument("--json", type=Path, required=True, help="file to write")
    extend(parser)
    options = parser.parse_args()
    if not options.json.resolve().parent.is_dir():
        parser.error(f"folder {options.json.resolve().parent} does not exist: create it first")
    return options


def write_report(path: Path, figures: Mapping[str, float | str], *, quick: bool) -> None:
    """Write metric → number or text, with command, commit, hardware, versions, and if it was quick.

    A full run also writes the same as a Markdown table beside it.
    """
    content = {
        **figures,
        "command": shlex.join(["python", "-m", _module_name(), *sys.argv[1:]]),
        "commit": cectflow_commit(),
        "hardware": f"{os.cpu_count()} cores, {_processor()}",
        "versions": _versions(),
        "quick": quick,
    }
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if not quick:
        path.with_suffix(".md").write_text(_tabulate(content), encoding="utf-8")


def _tabulate(content: Mapping[str, object]) -> str:
    """Markdown: a row per metric with the ends that it states, then how it was measured."""
    lines = ["| metric | value | low | high |", "|---|---|---|---|"]
    for name, value in content.items():
        if isinstance(value, float) and not name.endswith(("_low", "_high")):
            ends = (content.get(f"{name}_{end}", "") for end in ("low", "high"))
            told = " | ".join(f"{e:.4g}" if isinstance(e, float) else "" for e in ends)
            lines.append(f"| {name} | {value:.4g} | {told} |")
    lines.append("")
    words = [name for name, value in content.items() if isinstance(value, str) or name == "seeds"]
    lines += [f"- {name}: {content[name]}" for name in words]
    return "\n".join(lines) + "\n"


def _module_name() -> str:
    return f"benchmarks.{Path(sys.argv[0]).stem}"


def _versions() -> str:
    """Of Python and of the libraries that do the computing."""
    libraries = (f"{name} {version(name)}" for name in ("torch", "numpy", "scipy", "numba"))
    return ", ".join((f"python {platform.python_version()}", *libraries))


def _processor() -> str:
    """Name of the processor, as far as the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
