"""Cost of the simulation: cubes per second, fast against literal path, workers, live, memory."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.report import parse_options, write_report
from cectflow.dataset import BatchSource, Dataset
from cectflow.execution import single_thread
from cectflow.flows.simulation import load_structures
from cectflow.learning.fit import FitRecipe, fit, open_fabric
from cectflow.learning.objective import Classify
from cectflow.networks import create_network
from cectflow.networks.normalisation import NormalisePerCube
from cectflow.shards import write_shard
from cectflow.simulation.delivery import simulate_dataset
from cectflow.simulation.extraction import choose_targets, cut_cubes, simulate_subtomograms
from cectflow.simulation.field import (
    Specimen,
    draw_field,
    image_rendered,
    prepare_specimen,
    render_drawn,
    simulate_field,
)
from cectflow.simulation.imaging import image_field
from cectflow.simulation.live import open_live
from cectflow.simulation.microscope import Microscope, draw_optics
from cectflow.simulation.optics import optics_of
from cectflow.simulation.recipe import SimulationRecipe
from cectflow.simulation.tilt_series import back_project, record_tilt_series

SHARED = SimulationRecipe(
    box=40,
    voxel_size=10.0,
    field_shape=(64, 128, 128),
    fields={"train": 8},
    occupancy=0.1,
    blur=6.8,
    snr=(0.05, 0.1),
    ctf_correction="phase_flip",
    # Drawn anew for each field, so that the filters of one do not serve the next.
    microscope=Microscope(defocus_um=(3.0, 6.0)),
)
CUBE = (64, 64, 64)
INDEPENDENT = SHARED.model_copy(update={"field_shape": CUBE, "independent": True})
# Cubes that train quickly, so that a generator which does not keep up shows.
SMALL = SHARED.model_copy(
    update={"box": 24, "voxel_size": 16.0, "blur": 11.0, "field_shape": (48, 96, 96)}
)
LIVE_WORKERS = 1
"""Processes that simulate beside the training, which has one thread."""


def main() -> None:
    """Measure on one thread, but for ``two_workers``; wall and process time differ under load.

    - ``shared_per_s``: 40³ cubes with voxel labels per second of wall time, all particles of a
      shared field of 64 × 128 × 128 voxels of 10 Å at 10 % occupancy, optics drawn per field;
      ``shared_per_cpu_s`` the same per second of process time. Nothing is written.
    - ``shared_to_disk_per_s``, ``shared_to_disk_per_cpu_s``: the same fields written as shards,
      with their digests.
    - ``independent_per_s``, ``independent_per_cpu_s``: the same for one target in each field of
      64³.
    - ``fast_over_literal``: time of record_tilt_series and back_project over that of optics_of
      and image_field, noise included, for one field of 64³ and optics not seen before;
      ``fast_over_literal_shared`` for the shared field, ``…_kept`` with filters at hand.
    - ``two_workers``: wall time of a dataset of 1,200 fields by one process over that by two; the
      start of the processes and the preparation of the specimen are included. ``two_copies``:
      what the machine allows, two such datasets at once by one process each.
    - ``gpu_per_s``, only where torch sees a CUDA device: 40³ cubes per second that it images,
      measures and cuts of fields that are rendered already, their densities copied there in the
      time measured; ``gpu_whole_per_s`` with packing, rendering and labels on one thread before.
    - ``live_over_stored``: seconds of an epoch that learns from live data over those of one that
      reads as many cubes from disk, ``live_epoch_s`` over ``stored_epoch_s``: ``strided_small``
      on cubes of 24³, one thread, ``live_workers`` processes beside it; the medians of all epochs
      but the first.
    - ``peak_gb``: largest resident memory of any process that writes a dataset.
    """
    options = parse_options(__doc__ or "")
    structures = load_structures(SHARED)
    specimen = prepare_specimen(SHARED, structures)
    alone = prepare_specimen(INDEPENDENT, structures)
    figures: dict[str, float] = {}
    with single_thread():
        figures |= _measure_rate("shared", specimen, fields=3 if options.quick else 10)
        figures |= _measure_writing(specimen, fields=3 if options.quick else 10)
        figures |= _measure_rate("independent", alone, fields=20 if options.quick else 100)
        figures |= _measure_paths(specimen, repeats=2 if options.quick else 5)
        if torch.cuda.is_available():
            figures |= _measure_gpu(specimen.to("cuda"), fields=4 if options.quick else 20)
        figures |= _measure_live(fields=2 if options.quick else 8)
    figures |= _measure_workers(fields=24 if options.quick else 1200)
    write_report(options.json, figures, quick=options.quick)


def _measure_rate(name: str, specimen: Specimen, *, fields: int) -> dict[str, float]:
    simulate_subtomograms(specimen, "warm-up", 0)  # numba compiles
    wall, process, cubes = time.perf_counter(), time.process_time(), 0
    for index in range(fields):
        cubes += len(simulate_subtomograms(specimen, "train", index)[0].rows)
    return {
        f"{name}_per_s": cubes / (time.perf_counter() - wall),
        f"{name}_per_cpu_s": cubes / (time.process_time() - process),
        f"{name}_cubes_per_field": cubes / fields,
    }


def _measure_gpu(specimen: Specimen, *, fields: int) -> dict[str, float]:
    simulate_subtomograms(specimen, "warm-up", 0)
    torch.cuda.synchronize()
    start, cubes, imaging = time.perf_counter(), 0, 0.0
    for index in range(fields):
        rendered = render_drawn(specimen, draw_field(specimen, "train", index))
        targets = choose_targets(specimen, rendered, index)
        begun = time.perf_counter()
        tomogram, _ = image_rendered(specimen, rendered)
        cubes += len(cut_cubes(tomogram, targets.centres, specimen.recipe.box))
        torch.cuda.synchronize()
        imaging += time.perf_counter() - begun
    return {
        "gpu_per_s": cubes / imaging,
        "gpu_whole_per_s": cubes / (time.perf_counter() - start),
    }


def _measure_writing(specimen: Specimen, *, fields: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as scratch:
        wall, process, cubes = time.perf_counter(), time.process_time(), 0
        for index in range(fields):
            content, record = simulate_subtomograms(specimen, "train", index)
            name = f"train/{index:05d}"
            write_shard(Path(scratch), name, content, (record,), specimen.recipe.voxel_size)
            cubes += len(content.rows)
        return {
            "shared_to_disk_per_s": cubes / (time.perf_counter() - wall),
            "shared_to_disk_per_cpu_s": cubes / (time.process_time() - process),
        }


def _measure_live(*, fields: int) -> dict[str, float]:
    recipe = SMALL.model_copy(update={"fields": {"train": fields, "validation": 1}})
    structures = load_structures(recipe)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        dataset = simulate_dataset(recipe, structures, folder / "data")
        stored, specimen = dataset.split("train"), prepare_specimen(recipe, structures)
        seconds = {"stored": _measure_epoch(stored, dataset, folder / "stored")}
        with open_live(specimen, dataset.manifest, len(stored), workers=LIVE_WORKERS) as live:
            seconds["live"] = _measure_epoch(live, dataset, folder / "live")
    return {
        "live_over_stored": seconds["live"] / seconds["stored"],
        "live_epoch_s": seconds["live"],
        "stored_epoch_s": seconds["stored"],
        "live_epoch_cubes": len(stored),
        "live_workers": LIVE_WORKERS,
    }


def _measure_epoch(source: BatchSource, dataset: Dataset, folder: Path) -> float:
    """Median seconds of an epoch, the first left out: in it processes start and torch warms up."""
    number = len(dataset.manifest.classes)
    network = create_network("strided_small", num_outputs=number, box=dataset.manifest.box)
    result = fit(
        NormalisePerCube(network),
        Classify(number),
        source,
        dataset.split("validation"),
        FitRecipe(network="strided_small", epochs=4, batch_size=64, learning_rate=1e-3),
        fabric=open_fabric("cpu", "float32"),
        folder=folder,
        log=lambda row, epoch: None,
    )
    return float(np.median([row["epoch_seconds"] for row in result.history[1:]]))


def _measure_paths(specimen: Specimen, *, repeats: int) -> dict[str, float]:
    shared = simulate_field(specimen, "train", 0).density
    cube = np.ascontiguousarray(shared[: CUBE[0], : CUBE[1], : CUBE[2]])
    figures: dict[str, float] = {}
    for name, density in (("fast_over_literal", cube), ("fast_over_literal_shared", shared)):
        kept, *fresh = np.linspace(3.0, 6.0, 3 * repeats + 1).tolist()
        _image_fast(density, kept)
        fast = [_seconds(_image_fast, density, defocus) for defocus in fresh]
        with_kept = [_seconds(_image_fast, density, fresh[-1]) for _ in fresh]
        literal = min(_seconds(_image_literally, density, kept) for _ in range(repeats // 2 + 1))
        figures |= {name: literal / min(fast), f"{name}_kept": literal / min(with_kept)}
    return figures


def _image_fast(density: NDArray[np.float32], defocus_um: float) -> None:
    depth, height, width = density.shape
    optics = optics_of(
        (depth, height, width), SHARED.voxel_size,
        SHARED.microscope.model_copy(update={"defocus_um": defocus_um}), SHARED.tilts, defocus_um,
        SHARED.ctf_correction,
    )  # fmt: skip
    image_field(torch.from_numpy(density), optics, 1.0, torch.Generator().manual_seed(0))


def _image_literally(density: NDArray[np.float32], defocus_um: float) -> None:
    depth, height, width = density.shape
    microscope = SHARED.microscope.model_copy(update={"defocus_um": defocus_um})
    draw = draw_optics(microscope, SHARED.tilts, np.random.default_rng(0))
    series = record_tilt_series(
        density, SHARED.voxel_size, draw, SHARED.ctf_correction, 1.0, np.random.default_rng(0)
    )
    back_project(series, (depth, height, width))


def _seconds(
    work: Callable[[NDArray[np.float32], float], None],
    density: NDArray[np.float32],
    defocus_um: float,
) -> float:
    """Wall time; of several the shortest counts, which other programs disturbed least."""
    start = time.perf_counter()
    work(density, defocus_um)
    return time.perf_counter() - start


def _measure_workers(*, fields: int) -> dict[str, float]:
    recipe = SHARED.model_copy(update={"fields": {"train": fields}, "targets_per_field": 32})
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "recipe.yaml"
        path.write_text(recipe.to_yaml(), encoding="utf-8")
        (one,), (two,) = _deliver(path, workers=1), _deliver(path, workers=2)
        copies = _deliver(path, workers=1, copies=2)
    return {
        "two_workers": one["seconds"] / two["seconds"],
        "two_copies": 2 * one["seconds"] / max(copy["seconds"] for copy in copies),
        "peak_gb": max(run["peak_gb"] for run in (one, two, *copies)),
    }


def _deliver(recipe: Path, *, workers: int, copies: int = 1) -> list[dict[str, float]]:
    """What ``benchmarks.delivery`` measures, of as many copies as asked for at the same time."""
    command = [sys.executable, "-m", "benchmarks.delivery", str(recipe), "--workers", str(workers)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(copies)]
    outputs = [process.communicate()[0] for process in started]
    for process in started:
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
    return [json.loads(output) for output in outputs]


if __name__ == "__main__":
    main()
