"""Users' cubes come into a dataset folder as they are, and leave it as RELION wants them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray

from cectflow.dataset import Dataset, open_dataset
from cectflow.exchange import describe_dataset, export_relion
from cectflow.importing import ImportOptions, import_subtomograms
from cectflow.manifest import read_manifest
from cectflow.particles import ParticleTable, make_particle_rows, particles_from, read_particles
from cectflow.placement import coordinates_zyx
from cectflow.shards import check_dataset
from cectflow.volume import Volume
from cectflow.volume_writer import write_stack, write_volume

BOX = 6
VOXEL_SIZE = 13.5
CLASSES = ["rod", "ball", "rod", "ring", "ball", "rod"]
TOMOGRAMS = ["t1", "t1", "t2", "t3", "t3", "t2"]
TRAIN = ImportOptions(split="train")


@pytest.fixture
def cubes() -> NDArray[np.float32]:
    return np.random.default_rng(0).normal(3.0, 2.0, (6, BOX, BOX, BOX)).astype(np.float32)


@pytest.fixture
def stack(tmp_path: Path, cubes: NDArray[np.float32]) -> str:
    write_stack(tmp_path / "stack.mrcs", cubes, VOXEL_SIZE)
    return str(tmp_path / "stack.mrcs")


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    return write_csv(tmp_path, {"class": CLASSES, "tomogram": TOMOGRAMS})


def write_csv(folder: Path, columns: dict[str, Any]) -> Path:
    path = folder / "labels.csv"
    pd.DataFrame(columns).to_csv(path, index=False)
    return path


def read_all(dataset: Dataset, split: Any = "train") -> tuple[NDArray[Any], pd.DataFrame]:
    source = dataset.split(split)
    (batch,) = source.batches(1000)
    return batch.subtomograms[:, 0].numpy(), source.rows


# Import


def test_cubes_and_classes_come_back(
    tmp_path: Path, cubes: NDArray[np.float32], stack: str, labels: Path
) -> None:
    dataset = import_subtomograms(stack, labels, tmp_path / "out", TRAIN, commit="c0ffee")
    assert check_dataset(tmp_path / "out") == ()
    stored, rows = read_all(dataset)
    np.testing.assert_array_equal(stored, cubes)
    assert list(rows["cectflowClassName"]) == CLASSES
    assert list(rows["rlnTomoName"]) == TOMOGRAMS
    assert list(rows["rlnImageName"])[2] == "000003@stack.mrcs"
    manifest = dataset.manifest
    assert (manifest.kind, manifest.commit) == ("imported", "c0ffee")
    assert manifest.classes == ("ball", "ring", "rod")
    assert list(rows["rlnClassNumber"]) == [3, 1, 3, 2, 1, 3]
    assert (manifest.box, manifest.voxel_size) == (BOX, VOXEL_SIZE)
    assert manifest.contrast == "dark"
    assert not manifest.has_voxel_labels
    assert set(manifest.sources) == {"stack.mrcs", "labels.csv"}
    assert manifest.recipe["class_column"] == "class"
    records = {record.field: record for record in manifest.field_records("train")}
    assert records["t1"].mean == pytest.approx(cubes[:2].mean(), rel=1e-5)
    assert records["t1"].std == pytest.approx(cubes[:2].std(), rel=1e-5)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_light_cubes_are_stored_negated(
    tmp_path: Path, cubes: NDArray[np.float32], stack: str, labels: Path
) -> None:
    options = ImportOptions(split="test", contrast="light")
    dataset = import_subtomograms(stack, labels, tmp_path / "out", options)
    assert dataset.manifest.contrast == "dark"
    np.testing.assert_array_equal(read_all(dataset, "test")[0], -cubes)
    assert dataset.manifest.field_records("test")[0].mean < 0


def test_integers_and_compressed_files_are_read(tmp_path: Path, labels: Path) -> None:
    cubes = np.arange(6 * BOX**3, dtype=np.int16).reshape(6, BOX, BOX, BOX)
    (tmp_path / "in").mkdir()
    write_stack(tmp_path / "in" / "a.mrcs", cubes[:4], VOXEL_SIZE)
    write_stack(tmp_path / "in" / "b.mrcs.gz", cubes[4:], VOXEL_SIZE)
    dataset = import_subtomograms(str(tmp_path / "in"), labels, tmp_path / "out", TRAIN)
    np.testing.assert_array_equal(read_all(dataset)[0], cubes)


def test_without_tomograms_each_file_counts_as_one(
    tmp_path: Path, cubes: NDArray[np.float32]
) -> None:
    (tmp_path / "in").mkdir()
    for number, cube in enumerate(cubes):
        write_volume(tmp_path / "in" / f"{number}.mrc", Volume(cube, VOXEL_SIZE))
    labels = write_csv(tmp_path, {"class": CLASSES})
    dataset = import_subtomograms(str(tmp_path / "in" / "*.mrc"), labels, tmp_path / "out", TRAIN)
    stored, rows = read_all(dataset)
    np.testing.assert_array_equal(stored, cubes)
    assert list(rows["rlnTomoName"]) == [f"{number}.mrc" for number in range(6)]
    assert len(dataset.manifest.shards["train"]) == 1


def test_image_names_say_whose_row_it_is(
    tmp_path: Path, cubes: NDArray[np.float32], stack: str
) -> None:
    order = [3, 0, 5, 1, 4, 2]
    rows = pd.DataFrame(
        {
            "rlnImageName": [f"{index + 1:06d}@Extract/stack.mrcs" for index in order],
            "cectflowClassName": [CLASSES[index] for index in order],
        }
    )
    particles_from(rows).write(tmp_path / "other.star")
    beyond = rows.assign(rlnImageName=["9@stack.mrcs", *rows["rlnImageName"][1:]])
    particles_from(beyond).write(tmp_path / "beyond.star")
    with pytest.raises(ValueError, match=r"row 1 .*names .* none of the subtomograms"):
        import_subtomograms(stack, tmp_path / "beyond.star", tmp_path / "out", TRAIN)
    particles_from(rows.assign(rlnImageName="1@stack.mrcs")).write(tmp_path / "twice.star")
    with pytest.raises(ValueError, match=r"row 2 .* as does row 1"):
        import_subtomograms(stack, tmp_path / "twice.star", tmp_path / "out", TRAIN)
    # The folder in the name is not the stack's, its file name is.
    dataset = import_subtomograms(stack, tmp_path / "other.star", tmp_path / "out", TRAIN)
    stored, found = read_all(dataset)
    np.testing.assert_array_equal(stored, cubes[order])
    assert list(found["cectflowClassName"]) == [CLASSES[index] for index in order]


def test_image_names_of_other_files_leave_the_order_of_the_rows(
    tmp_path: Path, cubes: NDArray[np.float32], stack: str
) -> None:
    names = [f"{6 - number}@elsewhere.mrcs" for number in range(6)]
    labels = write_csv(tmp_path, {"class": CLASSES, "rlnImageName": names})
    dataset = import_subtomograms(stack, labels, tmp_path / "out", TRAIN)
    np.testing.assert_array_equal(read_all(dataset)[0], cubes)


def test_files_of_one_name_are_told_apart_by_their_folders(
    tmp_path: Path, cubes: NDArray[np.float32]
) -> None:
    for folder, part in (("a", cubes[:3]), ("b", cubes[3:])):
        (tmp_path / "in" / folder).mkdir(parents=True)
        write_stack(tmp_path / "in" / folder / "s.mrcs", part, VOXEL_SIZE)
    pattern = str(tmp_path / "in" / "**" / "*.mrcs")
    names = [f"{number}@{folder}/s.mrcs" for folder in "ba" for number in (1, 2, 3)]
    labels = write_csv(tmp_path, {"class": CLASSES, "rlnImageName": names})
    dataset = import_subtomograms(pattern, labels, tmp_path / "out", TRAIN)
    np.testing.assert_array_equal(read_all(dataset)[0], cubes[[3, 4, 5, 0, 1, 2]])
    labels = write_csv(tmp_path, {"class": CLASSES, "rlnImageName": "1@s.mrcs"})
    with pytest.raises(ValueError, match=r"several .* are called s.mrcs: .*folders"):
        import_subtomograms(pattern, labels, tmp_path / "out2", TRAIN)


@pytest.mark.parametrize("num_tomograms", [1, 2, 3, 20])
def test_whole_tomograms_go_to_splits_whatever_the_order(
    tmp_path: Path, num_tomograms: int
) -> None:
    names = np.array([f"data_{i % num_tomograms}" for i in range(2 * num_tomograms)])
    cubes = np.random.default_rng(0).normal(size=(len(names), 3, 3, 3)).astype(np.float32)
    splits = []
    for step in (1, -1):
        write_stack(tmp_path / "s.mrcs", cubes[::step], VOXEL_SIZE, overwrite=True)
        labels = write_csv(tmp_path, {"class": "a", "tomogram": names[::step]})
        out = tmp_path / f"out{step}"
        dataset = import_subtomograms(str(tmp_path / "s.mrcs"), labels, out, ImportOptions())
        assert check_dataset(out) == ()
        splits.append(
            {
                split: {record.field for record in dataset.manifest.field_records(split)}
                for split in ("train", "validation", "test")
            }
        )
    assert splits[0] == splits[1]
    expected = {1: (1, 0, 0), 2: (1, 0, 1), 3: (1, 1, 1), 20: (16, 2, 2)}[num_tomograms]
    assert tuple(len(fields) for fields in splits[0].values()) == expected
    assert set.union(*splits[0].values()) == set(names)


@pytest.mark.parametrize(
    ("column", "values", "classes", "expected"),
    [
        ("class", [7, 2, 7, 10, 2, 7], None, ("class_2", "class_7", "class_10")),
        ("class", [1, 2, 1, 3, 2, 1], ("x", "y", "z"), ("x", "y", "z")),
        ("class", CLASSES, ("rod", "ring", "cube", "ball"), ("rod", "ring", "cube", "ball")),
        ("species", CLASSES, None, ("ball", "ring", "rod")),
        ("class", ["001", "NA", "1e10", "001", "NA", "b c"], None, ("001", "1e10", "NA", "b c")),
    ],
)
def test_classes_are_names_or_numbers_in_a_known_order(
    tmp_path: Path,
    stack: str,
    column: str,
    values: list[Any],
    classes: tuple[str, ...] | None,
    expected: tuple[str, ...],
) -> None:
    labels = write_csv(tmp_path, {column: values})
    options = ImportOptions(class_column=column, classes=classes, split="train")
    dataset = import_subtomograms(stack, labels, tmp_path / "out", options)
    assert dataset.manifest.classes == expected
    rows = dataset.split("train").rows
    assert [expected[i - 1] for i in rows["rlnClassNumber"]] == list(rows["cectflowClassName"])
    if classes is None and column == "class" and values[0] == 7:
        assert list(rows["rlnClassNumber"]) == [2, 1, 2, 3, 1, 2]


def test_where_no_column_is_called_class_names_go_before_numbers(
    tmp_path: Path, stack: str
) -> None:
    columns = {"rlnClassNumber": [1, 2, 1, 3, 2, 1], "rlnMicrographName": TOMOGRAMS}
    labels = write_csv(tmp_path, columns)
    numbers = import_subtomograms(stack, labels, tmp_path / "numbers", TRAIN)
    assert numbers.manifest.classes == ("class_1", "class_2", "class_3")
    assert [record.field for record in numbers.manifest.field_records("train")] == [
        "t1",
        "t2",
        "t3",
    ]
    labels = write_csv(tmp_path, {**columns, "cectflowClassName": CLASSES})
    names = import_subtomograms(stack, labels, tmp_path / "names", TRAIN)
    assert names.manifest.classes == ("ball", "ring", "rod")


def test_voxel_labels_become_instances_and_classes(
    tmp_path: Path, cubes: NDArray[np.float32], stack: str, labels: Path
) -> None:
    marks = np.zeros(cubes.shape, np.float32)
    for number, mark in enumerate(marks):
        mark[number, 1:3, 2] = 1 + number
    write_stack(tmp_path / "marks.mrcs", marks, VOXEL_SIZE)
    options = ImportOptions(split="train", contrast="light")
    dataset = import_subtomograms(
        stack, labels, tmp_path / "out", options, voxel_labels=tmp_path / "marks.mrcs"
    )
    assert check_dataset(tmp_path / "out") == ()
    (batch,) = dataset.split("train").batches(10)
    assert batch.instances is not None
    assert batch.voxel_labels is not None
    np.testing.assert_array_equal(batch.instances, marks != 0)
    classes = np.array([3, 1, 3, 2, 1, 3])[:, None, None, None]
    np.testing.assert_array_equal(batch.voxel_labels, (marks != 0) * classes)
    assert set(dataset.manifest.sources) == {"stack.mrcs", "labels.csv", "marks.mrcs"}


def test_positions_keep_their_unit(tmp_path: Path, stack: str) -> None:
    positions = np.arange(18.0).reshape(6, 3) + 0.25
    rows = make_particle_rows(positions * 4, tomogram="data_1")
    rows = rows.assign(rlnClassNumber=1, rlnOpticsGroup=1, rlnAngleRot=30.0, rlnOther="x")
    rows = rows[rows.columns[::-1]]  # starfile takes a line that begins with data_ for a block
    optics = pd.DataFrame({"rlnOpticsGroup": [1], "rlnTomoTiltSeriesPixelSize": VOXEL_SIZE / 4})
    labels = tmp_path / "relion4.star"
    ParticleTable({"optics": optics, "particles": rows}, "particles").write(labels)
    import_subtomograms(stack, labels, tmp_path / "out", TRAIN)
    star = export_relion(tmp_path / "out", tmp_path / "relion", "train")
    for path in (tmp_path / "out" / "train" / "00000.star", star):
        table = read_particles(path)
        assert "rlnOther" not in table.rows
        assert set(table.rows["rlnAngleRot"]) == {30.0}
        found = coordinates_zyx(table, voxel_size=VOXEL_SIZE, shape=(40, 40, 40))
        np.testing.assert_allclose(found, positions)


def test_plain_coordinates_become_those_of_relion(tmp_path: Path, stack: str) -> None:
    columns = {"class": CLASSES, "x": range(6), "y": 1.5, "z": 2, "rlnAngleTilt": [""] * 6}
    labels = write_csv(tmp_path, columns)
    rows = import_subtomograms(stack, labels, tmp_path / "out", TRAIN).split("train").rows
    assert list(rows["rlnCoordinateX"]) == list(range(6))
    assert set(rows["rlnCoordinateY"]) == {1.5}
    assert "rlnAngleTilt" not in rows


def test_the_digest_tells_inputs_and_options_apart(
    tmp_path: Path, stack: str, labels: Path
) -> None:
    digests = [
        import_subtomograms(stack, labels, tmp_path / name, options).manifest.recipe_digest
        for name, options in (
            ("a", TRAIN),
            ("b", TRAIN),
            ("c", ImportOptions(split="train", ctf_correction="wiener")),
        )
    ]
    assert digests[0] == digests[1] != digests[2]


# Import: refusals


def test_rows_and_cubes_must_agree_in_number(tmp_path: Path, stack: str) -> None:
    labels = write_csv(tmp_path, {"class": CLASSES[:4]})
    with pytest.raises(ValueError, match=r"has 4 rows, .* has 6 subtomograms: expected one row"):
        import_subtomograms(stack, labels, tmp_path / "out", TRAIN)
    assert not (tmp_path / "out").exists()


def test_an_unknown_class_column_is_refused_with_those_there_are(
    tmp_path: Path, stack: str
) -> None:
    labels = write_csv(tmp_path, {"species": CLASSES, "tomogram": TOMOGRAMS})
    options = ImportOptions(class_column="kind")
    with pytest.raises(ValueError, match=r"no column kind: its columns are species, tomogram; .*"):
        import_subtomograms(stack, labels, tmp_path / "out", options)
    with pytest.raises(ValueError, match=r"no column class or cectflowClassName or rlnClassNumb"):
        import_subtomograms(stack, labels, tmp_path / "out", TRAIN)


@pytest.mark.parametrize(
    ("values", "classes", "message"),
    [
        (CLASSES, ("rod", "ball"), "holds ring: expected any of rod, ball, or numbers from 1 to 2"),
        ([0, 1, 0, 1, 0, 1], ("a", "b"), "holds 0, 1: expected any of a, b"),
        (CLASSES, ("rod", "rod", "ball", "ring"), "expected distinct names"),
        (["a", "", "b", "a", "b", "a"], None, "holds '' in row 2: expected a name"),
        (["a", "it's", "b", "a", "b", "a"], None, 'holds "it\'s" in row 2'),
    ],
)
def test_classes_that_cannot_be_told_are_refused(
    tmp_path: Path, stack: str, values: list[Any], classes: tuple[str, ...] | None, message: str
) -> None:
    labels = write_csv(tmp_path, {"class": values})
    with pytest.raises(ValueError, match=message):
        import_subtomograms(stack, labels, tmp_path / "out", ImportOptions(classes=classes))


@pytest.mark.parametrize(
    ("box", "voxel_size", "message"),
    [
        (BOX + 2, VOXEL_SIZE, r"b\.mrc holds \(8, 8, 8\) voxels of 13.5 Å, most files \(6, 6, 6\)"),
        (BOX, 12.0, r"b\.mrc holds .* of 12 Å, most files .* of 13.5 Å"),
    ],
)
def test_the_file_of_another_box_or_voxel_size_is_named(
    tmp_path: Path, box: int, voxel_size: float, message: str
) -> None:
    (tmp_path / "in").mkdir()
    for name in "acd":
        write_volume(tmp_path / "in" / f"{name}.mrc", Volume(np.ones((BOX,) * 3, "f4"), VOXEL_SIZE))
    write_volume(tmp_path / "in" / "b.mrc", Volume(np.ones((box,) * 3, "f4"), voxel_size))
    labels = write_csv(tmp_path, {"class": list("abcd")})
    with pytest.raises(ValueError, match=message):
        import_subtomograms(str(tmp_path / "in"), labels, tmp_path / "out", TRAIN)
    if box == BOX:
        options = ImportOptions(split="train", voxel_size=10.0)
        dataset = import_subtomograms(str(tmp_path / "in"), labels, tmp_path / "out", options)
        assert dataset.manifest.voxel_size == 10.0


def test_volumes_that_are_no_cubes_are_refused(tmp_path: Path) -> None:
    write_volume(tmp_path / "a.mrc", Volume(np.ones((4, 4, 5), "f4"), VOXEL_SIZE))
    labels = write_csv(tmp_path, {"class": ["a"]})
    with pytest.raises(ValueError, match=r"measure \(4, 4, 5\) voxels .*: expected cubes"):
        import_subtomograms(str(tmp_path / "a.mrc"), labels, tmp_path / "out", TRAIN)


def test_values_that_are_not_finite_are_refused(
    tmp_path: Path, stack: str, labels: Path, cubes: NDArray[np.float32]
) -> None:
    with mrcfile.mmap(stack, mode="r+") as mrc:
        mrc.data[4, 1, 1, 1] = np.nan
    with pytest.raises(ValueError, match=r"stack.mrcs: cube 5 holds values that are not finite"):
        import_subtomograms(stack, labels, tmp_path / "out", TRAIN)


def test_voxel_labels_must_fit_and_mark_every_target(
    tmp_path: Path, stack: str, labels: Path
) -> None:
    marks = np.ones((6, BOX, BOX, BOX), np.int8)
    marks[2:4] = 0
    path = tmp_path / "marks.mrcs"
    write_stack(path, marks, VOXEL_SIZE)
    with pytest.raises(ValueError, match=r"no target in 2 of 6 cubes, the first is cube 3"):
        import_subtomograms(stack, labels, tmp_path / "out", TRAIN, voxel_labels=path)
    write_stack(path, marks[:5], VOXEL_SIZE, overwrite=True)
    with pytest.raises(ValueError, match=r"holds 5 cubes of 6³ voxels, there are 6 subtomograms"):
        import_subtomograms(stack, labels, tmp_path / "out", TRAIN, voxel_labels=path)
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_is_refused_and_an_empty_one_taken(
    tmp_path: Path, stack: str, labels: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    import_subtomograms(stack, labels, out, TRAIN)
    before = read_manifest(out)
    with pytest.raises(FileExistsError, match=r"out exists and is not empty: give another"):
        import_subtomograms(stack, labels, out, TRAIN)
    assert read_manifest(out) == before


def test_a_failure_while_writing_leaves_nothing(
    tmp_path: Path, stack: str, labels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        msg = "no space left"
        raise OSError(msg)

    monkeypatch.setattr("cectflow.importing.write_shard", fail)
    with pytest.raises(OSError, match="no space left"):
        import_subtomograms(stack, labels, tmp_path / "out", TRAIN)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["labels.csv", "stack.mrcs"]


def test_missing_files_are_refused(tmp_path: Path, stack: str, labels: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no subtomograms at"):
        import_subtomograms(str(tmp_path / "no*.mrc"), labels, tmp_path / "out", TRAIN)
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none.csv"):
        import_subtomograms(stack, tmp_path / "none.csv", tmp_path / "out", TRAIN)
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(ValueError, match=r"empty.csv is not a CSV file"):
        import_subtomograms(stack, tmp_path / "empty.csv", tmp_path / "out", TRAIN)


# Export


def test_relion_gets_one_bright_volume_per_particle(
    tmp_path: Path, cubes: NDArray[np.float32], stack: str, labels: Path
) -> None:
    import_subtomograms(stack, labels, tmp_path / "out", TRAIN)
    star = export_relion(tmp_path / "out", tmp_path / "relion", "train")
    assert star == tmp_path / "relion" / "particles.star"
    table = read_particles(star)
    optics = table.blocks["optics"]
    assert isinstance(optics, pd.DataFrame)
    assert optics["rlnImagePixelSize"].tolist() == [VOXEL_SIZE]
    assert optics["rlnImageSize"].tolist() == [BOX]
    assert optics["rlnImageDimensionality"].tolist() == [3]
    assert list(table.rows["rlnClassNumber"]) == [3, 1, 3, 2, 1, 3]
    assert list(table.rows["cectflowClassName"]) == CLASSES
    assert list(table.rows["rlnTomoName"]) == TOMOGRAMS
    assert set(table.rows["rlnOpticsGroup"]) == {1}
    for name, cube in zip(table.rows["rlnImageName"], cubes, strict=True):
        with mrcfile.open(tmp_path / "relion" / name) as mrc:
            assert mrc.header.mode == 2
            assert mrc.is_volume()
            assert mrc.voxel_size.x == pytest.approx(VOXEL_SIZE)
            np.testing.assert_array_equal(mrc.data, -cube)
    with pytest.raises(FileExistsError, match=r"relion exists and is not empty"):
        export_relion(tmp_path / "out", tmp_path / "relion", "train")
    with pytest.raises(ValueError, match="no test split: it holds train"):
        export_relion(tmp_path / "out", tmp_path / "relion2", "test")
    assert not (tmp_path / "relion2").exists()


def test_what_was_exported_can_be_imported(
    tmp_path: Path, cubes: NDArray[np.float32], stack: str, labels: Path
) -> None:
    first = import_subtomograms(stack, labels, tmp_path / "out", TRAIN)
    star = export_relion(tmp_path / "out", tmp_path / "relion", "train")
    options = ImportOptions(split="train", contrast="light")
    folder = str(tmp_path / "relion" / "subtomograms")
    again = import_subtomograms(folder, star, tmp_path / "again", options)
    np.testing.assert_array_equal(read_all(again)[0], cubes)
    kept = ["rlnClassNumber", "cectflowClassName", "rlnTomoName"]
    pd.testing.assert_frame_equal(read_all(again)[1][kept], read_all(first)[1][kept])


# Description


def test_a_description_counts_and_measures(tmp_path: Path, stack: str, labels: Path) -> None:
    import_subtomograms(stack, labels, tmp_path / "out", ImportOptions())
    facts = describe_dataset(tmp_path / "out")
    assert json.loads(json.dumps(facts)) == facts
    assert facts["kind"] == "imported"
    assert facts["complete"]
    assert facts["missing_shards"] == {"train": 0, "validation": 0, "test": 0}
    assert facts["classes"] == ["ball", "ring", "rod"]
    assert (facts["box"], facts["voxel_size"], facts["contrast"]) == (BOX, VOXEL_SIZE, "dark")
    assert facts["fields"] == {"train": 1, "validation": 1, "test": 1}
    assert sum(facts["subtomograms"].values()) == 6
    per_class = facts["subtomograms_per_class"]
    assert sum(counts["rod"] for counts in per_class.values()) == 3
    assert facts["measured_snr"] is None
    assert facts["size_bytes"] > 6 * BOX**3 * 4
    assert facts["content_digest"] == open_dataset(tmp_path / "out").manifest.content_digest()


def test_an_incomplete_folder_is_described_too(tmp_path: Path, stack: str, labels: Path) -> None:
    manifest = import_subtomograms(stack, labels, tmp_path / "out", TRAIN).manifest
    record = manifest.shards["train"][0]
    fields = tuple(f.model_copy(update={"snr": 0.5, "snr_60": 2.0}) for f in record.fields)
    manifest.model_copy(
        update={
            "planned_shards": {"train": 3, "validation": 1},
            "shards": {"train": (record.model_copy(update={"fields": fields}),)},
            "snr": (0.4, 0.6),
        }
    ).write(tmp_path / "out")
    facts = describe_dataset(tmp_path / "out")
    assert not facts["complete"]
    assert facts["missing_shards"] == {"train": 2, "validation": 1}
    assert facts["subtomograms"] == {"train": 6, "validation": 0, "test": 0}
    assert (facts["requested_snr"], facts["measured_snr"]) == ([0.4, 0.6], 0.5)
    assert facts["measured_snr_60"] == 2.0


# Real data


def test_real_ribosomes_come_in(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "real" / "ribosome_70s"
    table = read_particles(folder / "ribosome_70s.star").with_columns(species="70S")
    table.write(tmp_path / "labels.star")
    options = ImportOptions(
        class_column="species", contrast="light", ctf_correction="premultiplied"
    )
    stack = folder / "ribosome_70s.mrcs"
    dataset = import_subtomograms(str(stack), tmp_path / "labels.star", tmp_path / "out", options)
    assert check_dataset(tmp_path / "out") == ()
    facts = describe_dataset(tmp_path / "out")
    assert (facts["box"], facts["voxel_size"], facts["classes"]) == (32, 12.0, ["70S"])
    assert facts["subtomograms"] == {"train": 10, "validation": 0, "test": 10}
    fields = {dataset.manifest.field_records(name)[0].field for name in ("train", "test")}
    assert fields == {"Unt_050.tomostar", "Unt_076.tomostar"}
    with mrcfile.open(stack) as mrc:
        stored = np.concatenate([read_all(dataset, split)[0] for split in ("train", "test")])
        assert {cube.tobytes() for cube in stored} == {(-cube).tobytes() for cube in mrc.data}
    # The particle is darker than what surrounds it, on average.
    centre = stored[:, 10:22, 10:22, 10:22].mean()
    assert centre < stored.mean()
