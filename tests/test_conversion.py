"""Converted tables hold the same particles at the same places, and all else that they held."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cectflow.cli import main
from cectflow.conversion import convert_particles, find_frames, name_tomogram
from cectflow.coordinates import CoordinateConvention, stated_unit
from cectflow.flows.conversion import ConversionOptions, convert_file
from cectflow.particles import ParticleTable, make_particle_rows, particles_from, read_particles
from cectflow.placement import coordinates_zyx
from cectflow.tomogram_table import TomogramInfo
from cectflow.volume import Volume
from cectflow.volume_writer import write_volume

CONVENTIONS: tuple[CoordinateConvention, ...] = get_args(CoordinateConvention)
TOMOGRAMS = {
    "TS_1": TomogramInfo((401, 302, 99), 1.5, 4.0),
    "TS_2": TomogramInfo((400, 600, 203), 2.5, 6.0),
}
NAMES = ["TS_2", "TS_1", "TS_2", "TS_1"]
VOXELS_ZYX = np.array([[30.0, 90.0, 60.0], [2.5, 0.0, 99.0], [0.0, 1.0, 2.0], [24.0, 75.0, 7.25]])
INNER_ZYX = np.minimum(VOXELS_ZYX, 20.0)
"""Which lie in either tomogram."""


def make_table(positions_zyx: np.ndarray = VOXELS_ZYX, **further: Any) -> ParticleTable:
    """RELION 3: voxels of two tomograms that differ in size, pixel and binning."""
    rows = make_particle_rows(positions_zyx, tomogram="", angles=positions_zyx * 2, **further)
    rows["rlnTomoName"] = pd.array(NAMES[: len(rows)], dtype="str")
    optics = pd.DataFrame({"rlnOpticsGroup": [1, 2], "rlnVoltage": [300.0, 300.0]})
    return ParticleTable({"general": {"a": 1}, "optics": optics, "particles": rows}, "particles")


def convert(
    table: ParticleTable, convention: CoordinateConvention, **options: Any
) -> ParticleTable:
    frames = find_frames(table, tomograms=TOMOGRAMS, **options)
    return convert_particles(table, convention, frames, tomograms=TOMOGRAMS)


def voxels(table: ParticleTable) -> np.ndarray:
    """Positions in voxels of their own tomogram, as the reader of one tomogram has them."""
    found = np.empty((len(table), 3))
    for name in table.tomograms:
        info = TOMOGRAMS[name.removesuffix(".tomostar")]
        assert info.voxel_size is not None
        assert info.shape is not None
        own = [other == name for other in table.tomogram_names]
        found[own] = coordinates_zyx(
            table.in_tomogram(name), voxel_size=info.voxel_size, shape=info.shape, info=info
        )
    return found


# Pure tables


@pytest.mark.parametrize("first", CONVENTIONS)
@pytest.mark.parametrize("second", CONVENTIONS)
def test_every_pair_of_conventions_keeps_every_particle_in_its_place(
    first: CoordinateConvention, second: CoordinateConvention
) -> None:
    table = convert(convert(make_table(), first), second)
    np.testing.assert_allclose(voxels(table), VOXELS_ZYX, atol=1e-5)
    angles = table.rows[["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"]]
    np.testing.assert_array_equal(angles, VOXELS_ZYX * 2)
    again = convert(table, first)
    np.testing.assert_allclose(voxels(again), VOXELS_ZYX, atol=1e-5)


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    positions_zyx=hnp.arrays(
        np.float64, st.integers(0, 4).map(lambda n: (n, 3)), elements=st.floats(0, 24)
    ),
    route=st.lists(st.sampled_from(CONVENTIONS), min_size=1, max_size=6),
    offset=st.floats(-30, 30),
)
def test_offsets_count_once_however_long_the_way(
    positions_zyx: np.ndarray, route: list[CoordinateConvention], offset: float
) -> None:
    table = make_table(positions_zyx, rlnOriginXAngst=offset, rlnOriginYAngst=0.0)
    steps = [table]
    expected = positions_zyx * [info_of(name) for name in NAMES[: len(table)]] if len(table) else 0
    expected = expected - np.array([0.0, 0.0, offset])
    if len(table) and (expected < 0).any():
        return
    for convention in route:
        steps.append(convert(steps[-1], convention))
    if len(table):
        last = steps[-1]
        sizes = np.array([info_of(name) for name in NAMES[: len(table)]])
        np.testing.assert_allclose(voxels(last) * sizes, expected, atol=1e-4)
        assert (last.rows["rlnOriginXAngst"] == 0).all()
    assert all(len(one) == len(other) for one, other in pairwise(steps))


def info_of(name: str) -> list[float]:
    size = TOMOGRAMS[name].voxel_size
    assert size is not None
    return [size]


def test_relion_4_and_5_hold_what_relion_computes() -> None:
    relion4 = convert(make_table(), "relion4").rows
    np.testing.assert_allclose(relion4["rlnCoordinateX"], [360, 396, 12, 29])  # voxels * binning
    np.testing.assert_allclose(relion4["rlnTomoTiltSeriesPixelSize"], [2.5, 1.5, 2.5, 1.5])
    relion5 = convert(make_table(), "relion5").rows
    # getParticleCoordDecenteredPixel: angstrom / pixel size + unbinned size / 2
    sizes = np.array([400, 401, 400, 401])
    pixels = relion5["rlnCenteredCoordinateXAngst"] / [2.5, 1.5, 2.5, 1.5] + sizes / 2
    np.testing.assert_allclose(pixels, relion4["rlnCoordinateX"], atol=1e-5)
    assert "rlnCoordinateX" not in relion5


def test_columns_and_blocks_that_are_not_of_the_placement_stay() -> None:
    further: dict[str, Any] = {"rlnClassNumber": [1, 2, 3, 4], "note": ["a", "b b", "c", ""]}
    table = make_table(**further, rlnTomoSubtomogramRot=7.0)
    for convention in CONVENTIONS:
        found = convert(table, convention)
        for name in (*further, "rlnTomoSubtomogramRot", "rlnTomoName"):
            if name != "rlnTomoName" or convention != "warp":
                assert list(found.rows[name]) == list(table.rows[name])
        kept = ["particles"] if convention == "csv" else ["general", "optics", "particles"]
        assert list(found.blocks) == kept
        if convention != "csv":
            pd.testing.assert_frame_equal(
                pd.DataFrame(found.blocks["optics"]), pd.DataFrame(table.blocks["optics"])
            )
        assert list(found.rows).index("rlnClassNumber") < list(found.rows).index("note")


def test_offsets_turn_with_the_subtomogram_and_are_folded_in() -> None:
    offsets = {"rlnOriginXAngst": 0.0, "rlnOriginYAngst": 0.0, "rlnOriginZAngst": 0.0}
    turned = {"rlnTomoSubtomogramRot": 90.0, "rlnTomoSubtomogramTilt": 0.0}
    table = make_table(INNER_ZYX + 1.0, **(offsets | {"rlnOriginXAngst": 6.0}), **turned)
    table = table.with_columns(rlnTomoSubtomogramPsi=0.0)
    found = convert(table, "relion5")
    np.testing.assert_allclose(voxels(found), voxels(table), atol=1e-5)
    # RELION's matrix for rot = 90 takes x to -y: subtracting it moves the particle along +y.
    sizes = np.array([15.0, 6.0, 15.0, 6.0])
    np.testing.assert_allclose(voxels(found)[:, 1], INNER_ZYX[:, 1] + 1 + 6 / sizes, atol=1e-5)
    assert (found.rows[list(offsets)] == 0).to_numpy().all()
    assert (found.rows["rlnTomoSubtomogramRot"] == 90).all()


def test_pixel_offsets_are_folded_in_and_go() -> None:
    table = make_table(INNER_ZYX + 1.0, rlnOriginX=0.5)
    found = convert(table, "relion4")
    np.testing.assert_allclose(voxels(found), INNER_ZYX + np.array([1, 1, 0.5]), atol=1e-5)
    assert "rlnOriginX" not in found.rows


def test_relion_3_says_nothing_that_makes_it_relion_4() -> None:
    table = convert(make_table(), "relion4")
    optics = pd.DataFrame({"rlnOpticsGroup": [1], "rlnTomoTiltSeriesPixelSize": [9.0]})
    table = ParticleTable({**table.blocks, "optics": optics}, "particles")
    found = convert(table, "relion3")
    assert not any("rlnTomoTiltSeriesPixelSize" in block for block in found.blocks.values())
    assert list(pd.DataFrame(found.blocks["optics"])["rlnMicrographOriginalPixelSize"]) == [9.0]
    assert list(found.rows["rlnMicrographOriginalPixelSize"]) == [2.5, 1.5, 2.5, 1.5]
    assert list(found.rows["rlnPixelSize"]) == [15.0, 6.0, 15.0, 6.0]
    np.testing.assert_allclose(voxels(found), VOXELS_ZYX, atol=1e-5)


def test_warp_names_end_in_tomostar_and_relion_keeps_the_spelling_of_its_table() -> None:
    warp = convert(make_table(), "warp")
    expected = [f"{name}.tomostar" for name in NAMES]
    assert list(warp.rows["rlnTomoName"]) == list(warp.rows["rlnMicrographName"]) == expected
    assert list(warp.rows["rlnPixelSize"]) == [15.0, 6.0, 15.0, 6.0]
    assert list(convert(warp, "relion5").rows["rlnTomoName"]) == NAMES
    alone = convert_particles(warp, "relion4", find_frames(warp, tomograms=TOMOGRAMS))
    assert list(alone.rows["rlnTomoName"]) == expected
    np.testing.assert_allclose(voxels(alone), VOXELS_ZYX, atol=1e-5)


def test_species_of_m_take_the_names_of_relion() -> None:
    columns = {f"wrpCoordinate{axis}1": INNER_ZYX[:, 2 - i] * 6 for i, axis in enumerate("XYZ")}
    angles = {f"wrpAngle{name}1": [1.0, 2.0, 3.0, 4.0] for name in ("Rot", "Tilt", "Psi")}
    rows = pd.DataFrame(columns | angles | {"wrpSourceName": ["TS_1.tomostar"] * 4})
    found = convert(particles_from(rows), "relion5")
    np.testing.assert_allclose(voxels(found), INNER_ZYX, atol=1e-5)
    assert list(found.rows["rlnAnglePsi"]) == [1.0, 2.0, 3.0, 4.0]
    assert not [name for name in found.rows if name.startswith(("wrpCoordinate", "wrpAngle"))]
    assert list(found.rows["wrpSourceName"]) == ["TS_1.tomostar"] * 4


def test_the_pixel_size_of_exported_images_is_kept() -> None:
    rows = make_particle_rows(INNER_ZYX, tomogram="TS_1.tomostar", rlnImageName="a.mrc")
    found = convert(particles_from(rows.assign(rlnPixelSize=6.0)), "relion5")
    assert list(found.rows["rlnImagePixelSize"]) == [6.0] * 4
    assert "rlnPixelSize" not in found.rows


def test_units_that_are_missing_or_contradict_are_refused() -> None:
    bare = particles_from(make_particle_rows(VOXELS_ZYX, tomogram="t"))
    nothing = find_frames(bare)
    with pytest.raises(ValueError, match=r"voxels, whose size is not known: .*--coords-voxel-size"):
        convert_particles(bare, "relion5", nothing)
    with pytest.raises(ValueError, match=r"counts from the tomogram's centre, .* 4 of 4 .*--tomo"):
        convert_particles(bare, "relion5", nothing, coords_voxel_size=10.0)
    with pytest.raises(ValueError, match=r"unbinned pixels: .*--pixel-size"):
        convert_particles(bare, "relion4", nothing, coords_voxel_size=10.0)
    with pytest.raises(ValueError, match=r"csv counts in voxels of the tomogram: .*--voxel-size"):
        convert_particles(bare, "csv", nothing, coords_voxel_size=10.0)
    stated = bare.with_columns(rlnPixelSize=10.0)
    with pytest.raises(ValueError, match=r"voxels of 10 angstrom by rlnPixelSize, .* measure 5:"):
        convert_particles(stated, "csv", find_frames(stated, voxel_size=5.0))
    finer = convert_particles(
        stated, "csv", find_frames(stated, voxel_size=5.0), coords_voxel_size=10.0
    )
    np.testing.assert_allclose(finer.rows["x"], VOXELS_ZYX[:, 2] * 2)
    same = convert_particles(stated, "csv", find_frames(stated))
    np.testing.assert_allclose(same.rows["x"], VOXELS_ZYX[:, 2])
    with pytest.raises(ValueError, match=r"measure 1.5 angstrom by the particle .* 2 by --pixel"):
        find_frames(convert(make_table(), "relion4").in_tomogram("TS_1"), pixel_size=2.0)
    with pytest.raises(ValueError, match=r"--voxel-size is a positive number of .*, given -1"):
        find_frames(bare, voxel_size=-1.0)
    with pytest.raises(ValueError, match=r"counts unbinned pixels: .*--pixel-size"):
        find_frames(bare, size_xyz=(4, 4, 4))


def test_particles_outside_their_own_tomogram_are_refused_by_name() -> None:
    far = VOXELS_ZYX.copy()
    far[3] = (0.0, 90.0, 0.0)  # inside TS_2, but beyond the 75.5 voxels of TS_1
    with pytest.raises(ValueError, match=r"1 of 4 .*at voxel 0 x 90 x 0 .*, TS_1\)"):
        convert(make_table(far), "relion5")


def test_tomograms_need_names() -> None:
    plain = particles_from(pd.DataFrame({"x": [1.0], "y": [2.0], "z": [3.0]}))
    with pytest.raises(ValueError, match=r"name no tomogram, 2 are described: .*--tomogram-name"):
        find_frames(plain, tomograms=TOMOGRAMS)
    frames = find_frames(plain, voxel_size=5.0, pixel_size=1.0, size_xyz=(99, 99, 99))
    with pytest.raises(ValueError, match="relion4 names the tomogram of each particle"):
        convert_particles(plain, "relion4", frames)
    named = name_tomogram(plain, "TS_1")
    assert convert_particles(named, "relion4", frames).tomograms == ("TS_1",)
    with pytest.raises(ValueError, match=r"called 'TS_2', the table says TS_1: leave out"):
        name_tomogram(named, "TS_2")


def test_the_pixel_size_of_images_in_the_rows_does_not_count_after_a_conversion() -> None:
    rows = make_particle_rows(INNER_ZYX[:1], tomogram="a.tomostar", rlnImagePixelSize=3.0)
    table = particles_from(rows)
    frames = find_frames(table, voxel_size=6.0, pixel_size=1.5)
    conventions: tuple[CoordinateConvention, ...] = ("relion3", "relion4", "warp")
    for convention in conventions:
        found = convert_particles(table, convention, frames)
        unit = 1.5 if convention == "relion4" else 6.0
        np.testing.assert_array_equal(stated_unit(found), [unit])
        np.testing.assert_allclose(found.rows["rlnCoordinateX"] * unit, INNER_ZYX[:1, 2] * 3.0)


# Files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Picks in CSV, their tomogram and a table of tomograms."""
    volume = np.zeros((20, 30, 40), np.float32)
    write_volume(tmp_path / "TS_9.mrc", Volume(volume, 12.0))
    (tmp_path / "picks.csv").write_text("x,y,z,score\n20,15,10,0.5\n0,29,3,0.25\n")
    (tmp_path / "tomograms.star").write_text(
        "data_global\n\nloop_\n_rlnTomoName #1\n_rlnTomoSizeX #2\n_rlnTomoSizeY #3\n"
        "_rlnTomoSizeZ #4\n_rlnTomoTiltSeriesPixelSize #5\n_rlnTomoTomogramBinning #6\n"
        "TS_9 161 121 81 3.0 4.0\n"
    )
    return tmp_path


