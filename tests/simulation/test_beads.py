"""Beads: weight, centre and spread are kept, and labels have the volume asked for."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cectflow.simulation.beads import Beads, coarse_grain, label_threshold, render_field
from cectflow.simulation.beads import rotate_beads as rotate
from cectflow.simulation.structure import Structure, find_structures, load_structure

Phantom = Callable[[str], Structure]

VOXEL_SIZE = 10.0
SIGMA = 6.75
"""Å: the finest blur that 10 Å voxels sample."""
NEVER = 1e9
"""Threshold that no voxel exceeds."""


def render(
    *particles: tuple[Beads, tuple[float, float, float], NDArray[np.float64]],
    shape: tuple[int, int, int] = (32, 32, 32),
    thresholds: tuple[float, ...] | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Density and owners of particles (beads, voxel, angles), each of a class of its own."""
    beads, positions, angles = zip(*particles, strict=True)
    return render_field(
        beads,
        np.arange(1, len(beads) + 1),
        np.array(positions, float),
        np.array(angles, float),
        shape=shape,
        voxel_size=VOXEL_SIZE,
        sigma=SIGMA,
        thresholds=np.array(thresholds or [NEVER] * len(beads)),
    )


def random_angles(number: int, seed: int = 0) -> NDArray[np.float64]:
    return Rotation.random(number, rng=np.random.default_rng(seed)).as_euler("ZYZ", degrees=True)


def centre_of_mass(density: NDArray[np.float32]) -> NDArray[np.float64]:
    grid = np.stack(np.indices(density.shape), axis=-1).reshape(-1, 3)
    return np.average(grid, axis=0, weights=density.ravel().astype(np.float64))


def splat_directly(
    structure: Structure,
    position_zyx: NDArray[np.float64],
    angles: NDArray[np.float64],
    shape: tuple[int, int, int],
) -> NDArray[np.float64]:
    """Sum of untruncated Gaussians, one per point of the structure, at a pose."""
    turn = Rotation.from_euler("ZYZ", angles, degrees=True)
    points = turn.apply(structure.positions_zyx[:, ::-1].astype(float))[:, ::-1] / VOXEL_SIZE
    points = points + position_zyx
    sigma = np.hypot(SIGMA, structure.spread) / VOXEL_SIZE
    density = np.zeros(shape)
    for chosen in np.array_split(np.arange(len(points)), len(points) // 2000 + 1):
        along_z, along_y, along_x = (
            np.exp(-0.5 * ((np.arange(size) - points[chosen, axis, None]) / sigma) ** 2)
            / (sigma * np.sqrt(2 * np.pi))
            for axis, size in enumerate(shape)
        )
        weighted = along_z * structure.weights[chosen, None] / VOXEL_SIZE**3
        plane_x = (weighted[:, :, None] * along_y[:, None, :]).reshape(len(chosen), -1)
        density += (plane_x.T @ along_x).reshape(shape)
    return density


# --- coarse graining ------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", [3.0, 10.0])
@pytest.mark.parametrize("name", ["ring", "rod", "tripod"])
def test_beads_keep_the_weight_and_the_centre(phantom: Phantom, name: str, spacing: float) -> None:
    structure = phantom(name)
    beads = coarse_grain(structure, spacing=spacing)
    assert beads.weights.sum() == pytest.approx(structure.weights.sum(), rel=1e-5)
    centre = np.average(beads.positions_zyx, axis=0, weights=beads.weights)
    assert np.abs(centre).max() < 0.01
    assert beads.molecular_volume == structure.molecular_volume


@pytest.mark.parametrize("spacing", [6.0, 10.0, 14.0])
def test_the_matter_in_a_bead_spreads_less_than_half_its_cube(
    phantom: Phantom, spacing: float
) -> None:
    structure = phantom("barrel")
    inside = coarse_grain(structure, spacing=spacing).variance - structure.spread**2
    assert 0 < inside < spacing**2 / 4
    # Full cubes have spacing² / 12; those at the surface are partly empty.
    assert inside == pytest.approx(spacing**2 / 12, rel=0.25)


def test_a_beads_variance_is_added_to_that_of_the_blur(phantom: Phantom) -> None:
    structure = phantom("shell")
    grid = (np.stack(np.indices((32, 32, 32)), axis=-1) - 16.0) * VOXEL_SIZE
    for spacing in (5.0, 10.0):
        beads = coarse_grain(structure, spacing=spacing)
        density, _ = render((beads, (16, 16, 16), np.zeros(3)))
        measured = np.average((grid**2).sum(axis=-1), weights=density)
        of_points = (structure.positions_zyx.astype(float) ** 2).sum(axis=1).mean()
        # Without the bead's own 8 Å² along each axis this would be 0.7 % less at 10 Å.
        assert measured == pytest.approx(of_points + 3 * (SIGMA**2 + structure.spread**2), rel=2e-3)


def test_the_leading_beads_span_the_shape(phantom: Phantom) -> None:
    beads = coarse_grain(phantom("rod"))
    first, second = beads.positions_zyx[:2]
    length = np.ptp(beads.positions_zyx[:, 0])
    assert np.linalg.norm(first - second) > 0.95 * length


# --- pose -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("angles", "turned_xyz"),
    [
        ((0, 0, 0), (0, 0, 1)),
        ((0, 90, 0), (1, 0, 0)),
        ((90, 90, 0), (0, 1, 0)),
        ((0, 90, 90), (1, 0, 0)),
    ],
)
def test_tilt_then_rot_carry_the_z_axis_of_the_reference(
    phantom: Phantom, angles: tuple[float, ...], turned_xyz: tuple[float, ...]
) -> None:
    up = np.array([[1, 0, 0]], np.float32)
    beads = Beads("up", up, np.ones(1, np.float32), variance=1.0, molecular_volume=1.0)
    turned = rotate(beads, np.array(angles, float))
    np.testing.assert_allclose(turned[0, ::-1], turned_xyz, atol=1e-12)


