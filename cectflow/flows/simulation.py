"""From a recipe to a dataset folder, and to a tomogram with its particles."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from cectflow.dataset import Dataset
from cectflow.execution import HERE, Workplace, single_thread
from cectflow.figures import draw_slices, write_figure
from cectflow.manifest import SPLITS, Manifest, SplitName
from cectflow.recipe import Recipe, load_recipe
from cectflow.simulation.delivery import simulate_dataset
from cectflow.simulation.field import Specimen, field_optics, prepare_specimen, simulate_field
from cectflow.simulation.figures import (
    draw_optics,
    draw_simulated_field,
    draw_snr,
    draw_spectra,
)
from cectflow.simulation.recipe import SimulationRecipe
from cectflow.simulation.structure import Structure, find_structures, load_structure
from cectflow.simulation.tomogram import Tomogram, simulate_tomogram, surround
from cectflow.simulation.tomogram_files import deliver_tomograms, write_tomogram_files
from cectflow.tracking.runs import Run, cectflow_commit, start_run

__all__ = [
    "SimulatedTomogram",
    "choose_recipe",
    "load_structures",
    "new_folder",
    "recipe_of",
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


def recipe_of(manifest: Manifest) -> SimulationRecipe:
    """The recipe that a dataset was simulated with.

    Raises
    ------
    ValueError
        If it was not simulated, or the recipe is of another cectflow.
    """
    if manifest.kind != "simulated":
        msg = "the data were not simulated"
        raise ValueError(msg)
    return SimulationRecipe.from_json(json.dumps(manifest.recipe), source="the dataset's recipe")


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


def simulate(
    recipe: Recipe, folder: Path, *, where: Workplace = HERE, nested: bool = False
) -> Dataset:
    """Dataset of a recipe, logged as a run with its manifest and pictures.

    The pictures lie in the dataset's folder ``figures``, which is no part of its content: they
    are drawn anew whenever the dataset is asked for.
    """
    structures = load_structures(recipe.simulation)
    with start_run("simulate", tags={"role": "dataset"}, nested=nested) as run:
        run.log_config(recipe.simulation, "recipe")
        dataset = simulate_dataset(
            recipe.simulation, structures, folder, where=where, commit=cectflow_commit()
        )
        manifest = dataset.manifest
        run.log_dataset("simulated", manifest.content_digest(), str(folder.resolve()), "output")
        run.log_files(folder / "manifest.json")
        _log_measured(run, dataset)
        _write_figures(dataset, prepare_specimen(recipe.simulation, structures))
        run.log_files(folder / "figures", "figures")
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
        Receives the files of :func:`deliver_tomograms`.
    overwrite
        Replace them if they exist.
    """
    specimen = prepare_specimen(recipe, load_structures(recipe))
    shape = recipe.field_shape
    tomogram = simulate_tomogram(surround(specimen, shape), shape, 0)
    folder.mkdir(parents=True, exist_ok=True)
    write_tomogram_files(tomogram, folder, "tomogram", specimen, overwrite=overwrite)
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
    where: Workplace = HERE,
) -> tuple[Path, ...]:
    """Tomograms of a recipe with their truth, logged as a run: :func:`deliver_tomograms`."""
    structures = load_structures(recipe)
    with start_run("simulate tomograms", tags={"role": "tomograms"}) as run:
        run.log_config(recipe, "recipe")
        folders = deliver_tomograms(
            recipe, structures, folder, count=count, shape=shape or recipe.field_shape,
            tilt_series=tilt_series, where=where, commit=cectflow_commit(),
        )  # fmt: skip
        for made in folders:
            run.log_files(made / "slices.png", f"figures/{made.name}")
        run.log_files(folder / "tomograms.json")
    return folders


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


def _write_figures(dataset: Dataset, specimen: Specimen) -> None:
    """Pictures of the dataset, and of the first field of its first split, which is made again."""
    recipe, manifest = specimen.recipe, dataset.manifest
    split = next(name for name in SPLITS if manifest.count(name))
    with single_thread():
        field = simulate_field(specimen, split, 0)
    pictures = {
        "field": draw_simulated_field(specimen, field),
        "power_spectra": draw_spectra(specimen, field),
        "ctf": draw_optics(field_optics(specimen, field.draw), field.draw, recipe),
        "subtomograms": _draw_classes(dataset, split),
    }
    if recipe.snr is not None:
        records = [record for name in SPLITS for record in manifest.field_records(name)]
        pictures["snr"] = draw_snr(records, stage=recipe.snr_stage, requested=recipe.snr)
    folder = dataset.folder / "figures"
    folder.mkdir(exist_ok=True)
    for name, picture in pictures.items():
        write_figure(picture, folder / f"{name}.png", overwrite=True)


def _draw_classes(dataset: Dataset, name: SplitName) -> Figure:
    """One subtomogram of each class with its target outlined."""
    split, classes = dataset.split(name), dataset.manifest.classes[:10]
    first = [int(np.argmax(split.class_ids == i)) for i in range(1, len(classes) + 1)]
    batch = split.read(np.array(first))
    assert batch.instances is not None
    return draw_slices(
        batch.subtomograms[:, 0].numpy(),
        (batch.instances == 1).numpy(),
        None,
        voxel_size=dataset.manifest.voxel_size,
        titles=classes,
    )
