"""Inputs: which file is the tomogram of which name, and what becomes of names without one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from builders import make_card, write_dataset

from cectflow.cli import main
from cectflow.exit_codes import INCOMPLETE
from cectflow.particles import make_particle_rows, particles_from, read_particles
from cectflow.placement import coordinate_columns
from cectflow.prediction.contract import InputOptions
from cectflow.prediction.inputs import InputFiles, find_tomograms
from cectflow.star import format_star
from cectflow.volume import Volume
from cectflow.volume_writer import write_volume

VOXEL_SIZE = 12.0
SHAPE = (24, 40, 48)
NAMES = ("TS_1", "TS_10", "TS_2")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Tomograms that hold their number, with names as WarpTools and IMOD give them."""
    folder = tmp_path / "tomograms"
    folder.mkdir()
    for number, name in enumerate(("TS_1.mrc", "TS_10.mrc", "TS_2_12.00Apx.rec")):
        data = np.random.default_rng(number).normal(size=SHAPE).astype(np.float32)
        write_volume(folder / name, Volume(data, VOXEL_SIZE))
    return folder


def write_picks(path: Path, names: list[str]) -> Path:
    positions = np.random.default_rng(0).uniform((8, 8, 8), (16, 32, 40), (len(names), 3))
    rows = make_particle_rows(positions.round(2), tomogram="").assign(rlnTomoName=names)
    particles_from(rows.assign(order=np.arange(len(names)))).write(path)
    return path


def run(*arguments: Any) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["predict", *map(str, arguments)])
    return int(stop.value.code or 0)


def found(given: str | Path, *names: str) -> list[str]:
    """File name of each tomogram, or why there is none."""
    files = find_tomograms(str(given), names)
    assert list(files) == list(names)
    return [each if isinstance(each, str) else each.name for each in files.values()]


def test_files_fit_names_up_to_what_is_no_letter_or_digit(folder: Path) -> None:
    expected = ["TS_1.mrc", "TS_10.mrc", "TS_2_12.00Apx.rec"]
    for given in (folder, f"{folder}/*", f"{folder.parent}/**/TS*"):
        assert found(given, *NAMES) == expected
        assert found(given, *(f"{name}.tomostar" for name in NAMES)) == expected
        assert found(given, "a/b/TS_1.mrc", "TS_10.rec") == expected[:2]
    assert found(f"{folder}/{{name}}.mrc", "TS_1.tomostar", "TS_10") == expected[:2]
    assert found(folder / "TS_1.mrc", "whatever") == ["TS_1.mrc"]  # one volume, one name
    assert found(folder / "TS_1.mrc", "") == ["TS_1.mrc"]


def test_one_file_of_a_glob_is_not_taken_for_a_tomogram_of_another_name(folder: Path) -> None:
    (reason,) = found(f"{folder}/TS_10*", "TS_1")
    assert reason == f"there is no file for the tomogram 'TS_1' among 1 at {folder}/TS_10*"


def test_a_list_holds_paths_from_here_or_from_its_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["# tomograms", "", " TS_1.mrc ", str(folder / "TS_10.mrc"), "gone/TS_2.mrc"]
    (folder / "list.txt").write_text("\n".join(lines))
    for here in (folder, folder.parent):
        monkeypatch.chdir(here)
        assert found(folder / "list.txt", *NAMES)[:2] == ["TS_1.mrc", "TS_10.mrc"]
    (folder / "empty.txt").write_text("# none\n")
    with pytest.raises(ValueError, match=r"the list .*empty.txt names no tomogram"):
        found(folder / "empty.txt", "TS_1")
    with pytest.raises(FileNotFoundError, match=r"there is no list .*gone.txt"):
        found(folder / "gone.txt", "TS_1")
    for content in (b"\xff\xfe\0", b"a\0b"):
        (folder / "binary.txt").write_bytes(content)
        with pytest.raises(ValueError, match=r"binary.txt is no text: expected a list"):
            found(folder / "binary.txt", "TS_1")


