"""Simulated fields: structures made ready for a recipe, packed, rendered, imaged and measured.

Packing and rendering run on the CPU (numba), all that follows on the device of the specimen: a
field's density is copied there once, its tomogram stays there. On another device than the CPU the
noise is another one; the bytes of a recipe are those that the CPU makes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cectflow.execution import single_thread
from cectflow.manifest import JUNK_CLASS, FieldRecord
from cectflow.simulation.beads import Beads, coarse_grain, label_threshold, render_field
from cectflow.simulation.distractors import render_distractors
from cectflow.simulation.half_spectrum import power_spectrum, volume_of
from cectflow.simulation.imaging import image_spectrum, noise_scale
from cectflow.simulation.microscope import OpticsDraw, draw_optics
from cectflow.simulation.optics import Optics, optics_of
from cectflow.simulation.recipe import SimulationRecipe
from cectflow.simulation.scene import Scene, pack_scene
from cectflow.simulation.statistics import measure_statistics
from cectflow.simulation.structure import Structure

__all__ = [
    "DrawnField",
    "RenderedField",
    "SimulatedField",
    "Specimen",
    "draw_field",
    "draw_field_optics",
    "field_optics",
    "image_drawn",
    "image_rendered",
    "leave_out",
    "prepare_specimen",
    "render_drawn",
    "render_foreign",
    "render_particles",
    "seed_of",
    "simulate_field",
]

REFERENCE_VOXELS = 2**22
"""Voxels of the fields over which the expected power spectrum is averaged, 2 to 32 fields: the
power of a field of 32³ varies by 4 %, of larger ones by less."""


@dataclass(frozen=True, eq=False)
class Specimen:
    """Structures made ready for a recipe: beads, label thresholds, expected power.

    Attributes
    ----------
    recipe_digest
        sha256 over the recipe and the structures' content, wherever their files are: every seed
        derives from it.
    abundances
        Of each structure.
    expected_power
        Mean power spectrum of the particles of the recipe's scenes, from reference fields of their
        own. Membranes and gold are left out: the SNR is that of the particles, and one gold bead
        would outweigh them all. Its device is the specimen's: :meth:`to`.
    left_out
        Structures of which no particle is placed: see :func:`leave_out`.
    """

    recipe: SimulationRecipe
    recipe_digest: str
    beads: tuple[Beads, ...]
    thresholds: NDArray[np.float64]
    abundances: NDArray[np.float64]
    expected_power: Tensor
    left_out: tuple[str, ...] = ()

    @property
    def device(self) -> torch.device:
        """Where fields are imaged and cut."""
        return self.expected_power.device

    def to(self, device: str) -> Specimen:
        """The same specimen, whose fields are imaged, measured and cut on another device."""
        return replace(self, expected_power=self.expected_power.to(device))

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; ``class_id`` counts from 1."""
        names = tuple(grains.name for grains in self.beads)
        return names if self.recipe.junk is None else (*names, JUNK_CLASS)


@dataclass(frozen=True, eq=False)
class SimulatedField:
    """One imaged field with its ground truth; arrays are (z, y, x) over the periodic field."""

    scene: Scene
    tomogram: Tensor
    """float32, on the specimen's device."""
    owners: NDArray[np.int32]
    """0 background, else 1 + index of the particle in the scene."""
    density: NDArray[np.float32]
    distractor_kinds: NDArray[np.int8]
    """Kind of distractor of each voxel, 0 none; see :func:`render_distractors`."""
    record: FieldRecord
    draw: OpticsDraw


def prepare_specimen(recipe: SimulationRecipe, structures: Sequence[Structure]) -> Specimen:
    """Specimen of a recipe.

    Raises
    ------
    ValueError
        If a structure does not fit the box with its jitter, the request cannot be packed, or
        abundances name no structure.
    """
    abundances = _abundances_of(recipe, structures)
    for structure in structures:
        if structure.extent > recipe.room:
            needed = int(np.ceil((structure.extent + 2.0 * recipe.jitter) / recipe.voxel_size))
            msg = (
                f"{structure.name} is {structure.extent:.0f} Å across; a box of {recipe.box} "
                f"voxels of {recipe.voxel_size:g} Å less the jitter has room for "
                f"{recipe.room:.0f} Å: use a box of {needed}, a larger voxel, or leave it out of "
                "`include`"
            )
            raise ValueError(msg)
    digest = _digest_of(recipe, structures)
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
    specimen = Specimen(recipe, digest, beads, thresholds, abundances, nothing)
    with single_thread():
        spectra = []
        num_fields = REFERENCE_VOXELS // int(np.prod(recipe.field_shape))
        for index in range(min(max(num_fields, 2), 32)):
            generator = np.random.default_rng(seed_of(specimen, "reference", index))
            density = render_particles(specimen, _pack(specimen, generator))[0]
            spectra.append(power_spectrum(torch.from_numpy(density)))
        expected_power = torch.stack(spectra).mean(dim=0)
    return Specimen(recipe, digest, beads, thresholds, abundances, expected_power)


