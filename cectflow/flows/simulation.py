"""From a recipe to a dataset folder, and to a tomogram with its particles."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cectflow.config import Config
from cectflow.dataset import SPLITS, Dataset
from cectflow.execution import run_all
from cectflow.figures import draw_slices
from cectflow.files import appearing, refuse_existing_folder, replacing
from cectflow.particles import make_particle_rows, particles_from
from cectflow.recipe import Recipe, load_recipe
from cectflow.simulation.delivery import simulate_dataset
from cectflow.simulation.field import Specimen, prepare_specimen
from cectflow.simulation.recipe import SimulationRecipe
from cectflow.simulation.structure import Structure, find_structures, load_structure
from cectflow.simulation.tomogram import (
    Tomogram,
    check_tomogram_shape,
    simulate_tomogram,
    surround,
)
from cectflow.tracking.runs import Run, cectflow_commit, start_run
from cectflow.volume import Volume, write_images, write_volume

__all__ = [
    "SimulatedTomogram",
    "TomogramSet",
    "choose_recipe",
    "load_structures",
    "new_folder",
    "simulate",
    "simulate_tomograms",
    "write_tomogram",
]


@dataclass(frozen=True, eq=False)
class SimulatedTomogram:
    """A simulated tomogram, where it and its particles were written, and its truth.

    Attributes
    ----------
    tomogram, particles
        MRC volume, and STAR with the column ``cectflowTrueClass``.
    truth
        With density, class and instance of every voxel.
    class_names
        In the order of ``class_id``, from 1.
    """

    tomogram: Path
    particles: Path
    truth: Tomogram
    class_names: tuple[str, ...]


class TomogramSet(Config):
    """What a folder of tomograms was simulated from: ``tomograms.json`` beside them."""

    recipe: dict[str, Any]
    recipe_digest: str
    """Over the recipe and the structures' content."""
    sources: dict[str, str]
    commit: str
    classes: tuple[str, ...]
    """Names in the order of ``class_id``, from 1."""
    shape: tuple[int, int, int]
    voxel_size: float
    tilt_series: bool
    """Whether tomograms are back-projections of the tilt series beside them."""


def choose_recipe(
    name_or_path: str, *, structures: str | None = None, seed: int | None = None
) -> Recipe:
    """Recipe by name or path, with structures and seed replaced where given.

    Parameters
    ----------
    name_or_path
        A recipe that cectflow brings, or a YAML file.
    structures
        ``builtin`` or comma-separated files and folders.
    seed
        Of simulation and trainings.
    """
    recipe = load_recipe(name_or_path)
    simulation = recipe.simulation
    if structures:
        paths = tuple(part.strip() for part in structures.split(",") if part.strip())
        simulation = simulation.model_copy(update={"structures": paths})
    recipe = recipe.model_copy(update={"simulation": simulation})
    return recipe if seed is None else recipe.with_seed(seed)


def load_structures(recipe: SimulationRecipe) -> tuple[Structure, ...]:
    """Structures of a recipe in class order.

    Raises
    ------
    ValueError
        If a name in ``include`` is not among the sources; the message lists those there are.
    """
    sources = {source.name: source for source in find_structures(",".join(recipe.structures))}
    missing = [name for name in recipe.include if name not in sources]
    if missing:
        msg = (
            f"include names {', '.join(missing)}: not among the structures of "
            f"{', '.join(recipe.structures)}, which are {', '.join(sources)}"
        )
        raise ValueError(msg)
    chosen = recipe.include or tuple(sources)
    return tuple(load_structure(sources[name]) for name in chosen)


