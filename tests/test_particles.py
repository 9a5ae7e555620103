"""Particle files come back as they were, and every convention leads to the same voxels."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cectflow.particles import (
    CoordinateConvention,
    ParticleTable,
    coordinate_columns,
    coordinates_zyx,
    make_particle_rows,
    particles_from,
    read_particles,
)

SHAPE = (40, 100, 80)
POSITIONS = np.array([[20.0, 50.0, 40.0], [3.25, 99.0, 0.5]])


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def table_of(columns: dict[str, Any], **blocks: Any) -> ParticleTable:
    return ParticleTable({**blocks, "particles": pd.DataFrame(columns)}, "particles")


def xyz(names: str, positions_zyx: np.ndarray, factor: float = 1.0) -> dict[str, np.ndarray]:
    """Columns from a template such as ``rlnCoordinate{}``."""
    return {names.format(axis): positions_zyx[:, 2 - i] * factor for i, axis in enumerate("XYZ")}


def positions(table: ParticleTable, **options: Any) -> np.ndarray:
    return coordinates_zyx(table, **{"voxel_size": 12.0, "shape": SHAPE, **options})


# Reading and writing


@pytest.mark.parametrize("name", ["relion5_particles.star", "relion3_tilt_images.star"])
def test_real_files_come_back_block_by_block(shared_data: Path, tmp_path: Path, name: str) -> None:
    table = read_particles(shared_data / "star" / name)
    table.write(tmp_path / name)
    again = read_particles(tmp_path / name)
    assert list(again.blocks) == list(table.blocks)
    assert again.block == table.block
    for block, content in table.blocks.items():
        if isinstance(content, dict):
            assert again.blocks[block] == content
        else:
            pd.testing.assert_frame_equal(again.blocks[block], content, check_exact=True)


def test_the_real_files_hold_what_their_programs_wrote(shared_data: Path) -> None:
    relion5 = read_particles(shared_data / "star" / "relion5_particles.star")
    assert list(relion5.blocks) == ["general", "optics", "particles"]
    assert relion5.blocks["general"] == {"rlnTomoSubTomosAre2DStacks": 1}
    assert len(relion5) == 40
    assert relion5.tomograms[0] == "Unt_083.tomostar"
    relion3 = read_particles(shared_data / "star" / "relion3_tilt_images.star")
    assert (relion3.block, len(relion3)) == ("", 219)
    stack = read_particles(shared_data / "real" / "ribosome_70s" / "ribosome_70s.star")
    assert len(stack) == 20
    with pytest.raises(ValueError, match=r"no coordinates.*found rlnTomoName, rlnImageName"):
        positions(stack)
    with pytest.raises(ValueError, match=r"0 tables of particles.*global"):
        read_particles(shared_data / "star" / "relion5_tomograms.star")


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    values=hnp.arrays(
        np.float64,
        st.integers(1, 5).map(lambda n: (n, 3)),
        elements=st.floats(-1e9, 1e9, allow_subnormal=False),
    )
)
def test_numbers_keep_their_digits(tmp_path: Path, values: np.ndarray) -> None:
    path = tmp_path / "particles.star"
    particles_from(make_particle_rows(values, tomogram="a")).write(path, overwrite=True)
    rows = read_particles(path).rows
    np.testing.assert_allclose(rows["rlnCoordinateZ"], values[:, 0], rtol=1e-15, atol=1e-300)


def test_names_that_look_like_numbers_stay_names(tmp_path: Path) -> None:
    rows = make_particle_rows(POSITIONS, tomogram="001")
    rows["cectflowClassName"] = ["1e10", "with space"]
    particles_from(rows).write(tmp_path / "a.star")
    again = read_particles(tmp_path / "a.star")
    assert again.tomograms == ("001",)
    assert list(again.rows["cectflowClassName"]) == ["1e10", "with space"]


def test_equal_tables_make_equal_files(tmp_path: Path) -> None:
    for name in ("a.star", "b.star"):
        particles_from(make_particle_rows(POSITIONS, tomogram="t")).write(tmp_path / name)
    text = (tmp_path / "a.star").read_text()
    assert text == (tmp_path / "b.star").read_text()
    assert text.startswith("# Written by cectflow\n")


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    path = write(tmp_path / "a.star", "mine")
    table = particles_from(make_particle_rows(POSITIONS, tomogram="t"))
    with pytest.raises(FileExistsError, match="--overwrite"):
        table.write(path)
    assert path.read_text() == "mine"
    table.write(path, overwrite=True)
    assert len(read_particles(path)) == 2


def test_a_rewritten_file_is_read_anew(tmp_path: Path) -> None:
    path = write(tmp_path / "a.star", "data_particles\nnothing\n")
    with pytest.raises(ValueError, match="not a STAR file"):
        read_particles(path)
    particles_from(make_particle_rows(POSITIONS, tomogram="t")).write(path, overwrite=True)
    os.utime(path, (1, 1))
    assert len(read_particles(path)) == 2


def test_columns_are_added_to_the_same_rows() -> None:
    table = table_of({"a": [1, 2, 3]}, optics=pd.DataFrame({"b": [1]}))
    scored = table.with_columns(score=[0.1, 0.2, 0.3], a=pd.Series([7, 8, 9], index=[5, 6, 7]))
    assert list(scored.rows["a"]) == [7, 8, 9]
    assert list(scored.rows.columns) == ["a", "score"]
    assert list(scored.blocks) == ["optics", "particles"]
    assert list(table.rows.columns) == ["a"]
    few = scored.select([True, False, True])
    assert list(few.rows["score"]) == [0.1, 0.3]
    assert list(few.rows.index) == [0, 1]
    with pytest.raises(ValueError, match="length"):
        table.with_columns(score=[0.1])


def test_a_particle_block_without_a_loop_is_one_row(tmp_path: Path) -> None:
    text = "data_particles\n\n_rlnCoordinateX 1.5\n_rlnCoordinateY 2\n_rlnCoordinateZ 3\n"
    table = read_particles(write(tmp_path / "a.star", text))
    np.testing.assert_array_equal(positions(table), [[3, 2, 1.5]])


def test_the_only_table_with_images_is_found_by_its_columns(tmp_path: Path) -> None:
    optics = "data_optics\n\nloop_\n_rlnOpticsGroup #1\n1\n\n"
    images = "data_{}\n\nloop_\n_rlnImageName #1\na.mrc\n\n"
    table = read_particles(write(tmp_path / "a.star", optics + images.format("picks")))
    assert table.block == "picks"
    both = write(tmp_path / "b.star", images.format("one") + images.format("two"))
    with pytest.raises(ValueError, match=r"2 tables of particles.*'one', 'two'.*rlnImageName"):
        read_particles(both)


@pytest.mark.parametrize(
    "content",
    [b"", b"hello\n", b"x,y,z\n1,2,3\n", bytes(range(256)), b"data_\n", b"data_a\nloop_\n"],
)
def test_what_is_not_star_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.star").write_bytes(content)
    with pytest.raises(ValueError, match=r"not a STAR file|tables of particles"):
        read_particles(tmp_path / "a.star")


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_particles(tmp_path / "a.star")


def test_a_table_needs_its_block() -> None:
    with pytest.raises(ValueError, match=r"no table 'particles' among the blocks \['optics'\]"):
        ParticleTable({"optics": {}}, "particles")


def test_csv_files_hold_voxels_and_keep_their_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "x,y,z,class,note\n40,50,20,ribosome,\n0.5,99,3.25,fas,b\n")
    table = read_particles(path)
    np.testing.assert_array_equal(positions(table), POSITIONS)
    np.testing.assert_array_equal(positions(table, coords_voxel_size=6.0), POSITIONS / 2)
    table.write(tmp_path / "b.csv")
    pd.testing.assert_frame_equal(read_particles(tmp_path / "b.csv").rows, table.rows)
    with pytest.raises(ValueError, match="lacks the columns x, y, z: its columns are a, b"):
        read_particles(write(tmp_path / "c.csv", "a,b\n1,2\n"))
    with pytest.raises(ValueError, match="not a CSV file"):
        read_particles(write(tmp_path / "d.csv", ""))


# Coordinates


@settings(max_examples=30, deadline=None)
@given(
    positions_zyx=hnp.arrays(
        np.float64, st.integers(0, 4).map(lambda n: (n, 3)), elements=st.floats(0, 39)
    ),
    convention=st.sampled_from(["relion3", "relion4", "relion5"]),
    pixel_size=st.floats(0.5, 4),
)
def test_every_convention_leads_back_to_the_same_voxels(
    positions_zyx: np.ndarray, convention: CoordinateConvention, pixel_size: float
) -> None:
    columns = coordinate_columns(
        positions_zyx,
        convention,
        voxel_size=12.0,
        shape=SHAPE,
        tilt_series_pixel_size=pixel_size,
    )
    np.testing.assert_allclose(positions(table_of(columns)), positions_zyx, atol=1e-9)


def test_relion_4_needs_its_pixel_size() -> None:
    with pytest.raises(ValueError, match="unbinned pixels"):
        coordinate_columns(POSITIONS, "relion4", voxel_size=12.0, shape=SHAPE)


def test_relion_5_counts_from_half_the_size() -> None:
    table = table_of(xyz("rlnCenteredCoordinate{}Angst", np.zeros((1, 3))))
    np.testing.assert_array_equal(positions(table), [[20, 50, 40]])


def test_relion_5_takes_the_unbinned_size_where_it_is_known() -> None:
    columns = xyz("rlnCenteredCoordinate{}Angst", np.zeros((2, 3))) | {"rlnTomoName": ["t", "t"]}
    sizes = {
        f"rlnTomoSize{axis}": [size, 9] for axis, size in zip("XYZ", (641, 800, 322), strict=True)
    }
    tomograms = pd.DataFrame(
        {"rlnTomoName": ["t", "other"], "rlnTomoTiltSeriesPixelSize": [1.5, 1.5], **sizes}
    )
    table = table_of(columns, **{"global": tomograms})
    np.testing.assert_allclose(positions(table), [[322 / 16, 50, 641 / 16]] * 2)


def test_relion_4_counts_in_unbinned_pixels_of_each_optics_group() -> None:
    columns = xyz("rlnCoordinate{}", POSITIONS * np.array([[4], [8]])) | {"rlnOpticsGroup": [1, 2]}
    optics = pd.DataFrame({"rlnOpticsGroup": [2, 1], "rlnTomoTiltSeriesPixelSize": [1.5, 3.0]})
    table = table_of(columns, optics=optics)
    np.testing.assert_allclose(positions(table), POSITIONS)
    missing = table_of(columns, optics=optics.iloc[:1].assign(rlnOpticsGroup=3).iloc[[0, 0]])
    with pytest.raises(ValueError, match="2 particles lack a number in rlnTomoTiltSeriesPixelSize"):
        positions(missing)


def test_relion_3_counts_in_voxels_of_the_tomogram_or_as_told() -> None:
    table = table_of(xyz("rlnCoordinate{}", POSITIONS))
    np.testing.assert_array_equal(positions(table), POSITIONS)
    fine = table_of(xyz("rlnCoordinate{}", POSITIONS * 4))
    np.testing.assert_allclose(positions(fine, coords_voxel_size=3.0), POSITIONS)


def test_m_counts_in_angstrom_from_the_corner() -> None:
    table = table_of(xyz("wrpCoordinate{}1", POSITIONS * 12.0))
    np.testing.assert_allclose(positions(table), POSITIONS)


def test_warp_exports_count_in_the_exported_pixels() -> None:
    columns = xyz("rlnCoordinate{}", POSITIONS * 2) | {"rlnMicrographName": ["a.tomostar"] * 2}
    table = table_of(columns | {"rlnPixelSize": [6.0, 6.0]})
    np.testing.assert_allclose(positions(table), POSITIONS)
    with pytest.raises(ValueError, match="between 0 and 1, as Warp's template matching"):
        positions(table_of(columns | xyz("rlnCoordinate{}", POSITIONS / 100)))


def test_the_real_warp_export_fills_its_tomograms(shared_data: Path) -> None:
    # 4400 x 6000 x 1400 pixels of 1.667 angstrom. Coordinates read as unbinned pixels would crowd
    # into a corner of an eighth of each edge; WarpTools divides by the exported 12 angstrom.
    table = read_particles(shared_data / "star" / "relion5_particles.star")
    shape = tuple(int(size * 1.667 / 10) for size in (1400, 6000, 4400))
    for name in table.tomograms:
        found = positions(table.in_tomogram(name), voxel_size=10.0, shape=shape)
        assert (found.max(axis=0) > np.array(shape) * 0.6).all()
    first = table.select(np.arange(40) == 0)
    np.testing.assert_allclose(
        positions(first, voxel_size=10.0, shape=shape) / 1.2, [[28.146, 564.065, 494.521]]
    )
    with pytest.raises(ValueError, match=r"in 4 tomograms, Unt_083.tomostar, .*those of one"):
        positions(table)
    with pytest.raises(ValueError, match=r"no particles in tomogram 'TS_1': .* Unt_083.tomostar"):
        table.in_tomogram("TS_1")


def test_origins_are_subtracted() -> None:
    columns = xyz("rlnCoordinate{}", POSITIONS)
    shifted = table_of(columns | xyz("rlnOrigin{}Angst", np.full((2, 3), 6.0)))
    np.testing.assert_allclose(positions(shifted), POSITIONS - 0.5)
    in_pixels = table_of(columns | xyz("rlnOrigin{}", np.full((2, 3), 0.25)))
    np.testing.assert_allclose(positions(in_pixels), POSITIONS - 0.25)


def test_origins_turn_with_the_subtomogram() -> None:
    # RELION's matrix for rot = 90 takes x to -y: subtracting it moves the particle along +y.
    columns = xyz("rlnCoordinate{}", POSITIONS[:1]) | xyz("rlnOrigin{}Angst", np.eye(3)[2:] * 12)
    angles = {"rlnTomoSubtomogramRot": [90], "rlnTomoSubtomogramTilt": [0]}
    table = table_of(columns | angles | {"rlnTomoSubtomogramPsi": [0]})
    np.testing.assert_allclose(positions(table), POSITIONS[:1] + np.array([[0, 1, 0]]))


def test_coordinates_outside_are_refused_with_the_remedy() -> None:
    table = table_of(xyz("rlnCoordinate{}", np.vstack([POSITIONS, POSITIONS * 5])))
    with pytest.raises(
        ValueError,
        match=r"2 of 4 .* row 2 at voxel 200.0 x 250.0 x 100.0 of 80 x 100 x 40 .*"
        "12 angstrom.*--coords-voxel-size",
    ):
        positions(table)
    centred = table_of(xyz("rlnCenteredCoordinate{}Angst", POSITIONS * 100))
    with pytest.raises(ValueError, match="uncropped"):
        positions(centred)
    border = np.array([[-0.5, 0, 0], [40, 100, 80]])
    assert len(positions(table_of(xyz("rlnCoordinate{}", border)))) == 2


def test_a_voxel_size_that_would_be_ignored_is_refused() -> None:
    table = table_of(xyz("rlnCenteredCoordinate{}Angst", POSITIONS))
    with pytest.raises(ValueError, match="rlnCenteredCoordinateXAngst is in angstrom already"):
        positions(table, coords_voxel_size=6.0)
    with pytest.raises(ValueError, match="positive number of angstrom, given 0"):
        positions(table_of(xyz("rlnCoordinate{}", POSITIONS)), coords_voxel_size=0.0)


def test_coordinates_that_are_no_numbers_are_refused() -> None:
    columns = xyz("rlnCoordinate{}", POSITIONS) | {"rlnCoordinateY": [1.0, np.nan]}
    with pytest.raises(
        ValueError, match=r"1 particles lack a number in rlnCoordinateX.*first row 1"
    ):
        positions(table_of(columns))


def test_new_rows_carry_tomogram_position_and_angles() -> None:
    angles = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    table = particles_from(make_particle_rows(POSITIONS, angles=angles, tomogram="TS_1"))
    assert table.tomograms == ("TS_1",)
    np.testing.assert_array_equal(positions(table), POSITIONS)
    np.testing.assert_array_equal(
        table.rows[["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"]].to_numpy(), angles
    )
    assert "rlnAngleRot" not in make_particle_rows(POSITIONS, tomogram="TS_1")
    assert len(make_particle_rows(POSITIONS[:0], tomogram="TS_1")) == 0