def _digest_of(recipe: SimulationRecipe, structures: Sequence[Structure]) -> str:
    """Digest of all that fields depend on: names and content stand for where structures are."""
    elsewhere = recipe.model_copy(update={"structures": (), "include": ()})
    content = [elsewhere.digest(), *(f"{one.name} {one.digest}" for one in structures)]
    return hashlib.sha256("\n".join(content).encode()).hexdigest()


def leave_out(specimen: Specimen, names: Sequence[str]) -> Specimen:
    """The specimen without these structures: they are placed in no field, not as neighbours either.

    All else stays as it was: the numbers of the classes, the occupancy, which the others now fill,
    and the noise amplitude, so that a particle that is still there stands out as before. (A
    recipe without these structures would set the noise by the signal of the others alone.) The
    seeds are new ones.

    Raises
    ------
    ValueError
        If a name is no structure of the specimen, or no structure would be left.
    """
    if not names:
        return specimen
    known = [grains.name for grains in specimen.beads]
    unknown = [name for name in names if name not in known]
    if unknown:
        msg = f"cannot leave out {', '.join(unknown)}: the structures are {', '.join(known)}"
        raise ValueError(msg)
    left_out = tuple(name for name in known if name in {*names, *specimen.left_out})
    abundances = specimen.abundances * [name not in left_out for name in known]
    if not abundances.any():
        msg = f"without {', '.join(left_out)} no structure is left: leave out fewer"
        raise ValueError(msg)
    text = f"{specimen.recipe_digest}/without/{','.join(left_out)}"
    digest = hashlib.sha256(text.encode()).hexdigest()
    return replace(specimen, recipe_digest=digest, abundances=abundances, left_out=left_out)


def simulate_field(specimen: Specimen, split: str, index: int) -> SimulatedField:
    """Field number ``index`` of a split; depends on nothing but the recipe and these two."""
    rendered = render_drawn(specimen, draw_field(specimen, split, index))
    drawn, density = rendered.drawn, rendered.density
    tomogram, record = image_rendered(specimen, rendered)
    if rendered.foreign is not None:
        density += rendered.foreign
    return SimulatedField(
        drawn.scene, tomogram, rendered.owners, density, rendered.kinds, record, drawn.optics
    )


@dataclass(frozen=True, eq=False)
class DrawnField:
    """All that chance decides of a field, before any of its arrays is made.

    Attributes
    ----------
    name
        ``split-NNNNN``.
    snr
        Requested; None: noise-free.
    noise_seed
        Of the noise.
    """

    name: str
    scene: Scene
    snr: float | None
    optics: OpticsDraw
    noise_seed: int


def draw_field(specimen: Specimen, split: str, index: int) -> DrawnField:
    """What chance decides of field number ``index`` of a split."""
    generator = np.random.default_rng(seed_of(specimen, split, index))
    scene, snr = _pack(specimen, generator), None
    if specimen.recipe.snr is not None:
        snr = float(np.exp(generator.uniform(*np.log(specimen.recipe.snr))))
    optics = draw_field_optics(specimen, split, index)
    seed = int(generator.integers(2**63 - 1))
    return DrawnField(f"{split}-{index:05d}", scene, snr, optics, seed)


@dataclass(frozen=True, eq=False)
class RenderedField:
    """A drawn field's densities and its ground truth, all that the CPU makes of it.

    Attributes
    ----------
    density, foreign
        Of the particles; of the distractors, None without any.
    owners
        0 background, else 1 + index of the particle in the scene.
    kinds
        Kind of distractor of each voxel, 0 none.
    """

    drawn: DrawnField
    density: NDArray[np.float32]
    foreign: NDArray[np.float32] | None
    owners: NDArray[np.int32]
    kinds: NDArray[np.int8]


