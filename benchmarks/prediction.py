"""Prediction in bulk: `cectflow predict classify` against the bare network, and its memory."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from benchmarks.report import parse_options, write_report
from cectflow.cost import measure_throughputs
from cectflow.export import export_network
from cectflow.flows.prediction import predict_classes
from cectflow.model_card import (
    CARD_FILE,
    ModelCard,
    Score,
    Trust,
    TypicalLogits,
    Variant,
    VariantFigures,
)
from cectflow.networks import create_network
from cectflow.networks.normalisation import NormalisePerCube
from cectflow.particles import make_particle_rows, particles_from, read_particles
from cectflow.prediction.classify import BLOCK_SIZE
from cectflow.prediction.contract import InputOptions
from cectflow.prediction.inputs import InputFiles
from cectflow.prediction.journal import Journal, journal_folder
from cectflow.quantise import quantise
from cectflow.runtime import RUNTIMES, load_runtime
from cectflow.timing import Candidate, list_candidates, make_cubes
from cectflow.volume_writer import create_volume

STUDENT, TEACHER = "strided_nano", "dsrf3d_v2"
CLASSES = tuple(f"class_{number}" for number in range(22))
VOXEL_SIZE = 10.0
BOX = 40
VARIANTS: tuple[Variant, ...] = ("float32", "bfloat16", "int8")
BATCH = InputOptions().batch_size
_mrcfile: Any = mrcfile  # which has no type annotations
TINY_BOX, TINY_EDGE = 12, 48
"""Of the prediction whose memory counts: its network does little."""


@dataclass(frozen=True)
class Plan:
    """Sizes of one run of the benchmark.

    Attributes
    ----------
    shape
        Of the tomogram.
    particles, teacher_particles, loop_particles
        That student, teacher and the plain loop are shown.
    turns
        Of everything that is compared; medians count.
    rows
        Of the largest STAR file.
    starts
        Of the command, to time its first prediction.
    killed_particles
        Of the run that is killed three times.
    """

    shape: tuple[int, int, int] = (200, 512, 512)
    particles: int = 50_000
    teacher_particles: int = 640
    loop_particles: int = 3000
    turns: int = 5
    rows: int = 1_000_000
    starts: int = 5
    killed_particles: int = 100_000


FULL = Plan()
QUICK = Plan((96, 200, 200), 4000, 128, 300, 2, 50_000, 2, 6000)


@dataclass(frozen=True)
class Bench:
    """Where a run works, and with what."""

    plan: Plan
    folder: Path

    @property
    def tomogram(self) -> Path:
        """Noise in float32, as RELION and Warp write tomograms."""
        return self.folder / "tomogram.mrc"

    def picks(self, number: int) -> Path:
        """STAR file of so many particles anywhere in the tomogram, some of them over its border."""
        path = self.folder / f"picks-{number}.star"
        if not path.is_file():
            particles_from(_make_rows(number, self.plan.shape)).write(path)
        return path

    def model(self, network: str, box: int = BOX) -> Path:
        """Model folder of an untrained network, in every variant: weights change no rate."""
        folder = self.folder / "models" / f"{network}-{box}"
        if not folder.is_dir():
            _export(network, box, folder)
        return folder

    def classify(
        self, network: str, number: int, runtime: str, variant: Variant, device: str = "cpu"
    ) -> float:
        """Particles per second from tomogram and STAR file to STAR file, all of it."""
        files = InputFiles(tomogram=self.tomogram, particles=self.picks(number))
        options = InputOptions(runtime=runtime, variant=variant, device=device, overwrite=True)
        began = time.perf_counter()
        predict_classes(
            str(self.model(network)), files, self.folder / "out.star", options, lambda line: None
        )
        return number / (time.perf_counter() - began)


def main() -> None:
    """Measure on the threads that the machine has; the tomogram is in the page cache.

    What is compared is measured by turns, and a figure is the median over them.

    - ``student_per_s``: 40³ subtomograms per second through the whole command, from a tomogram and
      its STAR file to a STAR file, ``strided_nano`` in the fastest runtime and variant, which
      ``student_runtime`` and ``student_variant`` name; imports are left out. ``…_float32`` the
      same in float32; ``bare_per_s_…`` the network alone on batches that are in memory.
    - ``end_to_end_over_bare``: the command's rate over the bare network's, same runtime, float32;
      ``…_best`` in the fastest variant, where reading counts for more.
    - ``over_teacher``: the command's rate with ``strided_nano`` over that with ``dsrf3d_v2``, same
      runtime, both in float32; ``…_best`` both in the student's fastest variant.
    - ``over_plain_loop``: over a loop that reads the tomogram with mrcfile, cuts a cube and asks
      the same network in eager torch, one at a time; float32, and ``…_best``.
    - ``million_rows_gb``: peak resident memory of ``cectflow predict classify`` on a STAR file of
      1,000,000 rows of 24 columns, three of them different names of files in each row;
      ``million_rows_s`` its time, ``million_rows_mb`` the file's size.
    - ``first_prediction_s``: from the start of ``cectflow predict classify`` to the first recorded
      block of 1024 particles, warm file cache.
    - ``kills``: how often a run over ``killed_particles`` was killed with SIGKILL, after a quarter,
      a half and three quarters of it; ``killed_rows`` the rows of the output when it was given
      once more, in the order of the input (anything else is an error);
      ``killed_as_uninterrupted`` the share of rows that are those of a run that nobody killed.
    - ``gpu_per_s``, only where torch sees a CUDA device: as ``student_per_s`` there, in bfloat16.
    """
    options = parse_options(__doc__ or "", _add_options)
    plan = QUICK if options.quick else FULL
    folder = options.work / ("quick" if options.quick else "full")
    folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(plan, folder)
    _make_tomogram(bench)
    parts: dict[str, Callable[[Bench], dict[str, float | str]]] = {
        "rates": _measure_rates,
        "memory": _measure_memory,
        "start": _measure_start,
        "kills": _measure_kills,
        "gpu": _measure_gpu,
    }
    figures: dict[str, float | str] = {}
    for name in options.only or parts:
        figures |= parts[name](bench)
    write_report(options.json, figures, quick=options.quick)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--work", type=Path, required=True, help="folder that is kept and reused")
    parser.add_argument("--only", nargs="+", choices=("rates", "memory", "start", "kills", "gpu"))


def _measure_rates(bench: Bench) -> dict[str, float | str]:
    plan = bench.plan
    candidates = list_candidates(bench.model(STUDENT), RUNTIMES[1:], VARIANTS)
    rates = measure_throughputs(candidates, batch_size=BATCH)
    best = max(zip(rates, candidates, strict=True), key=lambda pair: pair[0])[1]
    variants = dict.fromkeys(("float32", best.variant))
    cubes = make_cubes(bench.model(STUDENT), 8 * BATCH)
    found: dict[str, list[float]] = {}
    for turn in range(plan.turns + 1):
        measured: dict[str, float] = {}
        for variant in variants:
            candidate = best.model_copy(update={"variant": variant})
            number = 4 * BATCH if turn == 0 else plan.particles
            measured[f"bare_{variant}"] = _bare_rate(candidate, cubes, number // 2)
            measured[f"student_{variant}"] = bench.classify(STUDENT, number, best.runtime, variant)
            measured[f"ratio_{variant}"] = (
                measured[f"student_{variant}"] / measured[f"bare_{variant}"]
            )
            few = BATCH if turn == 0 else plan.teacher_particles
            measured[f"teacher_{variant}"] = bench.classify(TEACHER, few, best.runtime, variant)
        measured["loop"] = _loop_rate(bench, 1 if turn == 0 else plan.loop_particles)
        for name, value in measured.items():
            if turn:  # the first warms up
                found.setdefault(name, []).append(value)
    median = {name: float(np.median(values)) for name, values in found.items()}
    figures: dict[str, float | str] = {
        "end_to_end_over_bare": median["ratio_float32"],
        "end_to_end_over_bare_best": median[f"ratio_{best.variant}"],
        "student_per_s": median[f"student_{best.variant}"],
        "student_per_s_float32": median["student_float32"],
        "student_runtime": best.runtime,
        "student_variant": best.variant,
        "over_teacher": median["student_float32"] / median["teacher_float32"],
        "over_teacher_best": (
            median[f"student_{best.variant}"] / median[f"teacher_{best.variant}"]
        ),
        "over_plain_loop": median["student_float32"] / median["loop"],
        "over_plain_loop_best": median[f"student_{best.variant}"] / median["loop"],
        "plain_loop_per_s": median["loop"],
        "threads": float(torch.get_num_threads()),
    }
    for variant in variants:
        figures[f"bare_per_s_{variant}"] = median[f"bare_{variant}"]
        figures[f"teacher_per_s_{variant}"] = median[f"teacher_{variant}"]
    for candidate, rate in zip(candidates, rates, strict=True):
        figures[f"runtime_per_s_{candidate.runtime}_{candidate.variant}"] = rate
    return figures


def _bare_rate(candidate: Candidate, cubes: NDArray[np.float32], number: int) -> float:
    """Subtomograms per second of a network on batches that are in memory."""
    infer = load_runtime(candidate.folder, candidate.runtime, variant=candidate.variant)
    batches = np.split(cubes, len(cubes) // BATCH)
    infer(batches[0])
    calls = max(1, number // BATCH)
    began = time.perf_counter()
    for call in range(calls):
        infer(batches[call % len(batches)])
    return calls * BATCH / (time.perf_counter() - began)


def _loop_rate(bench: Bench, number: int) -> float:
    """Subtomograms per second of what one writes by hand."""
    network = NormalisePerCube(create_network(STUDENT, num_outputs=len(CLASSES), box=BOX)).eval()
    half = BOX // 2
    edges = np.array(bench.plan.shape) - half
    centres = np.random.default_rng(1).uniform(half, edges, (number, 3)).astype(int)
    named: list[str] = []
    began = time.perf_counter()
    with _mrcfile.open(bench.tomogram, permissive=True) as file, torch.inference_mode():
        for z, y, x in centres:
            cube = file.data[z - half : z + half, y - half : y + half, x - half : x + half]
            logits = network(torch.from_numpy(cube.astype(np.float32))[None, None])
            named.append(CLASSES[int(logits.argmax())])
    return number / (time.perf_counter() - began)


def _measure_memory(bench: Bench) -> dict[str, float | str]:
    rows, folder = bench.plan.rows, bench.folder
    star, tomogram, note = folder / f"rows-{rows}.star", folder / "tiny.mrc", folder / "peak"
    if not star.is_file():
        particles_from(_make_wide_rows(rows, (TINY_EDGE,) * 3)).write(star)
    _write_noise(tomogram, (TINY_EDGE,) * 3)
    command = [
        sys.executable, "-m", "benchmarks.memory", str(note), "predict", "classify",
        "--model", str(bench.model(STUDENT, TINY_BOX)), "--tomogram", str(tomogram),
        "--particles", str(star), "--out", str(folder / "million.star"), "--device", "cpu",
        "--overwrite",
    ]  # fmt: skip
    began = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return {
        "million_rows_gb": float(note.read_text(encoding="ascii")),
        "million_rows_s": time.monotonic() - began,
        "million_rows_mb": star.stat().st_size / 1e6,
        "rows": float(rows),
    }


def _measure_start(bench: Bench) -> dict[str, float | str]:
    seconds = [_first_prediction(bench) for _ in range(bench.plan.starts + 1)]
    return {"first_prediction_s": float(np.median(seconds[1:]))}  # the first warms the cache


def _first_prediction(bench: Bench) -> float:
    out = bench.folder / "first.star"
    journal = journal_folder(out)
    shutil.rmtree(journal, ignore_errors=True)
    out.unlink(missing_ok=True)
    command = _command(bench, bench.plan.particles, out)
    began = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while not any(journal.glob("[0-9]*.npz")) and not out.exists():
            if process.poll():
                raise subprocess.CalledProcessError(process.returncode, command)
            time.sleep(0.005)
        seconds = time.monotonic() - began
        process.kill()
    return seconds


def _measure_kills(bench: Bench) -> dict[str, float | str]:
    number = bench.plan.killed_particles
    out, whole = bench.folder / "killed.star", bench.folder / "whole.star"
    journal = journal_folder(out)
    shutil.rmtree(journal, ignore_errors=True)
    out.unlink(missing_ok=True)
    blocks = -(-number // BLOCK_SIZE)
    recorded = 0
    for quarter in (1, 2, 3):
        with subprocess.Popen(_command(bench, number, out), stdout=subprocess.DEVNULL) as process:
            while recorded < quarter * blocks // 4:
                if process.poll() is not None:
                    msg = f"the run ended with {process.returncode} before it was killed"
                    raise RuntimeError(msg)
                time.sleep(0.01)
                recorded = len(Journal(journal).finished()) if journal.is_dir() else 0
            process.kill()
        recorded = len(Journal(journal).finished())
    print(f"{recorded} of {blocks} blocks were recorded when it was killed the last time")
    subprocess.run(_command(bench, number, out), check=True, stdout=subprocess.DEVNULL)
    subprocess.run(
        [*_command(bench, number, whole), "--overwrite"], check=True, stdout=subprocess.DEVNULL
    )
    given, found, expected = (
        read_particles(path).rows for path in (bench.picks(number), out, whole)
    )
    pd.testing.assert_frame_equal(found[given.columns], given)
    same = (found == expected).all(axis=1)
    return {
        "kills": 3.0,
        "killed_rows": float(len(found)),
        "killed_as_uninterrupted": float(same.mean()),
    }


def _command(bench: Bench, number: int, out: Path) -> list[str]:
    return [
        sys.executable, "-m", "cectflow", "predict", "classify",
        "--model", str(bench.model(STUDENT)), "--tomogram", str(bench.tomogram),
        "--particles", str(bench.picks(number)), "--out", str(out), "--device", "cpu",
    ]  # fmt: skip


def _measure_gpu(bench: Bench) -> dict[str, float | str]:
    if not torch.cuda.is_available():
        return {}
    number = bench.plan.particles
    rates = [
        bench.classify(STUDENT, number, "torch", "bfloat16", "cuda")
        for _ in range(bench.plan.turns + 1)
    ]
    return {"gpu_per_s": float(np.median(rates[1:])), "gpu": torch.cuda.get_device_name()}


def _make_tomogram(bench: Bench) -> None:
    if not bench.tomogram.is_file():
        _write_noise(bench.tomogram, bench.plan.shape)
    with bench.tomogram.open("rb") as file:  # into the page cache
        while file.read(1 << 24):
            pass


def _write_noise(path: Path, shape: tuple[int, int, int]) -> None:
    generator = np.random.default_rng(0)
    with create_volume(path, shape, VOXEL_SIZE, np.float32, overwrite=True) as data:
        for section in data:
            section[...] = generator.normal(size=section.shape)


def _make_rows(number: int, shape: tuple[int, int, int]) -> pd.DataFrame:
    generator = np.random.default_rng(0)
    positions = generator.uniform(0, np.array(shape) - 1, (number, 3)).round(3)
    angles = generator.uniform(-180, 180, (number, 3)).round(4)
    return make_particle_rows(positions, tomogram="tomogram", angles=angles)


def _make_wide_rows(number: int, shape: tuple[int, int, int]) -> pd.DataFrame:
    """As many columns as RELION 4 and 5 write, three of them names of files."""
    rows = _make_rows(number, shape)
    generator = np.random.default_rng(1)
    numbers = np.arange(1, number + 1)
    job = "PseudoSubtomo/job042/Subtomograms/TS_001"
    columns: dict[str, Any] = {
        "rlnTomoParticleName": [f"TS_001/{each}" for each in numbers],
        "rlnImageName": [f"{job}/{each}_stack2d.mrcs" for each in numbers],
        "rlnCtfImage": [f"{job}/{each}_weights.mrc" for each in numbers],
        "rlnTomoParticleId": numbers,
        "rlnTomoManifoldIndex": 1,
        "rlnOpticsGroup": 1,
        "rlnGroupNumber": 1,
        "rlnClassNumber": generator.integers(1, 5, number),
        "rlnRandomSubset": generator.integers(1, 3, number),
        "rlnNormCorrection": 1.0,
    }
    for axis in "XYZ":
        columns[f"rlnOrigin{axis}Angst"] = generator.normal(size=number).round(6)
    for axis in ("Rot", "Tilt", "Psi"):
        columns[f"rlnTomoSubtomogram{axis}"] = 0.0
    columns["rlnLogLikeliContribution"] = generator.normal(1e6, 1e4, number).round(3)
    return rows.assign(**columns)


def _export(network: str, box: int, folder: Path) -> None:
    score = Score(value=0.9, low=0.88, high=0.92)
    count = len(CLASSES)
    typical = TypicalLogits(centres=((0.0,) * count,) * count, spread=(1.0,) * count)
    card = ModelCard(
        role="teacher" if network == TEACHER else "student", task="classify", network=network,
        num_outputs=count, classes=CLASSES, box=box, voxel_size=VOXEL_SIZE, ctf_correction="none",
        tilt_range=(-60, 60), snr_stage="reconstruction", snr=(0.01, 0.1), noise_spectrum="white",
        occupancy=0.1, jitter=VOXEL_SIZE, dataset_digest="none", recipe_digest="none",
        commit="none",
        trust=Trust(
            temperature=1.5, ece_before=0.1, ece_after=0.02, typical=typical,
            unknown_score="distance", unknown_threshold=-1e6, true_positive_rate=score,
            validation_cubes=1000,
        ),
    )  # fmt: skip
    torch.manual_seed(0)
    net = NormalisePerCube(create_network(network, num_outputs=count, box=box))
    part = folder.with_name(f"{folder.name}-part")
    shutil.rmtree(part, ignore_errors=True)
    card = export_network(net, card, part)
    noise = np.random.default_rng(0).normal(size=(16, 1, box, box, box)).astype(np.float32)
    quantise(part, noise)
    judged = VariantFigures(
        score=score, difference=score, parity=0.1, speedup=1.0, runtime="openvino", threads=2
    )
    variants: dict[Variant, VariantFigures] = {"int8": judged, "bfloat16": judged}
    card = card.model_copy(update={"variants": variants})
    (part / CARD_FILE).write_text(card.to_json(), encoding="utf-8")
    part.rename(folder)


if __name__ == "__main__":
    main()
