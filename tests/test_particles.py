"""Particle files come back as they were, block by block and digit by digit."""

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

from cectflow.particles import ParticleTable, make_particle_rows, particles_from, read_particles
from cectflow.placement import coordinates_zyx

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


def test_what_would_be_lost_or_made_up_is_refused(tmp_path: Path) -> None:
    loop = "data_particles\n\nloop_\n_rlnCoordinateX #1\n_rlnCoordinateY #2\n_rlnImageName #3\n"
    path = tmp_path / "a.star"
    with pytest.raises(ValueError, match="has the block 'particles' more than once"):
        read_particles(write(path, f"{loop}1 2 a\n\n{loop}3 4 b\n"))
    with pytest.raises(ValueError, match="has the column 'rlnCoordinateX' more than once"):
        read_particles(write(path, f"{loop.replace('Y', 'X')}1 2 a\n"))
    cut = "row 1 of block 'particles' has 2 values for 3 columns: the file may be cut off"
    with pytest.raises(ValueError, match=cut):
        read_particles(write(path, f"{loop}1 2 a\n3 4"))
    with pytest.raises(ValueError, match=cut):
        read_particles(write(path, f"{loop.replace('ImageName', 'AnglePsi')}1 2 3\n4 5\n6 7 8\n"))
    whole = read_particles(write(path, f"{loop}1 2 <NA>\n3 4 'b c'\n5 6 nan # said\n"))
    assert list(whole.rows["rlnImageName"].isna()) == [True, False, True]
    assert list(read_particles(write(path, f'{loop}1 2 ""\n')).rows["rlnImageName"]) == [""]


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