def test_several_files_of_one_name_are_refused_with_the_remedy(folder: Path) -> None:
    (folder / "TS_1_denoised.mrc").touch()
    assert found(folder, "TS_1") == ["TS_1.mrc"]  # the very name comes before what begins so
    (folder / "TS_2_b.mrc").touch()
    with pytest.raises(ValueError, match=r"2 files at .* fit the tomogram 'TS_2'.*holds \{name\}"):
        found(folder, "TS_2")
    (folder / "TS_1.rec").touch()
    with pytest.raises(ValueError, match="fit the tomogram 'TS_1'"):
        found(folder, "TS_1")
    with pytest.raises(ValueError, match=r"name no tomogram, and .* are 6: expected one"):
        found(folder, "")


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "", "..", ".", ".tomostar", "a/b", "a\\b", "a\0b", ".hidden"]
)
def test_hostile_names_lead_nowhere(folder: Path, name: str) -> None:
    why = "cannot be put in place of" if name else "the particles name no tomogram, which {name} in"
    with pytest.raises(ValueError, match=re.escape(why)):
        found(f"{folder}/{{name}}.mrc", name)
    (reason, _) = found(folder, name, "TS_1")
    assert "no tomogram" in reason or "no file for the tomogram" in reason


def write_tomogram_table(path: Path, files: list[str], column: str, sizes: bool = True) -> Path:
    rows = pd.DataFrame({"rlnTomoName": NAMES[: len(files)], column: files})
    for axis, size in zip("ZYX", SHAPE, strict=True):
        rows[f"rlnTomoSize{axis}"] = 2 * size
    rows["rlnTomoTiltSeriesPixelSize"] = VOXEL_SIZE / 2
    path.write_text(format_star({"global": rows if len(rows) > 1 else rows.iloc[0].to_dict()}))
    return path


@pytest.mark.parametrize(
    "column", ["rlnTomoReconstructedTomogram", "rlnTomoReconstructedTomogramDenoised"]
)
def test_relions_table_names_the_files(folder: Path, column: str) -> None:
    files = ["TS_1.mrc", str(folder / "TS_10.mrc")]
    table = write_tomogram_table(folder / "tomograms.star", files, column)
    assert found(table, "TS_1", "TS_10.tomostar") == ["TS_1.mrc", "TS_10.mrc"]
    (reason,) = found(table, "TS_2")
    assert "tomograms.star does not describe the tomogram 'TS_2'" in reason
    one = write_tomogram_table(folder / "one.star", ["TS_1.mrc"], column)
    assert found(one, "TS_1") == ["TS_1.mrc"]
    other = write_tomogram_table(folder / "other.star", ["TS_1.mrc"], "rlnTomoOther")
    with pytest.raises(ValueError, match=r"names no reconstructions.*--tomogram-table"):
        found(other, "TS_1")


def classify(model: Path, out: Path, *arguments: Any) -> tuple[int, pd.DataFrame]:
    code = run("classify", "--model", model, "--out", out, *arguments)
    return code, read_particles(out).rows


