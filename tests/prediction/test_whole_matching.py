"""Whole tomograms are filtered to the spectrum of the training data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_whole import SHAPE, VOXEL, finder, run, semantic_card, silent, specimen, store

from cectflow.model_card import ModelCard
from cectflow.prediction import whole_matching
from cectflow.prediction.contract import InputOptions
from cectflow.prediction.tomogram import (
    TomogramError,
    WholeTomogram,
    check_tomogram,
    open_tomogram,
)
from cectflow.prediction.whole import WholeOptions
from cectflow.prediction.whole_matching import filter_tomogram, match_tomogram
from cectflow.spectrum import PowerSum, gain_at, num_shells
from cectflow.volume import read_volume

MATCHED = InputOptions(match_spectrum=True)
BOX = 8
GAIN = tuple(1.0 + np.sin(np.arange(num_shells(BOX))) / 2)


def opened(path: Path, card: ModelCard, folder: Path) -> WholeTomogram:
    folder.mkdir(exist_ok=True)
    return open_tomogram(path, card, InputOptions(), folder, silent)


def card_like(data: np.ndarray, **changes: object) -> ModelCard:
    """Card of a network that was trained on cubes of this volume."""
    corners = np.stack(
        [data[z : z + BOX, y : y + BOX, x : x + BOX]
         for z in range(0, data.shape[0] - BOX + 1, BOX)
         for y in range(0, data.shape[1] - BOX + 1, BOX)
         for x in range(0, data.shape[2] - BOX + 1, BOX)]
    )  # fmt: skip
    total = PowerSum(BOX)
    total.add(corners.astype(np.float32))
    return semantic_card(box=BOX, spectrum=tuple(total.power), **changes)


def test_each_wave_is_multiplied_by_the_gain_of_its_frequency(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape, waves = (12, 20, 15), (3, 7, 2)
    along = [
        np.cos(np.pi * k * (np.arange(n) + 0.5) / n) for k, n in zip(waves, shape, strict=True)
    ]
    wave = np.einsum("i,j,k->ijk", *along).astype(np.float32)
    tomogram = opened(store(tmp_path / "t.mrc", wave), semantic_card(), tmp_path / "a")
    before = tomogram.read(tuple(slice(0, n) for n in shape))
    radius = BOX * np.sqrt(sum((k / (2 * n)) ** 2 for k, n in zip(waves, shape, strict=True)))
    after = filter_tomogram(tomogram, GAIN, BOX, tmp_path / "a")
    # What is no wave is the median, a constant.
    offset = before.mean()
    expected = (before - offset) * gain_at(GAIN, np.array([radius])) + offset * GAIN[1]
    np.testing.assert_allclose(after, expected, atol=1e-4)
    monkeypatch.setattr("cectflow.prediction.tomogram.SLAB_VOXELS", 700)
    monkeypatch.setattr(whole_matching, "SLAB_VOXELS", 700)
    (tmp_path / "b").mkdir()
    np.testing.assert_allclose(
        filter_tomogram(tomogram, GAIN, BOX, tmp_path / "b"), after, atol=1e-5
    )


def coloured(data: np.ndarray, folder: Path) -> np.ndarray:
    """As another microscope would have it."""
    gain = (1.0, *(np.arange(1, num_shells(BOX)) / 3.0) ** -1.5)
    tomogram = opened(store(folder / "c.mrc", data), semantic_card(), folder / "c")
    return np.array(filter_tomogram(tomogram, gain, BOX, folder / "c"))


def test_what_another_spectrum_hides_is_found(tmp_path: Path) -> None:
    data = specimen()
    other = store(tmp_path / "t.mrc", coloured(data, tmp_path))
    card = card_like(data)
    wanted, _ = run(store(tmp_path / "model.mrc", data), "same", network=finder(card))
    told: list[str] = []
    plain_outcome, plain = run(other, "plain", network=finder(card), report=told.append)
    assert sum("spectrum of this tomogram is not that of the training data" in t for t in told) == 1
    told.clear()
    outcome, matched = run(
        other, "matched", network=finder(card), options=MATCHED, report=told.append
    )
    assert any(line.startswith("spectrum: filtered") for line in told)
    assert not any("give --match-spectrum" in line for line in told)
    assert outcome.num_picks == wanted.num_picks
    assert plain_outcome.num_picks != wanted.num_picks
    truth = read_volume(tmp_path / "same_p.mrc").data
    errors = [
        float(np.abs(read_volume(outputs.probabilities).data - truth).mean())
        for outputs in (plain, matched)
    ]
    assert errors[1] < 0.5 * errors[0]


def test_the_filter_is_one_whatever_windows_contrast_scale_and_padding(tmp_path: Path) -> None:
    data = specimen()
    card = card_like(data)
    other = coloured(data, tmp_path)
    _, outputs = run(store(tmp_path / "t.mrc", other), network=finder(card), options=MATCHED)
    expected = read_volume(outputs.probabilities).data
    variants = {
        "windows": (other, MATCHED, WholeOptions(window=56)),
        "light": (-7.0 * other + 20.0, replace(MATCHED, contrast="light"), WholeOptions()),
    }
    for name, (voxels, options, whole) in variants.items():
        path = store(tmp_path / f"{name}_t.mrc", voxels.astype(np.float32))
        _, outputs = run(path, name, network=finder(card), options=options, whole=whole)
        np.testing.assert_allclose(
            read_volume(outputs.probabilities).data, expected, atol=1e-3, err_msg=name
        )
    padded = np.pad(other, ((0, 0), (0, 0), (0, 12)), constant_values=50.0)
    path = store(tmp_path / "wide.mrc", padded)
    _, outputs = run(path, "padded", network=finder(card), options=MATCHED)
    found = read_volume(outputs.probabilities).data
    assert not found[:, :, SHAPE[2] :].any()
    inner = np.s_[:, :, : SHAPE[2] - 6]
    np.testing.assert_allclose(found[inner], expected[inner], atol=0.1)


def test_a_rescaled_tomogram_is_filtered_at_the_cards_voxel_size(tmp_path: Path) -> None:
    data = specimen()
    card = card_like(data)
    path = store(tmp_path / "t.mrc", specimen((36, 105, 69), 1.5), VOXEL / 1.5)
    told: list[str] = []
    outcome, _ = run(
        path, network=finder(card), options=replace(MATCHED, rescale=True), report=told.append
    )
    assert any(line.startswith("spectrum: filtered") for line in told)
    assert outcome.picks is not None


@pytest.mark.parametrize("depth", [BOX + 1, 2 * BOX - 1, 2 * BOX])
def test_a_thin_tomogram_is_measured_through_its_whole_depth(tmp_path: Path, depth: int) -> None:
    data = specimen()[:depth]
    data[: depth // 2] += np.random.default_rng(3).normal(0.0, 2.0, data[: depth // 2].shape)
    card, filtered = card_like(specimen()), []
    for name, voxels in (("up", data), ("down", data[::-1])):
        path = store(tmp_path / f"{name}.mrc", np.ascontiguousarray(voxels))
        tomogram = opened(path, card, tmp_path / name)
        matched = match_tomogram(tomogram, card, "x", tmp_path / name, silent)
        filtered.append(matched.read(tuple(slice(0, n) for n in voxels.shape)))
    np.testing.assert_allclose(filtered[0], filtered[1][::-1], atol=1e-3)


def test_what_cannot_be_matched_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = specimen()
    path = store(tmp_path / "t.mrc", data)
    with pytest.raises(ValueError, match=r"does not state the spectrum .* train it again"):
        run(path, network=finder(semantic_card()), options=MATCHED)
    thin = store(tmp_path / "short.mrc", data[: BOX - 1])
    with pytest.raises(TomogramError, match="there is none in 7x70x46 voxels"):
        run(thin, "out", network=finder(card_like(data)), options=MATCHED)
    with pytest.raises(TomogramError, match="without --match-spectrum, to another --out"):
        check_tomogram(thin, card_like(data), MATCHED)  # by its header
    check_tomogram(thin, card_like(data), InputOptions())
    run(thin, "out", network=finder(card_like(data)))  # unmatched, nothing is judged
    tomogram = opened(path, semantic_card(), tmp_path / "f")
    monkeypatch.setattr(
        "cectflow.prediction.tomogram.shutil.disk_usage",
        lambda _: type("Usage", (), {"free": 1000})(),
    )
    with pytest.raises(TomogramError, match=r"takes 0\.0 GB beside the output"):
        match_tomogram(tomogram, card_like(data), "x", tmp_path / "f", silent)
