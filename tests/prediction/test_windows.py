"""Windows tile a volume, and keep what one pass over the whole volume gives."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cectflow.networks import create_network, network_info
from cectflow.prediction.windows import Region, blend_windows, plan_windows, run_windows
from cectflow.turns import HALF_TURNS

SHAPE = (13, 180, 30)
NETWORK = "strided_ed_small"
INFO = network_info(NETWORK)
Infer = Callable[[np.ndarray], np.ndarray]


@pytest.fixture(scope="module")
def infer() -> Infer:
    """An untrained network whose probabilities spread from 0 to 1."""
    torch.manual_seed(0)
    network = create_network(NETWORK, num_outputs=3, box=16, centred=False).eval()

    def raw(cubes: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return network(torch.from_numpy(cubes)).numpy()

    cube = np.random.default_rng(1).normal(size=(1, 1, 32, 32, 32)).astype(np.float32)
    usual = raw(cube)
    offset = usual.mean(axis=(0, 2, 3, 4))[:, None, None, None]
    scale = 3.0 / (usual - offset).std()

    def call(cubes: np.ndarray) -> np.ndarray:
        return scale * (raw(cubes) - offset)

    return call


@pytest.fixture(scope="module")
def volume() -> np.ndarray:
    return np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)


def reader(volume: np.ndarray) -> Callable[[Region], np.ndarray]:
    def read(region: Region) -> np.ndarray:
        block = np.zeros([part.stop - part.start for part in region], np.float32)
        part = volume[region]
        block[tuple(slice(0, size) for size in part.shape)] = part
        return block

    return read


def assemble(pieces: object, shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    """The pieces in their places; each voxel must come exactly once."""
    result = np.zeros((3, *shape), np.float32)
    times = np.zeros(shape, int)
    for region, found in pieces:  # type: ignore[attr-defined]
        result[(slice(None), *region)] = found
        times[region] += 1
    assert (times == 1).all()
    return result


def whole_pass(infer: Infer, volume: np.ndarray) -> np.ndarray:
    """Softmax of one call, the volume padded with zeros to the stride and cropped again."""
    padded = [-(-length // INFO.stride) * INFO.stride for length in volume.shape]
    block = reader(volume)(tuple(slice(0, length) for length in padded))  # type: ignore[arg-type]
    logits = torch.from_numpy(infer(block[None, None])[0])
    crop = tuple(slice(0, length) for length in volume.shape)
    return logits.softmax(dim=0).numpy()[(slice(None), *crop)]


@pytest.mark.parametrize(
    ("number", "turns"),
    [(3, ("identity",)), (2, ("identity", "y")), (1, ("identity",))],
)
def test_windows_give_what_one_pass_gives(
    number: int, turns: tuple[str, ...], infer: Infer, volume: np.ndarray
) -> None:
    assert INFO.reach is not None
    stride, halo = INFO.stride, -(-INFO.reach // INFO.stride) * INFO.stride
    edge = -(-(SHAPE[1] + (number - 1) * 2 * halo) // (number * stride)) * stride
    plan = plan_windows(SHAPE, stride=INFO.stride, halo=INFO.reach, edge=edge)
    assert max(plan.window) <= edge
    assert len(plan) == number
    found = assemble(run_windows(infer, reader(volume), plan, turns))
    padded = np.zeros([-(-n // INFO.stride) * INFO.stride for n in SHAPE], np.float32)
    padded[tuple(slice(0, n) for n in SHAPE)] = volume
    expected = np.mean(
        [
            np.flip(whole_pass(infer, np.flip(padded, HALF_TURNS[turn]).copy()), HALF_TURNS[turn])
            for turn in turns
        ],
        axis=0,
    )[(slice(None), *(slice(0, n) for n in SHAPE))]
    assert expected[0].std() > 0.2, "the probabilities would hide a difference"
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_too_small_a_halo_is_seen(infer: Infer, volume: np.ndarray) -> None:
    plan = plan_windows(SHAPE, stride=INFO.stride, halo=4, edge=40)
    found = assemble(run_windows(infer, reader(volume), plan))
    assert np.abs(found - whole_pass(infer, volume)).max() > 0.05


def test_blending_weighs_to_one_and_leaves_a_single_window_as_it_is(
    infer: Infer, volume: np.ndarray, tmp_path: Path
) -> None:
    def pointwise(cubes: np.ndarray) -> np.ndarray:
        return np.concatenate([cubes, -cubes, 0.5 * cubes], axis=1)

    one = plan_windows(SHAPE, stride=INFO.stride, halo=4, edge=184)
    found = assemble(blend_windows(infer, reader(volume), one, tmp_path))
    np.testing.assert_allclose(found, whole_pass(infer, volume), atol=1e-4)
    several = plan_windows(SHAPE, stride=INFO.stride, halo=4, edge=24)
    assert len(several) > 9
    found = assemble(blend_windows(pointwise, reader(volume), several, tmp_path))
    np.testing.assert_allclose(found, whole_pass(pointwise, volume), atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 90)] * 3),
    stride=st.sampled_from([1, 2, 4, 8]),
    halo=st.integers(0, 13),
    voxels=st.sampled_from([40**3, 64**3]),
)
def test_every_plan_tiles_the_volume_with_aligned_windows_and_whole_halos(
    shape: tuple[int, int, int], stride: int, halo: int, voxels: int
) -> None:
    plan = plan_windows(shape, stride=stride, halo=halo, smallest=8, voxels=voxels)
    most = [max(2 * (-(-halo // stride) * stride) + stride, 8) for _ in shape]
    assert np.prod(plan.window) <= max(voxels, np.prod(most))
    for axis, length, window in zip(plan.axes, shape, plan.window, strict=True):
        assert axis[0].keep_start == 0
        assert axis[-1].keep_stop == axis[-1].stop >= max(length, 8)
        for before, after in pairwise(axis):
            assert before.keep_stop == after.keep_start
            assert before.stop - before.keep_stop >= halo
            assert after.keep_start - after.start >= halo
        for place in axis:
            assert place.start % stride == place.stop % stride == 0
            assert place.stop - place.start == window
            assert place.keep_stop > place.keep_start


def test_larger_windows_compute_less_and_a_whole_volume_nothing_twice() -> None:
    shape = (200, 512, 512)
    shares = [
        plan_windows(shape, stride=4, halo=26, voxels=voxels).computed_over_kept
        for voxels in (2**20, 2**22, 2**24, 2**26)
    ]
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] == 1.0
    assert shares[1] < 2.6


def test_a_window_that_is_all_halo_is_refused_with_the_smallest_useful_one() -> None:
    with pytest.raises(ValueError, match=r"a window of 48 voxels is too small.*at least 60"):
        plan_windows((200, 200, 200), stride=4, halo=26, edge=48)
    plan_windows((200, 200, 200), stride=4, halo=26, edge=60)
    plan_windows((40, 40, 40), stride=4, halo=26, edge=48)  # one window has no use for a halo