def test_psi_turns_the_reference_from_x_to_y() -> None:
    along_x = np.array([[0, 0, 1]], np.float32)
    beads = Beads("x", along_x, np.ones(1, np.float32), variance=1.0, molecular_volume=1.0)
    np.testing.assert_allclose(rotate(beads, np.array([0.0, 0, 90])), [[0, 1, 0]], atol=1e-12)


def test_a_turn_is_rigid_and_keeps_the_hand(phantom: Phantom) -> None:
    beads = coarse_grain(phantom("spring"))
    turned = rotate(beads, random_angles(1)[0])
    matrix, *_ = np.linalg.lstsq(beads.positions_zyx.astype(float), turned, rcond=None)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(3), atol=1e-6)
    assert np.linalg.det(matrix) == pytest.approx(1.0)


# --- density --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ring", "rod"])
def test_density_keeps_its_mass_and_follows_the_position(phantom: Phantom, name: str) -> None:
    beads = coarse_grain(phantom(name))
    generator = np.random.default_rng(1)
    for angles in random_angles(5):
        position = tuple(generator.uniform(15, 17, 3))
        density, _ = render((beads, position, angles))
        mass = density.sum(dtype=np.float64) * VOXEL_SIZE**3
        assert mass == pytest.approx(beads.weights.sum(dtype=np.float64), rel=1e-4)
        np.testing.assert_allclose(centre_of_mass(density), position, atol=0.01)


@pytest.mark.parametrize("voxel_size", [2.0, 4.0, 7.0, 10.0])
def test_beads_are_rendered_as_gaussians(phantom: Phantom, voxel_size: float) -> None:
    """Rows of one to four vectors, against untruncated Gaussians at unrounded places."""
    whole = coarse_grain(phantom("rod"))
    beads = dataclasses.replace(
        whole, positions_zyx=whole.positions_zyx[:40] * 0.3, weights=whole.weights[:40]
    )
    sigma = np.sqrt(SIGMA**2 + beads.variance) / voxel_size
    (angles,), size = random_angles(1, seed=7), 2 * int(30 / voxel_size + 5 * sigma)
    position = np.array([size / 2 - 0.3, size / 2, size / 2 + 0.4])
    density, _ = render_field(
        (beads,),
        np.array([1]),
        position[None],
        angles[None],
        shape=(size, size + 2, size + 5),
        voxel_size=voxel_size,
        sigma=SIGMA,
        thresholds=np.array([NEVER]),
    )
    centres = rotate(beads, angles) / voxel_size + position
    rows = [
        np.exp(-0.5 * ((np.arange(length) - centres[:, axis, None]) / sigma) ** 2)
        for axis, length in enumerate(density.shape)
    ]
    exact = np.einsum("b,bz,by,bx->zyx", beads.weights.astype(float), *rows)
    exact /= (voxel_size * sigma * np.sqrt(2 * np.pi)) ** 3
    assert np.sqrt(((density - exact) ** 2).mean() / (exact**2).mean()) < 0.004
    assert np.abs(density - exact).max() < 0.01 * exact.max()


def test_what_leaves_a_periodic_field_comes_in_again(phantom: Phantom) -> None:
    beads, angles = coarse_grain(phantom("tripod")), random_angles(1)[0]
    shape = (24, 28, 32)
    central, _ = render((beads, (12.25, 14.0, 15.5), angles), shape=shape)
    corner, _ = render((beads, (0.25, 27.0, -16.5), angles), shape=shape)
    np.testing.assert_allclose(corner, np.roll(central, (-12, 13, -32), (0, 1, 2)), atol=1e-5)
    assert corner.sum() * VOXEL_SIZE**3 == pytest.approx(beads.weights.sum(), rel=1e-4)


def test_a_particle_wider_than_the_field_keeps_its_mass(phantom: Phantom) -> None:
    beads = coarse_grain(phantom("rod"))
    density, _ = render((beads, (6, 6, 6), np.zeros(3)), shape=(12, 12, 12))
    assert density.sum() * VOXEL_SIZE**3 == pytest.approx(beads.weights.sum(), rel=1e-4)