def test_a_volume_says_size_voxel_and_name(folder: Path) -> None:
    options = ConversionOptions(tomogram=folder / "TS_9.mrc")
    told = convert_file(folder / "picks.csv", folder / "a.star", "relion5", options)
    assert told == ("2 particles of 1 tomogram: x became rlnCenteredCoordinateXAngst (relion5)",)
    rows = read_particles(folder / "a.star").rows
    assert list(rows["rlnTomoName"]) == ["TS_9", "TS_9"]
    assert list(rows["rlnCenteredCoordinateXAngst"]) == [0.0, -240.0]
    assert list(rows["score"]) == [0.5, 0.25]


def test_a_table_of_one_tomogram_says_so_too(folder: Path) -> None:
    options = ConversionOptions(tomograms=folder / "tomograms.star")
    convert_file(folder / "picks.csv", folder / "a.star", "relion5", options)
    rows = read_particles(folder / "a.star").rows
    assert list(rows["rlnTomoName"]) == ["TS_9", "TS_9"]
    assert list(rows["rlnCenteredCoordinateXAngst"]) == [20 * 12 - 80.5 * 3, -80.5 * 3]
    assert list(rows["rlnTomoTiltSeriesPixelSize"]) == [3.0, 3.0]
    options = ConversionOptions(
        tomogram_size=(161, 121, 81), pixel_size=3.0, voxel_size=12.0, tomogram_name="other"
    )
    convert_file(folder / "picks.csv", folder / "b.star", "relion5", options)
    again = read_particles(folder / "b.star").rows
    assert list(again["rlnCenteredCoordinateXAngst"]) == list(rows["rlnCenteredCoordinateXAngst"])
    assert list(again["rlnTomoName"]) == ["other", "other"]