def new_folder(name: str) -> Path:
    """Unused folder ``runs/NAME-<time>`` for the files of a run."""
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def simulate(recipe: Recipe, folder: Path, *, workers: int = 1, nested: bool = False) -> Dataset:
    """Dataset of a recipe, logged as a run with its manifest and pictures."""
    structures = load_structures(recipe.simulation)
    with start_run("simulate", tags={"role": "dataset"}, nested=nested) as run:
        run.log_config(recipe.simulation, "recipe")
        dataset = simulate_dataset(
            recipe.simulation, structures, folder, workers=workers, commit=cectflow_commit()
        )
        manifest = dataset.manifest
        run.log_dataset("simulated", manifest.content_digest(), str(folder.resolve()), "output")
        run.log_files(folder / "manifest.json")
        _log_measured(run, dataset)
        _log_slices(run, dataset)
    return dataset


def write_tomogram(
    recipe: SimulationRecipe, folder: Path, *, overwrite: bool = False
) -> SimulatedTomogram:
    """One more tomogram of a recipe, in no split, of the size of its fields.

    Parameters
    ----------
    recipe
        Of the simulation.
    folder
        Receives the files of :func:`simulate_tomograms`.
    overwrite
        Replace them if they exist.
    """
    specimen = prepare_specimen(recipe, load_structures(recipe))
    shape = recipe.field_shape
    tomogram = simulate_tomogram(surround(specimen, shape), shape, 0)
    folder.mkdir(parents=True, exist_ok=True)
    _write_tomogram(tomogram, folder, "tomogram", specimen, overwrite=overwrite)
    return SimulatedTomogram(
        folder / "tomogram.mrc", folder / "particles.star", tomogram, specimen.classes
    )


def simulate_tomograms(
    recipe: SimulationRecipe,
    folder: Path,
    *,
    count: int,
    shape: tuple[int, int, int] | None = None,
    tilt_series: bool = False,
    workers: int = 1,
) -> tuple[Path, ...]:
    """Tomograms of a recipe with their truth, a folder ``tomo_000`` … each, logged as a run.

    In each: ``tomogram.mrc``, ``particles.star`` with the column ``cectflowTrueClass``,
    ``true_classes.mrc`` and ``true_instances.mrc``, ``record.json`` with what was drawn and
    measured; of a tilt series also ``tilt_series.mrc``, an image stack after CTF correction, and
    ``tilt_series.tlt``, its angles in degrees, one a line.

    Parameters
    ----------
    recipe
        Of the simulation; its box and number of fields do not matter here.
    folder
        Receives them and ``tomograms.json``. Tomograms that are already there are kept.
    count
        How many tomograms there shall be.
    shape
        Voxels (z, y, x); None: those of the recipe's field.
    tilt_series
        Record projections and back-project them.
    workers
        Processes; the bytes do not depend on them, the memory does.

    Raises
    ------
    FileExistsError
        If the folder holds something else.
    ValueError
        If a structure is larger than the tomogram, or cannot be packed.
    """
    shape = shape or recipe.field_shape
    structures = load_structures(recipe)
    check_tomogram_shape(structures, shape, recipe.voxel_size)
    specimen = prepare_specimen(recipe, structures)
    description = TomogramSet(
        recipe=recipe.model_dump(mode="json"),
        recipe_digest=specimen.recipe_digest,
        sources={structure.name: structure.digest for structure in structures},
        commit=cectflow_commit(),
        classes=specimen.classes,
        shape=shape,
        voxel_size=recipe.voxel_size,
        tilt_series=tilt_series,
    )
    _start_folder(folder, description)
    with start_run("simulate tomograms", tags={"role": "tomograms"}) as run:
        run.log_config(recipe, "recipe")
        jobs = [
            _TomogramJob(specimen, shape, folder / f"tomo_{index:03d}", index, tilt_series)
            for index in range(count)
        ]
        missing = [job for job in jobs if not job.folder.exists()]
        for _ in run_all(_simulate_one, missing, workers=workers, title="simulating tomograms"):
            pass
        run.log_files(folder / "tomograms.json")
    return tuple(job.folder for job in jobs)


@dataclass(frozen=True, eq=False)
class _TomogramJob:
    specimen: Specimen
    shape: tuple[int, int, int]
    folder: Path
    index: int
    tilt_series: bool