@pytest.mark.parametrize("name", ["ring", "rod", "tripod"])
def test_ten_angstrom_beads_come_within_four_per_cent_of_all_points(
    phantom: Phantom, name: str
) -> None:
    structure = phantom(name)
    beads, shape = coarse_grain(structure), (32, 32, 32)
    for angles in random_angles(3, seed=2):
        position = np.array([15.7, 16.0, 16.4])
        exact = splat_directly(structure, position, angles, shape)
        density, _ = render((beads, tuple(position), angles))
        assert np.sqrt(((density - exact) ** 2).mean() / (exact**2).mean()) < 0.04


@pytest.fixture(scope="module")
def atoms(shared_data: Path) -> Phantom:
    """Structures of the real data by name, each read once."""
    sources = {s.name: s for s in find_structures(str(shared_data / "structures"))}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 1xnr has no assembly
        read = {name: load_structure(sources[name]) for name in ("1xnr", "1bxn", "1s3x", "4v1w")}
    return read.__getitem__


@pytest.mark.parametrize(("spacing", "limit"), [(10.0, 0.04), (7.5, 0.03)])
@pytest.mark.parametrize("name", ["1xnr", "1bxn", "1s3x", "4v1w"])
def test_beads_of_real_complexes_come_within_four_per_cent_of_their_atoms(
    atoms: Phantom, name: str, spacing: float, limit: float
) -> None:
    """RNA and protein, compact and hollow, large and small; 7.5 Å beads come closer."""
    structure = atoms(name)
    beads, shape = coarse_grain(structure, spacing=spacing), (32, 32, 32)
    position, (angles,) = np.array([15.7, 16.0, 16.4]), random_angles(1, seed=2)
    exact = splat_directly(structure, position, angles, shape)
    density, _ = render((beads, tuple(position), angles))
    assert np.sqrt(((density - exact) ** 2).mean() / (exact**2).mean()) < limit


@pytest.mark.parametrize("name", ["1xnr", "1bxn", "1s3x", "4v1w"])
def test_labels_of_real_complexes_have_the_volume_asked_for(atoms: Phantom, name: str) -> None:
    structure = atoms(name)
    beads, factor = coarse_grain(structure), 1.5
    threshold = label_threshold(beads, voxel_size=VOXEL_SIZE, sigma=SIGMA, volume_factor=factor)
    generator = np.random.default_rng(3)
    counts = [
        (render((beads, tuple(generator.uniform(15, 17, 3)), a), thresholds=(threshold,))[1]).sum()
        for a in random_angles(10, seed=4)
    ]
    volume = np.mean(counts) * VOXEL_SIZE**3
    assert volume == pytest.approx(1210 * structure.mass_kda * factor, rel=0.1)


def test_finer_beads_come_closer(phantom: Phantom) -> None:
    structure, angles, shape = phantom("ring"), random_angles(1)[0], (32, 32, 32)
    exact = splat_directly(structure, np.array([16.0, 16, 16]), angles, shape)
    errors = [
        np.abs(render((coarse_grain(structure, spacing=s), (16, 16, 16), angles))[0] - exact).mean()
        for s in (14.0, 10.0, 6.0, 3.0)
    ]
    assert errors == sorted(errors, reverse=True)


# --- labels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("volume_factor", [1.0, 1.5])
@pytest.mark.parametrize("name", ["rod", "ring", "barrel", "tripod"])
def test_labels_have_the_volume_asked_for(
    phantom: Phantom, name: str, volume_factor: float
) -> None:
    structure = phantom(name)
    beads = coarse_grain(structure)
    threshold = label_threshold(
        beads, voxel_size=VOXEL_SIZE, sigma=SIGMA, volume_factor=volume_factor
    )
    generator, counts = np.random.default_rng(3), []
    for angles in random_angles(10, seed=4):
        position = tuple(generator.uniform(15.5, 16.5, 3))
        _, owners = render((beads, position, angles), thresholds=(threshold,))
        counts.append((owners == 1).sum())
    volume = np.mean(counts) * VOXEL_SIZE**3
    assert volume == pytest.approx(1.21 * 1000 * structure.mass_kda * volume_factor, rel=0.1)


def test_a_contested_voxel_belongs_to_the_denser(phantom: Phantom) -> None:
    first, second = coarse_grain(phantom("barrel")), coarse_grain(phantom("rod"))
    angles = random_angles(2, seed=5)
    particles = ((first, (16, 16, 14), angles[0]), (second, (16, 16, 19), angles[1]))
    alone = np.stack([render(particle)[0] for particle in particles])
    limits = tuple(
        label_threshold(beads, voxel_size=VOXEL_SIZE, sigma=SIGMA, volume_factor=1.5)
        for beads in (first, second)
    )
    claimed = np.where(alone > np.array(limits)[:, None, None, None], alone, 0)
    expected = np.where(claimed.any(axis=0), 1 + claimed.argmax(axis=0), 0)
    assert (claimed > 0).all(axis=0).sum() > 20, "the particles are meant to overlap"
    for order in ((0, 1), (1, 0)):
        _, owners = render(
            *(particles[i] for i in order), thresholds=tuple(limits[i] for i in order)
        )
        renamed = np.array([0, *(i + 1 for i in order)])[owners]
        np.testing.assert_array_equal(renamed, expected)
