"""Phantoms: invented, the same each time, and no two alike."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from jaxtyping import Float
from numpy.typing import NDArray

from cectflow.simulation.phantoms import Phantom, build_phantom, list_phantoms
from cectflow.simulation.structure import Structure, find_structures, load_structure

NAMES = list_phantoms()


@pytest.fixture(scope="module")
def phantoms() -> dict[str, Phantom]:
    return {name: build_phantom(name) for name in NAMES}


@pytest.fixture(scope="module")
def structures() -> dict[str, Structure]:
    return {source.name: load_structure(source) for source in find_structures("builtin")}


def fingerprint(structure: Structure) -> Float[NDArray[np.float64], "13"]:
    """What no rotation changes: root moments along the principal axes, and radial quantiles; A."""
    positions = structure.positions_zyx.astype(float)
    moments = np.linalg.eigvalsh(positions.T @ positions / len(positions))
    radii = np.quantile(np.linalg.norm(positions, axis=1), np.linspace(0.05, 0.95, 10))
    joined: Float[NDArray[np.float64], "13"] = np.concatenate([np.sqrt(moments), radii])
    return joined


def test_there_are_enough_of_them_from_small_to_large(structures: dict[str, Structure]) -> None:
    assert len(structures) >= 12
    assert all(100 <= s.mass_kda <= 4000 for s in structures.values())
    assert max(s.mass_kda for s in structures.values()) > 2000
    small = [s for s in structures.values() if s.extent < 180 and 150 <= s.mass_kda <= 800]
    assert len(small) >= 6


def test_no_two_are_alike_at_low_resolution(structures: dict[str, Structure]) -> None:
    prints = {name: fingerprint(structure) for name, structure in structures.items()}
    distances = {
        (one, other): float(np.abs(prints[one] - prints[other]).max())
        for one, other in itertools.combinations(prints, 2)
    }
    closest = min(distances, key=lambda pair: distances[pair])
    assert distances[closest] > 5, f"{closest} differ by {distances[closest]:.1f} A only"


@pytest.mark.parametrize("name", ["ring", "spring", "tripod"])
def test_a_phantom_is_the_same_at_every_call(name: str) -> None:
    one, other = build_phantom(name), build_phantom(name)
    np.testing.assert_array_equal(one.positions_zyx, other.positions_zyx)
    assert one.digest == other.digest


def test_digests_differ(phantoms: dict[str, Phantom]) -> None:
    assert len({phantom.digest for phantom in phantoms.values()}) == len(NAMES)
    assert all(len(phantom.digest) == 64 for phantom in phantoms.values())


def test_points_fill_the_volume_of_their_body(phantoms: dict[str, Phantom]) -> None:
    ring = phantoms["ring"]
    torus = 2 * np.pi**2 * 54 * 19**2
    filled = len(ring.positions_zyx) * ring.point_volume
    assert torus < filled < 1.15 * torus  # and its knob
    nearest = np.linalg.norm(ring.positions_zyx[1:] - ring.positions_zyx[:-1], axis=1).min()
    assert 0.5 < nearest < 4


def test_the_spread_is_that_of_a_points_cell(phantoms: dict[str, Phantom]) -> None:
    assert phantoms["rod"].spread == pytest.approx(3.5 / np.sqrt(12))


def test_an_unknown_phantom_shows_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match=r"unknown phantom 'blob': expected one of barrel, boulder"
    ):
        build_phantom("blob")
