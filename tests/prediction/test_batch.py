"""Batches of particles: the same answers however they are worked through, and what a kill leaves.

The networks are untrained: that answers agree is seen by their probabilities.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
import pandas as pd
import pytest

from cectflow.cli import main
from cectflow.execution import Workplace
from cectflow.flows.prediction import predict_classes
from cectflow.particles import make_particle_rows, particles_from, read_particles
from cectflow.prediction.classify import Classification
from cectflow.prediction.contract import InputOptions
from cectflow.prediction.inputs import InputFiles
from cectflow.prediction.journal import journal_folder
from cectflow.prediction.outputs import ClassOutputs
from cectflow.runtime import has_openvino
from cectflow.volume import Volume, read_volume
from cectflow.volume_writer import write_stack, write_volume

BOX = 16
VOXEL_SIZE = 12.0
MANY = 2000
BLOCK = 50
PROBABILITIES = ("cectflowProbability", "cectflowEntropy")


def silent(_: str) -> None:
    pass


def run(arguments: list[str | Path]) -> int:
    """Exit code of the command line, in this process; a traceback is a failure of the test."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


def left_beside(out: Path) -> list[str]:
    """Hidden files and folders beside an output."""
    return sorted(path.name for path in out.parent.iterdir() if path.name.startswith("."))


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tomograms, of which two have names that begin alike, and picks that are interleaved."""
    folder = tmp_path_factory.mktemp("series")
    generator = np.random.default_rng(3)
    for name in ("TS_1", "TS_10", "TS_2"):
        data = generator.normal(size=(24, 40, 48)).astype(np.float32)
        write_volume(folder / f"{name}.mrc", Volume(data, VOXEL_SIZE))
    names = np.array(["TS_10", "TS_1", "TS_2"] * 7)
    positions = generator.uniform((8, 8, 8), (16, 32, 40), (len(names), 3)).round(2)
    rows = make_particle_rows(positions, tomogram="").assign(rlnTomoName=names)
    rows["note"] = np.arange(len(rows)) * 0.5
    particles_from(rows).write(folder / "picks.star")
    return folder


@pytest.fixture(scope="module")
def expected(classifier: Path, series: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Answers of the undisturbed run, from tomograms, one block, one process."""
    return classified(
        classifier, tmp_path_factory.mktemp("expected"), tomogram=f"{series}/{{name}}.mrc",
        particles=series / "picks.star",
    )  # fmt: skip


def classified(
    model: Path, folder: Path, *, block_size: int = 1024, workers: int = 1, **given: Any
) -> pd.DataFrame:
    """Rows of a classification."""
    sources = {"subtomograms", "tomogram", "particles", "coords_voxel_size"}
    options = {name: value for name, value in given.items() if name not in sources}
    files = InputFiles(**{name: value for name, value in given.items() if name in sources})
    out = folder / f"{len(list(folder.iterdir()))}.star"
    predict_classes(
        str(model), files, out, InputOptions(**options), silent, block_size=block_size,
        where=Workplace(workers),
    )  # fmt: skip
    return read_particles(out).rows


def assert_alike(found: pd.DataFrame, expected: pd.DataFrame, atol: float = 1e-4) -> None:
    assert expected["cectflowProbability"].std() > 100 * atol  # or the comparison means nothing
    for column in PROBABILITIES:
        np.testing.assert_allclose(found[column], expected[column], atol=atol)
    assert found["cectflowClassNumber"].tolist() == expected["cectflowClassNumber"].tolist()


@pytest.mark.parametrize(
    "how",
    [
        {"batch_size": 1}, {"batch_size": 3}, {"block_size": 1}, {"block_size": 4, "batch_size": 3},
        {"workers": 2, "block_size": 5}, {"runtime": "torch"}, {"runtime": "onnxruntime"},
        {"runtime": "openvino"},
    ],
    ids=lambda how: "-".join(f"{name}={value}" for name, value in how.items()),
)  # fmt: skip
def test_answers_do_not_depend_on_how_the_work_is_done(
    classifier: Path, series: Path, expected: pd.DataFrame, tmp_path: Path, how: dict[str, Any]
) -> None:
    if how.get("runtime") == "openvino" and not has_openvino():
        pytest.skip("openvino is not installed")
    found = classified(
        classifier, tmp_path, tomogram=f"{series}/{{name}}.mrc", particles=series / "picks.star",
        **how,
    )  # fmt: skip
    assert_alike(found, expected)
    assert found["note"].tolist() == expected["note"].tolist()


