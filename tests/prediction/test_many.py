"""Many tomograms through a semantic segmenter: as one by one, whatever fails or ends the work."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
import pandas as pd
import pytest

from cectflow.cli import main
from cectflow.execution import Workplace
from cectflow.flows.segmentation import predict_segments
from cectflow.particles import read_particles
from cectflow.prediction.contract import InputOptions
from cectflow.prediction.inputs import InputFiles, list_tomograms
from cectflow.prediction.journal import journal_folder
from cectflow.prediction.many import ManySegmentation
from cectflow.prediction.picks import PickRules
from cectflow.prediction.whole import WholeOptions, WholeOutputs
from cectflow.star import format_star
from cectflow.volume import Volume, read_volume
from cectflow.volume_writer import write_volume

pytest_plugins = ("exported",)

VOXEL = 10.0
NAMES = ("TS_1", "TS_2", "TS_10")
ALL = WholeOptions(rules=PickRules(min_volume=0.0, radius=0.0))
"""Of an untrained network; what it calls foreground is small."""


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(16, 40, 32)).astype(np.float32)


@pytest.fixture
def series(tmp_path: Path) -> Path:
    """A folder with three tomograms."""
    folder = tmp_path / "tomograms"
    folder.mkdir()
    for seed, name in enumerate(NAMES):
        write_volume(folder / f"{name}.mrc", Volume(noise(seed), VOXEL))
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def segment(
    model: Path,
    given: object,
    outputs: WholeOutputs,
    told: list[str] | None = None,
    *,
    whole: WholeOptions = ALL,
    **options: Any,
) -> ManySegmentation:
    where = options.pop("where", Workplace())
    outcome = predict_segments(
        str(model), InputFiles(tomogram=str(given)), outputs, InputOptions(device="cpu", **options),
        ([] if told is None else told).append, whole=whole, where=where,
    )  # fmt: skip
    assert isinstance(outcome, ManySegmentation)
    return outcome


def outputs_in(folder: Path, *, picks: str = "picks.star") -> WholeOutputs:
    return WholeOutputs(
        folder / "{name}.mrc", folder / "{name}_p.mrc", folder / picks, folder / "{name}.png"
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("workers", [1, 2])
def test_many_tomograms_are_segmented_as_one_by_one(
    semantic: Path, series: Path, out: Path, tmp_path: Path, workers: int
) -> None:
    told: list[str] = []
    outcome = segment(
        semantic, f"{series}/{{name}}.mrc", outputs_in(out), told, where=Workplace(workers)
    )
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["picks.star", *(f"{name}{end}" for name in NAMES for end in (".mrc", "_p.mrc", ".png"))]
    )
    everywhere = read_particles(out / "picks.star")
    assert len(everywhere)
    assert sorted(everywhere.tomograms) == sorted(NAMES)
    single = tmp_path / "single"
    single.mkdir()
    for name in NAMES:
        alone = WholeOutputs(single / "l.mrc", single / "p.mrc", single / "p.star")
        predict_segments(
            str(semantic), InputFiles(tomogram=series / f"{name}.mrc"), alone,
            InputOptions(overwrite=True), lambda _: None, whole=ALL,
        )  # fmt: skip
        for ours, own in (("", "l"), ("_p", "p")):
            np.testing.assert_allclose(
                read_volume(out / f"{name}{ours}.mrc").data,
                read_volume(single / f"{own}.mrc").data,
                atol=1e-5,
            )
        pd.testing.assert_frame_equal(
            everywhere.in_tomogram(name).rows.reset_index(drop=True),
            read_particles(single / "p.star").rows,
            atol=1e-4,
        )
        assert sum(line.startswith(f"{name}: ribosome ") for line in told) == 1
        assert outcome.shares[name]["ribosome"] == pytest.approx(
            (read_volume(single / "l.mrc").data == 1).mean()
        )
    assert outcome.num_picks is not None
    assert sum(outcome.num_picks.values()) == len(everywhere)
    assert outcome.figures["tomograms"] == 3
    assert sum("1 window of" in line for line in told) == 1
    assert "3 tomograms by semantic: " in told[-1]


def test_each_tomogram_may_have_a_table_of_its_own(semantic: Path, series: Path, out: Path) -> None:
    segment(semantic, f"{series}/*.mrc", outputs_in(out, picks="picks_{name}.star"))
    for name in NAMES:
        assert read_particles(out / f"picks_{name}.star").tomograms == (name,)


# What fails


def test_a_tomogram_that_cannot_be_segmented_costs_itself(
    semantic: Path,
    series: Path,
    out: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with mrcfile.open(series / "TS_2.mrc", mode="r+") as file:
        file.data[3] = np.nan
    write_volume(series / "fine.mrc", Volume(noise(7), 7.0))
    listed = [*(series / f"{name}.mrc" for name in (*NAMES, "fine")), "gone.mrc"]
    (tmp_path / "list.txt").write_text("\n".join(map(str, listed)), encoding="utf-8")
    arguments = [
        "predict", "segment", "--model", str(semantic), "--tomogram", str(tmp_path / "list.txt"),
        "--out", str(out / "{name}_labels.mrc"), "--picks", str(out / "picks.star"),
        "--min-volume", "0", "--device", "cpu",
    ]  # fmt: skip
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    said = capsys.readouterr().out
    assert stop.value.code == 4, said
    assert "3 of 5 tomograms could not be segmented" in said
    with (out / "labels_failures.csv").open(encoding="utf-8") as file:
        reasons = {row["tomogram"]: row["reason"] for row in csv.DictReader(file)}
    assert reasons.keys() == {"TS_2", "fine", "gone"}
    assert "voxels are not finite" in reasons["TS_2"]
    assert "voxel size is 7 Å: expected 10 Å" in reasons["fine"]
    assert "there is no tomogram" in reasons["gone"]
    assert {path.name for path in out.iterdir() if not path.name.startswith(".")} == {
        "TS_1_labels.mrc", "TS_10_labels.mrc", "picks.star", "labels_failures.csv",
    }  # fmt: skip
    finished = (out / "TS_1_labels.mrc").stat().st_mtime_ns
    write_volume(series / "TS_2.mrc", Volume(noise(1), VOXEL), overwrite=True)
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    said = capsys.readouterr().out
    assert stop.value.code == 4
    assert "going on: 2 of 3 tomograms are finished" in said
    assert "2 of 5 tomograms could not be segmented" in said
    assert (out / "TS_1_labels.mrc").stat().st_mtime_ns == finished
    assert sorted(read_particles(out / "picks.star").tomograms) == sorted(NAMES)
    (tmp_path / "list.txt").write_text("\n".join(map(str, listed[:3])), encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert not stop.value.code, capsys.readouterr()
    assert {path.name for path in out.iterdir()} == {
        "TS_1_labels.mrc", "TS_2_labels.mrc", "TS_10_labels.mrc", "picks.star",
    }  # fmt: skip


def test_where_none_can_be_segmented_nothing_is_written(
    semantic: Path, series: Path, out: Path
) -> None:
    with pytest.raises(ValueError, match=r"none of 3 tomograms .* TS_1: voxel size is 20 Å"):
        segment(semantic, f"{series}/*.mrc", outputs_in(out), voxel_size=20.0)
    for name in NAMES:
        write_volume(series / f"{name}.mrc", Volume(0 * noise(0), VOXEL), overwrite=True)
    with pytest.raises(ValueError, match=r"none of 3 tomograms .* TS_1: .* is constant"):
        segment(semantic, f"{series}/*.mrc", outputs_in(out))
    assert not contents(out)


# What ends the work


def interrupted_after(count: int) -> Iterator[None]:
    yield from [None] * count
    raise KeyboardInterrupt


def test_an_interrupted_run_goes_on_from_the_tomograms_that_are_finished(
    semantic: Path,
    series: Path,
    out: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from cectflow.prediction import many

    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    segment(semantic, series, outputs_in(undisturbed))
    work, left = many.segment_whole, interrupted_after(2)

    def meddle(*arguments: Any, **options: Any) -> Any:
        next(left)
        return work(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(many, "segment_whole", meddle)
        with pytest.raises(KeyboardInterrupt):
            segment(semantic, series, outputs_in(out))
    journal = journal_folder(out / "{name}.mrc")
    assert journal.is_dir()
    (journal / ".TS_10.mrc.killed.tmp").mkdir()
    write_volume(series / "TS_11.mrc", Volume(noise(11), VOXEL))
    finished = {path: path.stat().st_mtime_ns for path in out.glob("*.mrc")}
    assert len(finished) == 4
    with pytest.raises(ValueError, match=r"was begun with another min_volume \(0.0, now 1.0\)"):
        segment(
            semantic, series, outputs_in(out), whole=WholeOptions(rules=PickRules(min_volume=1.0))
        )
    told: list[str] = []
    with pytest.raises(SystemExit) as stop:
        main(
            ["predict", "segment", "--model", str(semantic), "--tomogram", str(series), "--out",
             str(out / "{name}.mrc"), "--dry-run", "--device", "cpu", "--picks",
             str(out / "picks.star"), "--min-volume", "0", "--nms-radius", "0"]
        )  # fmt: skip
    assert not stop.value.code
    assert "would segment 4 of 4 tomograms" in (said := capsys.readouterr().out)
    assert "2 of which are finished" in said
    (series / "TS_11.mrc").unlink()
    segment(semantic, series, outputs_in(out), told)
    assert told[0] == "going on: 2 of 3 tomograms are finished"
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert not journal.exists()
    maps = {name: file for name, file in contents(out).items() if name.endswith(".mrc")}
    assert maps.keys() == {f"{name}{end}.mrc" for name in NAMES for end in ("", "_p")}
    for name in maps:
        np.testing.assert_array_equal(
            read_volume(out / name).data, read_volume(undisturbed / name).data
        )
    assert contents(out)["picks.star"] == contents(undisturbed)["picks.star"]
    with pytest.raises(FileExistsError, match="--overwrite"):
        segment(semantic, series, outputs_in(out))


def test_a_map_that_was_removed_meanwhile_is_made_again(
    semantic: Path, series: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cectflow.prediction import many

    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(many, "_assemble", fail)
        with pytest.raises(KeyboardInterrupt):
            segment(semantic, series, outputs_in(out))
    (out / "TS_2.mrc").unlink()
    told: list[str] = []
    segment(semantic, series, outputs_in(out), told)
    assert told[0] == "going on: 2 of 3 tomograms are finished"
    assert (out / "TS_2.mrc").is_file()


def test_interrupted_in_the_first_tomogram_the_same_command_goes_on(
    semantic: Path, series: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cectflow.prediction import whole

    def fill(*_: Any, **__: Any) -> None:
        msg = "the disk is full"
        raise OSError(msg)

    with monkeypatch.context() as patch:
        patch.setattr(whole, "_draw", fill)
        with pytest.raises(OSError, match="the disk is full"):
            segment(semantic, series, outputs_in(out))
    assert [path.name for path in out.glob("*.mrc")]
    assert len(segment(semantic, series, outputs_in(out)).shares) == 3
    assert not journal_folder(out / "{name}.mrc").exists()


def test_a_tomogram_without_picks_changes_no_column(
    semantic: Path, series: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cectflow.prediction import whole

    work = whole.make_picks

    def few(bodies: Any, positions: np.ndarray, *arguments: Any, **options: Any) -> Any:
        if options["tomogram"] in empty:
            bodies = bodies.select(np.zeros(len(bodies), bool))
            positions, options["volumes"] = positions[:0], options["volumes"][:0]
        return work(bodies, positions, *arguments, **options)

    monkeypatch.setattr(whole, "make_picks", few)
    kinds = []
    for empty in ((), NAMES[:1], NAMES[1:2], NAMES):
        outputs = WholeOutputs(out / "{name}.mrc", picks=out / "picks.csv")
        segment(semantic, series, outputs, overwrite=True)
        rows = pd.read_csv(out / "picks.csv")
        assert {*rows["rlnTomoName"]} == {*NAMES} - {*empty}
        kinds.append(rows.dtypes["rlnClassNumber"])
    assert kinds[0] == kinds[1] == kinds[2] == np.int64


# What is refused before work starts


@pytest.mark.parametrize("name", ["data_1", "a#b", "_x", "o'neill"])
def test_a_name_that_star_cannot_hold_is_a_fault_of_its_tomogram(
    semantic: Path, series: Path, out: Path, name: str
) -> None:
    (series / "TS_2.mrc").rename(series / f"{name}.mrc")
    outcome = segment(semantic, series, outputs_in(out))
    assert outcome.faults.keys() == {name}
    assert f"{name!r} cannot be written into" in outcome.faults[name]
    alone = WholeOutputs(out / "l.mrc", picks=out / "p.star")
    with pytest.raises(ValueError, match="cannot be written into"):
        predict_segments(
            str(semantic), InputFiles(tomogram=series / f"{name}.mrc"), alone, InputOptions(),
            lambda _: None,
        )  # fmt: skip
    assert not (out / "l.mrc").exists()


def test_a_value_beyond_float32_is_a_fault_and_no_background(
    semantic: Path, series: Path, out: Path
) -> None:
    with mrcfile.open(series / "TS_1.mrc", mode="r+") as file:
        file.data[...] *= 1e-3
        file.data[8, 20, 16] = 3e38
    outcome = segment(semantic, series, outputs_in(out))
    assert outcome.faults.keys() == {"TS_1"}
    assert "the network's answer is no number in the window at (0, 0, 0)" in outcome.faults["TS_1"]
    assert not (out / "TS_1.mrc").exists()


@pytest.mark.parametrize("given", ["list.txt", "tomograms.star"])
def test_a_list_or_table_of_tomograms_is_never_replaced(
    semantic: Path, series: Path, out: Path, given: str
) -> None:
    listing = series / given
    rows = {"rlnTomoName": ["TS_1"], "rlnTomoReconstructedTomogram": ["TS_1.mrc"]}
    table = format_star({"global": pd.DataFrame(rows)})
    listing.write_text("TS_1.mrc\n" if given == "list.txt" else table, encoding="utf-8")
    before = listing.read_bytes()
    for labels in ("{name}.mrc", "l.mrc"):
        outputs = WholeOutputs(out / labels, picks=listing)
        with pytest.raises(ValueError, match="is the input"):
            predict_segments(
                str(semantic), InputFiles(tomogram=str(listing)), outputs,
                InputOptions(overwrite=True), lambda _: None,
            )  # fmt: skip
    assert listing.read_bytes() == before


def test_maps_beside_the_tomograms_are_left_out_the_second_time(
    semantic: Path, series: Path
) -> None:
    outputs = WholeOutputs(series / "{name}_labels.mrc")
    told: list[str] = []
    for overwrite in (False, True):
        outcome = segment(
            semantic, f"{series}/{{name}}.mrc", outputs, told, whole=WholeOptions(),
            overwrite=overwrite,
        )  # fmt: skip
        assert outcome.shares.keys() == {*NAMES}
    assert told.count("3 of 6 files are outputs of this command: left out") == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": "l.mrc"}, r"--out .*l.mrc would be one file of many.*such as .*\{name\}.mrc"),
        ({"probabilities": "p.mrc"}, "--probabilities .*would be one file of many"),
        ({"figure": "f.png"}, "--figure .*would be one file of many"),
        ({"labels": "{name}/{name}.mrc"}, "stands in the name of a file, not of its folder"),
    ],
)
def test_files_that_tomograms_would_share_are_refused(
    semantic: Path, series: Path, out: Path, changes: dict[str, str], message: str
) -> None:
    paths = {"labels": out / "{name}.mrc"} | {key: out / name for key, name in changes.items()}
    with pytest.raises(ValueError, match=message):
        segment(semantic, f"{series}/*.mrc", WholeOutputs(**paths), whole=WholeOptions())
    assert not contents(out)


def test_an_output_that_is_a_tomogram_is_refused(semantic: Path, series: Path) -> None:
    before = contents(series)
    with pytest.raises(ValueError, match=r"TS_1\w*.mrc is the input"):
        segment(
            semantic, f"{series}/*.mrc", WholeOutputs(series / "{name}.mrc"), overwrite=True,
            whole=WholeOptions(),
        )  # fmt: skip
    assert contents(series) == before


def test_a_dry_run_tells_and_writes_nothing(
    semantic: Path, series: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_volume(series / "fine.mrc", Volume(noise(7), 7.0))
    arguments = [
        "predict", "segment", "--model", str(semantic), "--tomogram", f"{series}/*.mrc",
        "--dry-run", "--device", "cpu", "--out",
    ]  # fmt: skip
    with pytest.raises(SystemExit) as stop:
        main([*arguments, str(out / "{name}.mrc")])
    assert not stop.value.code
    said = capsys.readouterr().out
    assert "would segment 3 of 4 tomograms with semantic" in said
    assert "fine: voxel size is 7 Å: expected 10 Å" in said
    assert f"TS_10: {series / 'TS_10.mrc'}" in said
    assert not contents(out)


def test_processes_for_a_single_tomogram_are_refused(
    semantic: Path, segmenter: Path, series: Path, out: Path
) -> None:
    with pytest.raises(ValueError, match="--workers, --cluster and --dry-run are for many"):
        segment(
            semantic, series / "TS_1.mrc", WholeOutputs(out / "l.mrc"), where=Workplace(2),
            whole=WholeOptions(),
        )  # fmt: skip
    with pytest.raises(ValueError, match=r"'target': outputs with \{name\} in their names need"):
        predict_segments(
            str(segmenter), InputFiles(tomogram=series / "TS_1.mrc"),
            WholeOutputs(out / "{name}.mrc"), InputOptions(), lambda _: None,
        )  # fmt: skip
    with pytest.raises(ValueError, match="'target': --workers need a semantic segmenter"):
        predict_segments(
            str(segmenter), InputFiles(tomogram=series / "TS_1.mrc"), WholeOutputs(out / "l.mrc"),
            InputOptions(), lambda _: None, where=Workplace(2),
        )  # fmt: skip


# Which tomograms there are


def test_tomograms_are_named_by_files_patterns_lists_and_tables(
    series: Path, tmp_path: Path
) -> None:
    files = {name: series / f"{name}.mrc" for name in NAMES}
    assert list_tomograms(str(series)) == files
    assert list_tomograms(f"{series}/TS_1*.mrc") == {
        name: files[name] for name in ("TS_1", "TS_10")
    }
    assert list_tomograms(f"{series}/TS_{{name}}.mrc") == {
        name.removeprefix("TS_"): path for name, path in files.items()
    }
    assert list_tomograms(str(files["TS_2"])) == {"TS_2": files["TS_2"]}
    table = tmp_path / "tomograms.star"
    rows = pd.DataFrame({
        "rlnTomoName": ["TS_1.tomostar", "TS_5.tomostar"],
        "rlnTomoReconstructedTomogram": ["tomograms/TS_1.mrc", "tomograms/TS_5.mrc"],
    })  # fmt: skip
    table.write_text(format_star({"global": rows}), encoding="utf-8")
    found = list_tomograms(str(table))
    assert found["TS_1"] == files["TS_1"]
    assert "there is no tomogram" in str(found["TS_5"])


def test_lists_of_other_editors_repeats_and_hidden_files(series: Path, tmp_path: Path) -> None:
    (series / "._TS_1.mrc").write_bytes(b"of macOS")
    assert [*list_tomograms(str(series))] == sorted(NAMES)
    listing = tmp_path / "list.txt"
    path = series / "TS_1.mrc"
    listing.write_text(f"{path}\n{path}\n", encoding="utf-8-sig")
    assert list_tomograms(str(listing)) == {"TS_1": path}
    listing.write_text("# none\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"list.txt names no tomogram: expected paths"):
        list_tomograms(str(listing))
    listing.write_text(f"{series}/._TS_1.mrc", encoding="utf-8")
    with pytest.raises(ValueError, match="begins with a dot"):
        list_tomograms(str(listing))
    rows = {
        "rlnTomoName": ["TS_1", "TS_1.tomostar"], "rlnTomoReconstructedTomogram": ["a.mrc", "b.mrc"]
    }  # fmt: skip
    table = tmp_path / "tomograms.star"
    table.write_text(format_star({"global": pd.DataFrame(rows)}), encoding="utf-8")
    with pytest.raises(ValueError, match="describes the tomogram 'TS_1' more than once"):
        list_tomograms(str(table))


def test_a_name_that_comes_twice_in_a_path_is_one_name(series: Path, tmp_path: Path) -> None:
    for folder, name in (("a", "a"), ("b", "b"), ("b", "a")):
        (tmp_path / folder).mkdir(exist_ok=True)
        write_volume(tmp_path / folder / f"{name}.mrc", Volume(noise(0), VOXEL))
    pattern = f"{tmp_path}/{{name}}/{{name}}.mrc"
    assert list_tomograms(pattern) == {name: tmp_path / name / f"{name}.mrc" for name in ("a", "b")}
    (tmp_path / "b" / "b1.mrc").write_bytes((tmp_path / "b" / "b.mrc").read_bytes())
    assert [*list_tomograms(f"{tmp_path}/{{name}}/{{name}}1.mrc")] == ["b"]
    with pytest.raises(ValueError, match=r"would both be called 'a': say .*\{name\}"):
        list_tomograms(f"{tmp_path}/*/a.mrc")
    with pytest.raises(FileNotFoundError, match="no file has a name so"):
        list_tomograms(f"{tmp_path}/{{name}}.rec")
