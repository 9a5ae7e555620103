"""SimulationRecipe, and the shards it stands for: the same recipe gives the same bytes anywhere."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor

from cectflow.config import Config
from cectflow.dataset import (
    SPLITS,
    Dataset,
    FieldRecord,
    Manifest,
    ShardRecord,
    SplitName,
    Subtomograms,
    open_dataset,
    write_shard,
)
from cectflow.execution import run_all, single_thread
from cectflow.model_card import CtfCorrection
from cectflow.particles import make_particle_rows
from cectflow.simulation.beads import Beads, coarse_grain, label_threshold, render_field
from cectflow.simulation.imaging import (
    SnrStage,
    image_and_measure,
    noise_scale,
    optics_of,
    power_spectrum,
)
from cectflow.simulation.microscope import Microscope, OpticsDraw, TiltScheme, draw_optics
from cectflow.simulation.scene import Scene, pack_scene
from cectflow.simulation.structure import Structure
from cectflow.subtomogram import cut

__all__ = [
    "SimulatedField",
    "SimulationRecipe",
    "Specimen",
    "draw_field_optics",
    "prepare_specimen",
    "simulate_dataset",
    "simulate_field",
]

MIN_BLUR = 0.68
"""Voxels: below it a Gaussian is undersampled (design.md, section 4)."""
REFERENCE_VOXELS = 2**22
"""Voxels of the fields over which the expected power spectrum is averaged, 2 to 32 fields: the
power of a field of 32³ varies by 4 %, of larger ones by less."""


class SimulationRecipe(Config):
    """Everything that a simulated dataset depends on, but for the structures' content."""

    seed: int = Field(0, ge=0)
    structures: tuple[str, ...] = ("builtin",)
    """``builtin``, files and folders."""
    include: tuple[str, ...] = ()
    """Names of the structures to use, in class order; empty: all of them."""
    box: int = Field(ge=8)
    """Edge of a subtomogram in voxels."""
    voxel_size: float = Field(gt=0)
    """Å."""
    field_shape: tuple[int, int, int]
    """Voxels (z, y, x) of the periodic field from which subtomograms are cut."""
    fields: dict[SplitName, int]
    """Number of fields of each split; splits are made by field."""
    targets_per_field: int | None = Field(None, ge=1)
    """At most this many subtomograms of a field; None: one for each particle."""
    occupancy: float = Field(gt=0, le=0.4)
    """Molecular volume (1.21 Å³/Da) over the volume of the field."""
    blur: float = Field(gt=0)
    """Gaussian sigma in Å of the specimen's density."""
    bead_spacing: float = Field(10.0, gt=0)
    """Å: structures are coarse-grained to beads of this size; 7.5 is finer, and slower."""
    jitter: float = Field(0.0, ge=0)
    """Largest offset in Å of a target from the box centre along each axis; the half voxel by which
    cubes are cut to whole voxels comes on top."""
    label_volume: float = Field(1.5, gt=0)
    """Labelled volume over the molecular volume; 1.5 includes the hydration shell."""
    snr: tuple[float, float] | None
    """Lowest and highest SNR, drawn log-uniformly per field; null: noise-free."""
    snr_stage: SnrStage = "reconstruction"
    """Where that SNR is defined: :func:`~cectflow.simulation.imaging.optics_of`."""
    ctf_correction: CtfCorrection = "none"
    microscope: Microscope = Microscope()
    tilts: TiltScheme = TiltScheme()
    num_optics: int | None = Field(None, ge=1)
    """Fields share this many draws of microscope and tilts; null: each field has its own."""

    @model_validator(mode="after")
    def _check(self) -> SimulationRecipe:
        if self.snr is not None and not 0 < self.snr[0] <= self.snr[1]:
            msg = f"snr is {self.snr}: expected 0 < lowest <= highest, or null for noise-free"
            raise ValueError(msg)
        if self.blur / self.voxel_size < MIN_BLUR - 1e-9:  # 0.68 * 10 is not 6.8
            msg = (
                f"blur is {self.blur:g} Å: expected at least {MIN_BLUR} voxel, "
                f"{MIN_BLUR * self.voxel_size:.2f} Å at {self.voxel_size:g} Å per voxel"
            )
            raise ValueError(msg)
        if self.box > min(self.field_shape):
            msg = f"box {self.box} is larger than the field {self.field_shape}: enlarge the field"
            raise ValueError(msg)
        plain = self.ctf_correction == "none" and self.microscope.noise_spectrum == "white"
        if self.snr_stage == "aitom" and not plain:
            msg = (
                f"snr_stage aitom with ctf_correction {self.ctf_correction} and noise_spectrum "
                f"{self.microscope.noise_spectrum}: expected none and white, that laboratory's "
                f"recipe has no others; use snr_stage reconstruction or projection"
            )
            raise ValueError(msg)
        if not self.fields or any(count < 1 for count in self.fields.values()):
            msg = f"fields is {self.fields}: expected at least one field in each split named"
            raise ValueError(msg)
        return self


