"""The networks of a promotion timed against one another on the devices that a policy names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch

from cectflow.cost import measure_timings
from cectflow.flows.judged import Judged
from cectflow.model_card import Timing
from cectflow.runtime import RuntimeName, choose_device, choose_runtime
from cectflow.timing import Candidate
from cectflow.tracking.policy_figures import TIMED

__all__ = ["figures_of_timing", "time_networks", "timed_figures"]

Device = Literal["cpu", "cuda"]
DEFAULT_TIMING: tuple[Device, RuntimeName] = ("cpu", "onnxruntime")
"""Device and runtime that are timed whatever the rules ask, for the report."""


def time_networks(
    candidate: Judged,
    teacher: Judged | None,
    incumbents: Sequence[Judged],
    asked: Sequence[tuple[Device, RuntimeName]],
) -> tuple[dict[tuple[str, str, str], Timing], dict[str, str]]:
    """Timings of all networks by turns, on every device and runtime that is asked for.

    Parameters
    ----------
    candidate, teacher, incumbents
        The networks; an ensemble asks one member after the other.
    asked
        Devices and runtimes, besides those of every report.

    Returns
    -------
    dict of (str, str, str) to Timing
        By label, device and runtime.
    dict of str to str
        Figure → why this machine does not measure it.
    """
    others = {each.label: each for each in (*incumbents, *([teacher] if teacher else []))}
    networks = {candidate.label: candidate} | others
    timings: dict[tuple[str, str, str], Timing] = {}
    not_timed: dict[str, str] = {}
    for device, runtime in dict.fromkeys((DEFAULT_TIMING, *asked)):
        why = _why_not_timed(device, runtime)
        if why:
            said = f"not measured: {why}"
            not_timed |= {f"{name}.{device}.{runtime}": said for name in TIMED}
            continue
        members = [
            (label, Candidate(folder=folder, runtime=runtime, device=device))
            for label, network in networks.items()
            for folder in network.folders
        ]
        found = measure_timings([member for _, member in members])
        for label in networks:
            own = [t for (name, _), t in zip(members, found, strict=True) if name == label]
            timings[label, device, runtime] = _one_after_the_other(own)
    return timings, not_timed


def _one_after_the_other(timings: Sequence[Timing]) -> Timing:
    """An ensemble asks one member after the other."""
    latencies = [
        sum(getattr(timing, name) for timing in timings)
        for name in ("latency_ms", "latency_ms_low", "latency_ms_high")
    ]
    first = timings[0]
    return first.model_copy(
        update={
            "latency_ms": latencies[0],
            "latency_ms_low": latencies[1],
            "latency_ms_high": latencies[2],
            "subtomograms_per_s": 1e3 * first.batch_size / latencies[0],
        }
    )


def timed_figures(
    candidate: Judged, teacher: Judged | None, timings: Mapping[tuple[str, str, str], Timing]
) -> tuple[dict[str, float], dict[str, str]]:
    """Figures of candidate and teacher, and the hardware on which they were measured."""
    figures: dict[str, float] = {}
    notes: dict[str, str] = {}
    for (label, device, runtime), timing in timings.items():
        if label != candidate.label:
            continue
        key = f"{device}.{runtime}"
        figures |= figures_of_timing(timing, "", key)
        said = f"{_hardware(device)}, {timing.threads} threads, batches of {timing.batch_size}"
        notes |= {f"{name}.{key}": said for name in TIMED}
        if teacher is not None:
            other = timings[teacher.label, device, runtime]
            figures |= figures_of_timing(other, "teacher_", key)
            figures[f"speedup.{key}"] = timing.subtomograms_per_s / other.subtomograms_per_s
    return figures, notes


def figures_of_timing(timing: Timing, prefix: str, key: str) -> dict[str, float]:
    """Figures of one network; the prefix says whose, the key on what."""
    return {
        f"{prefix}latency_ms.{key}": timing.latency_ms,
        f"{prefix}subtomograms_per_s.{key}": timing.subtomograms_per_s,
    }


def _why_not_timed(device: str, runtime: RuntimeName) -> str:
    """Why this machine cannot time a runtime on a device; empty where it can."""
    try:
        choose_device(device)
        choose_runtime(runtime, "float32", device)
    except ValueError as error:
        return str(error)
    if device == "cuda" and runtime == "onnxruntime":
        onnxruntime: Any = import_module("onnxruntime")  # its names are not exported for mypy
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            return "this onnxruntime computes on the CPU only: pip install onnxruntime-gpu"
    return ""


def _hardware(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return "CPU"
