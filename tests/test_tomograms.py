"""``cectflow simulate tomograms``: what is written, kept, completed and refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import mrcfile
import numpy as np
import pytest

from cectflow.cli import main
from cectflow.flows.simulation import simulate_tomograms, write_tomogram
from cectflow.particles import read_particles
from cectflow.recipe import load_recipe
from cectflow.tracking.runs import connect
from cectflow.volume import read_volume

resource = pytest.importorskip("resource", reason="limits are those of POSIX")

SHAPE = ("18", "32", "40")


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    empty_store: Path,
) -> Run:  # fmt: skip
    """Exit code, stdout and stderr of ``cectflow simulate tomograms`` of small ones."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_store, tmp_path / "store.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/store.db")

    def call(*arguments: str, shape: Sequence[str] = SHAPE) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main(("simulate", "tomograms", "--recipe", "tiny", "--shape", *shape, *arguments))
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return call


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_tomograms_with_their_truth_and_tilt_series(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("--count", "2", "--tilt-series", "--out", "t")
    assert code == 0
    assert out.split() == ["t/tomo_000/tomogram.mrc", "t/tomo_001/tomogram.mrc"]
    folder = tmp_path / "t" / "tomo_000"
    assert {path.name for path in folder.iterdir()} == {
        "tomogram.mrc", "particles.star", "true_classes.mrc", "true_instances.mrc", "record.json",
        "slices.png", "tilt_series.mrc", "tilt_series.tlt",
    }  # fmt: skip
    recipe = load_recipe("tiny").simulation
    for name, kind in (
        ("tomogram", np.float32), ("true_classes", np.int8), ("true_instances", np.int16),
    ):  # fmt: skip
        volume = read_volume(folder / f"{name}.mrc")
        assert volume.shape == (18, 32, 40)
        assert volume.voxel_size == recipe.voxel_size
        assert volume.data.dtype == kind
    classes = read_volume(folder / "true_classes.mrc").data
    instances = read_volume(folder / "true_instances.mrc").data
    rows = read_particles(folder / "particles.star").rows
    named = json.loads((tmp_path / "t/tomograms.json").read_text())["classes"]
    for number, row in enumerate(rows.itertuples(), start=1):
        voxels = instances == number
        if voxels.any():
            assert {named[i - 1] for i in np.unique(classes[voxels])} == {row.cectflowTrueClass}
            centre = np.argwhere(voxels).mean(axis=0)
            given = (row.rlnCoordinateZ, row.rlnCoordinateY, row.rlnCoordinateX)
            assert np.linalg.norm(centre - given) < 5
    assert set(rows["rlnTomoName"]) == {"tomo_000"}
    # IMOD's conventions: an image stack, and a line for each of its sections.
    angles = np.loadtxt(folder / "tilt_series.tlt")
    np.testing.assert_allclose(angles, recipe.tilts.angles)
    with mrcfile.open(folder / "tilt_series.mrc") as stack:
        assert stack.is_image_stack()
        assert stack.data.shape[0] == angles.size
        assert stack.voxel_size.x == recipe.voxel_size
    assert read_volume(tmp_path / "t/tomo_001/tomogram.mrc").data.std() > 0


def test_the_bytes_depend_on_recipe_and_index_alone(run: Run, tmp_path: Path) -> None:
    assert run("--count", "2", "--out", "one")[0] == 0
    assert run("--count", "2", "--out", "two", "--workers", "2")[0] == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert run("--count", "1", "--seed", "9", "--out", "three")[0] == 0
    other = contents(tmp_path / "three")["tomo_000/tomogram.mrc"]
    assert other != contents(tmp_path / "one")["tomo_000/tomogram.mrc"]


def test_a_second_call_makes_what_is_missing_and_touches_nothing_else(
    run: Run, tmp_path: Path
) -> None:
    assert run("--count", "1", "--out", "t")[0] == 0
    first = tmp_path / "t/tomo_000/tomogram.mrc"
    before = first.stat().st_mtime_ns
    assert run("--count", "2", "--out", "t")[0] == 0
    assert first.stat().st_mtime_ns == before
    assert (tmp_path / "t/tomo_001/tomogram.mrc").is_file()
    for changed in (("--seed", "9"), ("--tilt-series",)):
        code, _, err = run("--count", "2", "--out", "t", *changed)
        assert code == 2
        assert "another recipe, shape or kind" in err
    assert first.stat().st_mtime_ns == before
    # Structures that have moved are the same structures.
    description = tmp_path / "t/tomograms.json"
    content = json.loads(description.read_text())
    content["recipe"]["structures"] = ["/elsewhere"]
    description.write_text(json.dumps(content))
    assert run("--count", "2", "--out", "t")[0] == 0
    assert first.stat().st_mtime_ns == before
    first.unlink()
    code, out, err = run("--count", "2", "--out", "t")
    assert (code, out) == (2, "")
    assert "t/tomo_000 holds no tomogram.mrc: remove the folder" in err


def test_a_full_disk_is_one_clear_line_and_the_same_command_completes(
    run: Run, tmp_path: Path
) -> None:
    shape = ("28", "104", "104")
    num_bytes = 4 * 28 * 104 * 104
    assert run("--count", "1", "--out", "t", shape=shape)[0] == 0
    kept = contents(tmp_path / "t")
    (tmp_path / "t" / ".tomo_001.0123456789ab.tmp").mkdir()  # as after a kill
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The store is smaller than a tomogram, and goes on being written.
    assert (tmp_path / "store.db").stat().st_size < num_bytes
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        code, out, err = run("--count", "2", "--out", "t", shape=shape)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert "tomogram.mrc could not be written, File too large: it needs at least 1.2" in line
    assert "make room, then give the same command again" in line
    assert contents(tmp_path / "t") == kept
    assert run("--count", "2", "--out", "t", shape=shape)[0] == 0
    assert (tmp_path / "t/tomo_001/record.json").is_file()
    assert not list((tmp_path / "t").glob(".*"))


def test_a_folder_with_something_else_in_it_is_left_alone(run: Run, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    code, _, err = run("--out", "mine")
    assert code == 2
    assert "not empty" in err
    assert contents(tmp_path / "mine") == {"notes.txt": b"mine"}


def test_one_tomogram_of_the_road_and_of_the_command_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    connect(f"sqlite:///{tmp_path}/store.db")
    recipe = load_recipe("tiny").simulation
    written = write_tomogram(recipe, tmp_path / "road")
    (folder,) = simulate_tomograms(recipe, tmp_path / "t", count=1)
    np.testing.assert_array_equal(
        read_volume(written.tomogram).data, read_volume(folder / "tomogram.mrc").data
    )
    assert written.truth.classes.max() <= len(written.class_names)
    with pytest.raises(FileExistsError, match="--overwrite"):
        write_tomogram(recipe, tmp_path / "road")