def test_what_has_no_tomogram_is_listed_and_the_rest_is_predicted_in_order(
    classifier: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["TS_10", "TS_3", "TS_1", "TS_2", "TS_10", "TS_1", "TS_3", "TS_2"]
    picks = write_picks(tmp_path / "picks.star", names)
    outs = []
    for number, given in enumerate((folder, f"{folder}/TS_*", folder / "list.txt")):
        (folder / "list.txt").write_text("TS_1.mrc\nTS_10.mrc\nTS_2_12.00Apx.rec\n")
        out = tmp_path / f"{number}.star"
        code, rows = classify(
            classifier, out, "--tomogram", given, "--particles", picks, "--block-size", 2
        )
        assert code == INCOMPLETE
        assert rows["rlnTomoName"].tolist() == names
        assert rows["order"].tolist() == list(range(len(names)))
        assert (rows["cectflowClassName"] == "none").tolist() == [n == "TS_3" for n in names]
        failures = pd.read_csv(tmp_path / f"{number}_failures.csv")
        assert failures["row"].tolist() == [2, 7]
        assert failures["particle"].tolist() == ["TS_3", "TS_3"]
        assert failures["reason"].str.contains("no file for the tomogram 'TS_3'").all()
        outs.append(rows)
    assert (
        "2 of 8 particles could not be predicted: class none, number 0" in capsys.readouterr().out
    )
    for rows in outs[1:]:
        pd.testing.assert_frame_equal(rows, outs[0])


def test_each_particle_is_cut_from_its_own_tomogram(
    classifier: Path, folder: Path, tmp_path: Path
) -> None:
    picks = write_picks(tmp_path / "picks.star", ["TS_10", "TS_1", "TS_2"] * 4)
    table = read_particles(picks)
    _, together = classify(
        classifier, tmp_path / "o.star", "--tomogram", folder, "--particles", picks
    )
    for name, rows in table.rows_by_tomogram().items():
        table.take(rows).write(tmp_path / f"{name}.star")
        (path,) = folder.glob(f"{name}[._]*")
        _, alone = classify(
            classifier, tmp_path / f"{name}_out.star", "--tomogram", path, "--particles",
            tmp_path / f"{name}.star",
        )  # fmt: skip
        np.testing.assert_allclose(
            together["cectflowProbability"][rows], alone["cectflowProbability"], atol=1e-5
        )


def test_centred_picks_need_the_table_and_one_that_it_lacks_costs_its_rows(
    classifier: Path, folder: Path, tmp_path: Path
) -> None:
    plain = write_picks(tmp_path / "plain.star", ["TS_1", "TS_10", "TS_2"] * 3)
    rows = read_particles(plain).rows
    zyx = rows[[f"rlnCoordinate{axis}" for axis in "ZYX"]].to_numpy()
    centred = coordinate_columns(zyx, "relion5", voxel_size=VOXEL_SIZE, shape=SHAPE)
    kept = rows[["rlnTomoName", "order"]]
    particles_from(kept.assign(**centred)).write(tmp_path / "centred.star")
    files = ["TS_1.mrc", "TS_10.mrc"]
    table = write_tomogram_table(folder / "t.star", files, "rlnTomoReconstructedTomogram")
    code, expected = classify(
        classifier, tmp_path / "a.star", "--tomogram", folder, "--particles", plain
    )
    assert code == 0
    ways = ["--tomogram", table], ["--tomogram", folder, "--tomogram-table", table]
    for number, tomogram in enumerate(ways):
        out = tmp_path / f"b{number}.star"
        code, answers = classify(
            classifier, out, *tomogram, "--particles", tmp_path / "centred.star"
        )
        assert code == INCOMPLETE
        described = (rows["rlnTomoName"] != "TS_2").to_numpy()
        np.testing.assert_allclose(
            answers["cectflowProbability"][described], expected["cectflowProbability"][described],
            atol=1e-4,
        )  # fmt: skip
        assert (answers["cectflowClassName"][~described] == "none").all()
        assert "does not describe 'TS_2'" in out.with_name(f"b{number}_failures.csv").read_text()


def test_a_dataset_folder_is_read_split_by_split(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data")
    files = InputFiles(str(tmp_path / "data"))
    assert [path.parent.name for path in files.volumes] == ["train", "validation", "test"]
    source = files.open(make_card(), InputOptions(), lambda _: None)
    assert len(source.table) == 36
    assert sum(len(cubes) for cubes in source.batches()) == 36
    assert source.table.rows["rlnImageName"][12].endswith("validation/00000.mrcs")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--subtomograms", "none.star"], "there is no file none.star"),
        (["--subtomograms", "none/*.mrc"], "no subtomograms at 'none/*.mrc'"),
        (["--tomogram", "none/*.mrc", "--particles", "picks.star"], "no tomogram at"),
        (["--tomogram", "TS_1.mrc", "--particles", "none.star"], "there is no file none.star"),
        (["--tomogram", "TS_1.mrc", "--particles", "zero.star"], "zero.star holds no particles"),
        (["--subtomograms", "zero_list.star"], "there are no particles to predict"),
        (["--subtomograms", "a.mrcs", "--particles", "picks.star"], "either --subtomograms, or"),
        (["--tomogram", "{name}.rec", "--particles", "picks.star"], "there is no tomogram TS_1"),
    ],
)
def test_nothing_to_predict_is_refused_with_what_was_expected(
    classifier: Path, folder: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(folder)
    picks = read_particles(write_picks(folder / "picks.star", ["TS_1"] * 2))
    picks.select([False, False]).write(folder / "zero.star")
    particles_from(pd.DataFrame({"rlnImageName": pd.Series([], dtype=str)})).write(
        folder / "zero_list.star"
    )
    assert run("classify", "--model", classifier, *arguments, "--out", "answer.star") == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in folder.iterdir() if "answer" in path.name] == []


def test_segmenting_particles_of_several_tomograms_is_refused(
    segmenter: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picks = write_picks(tmp_path / "picks.star", ["TS_1", "TS_2", "TS_1"])
    code = run(
        "segment", "--model", segmenter, "--tomogram", folder / "TS_1.mrc", "--particles", picks,
        "--out", tmp_path / "o.mrc",
    )  # fmt: skip
    assert code == 2
    expected = "the particles are in 2 tomograms, 'TS_1', 'TS_2' and so on, and a label map is of"
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "o.mrc").exists()
