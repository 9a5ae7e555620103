"""copick projects: picks as particle tables and back, tomograms in Zarr."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from cectflow.cli import main
from cectflow.copick import open_project, read_picks, write_picks
from cectflow.particles import particles_from, read_particles
from cectflow.placement import coordinates_zyx
from cectflow.volume import find_stacks, read_header, read_volume

OBJECTS = [
    {"name": "ribosome", "is_particle": True, "label": 1, "color": [0, 255, 0, 255]},
    {"name": "membrane", "is_particle": False, "label": 2},
    {"name": "apo-ferritin", "is_particle": True, "label": 3, "radius": 60.0},
]


def picks_of(name: str, points: list[dict[str, Any]], **facts: Any) -> dict[str, Any]:
    """A file of picks, key by key as copick 1.31 writes it."""
    return {
        "pickable_object_name": name, "user_id": "alice", "session_id": "1", "run_name": "TS_1",
        "voxel_spacing": None, "unit": "angstrom", "points": points, "trust_orientation": True,
    } | facts  # fmt: skip


def point(x: float, y: float, z: float, pose: np.ndarray | None = None) -> dict[str, Any]:
    return {
        "location": {"x": x, "y": y, "z": z},
        "transformation_": (np.eye(4) if pose is None else pose).tolist(),
        "instance_id": 0,
        "score": 1.0,
    }


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return make_project(tmp_path)


def make_project(folder: Path) -> Path:
    """A project of two runs: picks of one lie in the static folder, and one file in both."""
    for root in ("static", "overlay"):
        for run in ("TS_1", "TS_2"):
            (folder / root / "ExperimentRuns" / run / "Picks").mkdir(parents=True)
    runs = folder / "static/ExperimentRuns", folder / "overlay/ExperimentRuns"
    turned = np.eye(4)
    turned[:3, :3] = Rotation.from_euler("ZYZ", [30, 40, 50], degrees=True).inv().as_matrix()
    turned[:3, 3] = 1.0, 2.0, 3.0
    first = [point(100.0, 50.0, 25.5), point(10.0, 20.0, 30.0, turned)]
    stale = [point(9.0, 9.0, 9.0)]
    for path, picks in {
        runs[0] / "TS_1/Picks/alice_1_ribosome.json": picks_of("ribosome", first),
        runs[0] / "TS_2/Picks/alice_1_ribosome.json": picks_of("ribosome", stale),
        runs[1] / "TS_2/Picks/alice_1_ribosome.json": picks_of("ribosome", [point(1.0, 2.0, 3.0)]),
        runs[1] / "TS_2/Picks/bob_7_apo-ferritin.json": picks_of(
            "apo-ferritin", [point(4.0, 5.0, 6.0)], user_id="bob", session_id=7
        ),
    }.items():
        path.write_text(json.dumps(picks))
    config = {
        "config_type": "filesystem", "name": "test", "description": "", "version": "1.0.0",
        "pickable_objects": OBJECTS, "user_id": None, "session_id": None,
        "overlay_root": f"local://{folder}/overlay", "overlay_fs_args": {"auto_mkdir": True},
        "static_root": f"local://{folder}/static", "static_fs_args": {"auto_mkdir": False},
    }  # fmt: skip
    (folder / "copick.json").write_text(json.dumps(config))
    return folder / "copick.json"


def test_picks_of_all_runs_become_one_table(project: Path) -> None:
    rows = read_picks(project, "ribosome").rows
    assert rows["rlnTomoName"].tolist() == ["TS_1", "TS_1", "TS_2"]
    positions = rows[[f"wrpCoordinate{axis}1" for axis in "XYZ"]].to_numpy()
    # The second is moved by its transformation; of TS_2's two files the overlay's counts.
    np.testing.assert_allclose(positions, [[100, 50, 25.5], [11, 22, 33], [1, 2, 3]])
    angles = rows[[f"rlnAngle{name}" for name in ("Rot", "Tilt", "Psi")]].to_numpy()
    np.testing.assert_allclose(angles, [[0, 0, 0], [30, 40, 50], [0, 0, 0]], atol=1e-9)
    table = read_picks(project, "*:bob/*")
    assert table.rows["copickObject"].tolist() == ["apo-ferritin"]
    assert "rlnAngleRot" not in table.rows
    found = coordinates_zyx(table, voxel_size=2.0, shape=(10, 10, 10))
    np.testing.assert_allclose(found, [[3.0, 2.5, 2.0]])


@given(seed=st.integers(0, 2**32 - 2))
@settings(max_examples=25, deadline=None)
def test_what_is_written_is_read_back(seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    project = make_project(tmp_path_factory.mktemp("copick"))
    generator = np.random.default_rng(seed)
    count = int(generator.integers(1, 9))
    positions = generator.uniform(0, 500, (count, 3))
    poses = Rotation.random(count, random_state=seed)
    sub = Rotation.random(count, random_state=seed + 1)
    rows: dict[str, Any] = {
        "rlnTomoName": generator.choice(["TS_1", "TS_2"], count),
        "cectflowClassName": generator.choice(["4v4r", "apo-ferritin", "none"], count),
        "cectflowProbability": generator.uniform(size=count),
    }
    for columns, turn in (("rlnAngle", poses), ("rlnTomoSubtomogram", sub)):
        angles = turn.inv().as_euler("ZYZ", degrees=True)
        rows |= dict(zip((f"{columns}{n}" for n in ("Rot", "Tilt", "Psi")), angles.T, strict=True))
    table = particles_from(pd.DataFrame(rows))
    kept = np.flatnonzero(table.rows["cectflowClassName"] != "none")
    objects = {"4v4r": "ribosome"}
    if not len(kept):
        with pytest.raises(ValueError, match="there are no particles to write"):
            write_picks(project, table, positions, objects=objects, session="s")
        return
    write_picks(project, table, positions, objects=objects, session="s")
    back = read_picks(project, "*:cectflow/s").rows
    names = table.rows["cectflowClassName"].replace(objects)
    order = sorted(kept, key=lambda row: (rows["rlnTomoName"][row], names[row], row))
    assert back["copickObject"].tolist() == [names[row] for row in order]
    found = back[[f"wrpCoordinate{axis}1" for axis in "XYZ"]].to_numpy()
    np.testing.assert_allclose(found, positions[order])
    np.testing.assert_allclose(
        back["rlnAutopickFigureOfMerit"], np.asarray(rows["cectflowProbability"])[order]
    )
    turns = Rotation.from_euler(
        "ZYZ", back[[f"rlnAngle{n}" for n in ("Rot", "Tilt", "Psi")]].to_numpy(), degrees=True
    ).inv()
    np.testing.assert_allclose(turns.as_matrix(), (sub * poses).as_matrix()[order], atol=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rlnTomoName": ["TS_3"]}, "name 'TS_3'; the runs of .* are TS_1, TS_2"),
        ({"rlnTomoName": None}, "name no tomogram"),
        ({"cectflowClassName": ["1s3x"]}, r"knows no particle '1s3x'; .*--object 1s3x=NAME"),
        ({"cectflowClassName": ["membrane"]}, "knows no particle 'membrane'"),
        ({"cectflowClassName": None}, "have no classes .*--object X"),
    ],
)
def test_what_the_project_does_not_know_is_refused(
    project: Path, change: dict[str, Any], message: str
) -> None:
    rows = {"rlnTomoName": ["TS_1"], "cectflowClassName": ["ribosome"]} | change
    table = particles_from(pd.DataFrame({k: v for k, v in rows.items() if v is not None}))
    before = sorted(project.parent.rglob("*"))
    with pytest.raises(ValueError, match=message):
        write_picks(project, table, np.zeros((1, 3)), objects={})
    assert sorted(project.parent.rglob("*")) == before


def test_picks_are_replaced_when_asked_to_only(project: Path) -> None:
    table = particles_from(pd.DataFrame({"rlnTomoName": ["TS_1"]}))
    (first,) = write_picks(project, table, np.zeros((1, 3)), objects={"": "ribosome"})
    before = first.read_bytes()
    with pytest.raises(FileExistsError, match=r"another --session, or .*--overwrite"):
        write_picks(project, table, np.ones((1, 3)), objects={"": "ribosome"})
    assert first.read_bytes() == before
    write_picks(project, table, np.ones((1, 3)), objects={"": "ribosome"}, overwrite=True)
    assert first.read_bytes() != before
    with pytest.raises(ValueError, match="session 'a_b': expected a name without"):
        write_picks(project, table, np.zeros((1, 3)), objects={"": "ribosome"}, session="a_b")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"config_type": "cryoet_data_portal"}, ValueError, "expected a project on a file system"),
        ({"overlay_root": "s3://bucket/x"}, ValueError, "expected local:// and a folder"),
        ({"overlay_root": "local:///nowhere"}, FileNotFoundError, "which is no folder"),
        ({"pickable_objects": 3}, ValueError, "no copick configuration: pickable_objects"),
        (
            {"pickable_objects": [{"name": "../x", "is_particle": True}]},
            ValueError,
            r"has an object '\.\./x'",
        ),
    ],
)
def test_other_projects_are_refused(
    project: Path, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    config = json.loads(project.read_text()) | change
    project.write_text(json.dumps(config))
    with pytest.raises(error, match=message):
        open_project(project)


def test_damaged_picks_are_refused_by_name(project: Path) -> None:
    file = project.parent / "static/ExperimentRuns/TS_1/Picks/alice_1_ribosome.json"
    for content, message in (
        ("{", "is no copick file of picks: the file"),
        (json.dumps(picks_of("ribosome", [{"location": {"x": 1, "y": 2}}])), r"location\.z"),
        (json.dumps(picks_of("ribosome", [], unit="nm")), "counts in nm"),
        (
            json.dumps(picks_of("ribosome", [point(1, 1, 1, np.eye(3))])),
            "a transformation is a matrix of 4 x 4",
        ),
    ):
        file.write_text(content)
        with pytest.raises(ValueError, match=f"alice_1_ribosome.*{message}"):
            read_picks(project, "ribosome")
    with pytest.raises(ValueError, match=r"no picks 'virus': there are .*bob_7_apo-ferritin"):
        read_picks(project, "virus")


# Volumes in Zarr


def write_zarr(
    path: Path, data: np.ndarray, voxel_size: float, *, version: int = 2, unit: str = "angstrom"
) -> None:
    """An OME-Zarr image of two scales, as copick and the data portal write it."""
    group = zarr.open_group(path, mode="w", zarr_format=version)  # type: ignore[arg-type]
    scales = []
    for level, step in enumerate((1, 2)):
        part = data[::step, ::step, ::step]
        group.create_array(str(level), data=part, chunks=(8, 8, 8))
        scale = {"type": "scale", "scale": [voxel_size * step] * 3}
        scales.append({"path": str(level), "coordinateTransformations": [scale]})
    axes = [{"name": axis, "type": "space", "unit": unit} for axis in "zyx"]
    images = [{"axes": axes, "datasets": scales, "name": "/", "version": "0.4"}]
    group.attrs.update(
        {"multiscales": images} if version == 2 else {"ome": {"multiscales": images}}
    )


@pytest.mark.parametrize("version", [2, 3])
def test_the_finest_scale_is_read(tmp_path: Path, version: int) -> None:
    data = np.random.default_rng(0).normal(size=(9, 10, 11)).astype(np.float32)
    write_zarr(tmp_path / "wbp.zarr", data, 10.012, version=version)
    volume = read_volume(tmp_path / "wbp.zarr")
    assert read_header(tmp_path / "wbp.zarr") == (volume.shape, volume.voxel_size)
    np.testing.assert_array_equal(volume.data, data)
    assert volume.voxel_size == 10.012
    assert find_stacks(f"{tmp_path}/wbp.zarr") == (tmp_path / "wbp.zarr",)
    write_zarr(tmp_path / "nm.zarr", data, 1.0, version=version, unit="nanometer")
    assert read_volume(tmp_path / "nm.zarr").voxel_size == 10.0


def test_what_is_no_volume_is_refused(tmp_path: Path) -> None:
    zarr.save_array(tmp_path / "bare.zarr", np.zeros((4, 5, 6), np.int16))
    with pytest.raises(ValueError, match=r"bare\.zarr says no voxel size: .*--voxel-size"):
        read_volume(tmp_path / "bare.zarr")
    assert read_volume(tmp_path / "bare.zarr", voxel_size=8.0).shape == (4, 5, 6)
    zarr.save_array(tmp_path / "flat.zarr", np.zeros((4, 5)))
    with pytest.raises(ValueError, match=r"float64 of shape \(4, 5\): expected a volume"):
        read_volume(tmp_path / "flat.zarr", voxel_size=8.0)
    zarr.open_group(tmp_path / "empty.zarr", mode="w")
    with pytest.raises(ValueError, match="is no volume in Zarr"):
        read_volume(tmp_path / "empty.zarr")
    write_zarr(tmp_path / "torn.zarr", np.zeros((4, 4, 4), np.float32), 10.0)
    (tmp_path / "torn.zarr/.zattrs").write_text('{"multiscales": [')
    with pytest.raises(ValueError, match=r"torn\.zarr is no volume in Zarr"):
        read_volume(tmp_path / "torn.zarr")
    (tmp_path / "folder.zarr").mkdir()
    with pytest.raises(ValueError, match="is no volume in Zarr"):
        read_volume(tmp_path / "folder.zarr")


def test_a_missing_extra_is_told_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_zarr(tmp_path / "a.zarr", np.zeros((4, 4, 4), np.float32), 10.0)
    monkeypatch.setitem(sys.modules, "zarr", None)
    with pytest.raises(OSError, match=r"pip install 'cectflow\[copick\]'"):
        read_volume(tmp_path / "a.zarr")


def test_a_project_is_classified_and_gets_its_picks_back(
    project: Path, classifier: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = project.parent
    card = json.loads((classifier / "card.json").read_text())
    spacing = folder / "static/ExperimentRuns/{name}/VoxelSpacing12.000/wbp.zarr"
    for run in ("TS_1", "TS_2"):
        data = np.random.default_rng(0).normal(size=(24, 24, 24)).astype(np.float32)
        write_zarr(Path(str(spacing).replace("{name}", run)), data, card["voxel_size"])
    steps = [
        ["convert", str(project), str(folder / "p.star"), "--to", "relion3", "--picks", "ribosome",
         "--voxel-size", "12"],
        ["predict", "classify", "--model", str(classifier), "--tomogram", str(spacing),
         "--particles", str(folder / "p.star"), "--out", str(folder / "classes.star")],
        ["convert", str(folder / "classes.star"), str(project), "--to", "copick",
         "--object", "apo-ferritin", "--session", "x", "--voxel-size", "12"],
    ]  # fmt: skip
    for step in steps:
        with pytest.raises(SystemExit) as stop:
            main(step)
        assert not stop.value.code, capsys.readouterr().err
    given, back = read_picks(project, "ribosome").rows, read_picks(project, "*:cectflow/x").rows
    columns = [f"wrpCoordinate{axis}1" for axis in "XYZ"]
    np.testing.assert_allclose(back[columns], given[columns], atol=1e-5)
    assert set(back["copickObject"]) == {"apo-ferritin"}
    np.testing.assert_allclose(
        back["rlnAutopickFigureOfMerit"],
        read_particles(folder / "classes.star").rows["cectflowProbability"],
    )
    with pytest.raises(SystemExit) as stop:
        main(steps[2])
    assert stop.value.code == 2
    with pytest.raises(SystemExit) as stop:
        main(["convert", str(project), str(folder / "q.star"), "--to", "relion3"])
    assert stop.value.code == 2
    with pytest.raises(SystemExit) as stop:
        main([*steps[0][:-1], "12", "--session", "y", "--overwrite"])
    assert stop.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "--object and --session are for --to copick" in said
    assert "goes with --picks OBJECT" in said
