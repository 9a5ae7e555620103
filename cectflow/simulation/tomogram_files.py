"""Folders of whole tomograms: the files they hold, and what these were simulated from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from cectflow.config import Config
from cectflow.execution import HERE, Workplace, run_all
from cectflow.figures import write_figure
from cectflow.files import appearing, refuse_existing_folder, remove_leftovers, replacing
from cectflow.particles import make_particle_rows, particles_from
from cectflow.simulation.field import Specimen, prepare_specimen
from cectflow.simulation.figures import draw_tomogram
from cectflow.simulation.recipe import SimulationRecipe
from cectflow.simulation.structure import Structure
from cectflow.simulation.tomogram import (
    Tomogram,
    check_tomogram_shape,
    simulate_tomogram,
    surround,
)
from cectflow.volume import Volume
from cectflow.volume_writer import write_images, write_volume

__all__ = ["TomogramSet", "deliver_tomograms", "write_tomogram_files"]


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


def deliver_tomograms(
    recipe: SimulationRecipe,
    structures: Sequence[Structure],
    folder: Path,
    *,
    count: int,
    shape: tuple[int, int, int],
    tilt_series: bool = False,
    where: Workplace = HERE,
    commit: str = "unknown",
) -> tuple[Path, ...]:
    """Tomograms of a recipe with their truth, a folder ``tomo_000`` … each.

    In each: ``tomogram.mrc``, ``particles.star`` with the column ``cectflowTrueClass``,
    ``true_classes.mrc`` and ``true_instances.mrc``, ``record.json`` with what was drawn and
    measured, ``slices.png``, its central slices; of a tilt series also ``tilt_series.mrc``, an
    image stack after CTF correction, and ``tilt_series.tlt``, its angles in degrees, one a line.

    Parameters
    ----------
    recipe, structures
        Of the simulation; the recipe's box and number of fields do not matter here.
    folder
        Receives them and ``tomograms.json``. Tomograms that are already there are kept.
    count
        How many tomograms there shall be.
    shape
        Voxels (z, y, x).
    tilt_series
        Record projections and back-project them.
    where
        Which processes do the work; the bytes do not depend on them, the memory does.
    commit
        Of cectflow.

    Raises
    ------
    FileExistsError
        If the folder holds something else, or a tomogram in it has lost its volume.
    ValueError
        If a structure is larger than the tomogram, or cannot be packed.
    """
    check_tomogram_shape(structures, shape, recipe.voxel_size)
    specimen = prepare_specimen(recipe, structures)
    description = TomogramSet(
        recipe=recipe.model_dump(mode="json"),
        recipe_digest=specimen.recipe_digest,
        sources={structure.name: structure.digest for structure in structures},
        commit=commit,
        classes=specimen.classes,
        shape=shape,
        voxel_size=recipe.voxel_size,
        tilt_series=tilt_series,
    )
    _start_folder(folder, description)
    jobs = [_Job(folder.absolute() / f"tomo_{index:03d}", index) for index in range(count)]
    missing = [job for job in jobs if not job.folder.exists()]
    for job in jobs:
        if job.folder.exists() and not (job.folder / "tomogram.mrc").is_file():
            msg = f"{job.folder} holds no tomogram.mrc: remove the folder, and it is made again"
            raise FileExistsError(msg)
    title = "simulating tomograms"
    simulate = partial(_simulate_one, _Setting(shape, specimen, tilt_series))
    for _ in run_all(simulate, missing, where=where, title=title, paths=[folder]):
        pass
    remove_leftovers(folder)
    return tuple(folder / job.folder.name for job in jobs)


@dataclass(frozen=True, eq=False)
class _Setting:
    shape: tuple[int, int, int]
    specimen: Specimen
    tilt_series: bool


@dataclass(frozen=True, eq=False)
class _Job:
    folder: Path
    index: int

    def __str__(self) -> str:
        return f"tomogram {self.folder.name}"


@lru_cache(maxsize=1)
def _surround_once(setting: _Setting) -> Specimen:
    return surround(setting.specimen, setting.shape)


def _simulate_one(setting: _Setting, job: _Job) -> None:
    tomogram = simulate_tomogram(
        _surround_once(setting), setting.shape, job.index, tilt_series=setting.tilt_series
    )
    try:
        with appearing(job.folder) as folder:
            write_tomogram_files(tomogram, folder, job.folder.name, setting.specimen)
    except OSError:
        # On a cluster a worker may be taken for dead that was not: the same tomogram is there.
        if not (job.folder / "tomogram.mrc").is_file():
            raise


def _start_folder(folder: Path, description: TomogramSet) -> None:
    path = folder / "tomograms.json"
    if path.is_file():
        earlier = TomogramSet.from_json(path.read_text(encoding="utf-8"), source=str(path))
        # The recipe counts by its digest: it names the structures' files, which may have moved.
        where_and_when = {"commit": description.commit, "recipe": description.recipe}
        if earlier.model_copy(update=where_and_when) == description:
            remove_leftovers(folder)
            return
        msg = f"{folder} holds tomograms of another recipe, shape or kind: give another folder"
        raise FileExistsError(msg)
    refuse_existing_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(description.to_json(), encoding="utf-8")


def write_tomogram_files(
    tomogram: Tomogram, folder: Path, name: str, specimen: Specimen, *, overwrite: bool = False
) -> None:
    """Write the files of a tomogram that :func:`deliver_tomograms` lists.

    Parameters
    ----------
    tomogram
        With its truth.
    folder
        That is there.
    name
        Of the tomogram, ``rlnTomoName`` of its particles.
    specimen
        It was simulated from.
    overwrite
        Replace files that exist.
    """
    voxel_size = specimen.recipe.voxel_size
    labels = (f"simulated, recipe {specimen.recipe_digest[:16]}",)
    instances = tomogram.instances
    if instances.dtype == np.int32:  # which MRC lacks; float32 counts to 16 million
        instances = instances.astype(np.float32)
    for file, data in (
        ("tomogram", tomogram.data),
        ("true_classes", tomogram.classes),
        ("true_instances", instances),
    ):
        volume = Volume(data, voxel_size)
        write_volume(folder / f"{file}.mrc", volume, overwrite=overwrite, labels=labels)
    rows = make_particle_rows(tomogram.positions_zyx, angles=tomogram.angles, tomogram=name)
    rows["rlnPixelSize"] = voxel_size
    rows["cectflowTrueClass"] = [specimen.classes[i - 1] for i in tomogram.class_ids]
    particles_from(rows).write(folder / "particles.star", overwrite=overwrite)
    with replacing(folder / "record.json", overwrite=overwrite) as temporary:
        temporary.write_text(tomogram.record.to_json(), encoding="utf-8")
    figure = draw_tomogram(specimen, tomogram, name)
    write_figure(figure, folder / "slices.png", overwrite=overwrite)
    if tomogram.series is not None:
        series = tomogram.series
        write_images(
            folder / "tilt_series.mrc", series.projections, series.pixel_size,
            overwrite=overwrite, labels=labels,
        )  # fmt: skip
        with replacing(folder / "tilt_series.tlt", overwrite=overwrite) as temporary:
            lines = "".join(f"{angle:8.2f}\n" for angle in series.angles)
            temporary.write_text(lines, encoding="utf-8")