def test_nothing_is_written_unless_all_is_well(folder: Path) -> None:
    before = sorted(folder.iterdir())
    picks, volume = folder / "picks.csv", ConversionOptions(tomogram=folder / "TS_9.mrc")

    def refuse(match: str, out: str, to: CoordinateConvention, options: ConversionOptions) -> None:
        with pytest.raises((ValueError, OSError), match=match):
            convert_file(picks, folder / out, to, options)
        assert sorted(folder.iterdir()) == before

    refuse("--overwrite", "picks.csv", "csv", volume)
    refuse(r"ends in .csv goes with --to csv", "a.csv", "relion5", volume)
    refuse(r"ends in .csv goes with --to csv", "a.star", "csv", volume)
    refuse("--pixel-size", "a.star", "relion4", volume)
    refuse("no file", "a.star", "relion5", ConversionOptions(tomograms=folder / "absent.star"))
    picks.write_text("x,y,z,my note\n1,2,3,a\n")
    refuse("column 'my note' of block 'particles': a STAR file's", "a.star", "relion5", volume)
    picks.write_text("x,y,z,note\n1,2,3,it's\n")
    refuse(r"row 0: \"it's\" holds quotes", "a.star", "relion5", volume)
    picks.write_text("name,x,y,z\ndata_1,1,2,3\n")
    refuse("'data_1' begins like a block", "a.star", "relion5", volume)
    with pytest.raises(ValueError, match="give one of them"):
        ConversionOptions(tomogram=folder, tomogram_size=(1, 2, 3))


