"""Timing: latency, throughput and memory of one runtime, alone in a process or by turns.

Nothing here imports torch, so that the memory of a runtime that does without it is its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from cectflow.config import Config
from cectflow.model_card import ModelCard, Timing, Variant
from cectflow.runtime import (
    INT8_FILE,
    VARIANTS,
    Infer,
    RuntimeName,
    choose_runtime,
    load_runtime,
)

__all__ = [
    "MIN_CALLS",
    "WARM_UP_CALLS",
    "Candidate",
    "list_candidates",
    "make_cubes",
    "own_peak",
    "time_alone",
    "time_here",
]

SECONDS = 2.0
"""For which a timing goes on, but for at least ``MIN_CALLS`` calls."""
MIN_CALLS = 5
WARM_UP_CALLS = 2


class Candidate(Config):
    """A model folder, and how its network is run."""

    folder: Path
    runtime: RuntimeName = "onnxruntime"
    variant: Variant = "float32"
    device: Literal["cpu", "cuda"] = "cpu"

    def load(self, threads: int) -> Infer:
        """Callable from cubes to logits; see :func:`~cectflow.runtime.load_runtime`."""
        return load_runtime(
            self.folder, self.runtime, variant=self.variant, device=self.device, threads=threads
        )


def list_candidates(
    folder: Path, runtimes: tuple[RuntimeName, ...], variants: tuple[Variant, ...]
) -> tuple[Candidate, ...]:
    """Those of the runtimes and variants that the folder and this machine have."""
    found = []
    for runtime in runtimes:
        for variant in variants:
            if variant not in VARIANTS[runtime]:
                continue
            if variant == "int8" and not (folder / INT8_FILE).is_file():
                continue
            try:
                choose_runtime(runtime, variant, "cpu")
            except ValueError:
                continue
            found.append(Candidate(folder=folder, runtime=runtime, variant=variant))
    return tuple(found)


def make_cubes(folder: Path, number: int) -> Float[NDArray[np.float32], "n 1 z y x"]:
    """Noise in a model folder's box."""
    box = ModelCard.from_folder(folder).box
    cubes = np.random.default_rng(0).normal(size=(number, 1, box, box, box))
    return cubes.astype(np.float32)


def time_here(
    infer: Infer, candidate: Candidate, batch_size: int, threads: int, *, seconds: float = SECONDS
) -> Timing:
    """Latency of a candidate that is loaded; torch's threads are the caller's to set.

    Two calls warm up; those of one size of batch are then timed one by one.

    Parameters
    ----------
    infer
        As :meth:`Candidate.load` gives it.
    candidate
        What it is.
    batch_size
        Cubes of a call.
    threads
        Of the runtime.
    seconds
        For which it goes on; at least five calls.
    """
    cubes = make_cubes(candidate.folder, batch_size)
    for _ in range(WARM_UP_CALLS):
        infer(cubes)
    latencies: list[float] = []
    while len(latencies) < MIN_CALLS or sum(latencies) < seconds:
        began = time.perf_counter()
        infer(cubes)
        latencies.append(time.perf_counter() - began)
    low, median, high = np.quantile(latencies, [0.25, 0.5, 0.75])
    return Timing(
        runtime=candidate.runtime,
        variant=candidate.variant,
        device=candidate.device,
        threads=threads,
        batch_size=batch_size,
        calls=len(latencies),
        latency_ms=1e3 * median,
        latency_ms_low=1e3 * low,
        latency_ms_high=1e3 * high,
        subtomograms_per_s=batch_size / median,
    )


def time_alone(
    candidate: Candidate, batch_size: int, threads: int, *, seconds: float = SECONDS
) -> Timing:
    """As :func:`time_here`, with the peak memory of a process that does nothing else.

    Raises
    ------
    RuntimeError
        If that process fails, with the last line of what it said.
    """
    arguments = (candidate.to_json(), str(batch_size), str(threads), str(seconds))
    ran = subprocess.run(
        [sys.executable, "-m", "cectflow.timing", *arguments],
        # Before it is imported: OpenMP reads its threads once.
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
        check=False,
    )
    if ran.returncode:
        last = ran.stderr.strip().splitlines()[-1:] or [f"exit code {ran.returncode}"]
        msg = f"{candidate.runtime} {candidate.variant} could not be timed: {last[0]}"
        raise RuntimeError(msg)
    return Timing.from_json(ran.stdout.splitlines()[-1], source="the timing")


def own_peak() -> float:
    """Largest resident memory of this process in GB.

    Not ``ru_maxrss``, which a process takes over from the one that started it.

    Raises
    ------
    OSError
        If the system is not Linux.
    """
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e9
    msg = "/proc/self/status names no VmHWM: memory is measured on Linux only"
    raise OSError(msg)


def main() -> None:
    """``python -m cectflow.timing CANDIDATE BATCH THREADS SECONDS``: print a timing as JSON."""
    candidate, batch_size, threads, seconds = sys.argv[1:]
    runtime = Candidate.from_json(candidate)
    infer = runtime.load(int(threads))
    found = time_here(infer, runtime, int(batch_size), int(threads), seconds=float(seconds))
    peak = 1e3 * own_peak() if sys.platform == "linux" else None
    print(found.model_copy(update={"peak_memory_mb": peak}).model_dump_json())


if __name__ == "__main__":
    main()
