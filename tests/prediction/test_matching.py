"""Cubes of another spectrum are filtered to that of the training data, tomogram by tomogram."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
import pandas as pd
import pytest
import starfile

from cectflow.cli import main
from cectflow.flows.prediction import plan_classes, predict_classes
from cectflow.flows.segmentation import predict_segments
from cectflow.flows.unlabelled import find_unlabelled
from cectflow.model_card import CARD_FILE, ModelCard
from cectflow.particles import make_particle_rows, particles_from, read_particles
from cectflow.prediction.contract import InputOptions
from cectflow.prediction.inputs import InputFiles
from cectflow.prediction.journal import Journal, journal_folder
from cectflow.prediction.matching import (
    FEW_CUBES,
    SAMPLED_CUBES,
    group_by_spectrum,
    match_spectra,
    warn_of_other,
)
from cectflow.prediction.on_device import read_block_on_device
from cectflow.prediction.outputs import ClassOutputs
from cectflow.prediction.source import CubeSource, open_tomograms, read_block
from cectflow.prediction.whole import WholeOutputs
from cectflow.spectrum import PowerSum, apply_gain, num_shells, shell_numbers
from cectflow.subtomogram import cut
from cectflow.volume import Volume, read_stack
from cectflow.volume_writer import write_stack, write_volume

MATCHED = InputOptions(match_spectrum=True)


def noise(number: int, box: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(number, box, box, box)).astype(np.float32)


def coloured(cubes: np.ndarray, slope: float) -> np.ndarray:
    """As another tomogram would have them: amplitudes by a power of the frequency."""
    shells = shell_numbers(cubes.shape[-1]).max() + 1
    return apply_gain(cubes, (1.0, *(np.arange(1, shells) / 4.0) ** slope))


def with_spectrum(folder: Path, cubes: np.ndarray, target: Path) -> ModelCard:
    """The model folder, its card stating the spectrum of these cubes."""
    shutil.copytree(folder, target)
    total = PowerSum(cubes.shape[-1])
    total.add(cubes)
    card = ModelCard.from_folder(folder).model_copy(update={"spectrum": tuple(total.power)})
    (target / CARD_FILE).write_text(card.to_json(), encoding="utf-8")
    return card


def classify(model: Path, stack: Path, out: Path, options: InputOptions, **changes: Any) -> Any:
    told: list[str] = []
    outcome = predict_classes(
        str(model), InputFiles(str(stack)), out, options, told.append, **changes
    )
    return outcome.judgement.probabilities, told


def test_a_filter_that_the_cubes_went_through_is_undone(classifier: Path, tmp_path: Path) -> None:
    card = ModelCard.from_folder(classifier)
    cubes = noise(24, card.box)
    with_spectrum(classifier, cubes, tmp_path / "model")
    write_stack(tmp_path / "a.mrcs", cubes, card.voxel_size)
    write_stack(tmp_path / "b.mrcs", coloured(cubes, -0.7), card.voxel_size)
    model = tmp_path / "model"
    plain, _ = classify(model, tmp_path / "a.mrcs", tmp_path / "a.star", InputOptions())
    other, _ = classify(model, tmp_path / "b.mrcs", tmp_path / "b.star", InputOptions())
    matched, told = classify(model, tmp_path / "b.mrcs", tmp_path / "c.star", MATCHED)
    assert np.abs(other - plain).max() > 0.01
    # To the accuracy of each cube's own variance, by which spectra are weighted.
    np.testing.assert_allclose(matched, plain, atol=0.1 * np.abs(other - plain).max())
    (line,) = [line for line in told if line.startswith("spectrum: ")]
    assert "filters: 1; gain " in line


def test_each_tomogram_of_a_table_has_its_own_filter(classifier: Path, tmp_path: Path) -> None:
    card = ModelCard.from_folder(classifier)
    cubes = noise(40, card.box)
    with_spectrum(classifier, cubes, tmp_path / "model")
    mixed = np.empty_like(cubes)
    mixed[::2], mixed[1::2] = coloured(cubes[::2], 0.8), coloured(cubes[1::2], -0.8)
    write_stack(tmp_path / "s.mrcs", mixed, card.voxel_size)
    names = [f"{row + 1:06d}@{tmp_path}/s.mrcs" for row in range(40)]
    rows = {"rlnTomoName": ["up", "down"] * 20, "rlnImageName": names}
    starfile.write(pd.DataFrame(rows), tmp_path / "s.star")
    told: list[str] = []
    options = replace(MATCHED, batch_size=7)
    files = InputFiles(str(tmp_path / "s.star"))
    source = match_spectra(
        files.open(ModelCard.from_folder(tmp_path / "model"), options, told.append), "x",
        told.append,
    )  # fmt: skip
    assert [len(block) for block in source.files] == [20, 20]
    for block, own in zip(source.files, (0, 1), strict=True):
        assert set(block.rows % 2) == {own}
        total = PowerSum(card.box)
        for batch in read_block(block, source.card, source.options):
            total.add(batch.cubes)
        np.testing.assert_allclose(total.power[2:], np.array(source.card.spectrum)[2:], rtol=0.02)
    outcome = predict_classes(
        str(tmp_path / "model"), files, tmp_path / "out.star", options, told.append, block_size=9
    )
    assert outcome.table.rows["rlnImageName"].tolist() == names
    assert any("filters: 2;" in line for line in told)


def sources_of(tmp_path: Path, card: ModelCard) -> tuple[CubeSource, CubeSource]:
    """Many particles cut from a tomogram, and the same ones in a stack."""
    rng = np.random.default_rng(1)
    data = rng.normal(size=(40, 40, 40)).astype(np.float32)
    centres = rng.uniform(card.box // 2, 40 - card.box // 2 - 1, (SAMPLED_CUBES + 50, 3)).round()
    write_volume(tmp_path / "t.mrc", Volume(data, card.voxel_size))
    rows = make_particle_rows(centres, tomogram="t")
    write_stack(tmp_path / "t.mrcs", cut(data, centres, card.box, periodic=False), card.voxel_size)
    cut_out = open_tomograms(
        particles_from(rows), {"t": tmp_path / "t.mrc"}, card, MATCHED, lambda _: None
    )
    stored = InputFiles(str(tmp_path / "t.mrcs")).open(card, MATCHED, lambda _: None)
    return cut_out, stored


def test_the_filter_is_the_same_however_particles_are_stored(
    classifier: Path, tmp_path: Path
) -> None:
    card = with_spectrum(
        classifier, noise(8, ModelCard.from_folder(classifier).box), tmp_path / "m"
    )
    matched = [match_spectra(each, "x", lambda _: None) for each in sources_of(tmp_path, card)]
    (first,), (second,) = (each.files for each in matched)
    assert first.gain is not None
    assert second.gain is not None
    np.testing.assert_allclose(first.gain, second.gain, rtol=1e-9)


def test_a_device_filters_as_is_done_here(classifier: Path, tmp_path: Path) -> None:
    card = with_spectrum(
        classifier, noise(8, ModelCard.from_folder(classifier).box), tmp_path / "m"
    )
    source = match_spectra(sources_of(tmp_path, card)[0], "x", lambda _: None)
    (block,) = source.files
    here = np.concatenate([batch.cubes for batch in read_block(block, card, MATCHED)])
    there = np.concatenate(
        [cubes.numpy() for cubes, _, _ in read_block_on_device(block, card, MATCHED, "cpu")]
    )
    np.testing.assert_allclose(there, here, atol=1e-4)


def test_few_particles_are_said_to_be_few(classifier: Path, tmp_path: Path) -> None:
    box = ModelCard.from_folder(classifier).box
    card = with_spectrum(classifier, noise(8, box), tmp_path / "m")
    for number in range(FEW_CUBES - 1):
        write_stack(tmp_path / f"{number}.mrc", noise(1, box, number), card.voxel_size)
    told: list[str] = []
    source = InputFiles(f"{tmp_path}/?.mrc").open(card, MATCHED, told.append)
    matched = match_spectra(source, "x", told.append)
    assert len({block.gain for block in matched.files}) == 1
    assert any(f"1 of 1 spectra are of fewer than {FEW_CUBES} cubes" in line for line in told)


def test_tomograms_of_few_particles_share_a_filter(classifier: Path, tmp_path: Path) -> None:
    box = ModelCard.from_folder(classifier).box
    card = with_spectrum(classifier, noise(8, box), tmp_path / "m")
    write_stack(tmp_path / "s.mrcs", noise(50, box), card.voxel_size)
    names = [f"{row + 1}@{tmp_path}/s.mrcs" for row in range(50)]
    tomograms = [f"t{row}" if row < 20 else "large" for row in range(50)]
    starfile.write(
        pd.DataFrame({"rlnTomoName": tomograms, "rlnImageName": names}), tmp_path / "s.star"
    )
    source = InputFiles(str(tmp_path / "s.star")).open(card, MATCHED, lambda _: None)
    assert [len(group) for group in group_by_spectrum(source)] == [30, 20]
    assert len({block.gain for block in match_spectra(source, "x", lambda _: None).files}) == 2


def test_what_cannot_be_read_is_a_fault_as_ever(classifier: Path, tmp_path: Path) -> None:
    box = ModelCard.from_folder(classifier).box
    card = with_spectrum(classifier, noise(8, box), tmp_path / "m")
    cubes = noise(10, box)
    write_stack(tmp_path / "s.mrcs", cubes, card.voxel_size)
    with mrcfile.open(tmp_path / "s.mrcs", mode="r+") as file:
        file.data[3, 2, 2, 2] = np.nan
    outcome = predict_classes(
        str(tmp_path / "m"), InputFiles(str(tmp_path / "s.mrcs")), tmp_path / "out.star", MATCHED,
        lambda _: None,
    )  # fmt: skip
    assert [*outcome.faults] == [3]
    assert read_particles(tmp_path / "out.star").rows["cectflowClassNumber"].gt(0).sum() == 9


def test_a_sample_that_is_unusable_is_not_all(classifier: Path, tmp_path: Path) -> None:
    box = ModelCard.from_folder(classifier).box
    cubes = noise(2 * SAMPLED_CUBES + 1, box)
    card = with_spectrum(classifier, cubes, tmp_path / "m")
    write_stack(tmp_path / "s.mrcs", coloured(cubes, -0.7), card.voxel_size)
    with mrcfile.open(tmp_path / "s.mrcs", mode="r+") as file:
        file.data[::2] = np.nan  # those that are drawn
    source = InputFiles(str(tmp_path / "s.mrcs")).open(card, MATCHED, lambda _: None)
    told: list[str] = []
    (block,) = match_spectra(source, "x", told.append).files
    assert block.gain is not None
    with mrcfile.open(tmp_path / "s.mrcs", mode="r+") as file:
        file.data[...] = np.nan
    (block,) = match_spectra(source, "x", told.append).files
    assert block.gain is None
    assert (
        f"1 of 1 spectra cannot be measured, of which the first is that of {tmp_path}" in told[-1]
    )


def interrupted(model: Path, table: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prediction of 40 particles in blocks of 5 that ends after some."""
    record = Journal.record

    def stop(journal: Journal, number: int, content: Any) -> None:
        record(journal, number, content)
        if number == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "record", stop)
        with pytest.raises(KeyboardInterrupt):
            classify(model, table, out, MATCHED, block_size=5)