def render_drawn(specimen: Specimen, drawn: DrawnField) -> RenderedField:
    """Densities and ground truth of a drawn field."""
    density, owners = render_particles(specimen, drawn.scene)
    if not drawn.scene.distractors:
        nowhere = np.zeros(specimen.recipe.field_shape, np.int8)
        return RenderedField(drawn, density, None, owners, nowhere)
    foreign, kinds = render_foreign(specimen, drawn.scene)
    return RenderedField(drawn, density, foreign, owners, kinds)


def image_rendered(specimen: Specimen, rendered: RenderedField) -> tuple[Tensor, FieldRecord]:
    """Tomogram of a rendered field, on the specimen's device, and what was measured of it."""
    spectra = [
        None if density is None else torch.fft.rfftn(torch.from_numpy(density).to(specimen.device))
        for density in (rendered.density, rendered.foreign)
    ]
    assert spectra[0] is not None
    return image_drawn(specimen, rendered.drawn, spectra[0], spectra[1])


def image_drawn(
    specimen: Specimen, drawn: DrawnField, spectrum: Tensor, foreign: Tensor | None
) -> tuple[Tensor, FieldRecord]:
    """Tomogram of a drawn field, and what was drawn and measured of it.

    Parameters
    ----------
    specimen, drawn
        Of the field.
    spectrum, foreign
        ``rfftn`` of the density of its particles and of its distractors, if it has any, on the
        specimen's device; both are overwritten.
    """
    recipe, draw, shape = specimen.recipe, drawn.optics, specimen.recipe.field_shape
    optics = field_optics(specimen, draw)
    factor = noise_scale(specimen.expected_power, optics, drawn.snr, width=shape[2])
    generator = torch.Generator(specimen.device).manual_seed(drawn.noise_seed)
    measured = image_spectrum(spectrum, shape, optics, factor, generator, recipe.voxel_size)
    if foreign is not None:  # after the SNR was measured, which is that of the particles
        spectrum += foreign.mul_(optics.signal)
    del optics  # of a whole tomogram they take as much as it does
    tomogram, numbers = volume_of(spectrum, shape), draw.numbers()
    values = measure_statistics(tomogram)
    record = FieldRecord(
        field=drawn.name,
        mean=values.mean,
        std=values.std,
        median=values.median,
        robust_std=values.robust_std,
        defocus_um=numbers["defocus_um"],
        drawn=numbers,
        requested_snr=drawn.snr,
        snr=None if measured is None else measured.stage,
        snr_reconstruction=None if measured is None else measured.reconstruction,
        snr_60=None if measured is None else measured.low_passed,
        noise_std=None if measured is None else measured.noise_std,
        occupancy=drawn.scene.occupancy,
        num_particles=len(drawn.scene),
    )
    return tomogram, record


def render_particles(
    specimen: Specimen, scene: Scene
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Density of a scene's particles and the owner of each voxel: :func:`render_field`."""
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


def render_foreign(
    specimen: Specimen, scene: Scene
) -> tuple[NDArray[np.float32], NDArray[np.int8]]:
    """Density of a scene's distractors and the kind in each voxel: :func:`render_distractors`."""
    recipe = specimen.recipe
    return render_distractors(
        scene.distractors,
        shape=recipe.field_shape,
        voxel_size=recipe.voxel_size,
        sigma=recipe.blur,
    )


def field_optics(specimen: Specimen, draw: OpticsDraw) -> Optics:
    """Filters of an optics draw on the recipe's field, on the specimen's device."""
    recipe = specimen.recipe
    return optics_of(
        recipe.field_shape,
        recipe.voxel_size,
        draw.microscope,
        draw.tilts,
        draw.defoci_um,
        recipe.ctf_correction,
        shifts=draw.shifts,
        snr_stage=recipe.snr_stage,
        device=str(specimen.device),
    )


def draw_field_optics(specimen: Specimen, split: str, index: int) -> OpticsDraw:
    """Optics of field number ``index`` of a split; one of ``num_optics`` where these are shared."""
    recipe = specimen.recipe
    seed = seed_of(specimen, f"{split}-optics", index)
    if recipe.num_optics is not None:
        seed = seed_of(specimen, "optics", seed % recipe.num_optics)
    return draw_optics(recipe.microscope, recipe.tilts, np.random.default_rng(seed))


def seed_of(specimen: Specimen, purpose: str, index: int) -> int:
    """Seed of one piece of work, from the recipe's digest: no two pieces share a stream."""
    text = f"{specimen.recipe_digest}/{purpose}/{index}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


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
