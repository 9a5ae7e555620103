"""Turns keep the missing wedge and the hand, and labels move with their image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from builders import make_cubes
from torch import Tensor

from cectflow.learning.augmentation import augment, turn
from cectflow.turns import HALF_TURNS, allowed_turns

ODD, EVEN = 15, 12
SYMMETRIC, ASYMMETRIC = (-60.0, 60.0), (-40.0, 60.0)


def wedge_mask(n: int, tilt_range: tuple[float, float]) -> np.ndarray:
    """Frequencies that a tilt series about y with the beam along z has measured."""
    kz, _, kx = np.meshgrid(*[np.fft.fftfreq(n)] * 3, indexing="ij")
    low, high = np.tan(np.radians(tilt_range))
    slope = np.divide(kz, kx, out=np.full_like(kz, np.inf), where=kx != 0)
    return ((slope >= low) & (slope <= high)) | ((kx == 0) & (kz == 0))


def wedge_filtered(n: int, tilt_range: tuple[float, float]) -> Tensor:
    noise = np.fft.fftn(np.random.default_rng(0).normal(size=(n, n, n)))
    mask = wedge_mask(n, tilt_range)
    if n % 2 == 0:  # the Nyquist planes have no partner of opposite sign
        for axis in range(3):
            np.moveaxis(mask, axis, 0)[n // 2] = False
    return torch.from_numpy(np.fft.ifftn(noise * mask).real)


def share_in_the_wedge(volume: Tensor, tilt_range: tuple[float, float]) -> float:
    """Fraction of the power at frequencies that were not measured."""
    power = np.abs(np.fft.fftn(volume.numpy())) ** 2
    return float(power[~wedge_mask(len(volume), tilt_range)].sum() / power.sum())


@pytest.mark.parametrize("n", [ODD, EVEN])
@pytest.mark.parametrize("tilt_range", [SYMMETRIC, ASYMMETRIC])
def test_allowed_turns_and_no_others_leave_the_wedge_empty(
    n: int, tilt_range: tuple[float, float]
) -> None:
    volume = wedge_filtered(n, tilt_range)
    assert share_in_the_wedge(volume, tilt_range) < 1e-20
    for axis in HALF_TURNS:
        share = share_in_the_wedge(turn(volume, axis), tilt_range)
        assert (share < 1e-20) == (axis in allowed_turns(tilt_range))


@pytest.mark.parametrize("axes", [(0, 2), (0, 1), (1, 2)])
def test_quarter_turns_about_y_and_x_would_move_the_wedge(axes: tuple[int, int]) -> None:
    turned = torch.rot90(wedge_filtered(ODD, SYMMETRIC), 1, axes)
    assert share_in_the_wedge(turned, SYMMETRIC) > 0.1


def test_a_symmetric_tilt_range_allows_all_half_turns_and_an_asymmetric_one_those_of_y() -> None:
    assert allowed_turns(SYMMETRIC) == ("identity", "x", "y", "z")
    assert allowed_turns(ASYMMETRIC) == ("identity", "y")


@pytest.mark.parametrize("axis", HALF_TURNS)
def test_each_turn_is_its_own_inverse(axis: str) -> None:
    volumes = torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(turn(turn(volumes, axis), axis), volumes)
    assert torch.equal(turn(volumes, axis), volumes) == (axis == "identity")


@pytest.mark.parametrize("axis", HALF_TURNS)
def test_each_turn_is_a_rotation_and_no_mirror(axis: str) -> None:
    reversal = np.ones(3)
    reversal[list(HALF_TURNS[axis])] = -1
    assert np.prod(reversal) == 1  # the determinant


def handedness(volume: Tensor) -> float:
    """Sign of the volume spanned by three arms that are told apart by their marks."""
    origin, *arms = (torch.argwhere(volume == mark)[0].double() for mark in (1, 2, 3, 4))
    return float(torch.linalg.det(torch.stack([arm - origin for arm in arms])).sign())


@pytest.mark.parametrize("axis", HALF_TURNS)
def test_each_turn_keeps_the_hand_that_a_mirror_changes(axis: str) -> None:
    volume = torch.zeros(EVEN, EVEN, EVEN)
    volume[6, 6, 6], volume[9, 6, 6], volume[6, 8, 7], volume[5, 6, 10] = 1, 2, 3, 4
    assert handedness(turn(volume, axis)) == handedness(volume)
    assert handedness(volume.flip(0)) == -handedness(volume)


def test_a_half_turn_about_an_axis_leaves_points_on_it() -> None:
    centre = ODD // 2
    for axis, index in (("z", 0), ("y", 1), ("x", 2)):
        volume = torch.zeros(ODD, ODD, ODD)
        place = [centre] * 3
        place[index] = 2
        volume[tuple(place)] = 1
        assert torch.equal(turn(volume, axis), volume)


def test_labels_move_with_their_image() -> None:
    batch = make_cubes(32)
    assert batch.instances is not None
    marked = type(batch)(
        batch.instances[:, None].float(),
        batch.voxel_labels,
        batch.instances,
        batch.class_ids,
        batch.fields,
    )
    turned = augment(marked, allowed_turns(SYMMETRIC), torch.Generator().manual_seed(0))
    assert turned.instances is not None
    assert turned.voxel_labels is not None
    assert torch.equal(turned.subtomograms[:, 0], turned.instances.float())
    assert torch.equal(turned.voxel_labels > 0, turned.instances > 0)
    assert not torch.equal(turned.subtomograms, marked.subtomograms)
    assert torch.equal(turned.class_ids, batch.class_ids)
    assert torch.equal(turned.fields, batch.fields)


def test_every_allowed_turn_is_drawn_and_nothing_else() -> None:
    batch = make_cubes(64)
    turns = allowed_turns(SYMMETRIC)
    turned = augment(batch, turns, torch.Generator().manual_seed(0)).subtomograms
    drawn = [
        next(axis for axis in turns if torch.equal(turn(before, axis), after))
        for before, after in zip(batch.subtomograms, turned, strict=True)
    ]
    assert set(drawn) == set(turns)


def test_the_identity_alone_changes_nothing() -> None:
    batch = make_cubes(5)
    same = augment(batch, ("identity",), torch.Generator().manual_seed(0))
    assert torch.equal(same.subtomograms, batch.subtomograms)


def test_the_same_generator_turns_the_same_way_and_another_does_not() -> None:
    batch = make_cubes(16)
    first, again, other = (
        augment(batch, allowed_turns(SYMMETRIC), torch.Generator().manual_seed(seed)).subtomograms
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_batch_without_labels_stays_one() -> None:
    batch = make_cubes(3)
    bare = type(batch)(batch.subtomograms, None, None, batch.class_ids, batch.fields)
    turned = augment(bare, ("y",), torch.Generator().manual_seed(0))
    assert turned.voxel_labels is None
    assert turned.instances is None
    assert torch.equal(turned.subtomograms, turn(batch.subtomograms, "y"))