def test_one_volume_is_not_several_tomograms(folder: Path) -> None:
    make_table().write(folder / "two.star")
    options = ConversionOptions(tomogram=folder / "TS_9.mrc")
    with pytest.raises(ValueError, match=r"particles of 2 tomograms, .*TS_9.mrc is one"):
        convert_file(folder / "two.star", folder / "a.star", "relion5", options)


def test_the_real_export_of_warp_goes_round_through_every_convention(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = shared_data / "star" / "relion5_particles.star"
    tomograms = ["--tomograms", str(shared_data / "star" / "relion5_tomograms.star")]
    steps = [first]
    for number, to in enumerate(("relion5", "relion4", "relion3", "csv", "relion5", "warp")):
        steps.append(tmp_path / f"{number}.{'csv' if to == 'csv' else 'star'}")
        sizes = ["--voxel-size", "12"]
        with pytest.raises(SystemExit) as stop:
            main(["convert", str(steps[-2]), str(steps[-1]), "--to", to, *tomograms, *sizes])
        assert not stop.value.code, capsys.readouterr().err
    assert (
        "left out, for CSV holds one table: the blocks general, optics" in capsys.readouterr().out
    )
    before, after = read_particles(first).rows, read_particles(steps[-1]).rows
    shared = [name for name in before if name in after]
    assert set(before) == set(shared)
    for name in shared:
        if before[name].dtype.kind == "f":
            np.testing.assert_allclose(after[name], before[name], atol=1e-5)
        else:
            assert list(after[name]) == list(before[name]), name
    middle = read_particles(steps[1])
    assert list(middle.blocks) == ["general", "optics", "particles"]
    pixels = middle.rows["rlnCenteredCoordinateZAngst"] / 1.667 + 700
    np.testing.assert_allclose(pixels * 1.667, before["rlnCoordinateZ"] * 12.0, atol=1e-5)