@dataclass(frozen=True, eq=False)
class Specimen:
    """Structures made ready for a recipe: beads, label thresholds, expected power.

    Attributes
    ----------
    recipe_digest
        sha256 over the recipe and the structures' content: every seed derives from it.
    expected_power
        Mean power spectrum of the recipe's scenes, from reference fields of their own.
    """

    recipe: SimulationRecipe
    recipe_digest: str
    beads: tuple[Beads, ...]
    thresholds: NDArray[np.float64]
    expected_power: Tensor

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; ``class_id`` counts from 1."""
        return tuple(grains.name for grains in self.beads)


@dataclass(frozen=True, eq=False)
class SimulatedField:
    """One imaged field with its ground truth; arrays are (z, y, x) over the periodic field."""

    scene: Scene
    tomogram: NDArray[np.float32]
    owners: NDArray[np.int32]
    """0 background, else 1 + index of the particle in the scene."""
    density: NDArray[np.float32]
    record: FieldRecord


def prepare_specimen(recipe: SimulationRecipe, structures: Sequence[Structure]) -> Specimen:
    """Specimen of a recipe.

    Raises
    ------
    ValueError
        If a structure does not fit the box with its jitter, or the request cannot be packed.
    """
    room = recipe.box * recipe.voxel_size - 2.0 * recipe.jitter
    for structure in structures:
        if structure.extent > room:
            needed = int(np.ceil((structure.extent + 2.0 * recipe.jitter) / recipe.voxel_size))
            msg = (
                f"{structure.name} is {structure.extent:.0f} Å across; a box of {recipe.box} "
                f"voxels of {recipe.voxel_size:g} Å less the jitter has room for {room:.0f} Å: "
                f"use a box of {needed}, a larger voxel, or leave it out of `include`"
            )
            raise ValueError(msg)
    content = recipe.digest() + "".join(structure.digest for structure in structures)
    beads = tuple(coarse_grain(structure, spacing=recipe.bead_spacing) for structure in structures)
    thresholds = np.array(
        [
            label_threshold(
                grains,
                voxel_size=recipe.voxel_size,
                sigma=recipe.blur,
                volume_factor=recipe.label_volume,
            )
            for grains in beads
        ]
    )
    nothing = torch.zeros(0)
    digest = hashlib.sha256(content.encode()).hexdigest()
    specimen = Specimen(recipe, digest, beads, thresholds, nothing)
    with single_thread():
        spectra = []
        num_fields = REFERENCE_VOXELS // int(np.prod(recipe.field_shape))
        for index in range(min(max(num_fields, 2), 32)):
            generator = np.random.default_rng(_seed(specimen, "reference", index))
            density = _render(specimen, _pack(specimen, generator))[0]
            spectra.append(power_spectrum(torch.from_numpy(density)))
        expected_power = torch.stack(spectra).mean(dim=0)
    return Specimen(recipe, digest, beads, thresholds, expected_power)


def simulate_field(specimen: Specimen, split: str, index: int) -> SimulatedField:
    """Field number ``index`` of a split; depends on nothing but the recipe and these two."""
    recipe = specimen.recipe
    generator = np.random.default_rng(_seed(specimen, split, index))
    scene = _pack(specimen, generator)
    snr = None
    if recipe.snr is not None:
        snr = float(np.exp(generator.uniform(*np.log(recipe.snr))))
    draw = draw_field_optics(specimen, split, index)
    optics = optics_of(
        recipe.field_shape,
        recipe.voxel_size,
        draw.microscope,
        draw.tilts,
        draw.defoci_um,
        recipe.ctf_correction,
        shifts=draw.shifts,
        snr_stage=recipe.snr_stage,
    )
    density, owners = _render(specimen, scene)
    factor = noise_scale(specimen.expected_power, optics, snr, width=recipe.field_shape[2])
    noise_generator = torch.Generator().manual_seed(int(generator.integers(2**63 - 1)))
    imaged, measured = image_and_measure(
        torch.from_numpy(density), optics, factor, noise_generator, recipe.voxel_size
    )
    tomogram, numbers = imaged.numpy(), draw.numbers()
    record = FieldRecord(
        field=f"{split}-{index:05d}",
        mean=float(tomogram.mean()),
        std=float(tomogram.std()),
        defocus_um=numbers["defocus_um"],
        drawn=numbers,
        requested_snr=snr,
        snr=None if measured is None else measured.stage,
        snr_reconstruction=None if measured is None else measured.reconstruction,
        snr_60=None if measured is None else measured.low_passed,
        occupancy=scene.occupancy,
        num_particles=len(scene),
    )
    return SimulatedField(scene, tomogram, owners, density, record)


def draw_field_optics(specimen: Specimen, split: str, index: int) -> OpticsDraw:
    """Optics of field number ``index`` of a split; one of ``num_optics`` where these are shared."""
    recipe = specimen.recipe
    seed = _seed(specimen, f"{split}-optics", index)
    if recipe.num_optics is not None:
        seed = _seed(specimen, "optics", seed % recipe.num_optics)
    return draw_optics(recipe.microscope, recipe.tilts, np.random.default_rng(seed))


def simulate_dataset(
    recipe: SimulationRecipe,
    structures: Sequence[Structure],
    folder: Path,
    *,
    workers: int = 1,
    commit: str = "unknown",
) -> Dataset:
    """Dataset folder of a recipe; shards that are already there are kept.

    One shard holds one field. The bytes do not depend on ``workers``.

    Parameters
    ----------
    recipe, structures
        What to simulate.
    folder
        Where to; created when missing.
    workers
        Processes.
    commit
        Of cectflow, for the manifest.

    Raises
    ------
    FileExistsError
        If the folder holds something other than an earlier start of this very simulation.
    ValueError
        If a structure does not fit the box, or the occupancy cannot be packed.
    """
    specimen = prepare_specimen(recipe, structures)
    manifest = _start_manifest(specimen, structures, folder, commit)
    done = {shard.name for shards in manifest.shards.values() for shard in shards}
    jobs = [
        _Job(specimen, folder, split, index)
        for split in SPLITS
        for index in range(recipe.fields.get(split, 0))
        if _shard_name(split, index) not in done
    ]
    for split, record in run_all(_simulate_shard, jobs, workers=workers, title="simulating"):
        shards = dict(manifest.shards)
        shards[split] = tuple(sorted((*shards[split], record), key=lambda shard: shard.name))
        manifest = manifest.model_copy(update={"shards": shards})
        manifest.write(folder)
    return open_dataset(folder)


@dataclass(frozen=True, eq=False)
class _Job:
    specimen: Specimen
    folder: Path
    split: SplitName
    index: int


def _simulate_shard(job: _Job) -> tuple[SplitName, ShardRecord]:
    with single_thread():
        field = simulate_field(job.specimen, job.split, job.index)
    recipe = job.specimen.recipe
    content = _cut_targets(job.specimen, field, _seed(job.specimen, f"{job.split}-cut", job.index))
    name = _shard_name(job.split, job.index)
    record = write_shard(job.folder, name, content, (field.record,), recipe.voxel_size)
    return job.split, record


def _cut_targets(specimen: Specimen, field: SimulatedField, seed: int) -> Subtomograms:
    """Subtomograms about the field's particles, with labels, instances and one row each."""
    recipe, scene = specimen.recipe, field.scene
    generator = np.random.default_rng(seed)
    # A particle that its neighbours' densities hide has no voxel to segment: no target.
    visible = np.unique(field.owners)
    targets = generator.permutation(visible[visible > 0] - 1)[: recipe.targets_per_field]
    targets.sort()
    offsets = generator.uniform(-1.0, 1.0, (len(targets), 3)) * recipe.jitter / recipe.voxel_size
    centres = np.round(scene.positions_zyx[targets] + offsets)
    cubes = cut(field.tomogram, centres, recipe.box, periodic=True).astype(np.float16)
    owners = cut(field.owners, centres, recipe.box, periodic=True)
    class_of_owner = np.concatenate([[0], scene.class_ids]).astype(np.int8)
    instances = np.stack(
        [_renumber(cube, int(target) + 1) for cube, target in zip(owners, targets, strict=True)]
    )
    present = (instances == 1).any(axis=(1, 2, 3))
    rows = make_particle_rows(
        scene.positions_zyx[targets], angles=scene.angles[targets], tomogram=field.record.field
    )
    rows["rlnClassNumber"] = scene.class_ids[targets]
    rows["cectflowClassName"] = [specimen.classes[i - 1] for i in scene.class_ids[targets]]
    for column, axis in (("X", 2), ("Y", 1), ("Z", 0)):
        rows[f"cectflowCentre{column}"] = centres[:, axis].astype(np.int64)
    return Subtomograms(
        cubes[present], class_of_owner[owners][present], instances[present],
        rows[present].reset_index(drop=True),
    )  # fmt: skip