def test_a_rerun_filters_as_was_begun(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = ModelCard.from_folder(classifier).box
    cubes = noise(40, box)
    card = with_spectrum(classifier, cubes, tmp_path / "m")
    for name, part, slope in (("a", cubes[:20], 0.5), ("b", cubes[20:], -0.7)):
        write_stack(tmp_path / f"{name}.mrcs", coloured(part, slope), card.voxel_size)

    def name_tomograms(*tomograms: str) -> None:
        names = [f"{row % 20 + 1}@{tmp_path}/{'ab'[row // 20]}.mrcs" for row in range(40)]
        rows = {"rlnTomoName": np.repeat(tomograms, 40 // len(tomograms)), "rlnImageName": names}
        starfile.write(pd.DataFrame(rows), tmp_path / "s.star", overwrite=True)

    table, out = tmp_path / "s.star", tmp_path / "out.star"
    name_tomograms("one", "two")
    whole, _ = classify(tmp_path / "m", table, tmp_path / "whole.star", MATCHED)
    interrupted(tmp_path / "m", table, out, monkeypatch)
    with pytest.raises(ValueError, match=r"begun with another match_spectrum \(True, now False\)"):
        classify(tmp_path / "m", table, out, InputOptions(), block_size=5)
    name_tomograms("one")
    with pytest.raises(ValueError, match="begun with another spectra"):
        classify(tmp_path / "m", table, out, MATCHED, block_size=5)
    name_tomograms("one", "two")

    def refuse(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr("cectflow.prediction.matching._measure", refuse)
    again, told = classify(tmp_path / "m", table, out, MATCHED, block_size=5)
    assert "going on: 4 of 8 blocks are finished" in told
    np.testing.assert_allclose(again, whole, atol=1e-5)


@pytest.mark.parametrize("value", [None, "a", [1.0], math.nan, -1.0])
def test_a_damaged_note_is_measured_again(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: object
) -> None:
    cubes = noise(40, ModelCard.from_folder(classifier).box)
    card = with_spectrum(classifier, cubes, tmp_path / "m")
    write_stack(tmp_path / "s.mrcs", coloured(cubes, 0.5), card.voxel_size)
    whole, _ = classify(tmp_path / "m", tmp_path / "s.mrcs", tmp_path / "whole.star", MATCHED)
    for number, damaged in enumerate(([value], [[value] * len(card.spectrum or ())])):
        out = tmp_path / f"out{number}.star"
        interrupted(tmp_path / "m", tmp_path / "s.mrcs", out, monkeypatch)
        (journal_folder(out) / "spectra.json").write_text(json.dumps(damaged))
        again, _ = classify(tmp_path / "m", tmp_path / "s.mrcs", out, MATCHED, block_size=5)
        np.testing.assert_allclose(again, whole, atol=1e-5)


def test_a_file_of_many_filters_is_one_file(classifier: Path, tmp_path: Path) -> None:
    box = ModelCard.from_folder(classifier).box
    card = with_spectrum(classifier, noise(8, box), tmp_path / "m")
    write_stack(tmp_path / "s.mrcs", noise(20, box), card.voxel_size)
    names = [f"{row + 1}@{tmp_path}/s.mrcs" for row in range(20)]
    rows = {"rlnTomoName": ["a", "b"] * 10, "rlnImageName": names}
    starfile.write(pd.DataFrame(rows), tmp_path / "s.star")
    told: list[str] = []
    outputs = ClassOutputs(tmp_path / "out.star")
    files = InputFiles(str(tmp_path / "s.star"))
    plan_classes(str(tmp_path / "m"), files, outputs, MATCHED, told.append)
    assert any("would classify 20 of 20 particles (files: 1, blocks: 1)" in line for line in told)
    source = files.open(card, MATCHED, told.append)
    assert match_spectra(source, "x", told.append).particles_per_file == {tmp_path / "s.mrcs": 20}


def test_the_command_filters_and_says_so(
    classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cubes = noise(16, ModelCard.from_folder(classifier).box)
    card = with_spectrum(classifier, cubes, tmp_path / "m")
    write_stack(tmp_path / "s.mrcs", coloured(cubes, -0.7), card.voxel_size)
    arguments = [
        "predict", "classify", "--model", str(tmp_path / "m"), "--subtomograms",
        str(tmp_path / "s.mrcs"), "--device", "cpu", "--out",
    ]  # fmt: skip
    for name, flags, line in (
        ("plain", [], f"warning: the power spectrum of {tmp_path}/s.mrcs is not that of"),
        ("matched", ["--match-spectrum"], "spectrum: filtered to that of the training data, "),
    ):
        with pytest.raises(SystemExit) as stop:
            main([*arguments, str(tmp_path / f"{name}.star"), *flags])
        assert not stop.value.code
        told = capsys.readouterr()
        assert line in told.out + told.err


def test_cubes_without_labels_are_matched_too(classifier: Path, tmp_path: Path) -> None:
    cubes = noise(64, ModelCard.from_folder(classifier).box)
    card = with_spectrum(classifier, cubes, tmp_path / "m")
    write_stack(tmp_path / "s.mrcs", coloured(cubes, -0.7), card.voxel_size)
    for options, tolerance in ((InputOptions(), 0.4), (MATCHED, 0.02)):
        total = PowerSum(card.box)
        found = find_unlabelled(str(tmp_path / "s.mrcs"), options, lambda _: None)
        assert found is not None
        assert ("--match-spectrum" in found.arguments) == options.match_spectrum
        total.add(found.read(card).numpy())
        differs = np.abs(total.power[1:] / np.array(card.spectrum)[1:] - 1).max()
        assert (differs < 0.02) == (tolerance == 0.02)


def test_a_warning_says_where_a_filter_is_of_use(classifier: Path, tmp_path: Path) -> None:
    card = ModelCard.from_folder(classifier)
    cubes = noise(24, card.box)
    with_spectrum(classifier, cubes, tmp_path / "model")
    for name, slope, number in (("same", 0.0, 24), ("other", -0.7, 24), ("few", -0.7, 4)):
        write_stack(tmp_path / f"{name}.mrcs", coloured(cubes[:number], slope), card.voxel_size)
        _, told = classify(
            tmp_path / "model", tmp_path / f"{name}.mrcs", tmp_path / f"{name}.star", InputOptions()
        )
        warned = [line for line in told if "give --match-spectrum" in line]
        assert len(warned) == (name == "other")
        assert all(f"of {tmp_path}/other.mrcs is not that" in line for line in warned)
    (tmp_path / "many").mkdir()
    for name, slope in (("1", 0.0), ("2", 0.0), ("3", -0.7)):
        own = tmp_path / "many" / f"{name}.mrcs"
        write_stack(own, coloured(cubes, slope), card.voxel_size)
    _, told = classify(tmp_path / "model", tmp_path / "many", tmp_path / "x.star", InputOptions())
    assert sum(f"of {tmp_path}/many/3.mrcs is not that" in line for line in told) == 1
    _, told = classify(tmp_path / "model", tmp_path / "other.mrcs", tmp_path / "m.star", MATCHED)
    assert not any("give --match-spectrum" in line for line in told)


def test_noise_where_training_data_have_nothing_is_warned_of() -> None:
    measured, told = PowerSum(16), list[str]()
    measured.add(noise(24, 16))
    warn_of_other(measured, np.where(np.arange(num_shells(16)) < 4, 1.0, 0.0), "a", told.append)
    assert len(told) == 1
    assert "to more than 1000 between" in told[0]


def test_a_card_without_a_spectrum_is_refused_before_work(
    classifier: Path, segmenter: Path, stack: Path, tmp_path: Path
) -> None:
    outputs = ClassOutputs(tmp_path / "out.star")
    with pytest.raises(ValueError, match=r"does not state the spectrum .* train it again"):
        plan_classes(str(classifier), InputFiles(str(stack)), outputs, MATCHED, print)
    shutil.copytree(segmenter, tmp_path / "semantic")
    card = ModelCard.from_folder(segmenter).model_copy(update={"task": "semantic"})
    (tmp_path / "semantic" / CARD_FILE).write_text(card.to_json(), encoding="utf-8")
    with pytest.raises(ValueError, match=r"does not state the spectrum .* train it again"):
        predict_segments(
            str(tmp_path / "semantic"), InputFiles(tomogram=tmp_path / "t.mrc"),
            WholeOutputs(tmp_path / "l.mrc"), MATCHED, print,
        )  # fmt: skip
    assert not (tmp_path / "out.star").exists()


def test_labels_come_in_the_order_of_the_table(segmenter: Path, tmp_path: Path) -> None:
    box = ModelCard.from_folder(segmenter).box
    cubes = noise(20, box)
    card = with_spectrum(segmenter, cubes, tmp_path / "m")
    mixed = cubes.copy()
    mixed[1::2] = coloured(cubes[1::2], -0.7)
    for name, own in (("a", mixed[:10]), ("b", mixed[10:])):
        write_stack(tmp_path / f"{name}.mrcs", own, card.voxel_size)
    # Rows go from file to file and from tomogram to tomogram.
    order = np.random.default_rng(0).permutation(20)
    names = [f"{row % 10 + 1}@{tmp_path}/{'ab'[row // 10]}.mrcs" for row in order]
    rows = {"rlnTomoName": [f"t{row % 2}" for row in order], "rlnImageName": names}
    starfile.write(pd.DataFrame(rows), tmp_path / "s.star")

    def labels(options: InputOptions, given: str, out: str) -> np.ndarray:
        predict_segments(
            str(tmp_path / "m"), InputFiles(given), WholeOutputs(tmp_path / out), options, print
        )
        return np.asarray(read_stack(tmp_path / out)[0])

    plain = labels(InputOptions(), f"{tmp_path}/?.mrcs", "plain.mrcs")
    listed = labels(InputOptions(), f"{tmp_path}/s.star", "listed.mrcs")
    np.testing.assert_array_equal(listed, plain[order])
    matched = labels(MATCHED, f"{tmp_path}/s.star", "matched.mrcs")
    assert 0 < (matched != listed).mean() < 0.5
    even = [place for place, row in enumerate(order) if row % 2 == 0]
    # The even ones are of the training's spectrum: hardly filtered.
    assert (matched[even] != listed[even]).mean() < 0.02


def test_a_target_segmenter_sees_matched_cubes(segmenter: Path, tmp_path: Path) -> None:
    box = ModelCard.from_folder(segmenter).box
    cubes = noise(12, box)
    card = with_spectrum(segmenter, cubes, tmp_path / "m")
    write_stack(tmp_path / "s.mrcs", coloured(cubes, -0.7), card.voxel_size)
    told: list[str] = []
    predict_segments(
        str(tmp_path / "m"), InputFiles(str(tmp_path / "s.mrcs")),
        WholeOutputs(tmp_path / "labels.mrcs"), MATCHED, told.append,
    )  # fmt: skip
    assert any(line.startswith("spectrum: filtered") for line in told)
