"""Whole tomograms as if they came from a microscope, with the truth about every voxel.

A tomogram is the middle of a larger periodic field. What is cut away, along each axis, is wider
than the longest structure and the reach of the point spread function together: no particle, and
nothing of its image, is at two opposite faces, and particles are cut by the faces as a volume of
cell is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from scipy.fft import next_fast_len
from torch import Tensor

from cectflow.execution import single_thread
from cectflow.manifest import FieldRecord
from cectflow.simulation.field import (
    Specimen,
    draw_field,
    draw_field_optics,
    image_drawn,
    render_foreign,
    render_particles,
)
from cectflow.simulation.microscope import electron_wavelength
from cectflow.simulation.scene import Scene
from cectflow.simulation.structure import Structure
from cectflow.simulation.tilt_series import (
    TiltSeries,
    back_project,
    projection_noise,
    record_tilt_series,
)

__all__ = ["Tomogram", "check_tomogram_shape", "simulate_tomogram", "surround"]

BLURS_ACROSS = 7.0
"""Width in sigmas of what the blur adds to a structure (beads.GAUSSIAN_REACH on either side)."""


@dataclass(frozen=True, eq=False)
class Tomogram:
    """One tomogram with its truth; arrays are ``(z, y, x)``.

    Attributes
    ----------
    data
        The tomogram, protein dark.
    density
        Potential above ice, V; to be looked at, hence no more than float16.
    classes
        class_id of every voxel, 0 background.
    instances
        Number of the particle that each voxel belongs to, 0 background. ``i + 1`` is row i of the
        particles below; higher numbers reach in from beyond the faces. int16, uint16 or
        int32, the first that holds them.
    class_ids, positions_zyx, angles
        Of the particles whose centre is inside: class, voxels of this tomogram, RELION ZYZ.
    record
        What was drawn and measured of the field that this is the middle of.
    series
        Projections, where they were asked for; ``data`` is then their back-projection.
    """

    data: Float[NDArray[np.float32], "z y x"]
    density: Float[NDArray[np.float16], "z y x"]
    classes: Int[NDArray[np.int8], "z y x"]
    instances: Int[NDArray[Any], "z y x"]
    class_ids: Int[NDArray[np.int64], " particle"]
    positions_zyx: Float[NDArray[np.float64], "particle 3"]
    angles: Float[NDArray[np.float64], "particle 3"]
    record: FieldRecord
    series: TiltSeries | None


def check_tomogram_shape(
    structures: Sequence[Structure], shape: tuple[int, int, int], voxel_size: float
) -> None:
    """Refuse a tomogram that a structure does not fit into.

    Raises
    ------
    ValueError
        With the structure, its size and the voxels needed.
    """
    largest = max(structures, key=lambda structure: structure.extent)
    needed = int(np.ceil(largest.extent / voxel_size))
    if min(shape) < needed:
        msg = (
            f"a tomogram of {shape} voxels of {voxel_size:g} Å (z, y, x) is smaller than "
            f"{largest.name}, {largest.extent:.0f} Å across: expected at least {needed} voxels "
            f"along each axis, or leave it out of `include`"
        )
        raise ValueError(msg)


def surround(specimen: Specimen, shape: tuple[int, int, int]) -> Specimen:
    """The specimen in a field so much larger than a tomogram that its faces are strangers.

    The expected power is carried over from the recipe's own field by its radial average: power
    in a voxel's volume is a property of the mixture of structures, not of the field.

    Parameters
    ----------
    specimen
        As prepared for the recipe.
    shape
        Of the tomogram in voxels.
    """
    recipe = specimen.recipe
    wavelength = electron_wavelength(recipe.microscope.voltage_kv)
    displacement = wavelength * float(np.abs(recipe.microscope.defocus_um).max()) * 1e4 / 2
    longest = max(grains.diameter for grains in specimen.beads) + BLURS_ACROSS * recipe.blur
    gap = longest / recipe.voxel_size + 2 * displacement / recipe.voxel_size**2
    depth, height, width = (next_fast_len(n + int(np.ceil(gap)), real=True) for n in shape)
    field_shape = (depth, height, width)
    growth = float(np.prod(field_shape)) / float(np.prod(recipe.field_shape))
    text = f"{specimen.recipe_digest}/tomogram/{shape}"
    return replace(
        specimen,
        recipe=recipe.model_copy(
            update={
                "field_shape": field_shape,
                "independent": False,
                "distractors": recipe.distractors.in_volume(growth),
            }
        ),
        recipe_digest=hashlib.sha256(text.encode()).hexdigest(),
        expected_power=_carry_over(specimen.expected_power, recipe.field_shape, field_shape),
    )


def simulate_tomogram(
    surrounded: Specimen,
    shape: tuple[int, int, int],
    index: int,
    *,
    tilt_series: bool = False,
) -> Tomogram:
    """Tomogram number ``index``; depends on nothing but the specimen, the shape and these two.

    Parameters
    ----------
    surrounded
        Of :func:`surround` for this shape.
    shape
        Voxels (z, y, x).
    index
        From 0.
    tilt_series
        Record every projection and back-project them, in minutes instead of seconds. The noise
        has the variance that it has without, by which ``record`` was measured.
    """
    whole = surrounded.recipe.field_shape
    first = [(long - short) // 2 for long, short in zip(whole, shape, strict=True)]
    middle = tuple(slice(start, start + part) for start, part in zip(first, shape, strict=True))
    with single_thread():
        drawn = draw_field(surrounded, "tomogram", index)
        scene = drawn.scene
        # A position just below 0 is one just below the period's end; the middle holds neither.
        positions = scene.positions_zyx - np.array(first)
        inside = ((positions >= 0) & (positions <= np.array(shape) - 1)).all(axis=1)
        # What is no longer needed goes at once: an array of the field may take hundreds of MB.
        density, owners = render_particles(surrounded, scene)
        classes, instances = _label(scene, inside, owners[middle])
        del owners
        spectrum, foreign_spectrum = torch.fft.rfftn(torch.from_numpy(density)), None
        if scene.distractors:
            foreign, _ = render_foreign(surrounded, scene)
            foreign_spectrum = torch.fft.rfftn(torch.from_numpy(foreign))
            density += foreign
            del foreign
        shown = density[middle].astype(np.float16)
        kept = density if tilt_series else None
        del density
        tomogram, record = image_drawn(surrounded, drawn, spectrum, foreign_spectrum)
    data, series = tomogram.numpy()[middle].copy(), None
    if kept is not None:
        series = _record(surrounded, kept, record, index)
        data = back_project(series, shape)
    return Tomogram(
        data=data,
        density=shown,
        classes=classes,
        instances=instances,
        class_ids=scene.class_ids[inside],
        positions_zyx=positions[inside],
        angles=scene.angles[inside],
        record=record,
        series=series,
    )


def _label(
    scene: Scene,
    inside: Bool[NDArray[np.bool_], " particle"],
    owners: Int[NDArray[np.int32], "z y x"],
) -> tuple[Int[NDArray[np.int8], "z y x"], Int[NDArray[Any], "z y x"]]:
    """Class of every voxel, and its particle, of which those inside come first."""
    order = np.concatenate([np.nonzero(inside)[0], np.nonzero(~inside)[0]])
    most = len(scene)
    narrow = np.int16 if most < 2**15 else np.uint16 if most < 2**16 else np.int32
    number = np.zeros(most + 1, narrow)
    number[order + 1] = np.arange(1, most + 1)
    class_of_owner = np.concatenate([[0], scene.class_ids]).astype(np.int8)
    return class_of_owner[owners], number[owners]


def _record(
    surrounded: Specimen, density: NDArray[np.float32], record: FieldRecord, index: int
) -> TiltSeries:
    recipe, factor = surrounded.recipe, 0.0
    draw = draw_field_optics(surrounded, "tomogram", index)
    if record.noise_std is not None:
        factor = projection_noise(
            record.noise_std**2, recipe.voxel_size, draw, recipe.ctf_correction
        )
    text = f"{surrounded.recipe_digest}/tilt series/{index}"
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    return record_tilt_series(
        density, recipe.voxel_size, draw, recipe.ctf_correction, factor,
        np.random.default_rng(seed),
    )  # fmt: skip


def _carry_over(
    power: Float[Tensor, "z y kx"], shape: tuple[int, int, int], larger: tuple[int, int, int]
) -> Tensor:
    """Expected power spectrum of another field of the same mixture, from its radial average."""
    num_shells = 2 * max(shape)
    shell = np.round(_radius(shape, range(shape[0])) * num_shells).astype(np.int64).ravel()
    total = np.bincount(shell, power.numpy().astype(np.float64).ravel())
    count = np.bincount(shell)
    # k = 0 is the mean's, of which no variance is made.
    found = np.nonzero(count[1:])[0] + 1
    density = total[found] / count[found] / np.prod(shape, dtype=np.float64)
    num_voxels = float(np.prod(larger, dtype=np.float64))
    carried = np.empty((larger[0], larger[1], larger[2] // 2 + 1), np.float32)
    for z in range(larger[0]):
        radius = _radius(larger, range(z, z + 1))[0]
        carried[z] = np.interp(radius * num_shells, found, density * num_voxels)
    return torch.from_numpy(carried)


def _radius(shape: tuple[int, int, int], slices: range) -> NDArray[np.float64]:
    """Cycles per voxel of some slices of a half spectrum."""
    kz = np.fft.fftfreq(shape[0])[slices.start : slices.stop, None, None]
    ky, kx = np.fft.fftfreq(shape[1])[:, None], np.fft.rfftfreq(shape[2])
    radius: NDArray[np.float64] = np.sqrt(kz**2 + ky**2 + kx**2)
    return radius
