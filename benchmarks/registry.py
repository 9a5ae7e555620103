"""What the registry's commands cost on many versions, and how much of that is their start-up.

A local server of MLflow holds 500 versions of six names, with stages, tags and a history; a second
one holds nothing. Each command is a process of its own, all take turns, and medians are reported:
what `models list` takes on the full server and not on the empty one is spent on the versions.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from benchmarks.report import parse_options, write_report
from benchmarks.server import serve
from cectflow.export import export_network
from cectflow.model_card import ModelCard, Score
from cectflow.networks.catalogue import create_network
from cectflow.networks.normalisation import NormalisePerCube
from cectflow.tracking.policy import Finding, Verdict
from cectflow.tracking.promotion import rollback, set_stage
from cectflow.tracking.registry import find_version, register_model
from cectflow.tracking.runs import connect, start_run

NAMES = 6
NETWORK = "strided_nano"
BOX = 16
CLASSES = ("ribosome", "proteasome")
PASSED = Verdict("student", True, (Finding("speedup at least 3", "speedup", 4.0, 3.0, True),))
STORE = ("--backend-store-uri", "sqlite:///mlflow.db", "--artifacts-destination", "./artifacts")


def main() -> None:
    """Fill a store, serve it and an empty one, and time the commands."""
    options = parse_options(__doc__ or "", _add_options)
    versions, repeats = (30, 2) if options.quick else (options.versions, options.repeats)
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        full, empty = Path(scratch) / "full", Path(scratch) / "empty"
        for folder in (full, empty):
            folder.mkdir()
            connect(f"sqlite:///{folder}/mlflow.db")
        connect(f"sqlite:///{full}/mlflow.db")
        start = time.perf_counter()
        names = _fill(Path(scratch) / "model", versions)
        filled = time.perf_counter() - start
        addresses = [stack.enter_context(serve(folder, STORE))[0] for folder in (full, empty)]
        commands = {
            "version_s": ("--version",),
            "help_s": ("--help",),
            "list_empty_s": ("models", "list", "--tracking-uri", addresses[1]),
            "list_s": ("models", "list", "--tracking-uri", addresses[0]),
            "list_json_s": ("models", "list", "--json", "--tracking-uri", addresses[0]),
            "list_name_s": ("models", "list", names[0], "--tracking-uri", addresses[0]),
            "show_s": ("models", "show", f"{names[0]}@production", "--tracking-uri", addresses[0]),
            "history_s": ("models", "history", names[0], "--tracking-uri", addresses[0]),
        }
        times = _time_by_turns(commands, repeats)
        connect(addresses[0])
        stages = _time_stages(names[0], repeats)
    figures: dict[str, float | str] = {"versions": float(versions), "names": float(NAMES)}
    figures["register_s"] = filled / versions
    for name, seconds in (times | stages).items():
        figures |= {
            name: statistics.median(seconds),
            f"{name}_low": min(seconds),
            f"{name}_high": max(seconds),
        }
    beyond = [
        full - empty for full, empty in zip(times["list_s"], times["list_empty_s"], strict=True)
    ]
    figures |= {
        "list_beyond_startup_s": statistics.median(beyond),
        "list_beyond_startup_s_low": min(beyond),
        "list_beyond_startup_s_high": max(beyond),
        "load": f"{os.getloadavg()[0]:.1f} processes at the end, those of the benchmark included",
    }
    for name, value in figures.items():
        print(name, value)
    write_report(options.json, figures, quick=options.quick)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--versions", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=7)


def _fill(folder: Path, versions: int) -> list[str]:
    """Names of models that are registered now, each with versions, stages and a history."""
    torch.manual_seed(0)
    network = NormalisePerCube(create_network(NETWORK, num_outputs=2, box=BOX))
    export_network(network, _card(), folder)
    names = [f"cectflow-student-{number}" for number in range(NAMES)]
    with start_run("register") as run:
        for number in range(versions):
            register_model(run, folder, name=names[number % NAMES])
    for name in names:
        for version, stage in ((1, "staging"), (1, "production"), (2, "production"),
                               (3, "staging")):  # fmt: skip
            set_stage(find_version(f"{name}/{version}"), stage, verdict=PASSED)
        rollback(name, reason="misses apoferritin")
    return names


def _card() -> ModelCard:
    return ModelCard(
        role="student", task="classify", network=NETWORK, num_outputs=2, classes=CLASSES, box=BOX,
        voxel_size=12.0, ctf_correction="none", tilt_range=(-60.0, 60.0),
        snr_stage="reconstruction", snr=(0.01, 0.1), noise_spectrum="white", occupancy=0.1,
        jitter=10.0, dataset_digest="d" * 64, recipe_digest="e" * 64, commit="unknown",
        scores={"accuracy": Score(value=0.9, low=0.85, high=0.94)},
    )  # fmt: skip


def _time_by_turns(commands: Mapping[str, Sequence[str]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each command of `cectflow`, each time it was run; the first turn warms up."""
    times: dict[str, list[float]] = {name: [] for name in commands}
    for turn in range(repeats + 1):
        for name, arguments in commands.items():
            command = [sys.executable, "-m", "cectflow", *arguments]
            start = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            if turn:
                times[name].append(time.perf_counter() - start)
    return times


def _time_stages(name: str, repeats: int) -> dict[str, list[float]]:
    """Seconds of what a promotion writes, its judgement apart, among many versions."""
    times: list[float] = []
    for number in range(repeats):
        version = find_version(f"{name}/{number % 3 + 1}")
        start = time.perf_counter()
        set_stage(version, "production", verdict=PASSED)
        times.append(time.perf_counter() - start)
    return {"set_stage_s": times}


if __name__ == "__main__":
    main()