def _renumber(owners: NDArray[Any], target: int) -> NDArray[np.int16]:
    """Instances of one cube: 1 the target, 2… its neighbours in the order of their numbers."""
    present = np.bincount(owners.ravel(), minlength=target + 1) > 0
    present[[0, target]] = False
    number_of_owner = (np.cumsum(present) + 1).astype(np.int16)
    number_of_owner[[0, target]] = 0, 1
    renumbered: NDArray[np.int16] = number_of_owner[owners]
    return renumbered


def _start_manifest(
    specimen: Specimen, structures: Sequence[Structure], folder: Path, commit: str
) -> Manifest:
    """Manifest of the folder: the one that is there, if it is of this simulation, or a new one."""
    recipe = specimen.recipe
    manifest = Manifest(
        kind="simulated",
        recipe=recipe.model_dump(mode="json"),
        recipe_digest=specimen.recipe_digest,
        sources={structure.name: structure.digest for structure in structures},
        commit=commit,
        classes=specimen.classes,
        box=recipe.box,
        voxel_size=recipe.voxel_size,
        ctf_correction=recipe.ctf_correction,
        tilt_range=recipe.tilts.range,
        snr_stage=recipe.snr_stage,
        snr=recipe.snr,
        noise_spectrum=recipe.microscope.noise_spectrum,
        occupancy=recipe.occupancy,
        jitter=recipe.jitter,
        has_voxel_labels=True,
        planned_shards={split: recipe.fields.get(split, 0) for split in SPLITS},
        shards=dict.fromkeys(SPLITS, ()),
    )
    path = folder / "manifest.json"
    if path.is_file():
        earlier = Manifest.from_json(path.read_text(encoding="utf-8"), source=str(path))
        if earlier.recipe_digest == manifest.recipe_digest:
            return earlier
        msg = f"{folder} holds another dataset: give another folder, or remove it first"
        raise FileExistsError(msg)
    if folder.is_dir() and any(folder.iterdir()):
        msg = f"{folder} is not empty and holds no dataset: give another folder"
        raise FileExistsError(msg)
    folder.mkdir(parents=True, exist_ok=True)
    manifest.write(folder)
    return manifest


def _pack(specimen: Specimen, generator: np.random.Generator) -> Scene:
    recipe = specimen.recipe
    return pack_scene(
        specimen.beads,
        shape=recipe.field_shape,
        voxel_size=recipe.voxel_size,
        occupancy=recipe.occupancy,
        generator=generator,
    )


def _render(specimen: Specimen, scene: Scene) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    recipe = specimen.recipe
    return render_field(
        specimen.beads,
        scene.class_ids,
        scene.positions_zyx,
        scene.angles,
        shape=recipe.field_shape,
        voxel_size=recipe.voxel_size,
        sigma=recipe.blur,
        thresholds=specimen.thresholds,
    )


def _seed(specimen: Specimen, purpose: str, index: int) -> int:
    """Seed of one piece of work, from the recipe's digest: no two pieces share a stream."""
    text = f"{specimen.recipe_digest}/{purpose}/{index}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def _shard_name(split: str, index: int) -> str:
    return f"{split}/{index:05d}"