def _simulate_one(job: _TomogramJob) -> None:
    surrounded = surround(job.specimen, job.shape)
    tomogram = simulate_tomogram(surrounded, job.shape, job.index, tilt_series=job.tilt_series)
    with appearing(job.folder) as folder:
        _write_tomogram(tomogram, folder, job.folder.name, job.specimen, overwrite=False)


def _start_folder(folder: Path, description: TomogramSet) -> None:
    path = folder / "tomograms.json"
    if path.is_file():
        earlier = TomogramSet.from_json(path.read_text(encoding="utf-8"), source=str(path))
        if earlier.model_copy(update={"commit": description.commit}) == description:
            return
        msg = f"{folder} holds tomograms of another recipe, shape or kind: give another folder"
        raise FileExistsError(msg)
    refuse_existing_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(description.to_json(), encoding="utf-8")


def _write_tomogram(
    tomogram: Tomogram, folder: Path, name: str, specimen: Specimen, *, overwrite: bool
) -> None:
    voxel_size = specimen.recipe.voxel_size
    labels = (f"simulated, recipe {specimen.recipe_digest[:16]}",)
    most = int(tomogram.instances.max())
    # MRC lacks int32; float32 counts to 16 million.
    narrow = np.int16 if most < 2**15 else np.uint16 if most < 2**16 else np.float32
    instances = tomogram.instances.astype(narrow)
    for file, data in (
        ("tomogram", tomogram.data),
        ("true_classes", tomogram.classes),
        ("true_instances", instances),
    ):
        volume = Volume(data, voxel_size)
        write_volume(folder / f"{file}.mrc", volume, overwrite=overwrite, labels=labels)
    rows = make_particle_rows(tomogram.positions_zyx, angles=tomogram.angles, tomogram=name)
    rows["cectflowTrueClass"] = [specimen.classes[i - 1] for i in tomogram.class_ids]
    particles_from(rows).write(folder / "particles.star", overwrite=overwrite)
    with replacing(folder / "record.json", overwrite=overwrite) as temporary:
        temporary.write_text(tomogram.record.to_json(), encoding="utf-8")
    if tomogram.series is not None:
        series = tomogram.series
        write_images(
            folder / "tilt_series.mrc", series.projections, series.pixel_size,
            overwrite=overwrite, labels=labels,
        )  # fmt: skip
        with replacing(folder / "tilt_series.tlt", overwrite=overwrite) as temporary:
            lines = "".join(f"{angle:8.2f}\n" for angle in series.angles)
            temporary.write_text(lines, encoding="utf-8")


def _log_measured(run: Run, dataset: Dataset) -> None:
    """Means over fields of what was measured, and the numbers of subtomograms."""
    for split in dataset.manifest.planned_shards:
        records = dataset.manifest.field_records(split)
        metrics: dict[str, float] = {f"{split}_subtomograms": dataset.manifest.count(split)}
        for name in ("snr", "snr_60", "occupancy"):
            values = [v for record in records if (v := getattr(record, name)) is not None]
            if values:
                metrics[f"{split}_{name}"] = float(np.mean(values))
        run.log(metrics)


def _log_slices(run: Run, dataset: Dataset) -> None:
    """One subtomogram of each class with its target outlined."""
    split = dataset.split(next(name for name in SPLITS if dataset.manifest.count(name)))
    classes = dataset.manifest.classes[:10]
    first = [int(np.argmax(split.class_ids == i)) for i in range(1, len(classes) + 1)]
    batch = split.read(np.array(first))
    assert batch.instances is not None
    figure = draw_slices(
        batch.subtomograms[:, 0].numpy(),
        (batch.instances == 1).numpy(),
        None,
        voxel_size=dataset.manifest.voxel_size,
        titles=classes,
    )
    run.log_figure(figure, "figures/subtomograms.png")
