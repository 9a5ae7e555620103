"""Surface distances are what geometry says, and say when there is none."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from builders import BOX, make_ball
from scipy.spatial.distance import directed_hausdorff

from cectflow.learning.surface import surface_distances


def distances(predicted: np.ndarray, truth: np.ndarray, voxel_size: float = 10.0) -> list[float]:
    mean, far = surface_distances(predicted[None], truth[None], voxel_size)[0]
    return [float(mean), float(far)]


def slab(first: int, last: int) -> np.ndarray:
    """Layers along z, in a mask that leaves the cube on four sides."""
    mask = np.zeros((BOX,) * 3, bool)
    mask[first:last] = True
    return mask


def test_a_mask_has_no_distance_from_itself() -> None:
    assert distances(make_ball(3.0), make_ball(3.0)) == [0.0, 0.0]


def test_shifted_slabs_are_apart_by_their_shift() -> None:
    # Faces of the cube are no surface: only the layers that move count.
    assert distances(slab(3, 6), slab(5, 8)) == pytest.approx([15.0, 20.0], abs=6.0)
    assert distances(slab(0, 5), slab(0, 7), 12.0) == pytest.approx([24.0, 24.0])


def test_distances_scale_with_the_voxel_and_do_not_ask_which_is_the_truth() -> None:
    small, large = make_ball(2.0), make_ball(4.0)
    assert distances(small, large) == distances(large, small)
    assert distances(small, large, 20.0) == pytest.approx([2 * d for d in distances(small, large)])
    mean, far = distances(small, large)
    assert 15.0 < mean <= far < 30.0


def surface_points(mask: np.ndarray) -> np.ndarray:
    """Voxels that share a face with one outside, one by one."""
    steps = [step for step in product((-1, 0, 1), repeat=3) if np.abs(step).sum() == 1]
    return np.array(
        [point for point in np.argwhere(mask) if not all(mask[tuple(point + s)] for s in steps)]
    )


def test_the_whole_hausdorff_distance_is_that_of_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = make_ball(2.5), make_ball(3.5, (5, 6, 7))
    monkeypatch.setattr("cectflow.learning.surface.PERCENTILE", 100.0)
    points = [surface_points(mask) for mask in (first, second)]
    expected = max(directed_hausdorff(*points)[0], directed_hausdorff(*points[::-1])[0])
    assert distances(first, second)[1] == pytest.approx(10.0 * expected)


def test_a_few_stray_voxels_do_not_make_the_distance() -> None:
    stray = make_ball(4.0)
    stray[0, 0, 0] = True
    assert distances(stray, make_ball(4.0))[1] == 0.0


def test_nothing_agrees_with_nothing_and_is_at_no_distance_from_something() -> None:
    nothing = np.zeros((BOX,) * 3, bool)
    assert distances(nothing, nothing) == [0.0, 0.0]
    assert np.isnan(distances(nothing, make_ball(3.0))).all()
    assert np.isnan(distances(make_ball(3.0), nothing)).all()
