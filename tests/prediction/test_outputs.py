"""Outputs of a classification: nothing of the input lost, nothing else replaced."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path
from typing import Any

import matplotlib.image
import mrcfile
import numpy as np
import pandas as pd
import pytest
import starfile
from builders import make_trust

from cectflow.cli import main
from cectflow.exit_codes import INCOMPLETE
from cectflow.flows.prediction import predict_classes
from cectflow.model_card import CARD_FILE, ModelCard, TypicalLogits
from cectflow.particles import (
    ParticleTable,
    make_particle_rows,
    particles_from,
    read_particles,
)
from cectflow.prediction.classify import Classification
from cectflow.prediction.contract import InputOptions
from cectflow.prediction.figures import Example, draw_classes
from cectflow.prediction.inputs import InputFiles
from cectflow.prediction.outputs import ClassOutputs, plain_name
from cectflow.volume import Volume
from cectflow.volume_writer import write_stack, write_volume

VOXEL_SIZE = 12.0
CLASSES = ("ribosome", "proteasome", "apoferritin")
ADDED = {
    "cectflowClassName", "cectflowClassNumber", "cectflowProbability", "cectflowEntropy",
    "cectflowModel", "cectflowModelDigest", "rlnClassNumber",
}  # fmt: skip


def run(*arguments: Any) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["predict", "classify", *map(str, arguments)])
    return int(stop.value.code or 0)


def predict(
    model: Path, files: InputFiles, outputs: ClassOutputs | Path, **options: Any
) -> Classification:
    return predict_classes(str(model), files, outputs, InputOptions(**options), lambda _: None)


@pytest.fixture
def various(tmp_path: Path) -> Path:
    """Cubes that an untrained network does not call all the same."""
    generator = np.random.default_rng(4)
    cubes = generator.normal(size=(40, 16, 16, 16))
    ramp = np.linspace(-1, 1, 16)[:, None] * np.ones(16)
    cubes += generator.normal(0, 3, (40, 1, 1, 1)) * ramp
    cubes *= np.exp(generator.normal(0, 1, (40, 16, 1, 1)))
    write_stack(tmp_path / "various.mrcs", cubes.astype(np.float32), VOXEL_SIZE)
    return tmp_path / "various.mrcs"


def write_empty_tomogram(path: Path, size_xyz: tuple[int, int, int]) -> None:
    """A large tomogram of zeros that takes no room: a header, and a hole in the file."""
    write_volume(path, Volume(np.zeros((4, 4, 4), np.int8), VOXEL_SIZE))
    content = bytearray(path.read_bytes()[:1024])
    for start in (0, 28):  # size, sampling
        struct.pack_into("<3i", content, start, *size_xyz)
    struct.pack_into("<3f", content, 40, *(VOXEL_SIZE * n for n in size_xyz))
    path.write_bytes(content)
    with path.open("r+b") as file:
        file.truncate(1024 + int(np.prod(size_xyz)))


def test_a_table_of_relion_5_comes_back_whole(
    classifier: Path, shared_data: Path, tmp_path: Path
) -> None:
    given = shared_data / "star" / "relion5_particles.star"
    for name in read_particles(given).tomograms:
        # 4400 x 6000 x 1400 pixels of 1.667 Å, at 12 Å.
        write_empty_tomogram(tmp_path / f"{name.removesuffix('.tomostar')}.mrc", (611, 833, 194))
    out = tmp_path / "classes.star"
    code = run(
        "--model", classifier, "--tomogram", f"{tmp_path}/{{name}}.mrc", "--particles", given,
        "--out", out,
        "--tomogram-table", shared_data / "star" / "relion5_tomograms.star",
    )  # fmt: skip
    assert code == 0
    before = starfile.read(given, always_dict=True)
    after = starfile.read(out, always_dict=True)
    assert list(after) == list(before)
    for name, block in before.items():
        if isinstance(block, dict):
            assert after[name] == block
        elif name != "particles":
            pd.testing.assert_frame_equal(after[name], block)
    rows = after["particles"]
    assert list(rows)[: len(before["particles"].columns)] == list(before["particles"])
    pd.testing.assert_frame_equal(rows[list(before["particles"])], before["particles"])
    assert {*rows} - {*before["particles"]} == ADDED
    assert rows["rlnClassNumber"].between(1, 3).all()


def test_blocks_columns_and_a_class_of_the_users_own_are_kept(
    classifier: Path, tomogram: Path, positions_zyx: np.ndarray, tmp_path: Path
) -> None:
    rows = make_particle_rows(positions_zyx, tomogram="tomogram")
    rows = rows.assign(rlnClassNumber=[9, 8, 7, 6], note=["a b", "", "c", "1e5"])
    rows = rows.assign(number=[0.1, 1 / 3, 2.0, -0.0])
    optics = pd.DataFrame({"rlnOpticsGroup": [1, 2], "rlnVoltage": [300.0, 200.0]})
    table = ParticleTable(
        {"general": {"rlnVersion": 5}, "optics": optics, "particles": rows}, "particles"
    )
    table.write(tmp_path / "p.star")
    files = InputFiles(tomogram=tomogram, particles=tmp_path / "p.star")
    predict(classifier, files, tmp_path / "o.star")
    before, after = (read_particles(tmp_path / f"{name}.star") for name in "po")
    assert list(after.blocks) == ["general", "optics", "particles"]
    pd.testing.assert_frame_equal(after.rows[list(before.rows)], before.rows)
    pd.testing.assert_frame_equal(after.blocks["optics"], before.blocks["optics"])
    assert after.rows["cectflowClassNumber"].between(1, 3).all()
    # A second time over its own output: the answers are replaced, not doubled.
    files = InputFiles(tomogram=tomogram, particles=tmp_path / "o.star")
    predict(classifier, files, tmp_path / "again.star")
    pd.testing.assert_frame_equal(read_particles(tmp_path / "again.star").rows, after.rows)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_the_table_of_probabilities(
    classifier: Path, various: Path, tmp_path: Path, suffix: str
) -> None:
    outputs = ClassOutputs(tmp_path / "o.star", tmp_path / f"t.{suffix}")
    outcome = predict(classifier, InputFiles(str(various)), outputs)
    path = tmp_path / f"t.{suffix}"
    table = pd.read_csv(path) if suffix == "csv" else pd.read_parquet(path)
    star = read_particles(tmp_path / "o.star").rows
    assert table["row"].tolist() == list(range(1, 41))
    assert table["rlnImageName"].tolist() == star["rlnImageName"].tolist()
    assert table["class_name"].tolist() == star["cectflowClassName"].tolist()
    probabilities = table[[f"probability_{name}" for name in CLASSES]].to_numpy()
    np.testing.assert_allclose(probabilities, outcome.judgement.probabilities, atol=1e-6)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1.0, atol=1e-5)
    np.testing.assert_allclose(probabilities.max(axis=1), star["cectflowProbability"], atol=1e-6)
    entropy = -(probabilities * np.log(probabilities)).sum(axis=1)
    np.testing.assert_allclose(star["cectflowEntropy"], entropy, atol=1e-5)
    assert set(table["model"]) == {"classifier"}


def test_a_file_for_each_class_and_none_for_a_class_that_is_gone(
    classifier: Path, various: Path, tmp_path: Path
) -> None:
    outputs = ClassOutputs(tmp_path / "o.star", per_class=tmp_path / "classes")
    outcome = predict(classifier, InputFiles(str(various)), outputs)
    assert len(outcome.counts) >= 2  # or the test says little
    whole = read_particles(tmp_path / "o.star").rows
    for name in CLASSES:
        path = tmp_path / "classes" / f"{name}.star"
        assert path.is_file() == (name in outcome.counts)
        if path.is_file():
            expected = whole[whole["cectflowClassName"] == name].reset_index(drop=True)
            pd.testing.assert_frame_equal(read_particles(path).rows, expected)
    # Another run must not replace them unasked, and leaves none of a class that is gone.
    other = ClassOutputs(tmp_path / "p.star", per_class=tmp_path / "classes")
    with pytest.raises(FileExistsError, match=r"classes/\w+.star exists: give another"):
        predict(classifier, InputFiles(str(various)), other)
    (tmp_path / "classes" / "mine.star").write_text("mine")
    with mrcfile.open(various, mode="r+") as file:
        file.data[1:] = file.data[0]
    outcome = predict(classifier, InputFiles(str(various)), other, overwrite=True)
    (name,) = outcome.counts
    assert sorted(path.name for path in (tmp_path / "classes").iterdir()) == sorted(
        ["mine.star", f"{name}.star"]
    )


def test_names_of_class_files_are_plain_and_differ(tmp_path: Path) -> None:
    names = ("4v94#1", "4v94_1", "a/b", "..", "Ribo", "ribo", "αβ")
    files = ClassOutputs(tmp_path / "o.star", per_class=tmp_path / "c").class_files(names)
    assert len({path.name.lower() for path in files.values()}) == len(names)
    assert all(path.parent == tmp_path / "c" for path in files.values())
    assert plain_name("../../x") == "_.._x"
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="is a file: expected a folder"):
        ClassOutputs(tmp_path / "o.star", per_class=tmp_path / "file").class_files(names)
    with pytest.raises(FileNotFoundError, match=r"does not exist: create it"):
        ClassOutputs(tmp_path / "o.star", per_class=tmp_path / "no" / "c").class_files(names)


def test_the_summary_shows_what_was_found(classifier: Path, various: Path, tmp_path: Path) -> None:
    with mrcfile.open(various, mode="r+") as file:
        file.data[3] = np.nan
    outputs = ClassOutputs(tmp_path / "o.star", summary=tmp_path / "s.png")
    outcome = predict(classifier, InputFiles(str(various)), outputs)
    picture = matplotlib.image.imread(tmp_path / "s.png")
    assert picture.shape[0] > 100 * len(outcome.counts)
    assert picture[..., :3].std() > 0.1
    assert len(outcome.faults) == 1


def test_the_picture_names_every_class_and_every_count() -> None:
    example = Example(np.random.default_rng(0).normal(size=(16, 16)), 0.7)
    figure = draw_classes(
        {"rare": np.full(3, 0.7), "common": np.full(1200, 0.9), "none": np.zeros(0)},
        {"rare": [example] * 3, "common": [example] * 6, "none": []},
        voxel_size=10.0, title="student/3", missing=17,
    )  # fmt: skip
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert sum(len(axes.images) for axes in figure.axes) == 9
    assert any("1,200" in text for text in texts)
    assert "17" in figure.get_suptitle()
    draw_classes({"a": np.zeros(0)}, {"a": []}, voxel_size=10.0)


def test_failures_are_listed_refused_when_they_exist_and_removed_when_there_are_none(
    classifier: Path, various: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    intact = various.read_bytes()
    with mrcfile.open(various, mode="r+") as file:
        file.data[[3, 17], 2] = np.inf
    arguments = ["--model", classifier, "--subtomograms", various, "--out", tmp_path / "o.star"]
    assert run(*arguments) == INCOMPLETE
    failures = pd.read_csv(tmp_path / "o_failures.csv")
    assert failures["row"].tolist() == [4, 18]
    assert failures["particle"].tolist() == [f"{n:06d}@{various}" for n in (4, 18)]
    assert failures["reason"].str.contains("not finite: leave it out").all()
    (tmp_path / "o.star").unlink()
    capsys.readouterr()
    assert run(*arguments) == 2
    assert "o_failures.csv exists: give another --out, or --overwrite" in capsys.readouterr().err
    various.write_bytes(intact)
    assert run(*arguments, "--overwrite") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o.star", "various.mrcs"]


@pytest.mark.parametrize(
    ("option", "name", "message"),
    [
        ("--out", "o.mrc", "o.mrc would be a particle table: expected a name in .star, .csv"),
        ("--table", "t.txt", "t.txt would be a table: expected a name in .parquet, .csv"),
        ("--summary", "s.pdf", "s.pdf would be a picture: expected a name in .png"),
        ("--table", "o_failures.csv", "o_failures.csv is given for two outputs"),
        ("--summary", "there.png", "there.png exists: give another --out, or --overwrite"),
        ("--table", "no/t.csv", "does not exist: create it first"),
        ("--out", "folder.star", "folder.star is a folder: expected the name of a file"),
        ("--per-class", "there.png", "there.png is a file: expected a folder"),
    ],
)
def test_outputs_are_refused_before_work(
    classifier: Path, stack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], option: str, name: str, message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.star").mkdir()
    (tmp_path / "there.png").write_text("mine")
    arguments = {"--out": "o.star", option: name}
    before = sorted(path.name for path in tmp_path.rglob("*"))
    flat = [part for pair in arguments.items() for part in pair]
    assert run("--model", classifier, "--subtomograms", stack, *flat) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    assert (tmp_path / "there.png").read_text() == "mine"


def test_an_output_never_replaces_what_is_read(
    classifier: Path, tomogram: Path, picks: Path, tmp_path: Path
) -> None:
    (tmp_path / "classes").mkdir()
    inside = tmp_path / "classes" / "ribosome.star"
    inside.write_bytes(picks.read_bytes())
    alias = tmp_path / "alias.star"
    alias.symlink_to(picks)
    for particles, outputs in (
        (picks, ClassOutputs(picks)),
        (picks, ClassOutputs(alias)),
        (inside, ClassOutputs(tmp_path / "o.star", per_class=tmp_path / "classes")),
    ):
        before = particles.read_bytes()
        with pytest.raises(ValueError, match="is the input: give the output another name"):
            predict(
                classifier, InputFiles(tomogram=tomogram, particles=particles), outputs,
                overwrite=True,
            )  # fmt: skip
        assert particles.read_bytes() == before


def test_a_table_that_star_would_not_keep_goes_to_csv(
    classifier: Path, tomogram: Path, tmp_path: Path
) -> None:
    (tmp_path / "p.csv").write_text("x,y,z,my note\n24,20,12,it's #1\n20,20,12,b\n")
    files = InputFiles(tomogram=tomogram, particles=tmp_path / "p.csv")
    with pytest.raises(ValueError, match=r"cannot be written as STAR: column 'my note'.*in \.csv"):
        predict(classifier, files, tmp_path / "o.star")
    predict(classifier, files, tmp_path / "o.csv")
    assert pd.read_csv(tmp_path / "o.csv")["my note"].tolist() == ["it's #1", "b"]


def test_unknown_particles_are_marked_in_every_output(
    classifier: Path, various: Path, tmp_path: Path
) -> None:
    model = tmp_path / "judged"
    shutil.copytree(classifier, model)
    card = ModelCard.from_folder(model)
    typical = TypicalLogits(centres=((0.0,) * 3,) * 3, spread=(1.0,) * 3)
    trust = make_trust(typical=typical, unknown_threshold=-1e-6)
    (model / CARD_FILE).write_text(card.model_copy(update={"trust": trust}).model_dump_json())
    outputs = ClassOutputs(tmp_path / "o.star", tmp_path / "t.parquet")
    outcome = predict(model, InputFiles(str(various)), outputs)
    assert outcome.num_unknown == 40
    assert read_particles(tmp_path / "o.star").rows["cectflowUnknown"].tolist() == [1] * 40
    assert pd.read_parquet(tmp_path / "t.parquet")["unknown"].all()


def test_after_a_segmenters_picks_the_class_number_is_the_classifiers(
    classifier: Path, tomogram: Path, positions_zyx: np.ndarray, tmp_path: Path
) -> None:
    rows = make_particle_rows(positions_zyx, tomogram="tomogram")
    found = dict.fromkeys(("rlnClassNumber", "cectflowClassNumber"), np.full(len(rows), 99))
    names = dict.fromkeys(("cectflowModel", "cectflowPickModel"), ["finder/1"] * len(rows))
    particles_from(rows.assign(**found, **names)).write(tmp_path / "p.star")
    predict(classifier, InputFiles(tomogram=tomogram, particles=tmp_path / "p.star"),
            tmp_path / "o.star")  # fmt: skip
    after = read_particles(tmp_path / "o.star").rows
    assert after["cectflowClassNumber"].between(1, 3).all()
    assert after["rlnClassNumber"].equals(after["cectflowClassNumber"])
    assert {*after["cectflowPickModel"]} == {"finder/1"}
    assert "finder/1" not in {*after["cectflowModel"]}
