"""Cubes cut where the network runs are those that are cut here, and get the same logits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cectflow.particles import read_particles
from cectflow.prediction import asking
from cectflow.prediction.contract import InputOptions, load_network
from cectflow.prediction.on_device import cut_on_device, read_block_on_device
from cectflow.prediction.source import open_tomograms, read_block
from cectflow.runtime import load_torch
from cectflow.subtomogram import cut
from cectflow.volume import Volume
from cectflow.volume_writer import write_volume


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(*[st.floats(-2, 11)] * 3), min_size=1, max_size=5), st.integers(7, 9))
def test_a_gather_is_a_cut(centres: list[tuple[float, float, float]], box: int) -> None:
    volume = np.random.default_rng(0).normal(size=(9, 10, 11)).astype(np.float32)
    expected = cut(volume, np.array(centres), box, periodic=False)
    found = cut_on_device(torch.from_numpy(volume), np.array(centres), box)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_a_cube_without_a_voxel_inside_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"row 1, .* has no voxel inside the volume of \(9, 9, 9\)"
    ):
        cut_on_device(torch.zeros(9, 9, 9), np.array([[4.0] * 3, [40.0] * 3]), 8)


@pytest.mark.parametrize("voxel_size", [12.0, 8.0])
@pytest.mark.parametrize("contrast", ["dark", "light"])
def test_a_block_there_is_the_block_here(
    classifier: Path, picks: Path, tmp_path: Path, voxel_size: float, contrast: str
) -> None:
    data = np.random.default_rng(2).integers(-90, 90, size=(24, 40, 48)).astype(np.int8)
    write_volume(tmp_path / "t.mrc", Volume(data, voxel_size))
    options = InputOptions(rescale=True, contrast=contrast, batch_size=3)  # type: ignore[arg-type]
    network = load_network(classifier, tasks=("classify",), label="x", device="cpu")
    source = open_tomograms(
        read_particles(picks), {"tomogram": tmp_path / "t.mrc"}, network.card, options,
        lambda _: None, coords_voxel_size=voxel_size,
    )  # fmt: skip
    (block,) = source.files
    here = np.concatenate([batch.cubes for batch in read_block(block, network.card, options)])
    there = list(read_block_on_device(block, network.card, options, "cpu"))
    cubes = np.concatenate([batch[0].numpy() for batch in there])
    np.testing.assert_allclose(cubes, here, rtol=1e-4, atol=1e-3)
    assert np.concatenate([batch[1] for batch in there]).tolist() == [0, 1, 2, 3]
    moved = replace(network, infer_there=load_torch(classifier, "cpu"))
    logits = [
        np.concatenate([part[1] for part in ask(each, (block,), options)])
        for ask, each in ((asking._ask_prefetched, network), (asking._ask_there, moved))
    ]
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-4)


def test_what_is_not_finite_is_left_out(classifier: Path, picks: Path, tmp_path: Path) -> None:
    data = np.random.default_rng(2).normal(size=(24, 40, 48)).astype(np.float32)
    write_volume(tmp_path / "t.mrc", Volume(data, 12.0))
    with mrcfile.open(tmp_path / "t.mrc", mode="r+") as file:
        file.data[10, 9, 30] = np.nan
    network = load_network(classifier, tasks=("classify",), label="x", device="cpu")
    source = open_tomograms(
        read_particles(picks), {"tomogram": tmp_path / "t.mrc"}, network.card, InputOptions(),
        lambda _: None,
    )  # fmt: skip
    ((cubes, kept, faults),) = read_block_on_device(
        source.files[0], network.card, InputOptions(), "cpu"
    )
    here = next(read_block(source.files[0], network.card, InputOptions()))
    assert faults == here.faults
    assert kept.tolist() == here.kept.tolist()
    assert len(cubes) == len(kept) < 4