@pytest.fixture
def cut_cubes(series: Path) -> np.ndarray:
    """The cubes of the series, cut by hand."""
    rows = read_particles(series / "picks.star").rows
    cubes = []
    for _, row in rows.iterrows():
        centre = np.array([row[f"rlnCoordinate{axis}"] for axis in "ZYX"])
        z, y, x = np.floor(centre + 0.5).astype(int) - BOX // 2
        data = read_volume(series / f"{row['rlnTomoName']}.mrc").data
        cubes.append(data[z : z + BOX, y : y + BOX, x : x + BOX])
    return np.stack(cubes)


def test_a_stack_its_single_volumes_and_cutting_on_the_fly_are_answered_alike(
    classifier: Path, expected: pd.DataFrame, cut_cubes: np.ndarray, tmp_path: Path
) -> None:
    answers = tmp_path / "answers"
    answers.mkdir()
    write_stack(tmp_path / "all.mrcs", cut_cubes, VOXEL_SIZE)
    from_stack = classified(classifier, answers, subtomograms=str(tmp_path / "all.mrcs"))
    assert_alike(from_stack, expected)

    singles = tmp_path / "singles"
    singles.mkdir()
    for number, cube in enumerate(cut_cubes):
        write_stack(singles / f"{number:03d}.mrc", cube[None], VOXEL_SIZE)
    for block_size in (1, 5, 1024):
        of_folder = classified(
            classifier, answers, subtomograms=str(singles), block_size=block_size
        )
        assert_alike(of_folder, expected)
    # Some by their numbers in the stack, some as files, backwards, relative to the table.
    names = [
        f"{number + 1}@all.mrcs" if number % 3 else f"singles/{number:03d}.mrc"
        for number in range(len(cut_cubes))
    ]
    table = particles_from(pd.DataFrame({"rlnImageName": names[::-1]}))
    table.write(tmp_path / "list.star")
    listed = classified(
        classifier, answers, subtomograms=str(tmp_path / "list.star"), batch_size=4, block_size=6
    )
    assert listed["rlnImageName"].tolist() == names[::-1]
    assert_alike(listed[::-1], expected)


