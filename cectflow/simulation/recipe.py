"""SimulationRecipe, and the shards it stands for: the same recipe gives the same bytes anywhere."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, no_type_check

import numba
import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from cectflow.config import Config
from cectflow.dataset import (
    JUNK_CLASS,
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
from cectflow.simulation.distractors import (
    Distractors,
    Junk,
    choose_junk,
    render_distractors,
)
from cectflow.simulation.imaging import (
    SnrStage,
    image_and_measure,
    image_field,
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
    "simulate_subtomograms",
]

MIN_BLUR = 0.68
"""Voxels: below it a Gaussian is undersampled (design.md, section 4)."""
REFERENCE_VOXELS = 2**22
"""Voxels of the fields over which the expected power spectrum is averaged, 2 to 32 fields: the
power of a field of 32³ varies by 4 %, of larger ones by less."""
LEAST_INDEPENDENT_FIELD = 1.6
"""Edge of an independent field over the box: a shorter one lets the CTF's tails come in again."""
INDEPENDENT_FIELDS_PER_SHARD = 100


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
    independent: bool = False
    """Each subtomogram has a crowded field of its own: its target is placed first, at the centre,
    and its neighbours around it. False: every particle of a field is a target."""
    fields_per_shard: int | None = Field(None, ge=1)
    """None: 1, or 100 where fields are independent."""
    targets_per_field: int | None = Field(None, ge=1)
    """At most this many subtomograms of a field; None: one for each particle."""
    occupancy: float = Field(gt=0, le=0.4)
    """Molecular volume (1.21 Å³/Da) over the volume of the field."""
    abundances: dict[str, float] = Field(default_factory=dict)
    """Class → relative number of particles; 1 where a class is not named."""
    keep_out: float = Field(0.0, ge=0)
    """Å that stay free between particles beyond what keeps them from overlapping."""
    distractors: Distractors = Distractors()
    """Membranes and gold beads; background in labels, and not part of the SNR."""
    junk: Junk | None = None
    """Adds the last class ``junk``; true: with the shares of :class:`Junk`."""
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

    @field_validator("junk", mode="before")
    @classmethod
    def _switch(cls, value: Any) -> Any:
        if isinstance(value, bool):
            return Junk() if value else None
        return value

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
                f"{self.microscope.noise_spectrum_name}: expected none and white, that "
                f"laboratory's recipe has no others; use snr_stage reconstruction or projection"
            )
            raise ValueError(msg)
        if not self.fields or any(count < 1 for count in self.fields.values()):
            msg = f"fields is {self.fields}: expected at least one field in each split named"
            raise ValueError(msg)
        self._check_scene()
        return self

    def _check_scene(self) -> None:
        if any(not 0 <= share < np.inf for share in self.abundances.values()):
            msg = f"abundances is {self.abundances}: expected finite numbers of 0 or more"
            raise ValueError(msg)
        edge = min(self.field_shape)
        if self.distractors.largest > edge * self.voxel_size:
            msg = (
                f"distractors reach {self.distractors.largest:.0f} Å across, the field only "
                f"{edge * self.voxel_size:.0f} Å: make them smaller or enlarge the field"
            )
            raise ValueError(msg)
        if self.independent and edge < LEAST_INDEPENDENT_FIELD * self.box - 1e-9:
            msg = (
                f"field_shape is {self.field_shape}: an independent field of a box of {self.box} "
                f"needs edges of at least {LEAST_INDEPENDENT_FIELD:g} times the box, "
                f"{int(np.ceil(LEAST_INDEPENDENT_FIELD * self.box - 1e-9))} voxels"
            )
            raise ValueError(msg)
        if self.independent and self.targets_per_field is not None:
            msg = "targets_per_field is given: an independent field has one target, leave it out"
            raise ValueError(msg)
        if self.junk is None:
            return
        present = self.distractors
        for kind, number in (
            ("membrane", present.vesicles + present.sheets),
            ("gold", present.gold),
        ):
            if getattr(self.junk, kind) and not number:
                msg = (
                    f"junk.{kind} is {getattr(self.junk, kind):g}, but distractors has none: "
                    f"give their number in distractors, or set junk.{kind} to 0"
                )
                raise ValueError(msg)

    def shards_of(self, split: SplitName) -> int:
        """Number of shards of a split."""
        return -(-self.fields.get(split, 0) // self._fields_per_shard)

    def fields_of(self, split: SplitName, shard: int) -> range:
        """Numbers of the fields that a shard of a split holds."""
        first = shard * self._fields_per_shard
        return range(first, min(first + self._fields_per_shard, self.fields.get(split, 0)))

    @property
    def _fields_per_shard(self) -> int:
        if self.fields_per_shard is not None:
            return self.fields_per_shard
        return INDEPENDENT_FIELDS_PER_SHARD if self.independent else 1


@dataclass(frozen=True, eq=False)
class Specimen:
    """Structures made ready for a recipe: beads, label thresholds, expected power.

    Attributes
    ----------
    recipe_digest
        sha256 over the recipe and the structures' content: every seed derives from it.
    abundances
        Of each structure.
    expected_power
        Mean power spectrum of the particles of the recipe's scenes, from reference fields of their
        own. Membranes and gold are left out: the SNR is that of the particles, and one gold bead
        would outweigh them all.
    """

    recipe: SimulationRecipe
    recipe_digest: str
    beads: tuple[Beads, ...]
    thresholds: NDArray[np.float64]
    abundances: NDArray[np.float64]
    expected_power: Tensor

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; ``class_id`` counts from 1."""
        names = tuple(grains.name for grains in self.beads)
        return names if self.recipe.junk is None else (*names, JUNK_CLASS)


@dataclass(frozen=True, eq=False)
class SimulatedField:
    """One imaged field with its ground truth; arrays are (z, y, x) over the periodic field."""

    scene: Scene
    tomogram: NDArray[np.float32]
    owners: NDArray[np.int32]
    """0 background, else 1 + index of the particle in the scene."""
    density: NDArray[np.float32]
    distractor_kinds: NDArray[np.int8]
    """Kind of distractor of each voxel, 0 none; see :func:`render_distractors`."""
    record: FieldRecord


def prepare_specimen(recipe: SimulationRecipe, structures: Sequence[Structure]) -> Specimen:
    """Specimen of a recipe.

    Raises
    ------
    ValueError
        If a structure does not fit the box with its jitter, the request cannot be packed, or
        abundances name no structure.
    """
    abundances = _abundances_of(recipe, structures)
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
    specimen = Specimen(recipe, digest, beads, thresholds, abundances, nothing)
    with single_thread():
        spectra = []
        num_fields = REFERENCE_VOXELS // int(np.prod(recipe.field_shape))
        for index in range(min(max(num_fields, 2), 32)):
            generator = np.random.default_rng(_seed(specimen, "reference", index))
            density = _render(specimen, _pack(specimen, generator))[0]
            spectra.append(power_spectrum(torch.from_numpy(density)))
        expected_power = torch.stack(spectra).mean(dim=0)
    return Specimen(recipe, digest, beads, thresholds, abundances, expected_power)


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
    foreign, kinds = render_distractors(
        scene.distractors,
        shape=recipe.field_shape,
        voxel_size=recipe.voxel_size,
        sigma=recipe.blur,
    )
    factor = noise_scale(specimen.expected_power, optics, snr, width=recipe.field_shape[2])
    noise_generator = torch.Generator().manual_seed(int(generator.integers(2**63 - 1)))
    imaged, measured = image_and_measure(
        torch.from_numpy(density), optics, factor, noise_generator, recipe.voxel_size
    )
    if scene.distractors:
        foreign_signal, _ = image_field(torch.from_numpy(foreign), optics, 0.0, noise_generator)
        imaged, density = imaged + foreign_signal, density + foreign
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
        noise_std=None if measured is None else measured.noise_std,
        occupancy=scene.occupancy,
        num_particles=len(scene),
    )
    return SimulatedField(scene, tomogram, owners, density, kinds, record)


def draw_field_optics(specimen: Specimen, split: str, index: int) -> OpticsDraw:
    """Optics of field number ``index`` of a split; one of ``num_optics`` where these are shared."""
    recipe = specimen.recipe
    seed = _seed(specimen, f"{split}-optics", index)
    if recipe.num_optics is not None:
        seed = _seed(specimen, "optics", seed % recipe.num_optics)
    return draw_optics(recipe.microscope, recipe.tilts, np.random.default_rng(seed))


def simulate_subtomograms(
    specimen: Specimen, split: str, index: int
) -> tuple[Subtomograms, FieldRecord]:
    """Subtomograms of field number ``index`` of a split, and what was measured of the field."""
    field = simulate_field(specimen, split, index)
    seed = _seed(specimen, f"{split}-cut", index)
    return _cut_targets(specimen, field, seed), field.record


def simulate_dataset(
    recipe: SimulationRecipe,
    structures: Sequence[Structure],
    folder: Path,
    *,
    workers: int = 1,
    commit: str = "unknown",
) -> Dataset:
    """Dataset folder of a recipe; shards that are already there are kept.

    A shard holds whole fields. The bytes do not depend on ``workers``.

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
        for index in range(recipe.shards_of(split))
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
    recipe, parts, records = job.specimen.recipe, [], []
    with single_thread():
        for index in recipe.fields_of(job.split, job.index):
            part, record_of_field = simulate_subtomograms(job.specimen, job.split, index)
            parts.append(part)
            records.append(record_of_field)
    name = _shard_name(job.split, job.index)
    content = _concatenate(parts)
    record = write_shard(job.folder, name, content, tuple(records), recipe.voxel_size)
    return job.split, record


def _concatenate(parts: Sequence[Subtomograms]) -> Subtomograms:
    if len(parts) == 1:
        return parts[0]
    labels = [part.voxel_labels for part in parts if part.voxel_labels is not None]
    instances = [part.instances for part in parts if part.instances is not None]
    return Subtomograms(
        np.concatenate([part.cubes for part in parts]),
        np.concatenate(labels),
        np.concatenate(instances),
        pd.concat([part.rows for part in parts], ignore_index=True),
    )


def _cut_targets(specimen: Specimen, field: SimulatedField, seed: int) -> Subtomograms:
    """Subtomograms about the field's particles, with labels, instances and one row each.

    Those of the class junk come after them. They have no target: no voxel of theirs is of
    instance 1 or of the class, and distractors are background in all cubes alike.
    """
    recipe, scene = specimen.recipe, field.scene
    generator = np.random.default_rng(seed)
    # A particle that its neighbours' densities hide has no voxel to segment: no target.
    whole = np.zeros((1, 3), np.int64)
    (visible,) = _find_owners(field.owners, whole, field.owners.shape, len(scene) + 2)
    targets = generator.permutation(np.flatnonzero(visible[1:]))[: recipe.targets_per_field]
    targets.sort()
    if recipe.independent:
        targets = targets[targets == 0]
    junk = _choose_junk_of(specimen, field, len(targets), generator)
    if recipe.independent and len(junk):
        targets = targets[:0]
    offsets = generator.uniform(-1.0, 1.0, (len(targets), 3)) * recipe.jitter / recipe.voxel_size
    centres = np.round(np.concatenate([scene.positions_zyx[targets] + offsets, junk]))
    class_ids = np.concatenate(
        [scene.class_ids[targets], np.full(len(junk), len(specimen.classes), np.int64)]
    )
    positions = np.concatenate([scene.positions_zyx[targets], junk])
    angles = np.concatenate([scene.angles[targets], np.zeros((len(junk), 3))])
    # One more than the last particle stands for junk, which has no voxel.
    owners = np.concatenate([targets + 1, np.full(len(junk), len(scene) + 1)])
    corners = centres.astype(np.int64) - recipe.box // 2
    box = (recipe.box, recipe.box, recipe.box)
    present = _find_owners(field.owners, corners, box, len(scene) + 2)
    # Junk has no target that could be missing.
    kept = present[np.arange(len(owners)), owners] | (owners > len(scene))
    instances = np.empty((int(kept.sum()), *box), np.int16)
    voxel_labels = np.empty(instances.shape, np.int8)
    _write_labels(
        field.owners,
        corners[kept],
        np.concatenate([[0], scene.class_ids, [0]]).astype(np.int8),
        _number_instances(present[kept], owners[kept]),
        voxel_labels,
        instances,
    )
    halves = torch.from_numpy(field.tomogram).half().numpy()
    cubes = cut(halves, centres[kept], recipe.box, periodic=True)
    names = [specimen.classes[class_id - 1] for class_id in class_ids[kept]]
    z, y, x = centres[kept].astype(np.int64).T
    rows = make_particle_rows(
        positions[kept],
        angles=angles[kept],
        tomogram=field.record.field,
        rlnClassNumber=class_ids[kept],
        cectflowClassName=pd.array(names, dtype="str"),
        cectflowCentreX=x,
        cectflowCentreY=y,
        cectflowCentreZ=z,
    )
    return Subtomograms(cubes, voxel_labels, instances, rows)


def _choose_junk_of(
    specimen: Specimen, field: SimulatedField, num_targets: int, generator: np.random.Generator
) -> NDArray[np.float64]:
    """Centres of the field's junk in voxels; of an independent field one or none."""
    recipe = specimen.recipe
    nowhere = np.zeros((0, 3))
    if recipe.junk is None:
        return nowhere
    shares = recipe.junk.shares
    if recipe.independent:
        # One cube of a field: junk as often as the shares say, and then of one kind.
        weights = np.array([1.0, *shares.values()])
        drawn = generator.choice(len(weights), p=weights / weights.sum())
        numbers = {kind: int(drawn == place) for place, kind in enumerate(shares, start=1)}
    else:
        numbers = {
            kind: int(share * num_targets + generator.random()) for kind, share in shares.items()
        }
    found = [
        choose_junk(
            kind,
            number,
            owners=field.owners,
            kinds=field.distractor_kinds,
            distractors=field.scene.distractors,
            voxel_size=recipe.voxel_size,
            box=recipe.box,
            generator=generator,
        )
        for kind, number in numbers.items()
        if number
    ]
    return np.concatenate([nowhere, *found])


def _number_instances(present: NDArray[np.bool_], targets: NDArray[np.int64]) -> NDArray[np.int16]:
    """Instance of each owner in each cube: 1 the target, 2… its neighbours in their order."""
    cubes = np.arange(len(targets))
    neighbours = present.copy()
    neighbours[:, 0] = neighbours[cubes, targets] = False
    numbers = (np.cumsum(neighbours, axis=1) + 1).astype(np.int16)
    numbers[:, 0], numbers[cubes, targets] = 0, 1
    return numbers


@numba.njit(cache=True)
@no_type_check  # pytest's jaxtyping hook would wrap what numba has to compile
def _find_owners(
    owners: NDArray[np.int32],
    corners: NDArray[np.int64],
    box: tuple[int, int, int],
    num_owners: int,
) -> NDArray[np.bool_]:
    """Which owners have voxels in each box of a periodic field."""
    depth, height, width = owners.shape
    present = np.zeros((corners.shape[0], num_owners), np.bool_)
    for cube in range(corners.shape[0]):
        for i in range(box[0]):
            z = (corners[cube, 0] + i) % depth
            for j in range(box[1]):
                y = (corners[cube, 1] + j) % height
                x, first = corners[cube, 2] % width, 0
                while first < box[2]:  # stretches between the faces of the field
                    stop = min(box[2], first + width - x)
                    last = -1
                    for owner in owners[z, y, x : x + stop - first]:
                        if owner != last:  # voxels of one owner lie together
                            present[cube, owner] = True
                            last = owner
                    first, x = stop, 0
    return present


@numba.njit(cache=True)
@no_type_check  # pytest's jaxtyping hook would wrap what numba has to compile
def _write_labels(
    owners: NDArray[np.int32],
    corners: NDArray[np.int64],
    classes: NDArray[np.int8],
    numbers: NDArray[np.int16],
    voxel_labels: NDArray[np.int8],
    instances: NDArray[np.int16],
) -> None:
    """Class and instance of each voxel of the cubes, from those of each owner in each cube."""
    depth, height, width = owners.shape
    box = instances.shape[1:]
    for cube in range(corners.shape[0]):
        number_of_owner = numbers[cube]
        for i in range(box[0]):
            z = (corners[cube, 0] + i) % depth
            for j in range(box[1]):
                y = (corners[cube, 1] + j) % height
                x, first = corners[cube, 2] % width, 0
                while first < box[2]:
                    stop = min(box[2], first + width - x)
                    row = owners[z, y, x : x + stop - first]
                    labels = voxel_labels[cube, i, j, first:stop]
                    numbered = instances[cube, i, j, first:stop]
                    for k in range(row.size):
                        labels[k] = classes[row[k]]
                        numbered[k] = number_of_owner[row[k]]
                    first, x = stop, 0


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
        noise_spectrum=recipe.microscope.noise_spectrum_name,
        occupancy=recipe.occupancy,
        jitter=recipe.jitter,
        has_voxel_labels=True,
        planned_shards={split: recipe.shards_of(split) for split in SPLITS},
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
        abundances=specimen.abundances,
        keep_out=recipe.keep_out,
        distractors=recipe.distractors,
        # Anywhere within the centre's voxel; the jitter is that of the cut.
        target_offset=generator.uniform(-0.5, 0.5, 3) if recipe.independent else None,
    )


def _abundances_of(
    recipe: SimulationRecipe, structures: Sequence[Structure]
) -> NDArray[np.float64]:
    names = [structure.name for structure in structures]
    unknown = [name for name in recipe.abundances if name not in names]
    if unknown:
        msg = (
            f"abundances names {', '.join(unknown)}: not among the structures, which are "
            f"{', '.join(names)}"
        )
        raise ValueError(msg)
    if recipe.junk is not None and JUNK_CLASS in names:
        msg = f"a structure is called {JUNK_CLASS}, as the class of junk: rename its file"
        raise ValueError(msg)
    abundances = np.array([recipe.abundances.get(name, 1.0) for name in names])
    if not abundances.any():
        msg = f"abundances is 0 for all of {', '.join(names)}: expected one above 0"
        raise ValueError(msg)
    return abundances


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