def test_single_volumes_share_batches_and_blocks(
    classifier: Path, cut_cubes: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cectflow.prediction import journal

    for number, cube in enumerate(cut_cubes):
        write_stack(tmp_path / f"{number:03d}.mrc", cube[None], VOXEL_SIZE)
    recorded = []
    record = journal.Journal.record
    monkeypatch.setattr(
        journal.Journal, "record",
        lambda self, number, content: (
            recorded.append(len(content["logits"])), record(self, number, content),
        ),
    )  # fmt: skip
    (tmp_path / "out").mkdir()
    classified(classifier, tmp_path / "out", subtomograms=f"{tmp_path}/*.mrc", block_size=8)
    assert recorded == [8, 8, 5]


# What ends the work


@pytest.fixture(scope="module")
def large_stack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "cubes.mrcs"
    generator = np.random.default_rng(5)
    cubes = generator.normal(size=(MANY, BOX, BOX, BOX)).astype(np.float32)
    write_stack(path, cubes, VOXEL_SIZE)
    return path


@pytest.fixture(scope="module")
def large_answer(
    classifier: Path, large_stack: Path, tmp_path_factory: pytest.TempPathFactory
) -> str:
    """The output of an undisturbed run."""
    out = tmp_path_factory.mktemp("undisturbed") / "out.star"
    options = InputOptions(runtime="onnxruntime")
    predict_classes(
        str(classifier), InputFiles(str(large_stack)), out, options, silent, block_size=BLOCK
    )
    return out.read_text()


SLOW = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background ignores it
from cectflow.prediction import journal
record = journal.Journal.record
def slowly(self, number, answers):
    record(self, number, answers)
    time.sleep(0.01)  # so that the kill comes in the midst of the work
journal.Journal.record = slowly
from cectflow.cli import main
main(sys.argv[1:])
"""


def start(classifier: Path, stack: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    command = ["predict", "classify", "--model", classifier, "--subtomograms", stack, "--out", out]
    command += ["--block-size", BLOCK, "--runtime", "onnxruntime", *more]
    return subprocess.Popen(
        [sys.executable, "-c", SLOW, *map(str, command)], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def wait_for_blocks(process: subprocess.Popen[str], out: Path, count: int) -> None:
    folder = journal_folder(out)
    until = time.monotonic() + 120
    while len(list(folder.glob("[0-9]*.npz"))) < count:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.002)


def test_killed_three_times_the_output_is_that_of_an_undisturbed_run(
    classifier: Path, large_stack: Path, large_answer: str, tmp_path: Path
) -> None:
    out = tmp_path / "out.star"
    for count in (6, 14, 22):
        process = start(classifier, large_stack, out)
        wait_for_blocks(process, out, count)
        process.kill()
        process.communicate()
        assert not out.exists()
        finished = len(list(journal_folder(out).glob("[0-9]*.npz")))
        assert count <= finished < MANY // BLOCK
    (journal_folder(out) / "0000003.npz").write_bytes(b"PK damaged")
    (journal_folder(out) / ".0000004.npz.0123456789ab.tmp").write_bytes(b"half")
    (tmp_path / ".out.star.0123456789ab.tmp").write_text("half")
    told: list[str] = []
    options = InputOptions(runtime="onnxruntime")
    files = InputFiles(str(large_stack))
    predict_classes(str(classifier), files, out, options, told.append, block_size=BLOCK)
    assert any(f"of {MANY // BLOCK} blocks are finished" in line for line in told)
    assert out.read_text() == large_answer
    assert len(read_particles(out)) == MANY
    assert [path.name for path in tmp_path.iterdir()] == ["out.star"]


def test_ctrl_c_keeps_the_journal_and_a_second_process_is_refused(
    classifier: Path, large_stack: Path, large_answer: str, tmp_path: Path
) -> None:
    out = tmp_path / "out.star"
    process = start(classifier, large_stack, out)
    wait_for_blocks(process, out, 2)
    options = InputOptions(runtime="onnxruntime")
    files = InputFiles(str(large_stack))
    with pytest.raises(BlockingIOError, match=r"another process is at work on .*out.star"):
        predict_classes(str(classifier), files, out, options, silent, block_size=BLOCK)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 130, said
    assert "interrupted: what was finished is kept" in said
    assert "Traceback" not in said
    assert not out.exists()
    assert len(list(journal_folder(out).glob("[0-9]*.npz"))) >= 2

    # Other work with the same output is refused, and what differs is named.
    for other, block_size, named in (
        ({"contrast": "light"}, BLOCK, r"another contrast \(dark, now light\): give the same"),
        ({"runtime": "torch"}, BLOCK, r"runtime \(onnxruntime, now torch\)"),
        ({}, 2 * BLOCK, r"block_size \(50, now 100\)"),
    ):
        changed = InputOptions(**{"runtime": "onnxruntime", **other})
        with pytest.raises(ValueError, match=named):
            predict_classes(str(classifier), files, out, changed, silent, block_size=block_size)
    few = tmp_path / "few.mrcs"
    write_stack(few, np.ones((2, BOX, BOX, BOX), np.float32), VOXEL_SIZE)
    with pytest.raises(ValueError, match="begun with another files, particles: give the same"):
        predict_classes(
            str(classifier), InputFiles(str(few)), out, options, silent, block_size=BLOCK
        )
    renamed = tmp_path / "renamed"
    shutil.copytree(classifier, renamed)
    with pytest.raises(ValueError, match=r"another model \(classifier, now renamed\)"):
        predict_classes(str(renamed), files, out, options, silent, block_size=BLOCK)
    # Rounding and messages alone do not make it other work, and anew is anew.
    told: list[str] = []
    anew = InputOptions(runtime="onnxruntime", overwrite=True)
    predict_classes(str(classifier), files, out, anew, told.append, block_size=BLOCK)
    assert not any("going on" in line for line in told)
    assert out.read_text() == large_answer
    assert left_beside(out) == []


def test_an_unfinished_run_does_not_license_other_outputs(
    classifier: Path, stack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, table = tmp_path / "out.star", tmp_path / "table.csv"
    files, options = InputFiles(str(stack)), InputOptions()

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr("cectflow.flows.prediction.write_outputs", stop)
        with pytest.raises(KeyboardInterrupt):
            predict_classes(str(classifier), files, out, options, silent)
    plan = json.loads((journal_folder(out) / "plan.json").read_text())
    assert str(out.resolve()) in plan["outputs"]
    table.write_text("mine")
    with pytest.raises(FileExistsError, match=r"table.csv exists"):
        predict_classes(str(classifier), files, ClassOutputs(out, table), options, silent)
    assert table.read_text() == "mine"
    table.unlink()
    # What such a run may have left half done is its own to replace.
    out.write_text("half")
    predict_classes(str(classifier), files, ClassOutputs(out, table), options, silent)
    assert len(read_particles(out)) == len(pd.read_csv(table)) == 5
    assert left_beside(out) == []


def test_a_run_that_failed_before_any_block_leaves_nothing(
    classifier: Path, stack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Iterator[Any]:
        msg = "no room"
        raise OSError(msg)

    monkeypatch.setattr("cectflow.prediction.classify.run_all", fail)
    out = tmp_path / "out.star"
    with pytest.raises(OSError, match="no room"):
        predict_classes(str(classifier), InputFiles(str(stack)), out, InputOptions(), silent)
    assert not out.exists()
    assert left_beside(out) == []


def test_a_dry_run_changes_nothing_on_disk(
    classifier: Path, series: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    code = run(
        ["predict", "classify", "--model", classifier, "--tomogram", f"{series}/TS_*.mrc",
         "--particles", series / "picks.star", "--out", tmp_path / "o.star",
         "--table", tmp_path / "t.parquet", "--per-class", tmp_path / "classes",
         "--summary", tmp_path / "s.png", "--block-size", "4", "--dry-run"]
    )  # fmt: skip
    said = capsys.readouterr()
    assert code == 0, said.err
    assert "would classify 21 of 21 particles (files: 3, blocks: 6)" in said.out
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before


# The signs of contrast, CTF and numbers that are none


def make_blobs(num: int, sign: float) -> np.ndarray:
    """Noise with a dark blob in the middle, times a sign; 0 is noise alone."""
    generator = np.random.default_rng(7)
    cubes = generator.normal(size=(num, BOX, BOX, BOX))
    grid = np.indices((BOX,) * 3) - BOX // 2
    blob = np.exp(-(grid**2).sum(axis=0) / 18.0)
    return (cubes - sign * 1.5 * blob).astype(np.float32)


@pytest.mark.parametrize(
    ("sign", "contrast", "warns"),
    [(1.0, "dark", False), (-1.0, "dark", True), (-1.0, "light", False), (1.0, "light", True),
     (0.0, "dark", False), (0.0, "light", False)],
)  # fmt: skip
def test_contrast_that_looks_inverted_is_told(
    classifier: Path, tmp_path: Path, sign: float, contrast: Any, warns: bool
) -> None:
    write_stack(tmp_path / "s.mrcs", make_blobs(150, sign), VOXEL_SIZE)
    told: list[str] = []
    predict_classes(
        str(classifier), InputFiles(str(tmp_path / "s.mrcs")), tmp_path / "o.star",
        InputOptions(contrast=contrast), told.append, block_size=20,
    )  # fmt: skip
    found = [line for line in told if "as if the contrast were inverted" in line]
    assert len(found) == warns
    other = "light" if contrast == "dark" else "dark"
    assert all(f"--contrast {other} --overwrite" in line for line in found)


def test_noise_alone_is_hardly_ever_called_inverted() -> None:
    from builders import make_card

    from cectflow.prediction.contrast import ContrastWatch, measure_lightness

    told: list[str] = []
    generator = np.random.default_rng(11)
    for _ in range(20):
        watch = ContrastWatch(make_card(), InputOptions(), told.append)
        for _ in range(8):
            cubes = generator.normal(size=(64, 1, 12, 12, 12)).astype(np.float32)
            watch.see(measure_lightness(cubes))
    assert told == []


def test_a_cube_with_constant_faces_says_nothing_of_the_contrast() -> None:
    from builders import make_card

    from cectflow.prediction.contrast import ContrastWatch, measure_lightness

    told: list[str] = []
    cubes = np.random.default_rng(11).normal(size=(200, 1, 12, 12, 12)).astype(np.float32)
    cubes[:, :, 4:8, 4:8, 4:8] += 2.0  # inverted
    cubes[0, 0, 0] = cubes[0, 0, -1] = cubes[0].mean()  # as padding leaves it
    lightness = measure_lightness(cubes)
    assert np.isnan(lightness).tolist() == [True] + [False] * 199
    ContrastWatch(make_card(), InputOptions(), told.append).see(lightness)
    assert len(told) == 1
    assert "in 199 cubes" in told[0]


@pytest.mark.parametrize(
    ("given", "message"),
    [(None, "expected are data with ctf_correction none: say with"),
     ("none", None),
     ("phase_flip", "warning: the input's ctf_correction is phase_flip, the network was trained")],
)  # fmt: skip
def test_the_correction_of_the_ctf_is_asked_for_and_compared(
    classifier: Path, stack: Path, tmp_path: Path, given: Any, message: str | None
) -> None:
    told: list[str] = []
    options = InputOptions(ctf_correction=given)
    predict_classes(
        str(classifier), InputFiles(str(stack)), tmp_path / "o.star", options, told.append
    )
    lines = [line for line in told if "ctf_correction" in line]
    assert len(lines) == (message is not None)
    assert message is None or message in lines[0]


def outcome_of(model: Path, out: Path, **files: Any) -> Classification:
    return predict_classes(str(model), InputFiles(**files), out, InputOptions(), silent)


def test_values_beyond_float32_are_a_failure_and_no_silent_class(
    classifier: Path, cubes: np.ndarray, tmp_path: Path
) -> None:
    write_stack(tmp_path / "s.mrcs", cubes, VOXEL_SIZE)
    with mrcfile.open(tmp_path / "s.mrcs", mode="r+") as file:
        file.data[2] *= 3e37
    outcome = outcome_of(classifier, tmp_path / "o.star", subtomograms=str(tmp_path / "s.mrcs"))
    classes = read_particles(tmp_path / "o.star").rows["cectflowClassNumber"]
    assert (classes == 0).tolist() == [row in outcome.faults for row in range(5)]
    assert {*outcome.faults} <= {2}
    assert np.isfinite(outcome.judgement.probabilities).all()


def test_a_tomogram_of_nan_is_listed_and_the_others_are_predicted(
    classifier: Path, series: Path, tmp_path: Path
) -> None:
    for name in ("TS_1", "TS_2", "TS_10"):
        shutil.copy(series / f"{name}.mrc", tmp_path)
    with mrcfile.open(tmp_path / "TS_2.mrc", mode="r+") as file:
        file.data[...] = np.nan
    outcome = outcome_of(
        classifier, tmp_path / "o.star", tomogram=f"{tmp_path}/{{name}}.mrc",
        particles=series / "picks.star",
    )  # fmt: skip
    assert [*outcome.faults] == [*range(2, 21, 3)]
    assert "TS_2.mrc: the subtomogram of particle 3 holds values that" in outcome.faults[2]


def test_a_file_that_shrinks_or_vanishes_meanwhile_costs_its_own_rows(
    classifier: Path, cubes: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cectflow.prediction import classify

    for name in ("a", "b", "c"):
        write_stack(tmp_path / f"{name}.mrcs", cubes, VOXEL_SIZE)
    work = classify.run_all

    def meddle(*arguments: Any, **options: Any) -> Any:
        (tmp_path / "a.mrcs").unlink()
        write_stack(tmp_path / "b.mrcs", cubes[:2], VOXEL_SIZE, overwrite=True)
        return work(*arguments, **options)

    monkeypatch.setattr(classify, "run_all", meddle)
    outcome = outcome_of(classifier, tmp_path / "o.star", subtomograms=f"{tmp_path}/*.mrcs")
    assert [*outcome.faults] == [*range(10)]
    assert "there is no file" in outcome.faults[0]
    assert "b.mrcs holds 2 subtomograms now" in outcome.faults[5]
    assert sum(outcome.counts.values()) == 5
