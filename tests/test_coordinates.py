"""Every convention of coordinates leads to the same voxels."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cectflow.coordinates import CoordinateConvention
from cectflow.particles import ParticleTable, read_particles
from cectflow.placement import coordinate_columns, coordinates_zyx, place_particles
from cectflow.subtomogram import cut
from cectflow.tomogram_table import TomogramInfo, read_tomograms

ROOT = Path(__file__).resolve().parents[1]
SHAPE = (40, 100, 80)
POSITIONS = np.array([[20.0, 50.0, 40.0], [3.25, 99.0, 0.5]])


def table_of(columns: dict[str, Any], **blocks: Any) -> ParticleTable:
    return ParticleTable({**blocks, "particles": pd.DataFrame(columns)}, "particles")


def xyz(names: str, positions_zyx: np.ndarray, factor: float = 1.0) -> dict[str, np.ndarray]:
    """Columns from a template such as ``rlnCoordinate{}``."""
    return {names.format(axis): positions_zyx[:, 2 - i] * factor for i, axis in enumerate("XYZ")}


def positions(table: ParticleTable, **options: Any) -> np.ndarray:
    return coordinates_zyx(table, **{"voxel_size": 12.0, "shape": SHAPE, **options})


@settings(max_examples=30, deadline=None)
@given(
    positions_zyx=hnp.arrays(
        np.float64, st.integers(0, 4).map(lambda n: (n, 3)), elements=st.floats(0, 39)
    ),
    convention=st.sampled_from(get_args(CoordinateConvention)),
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
    if convention == "warp" and len(positions_zyx):
        columns |= {"rlnTomoName": np.array(["a.tomostar"] * len(positions_zyx))}
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
        match=r"2 of 4 .* at voxel 200 x 250 x 100 of 80 x 100 x 40 .*"
        "12 angstrom.*--coords-voxel-size",
    ):
        positions(table)
    centred = table_of(xyz("rlnCenteredCoordinate{}Angst", POSITIONS * 100))
    with pytest.raises(ValueError, match="uncropped"):
        positions(centred)
    border = np.array([[-0.5, 0, 0], [40, 100, 80]])
    assert len(positions(table_of(xyz("rlnCoordinate{}", border)))) == 2


def test_single_particles_may_lie_outside_and_many_may_not() -> None:
    many = np.vstack([np.tile(POSITIONS, (30, 1)), POSITIONS * 5])
    many[7, 1] = np.nan
    frame: dict[str, Any] = {"voxel_size": 12.0, "shape": SHAPE}
    found, faults = place_particles(table_of(xyz("rlnCoordinate{}", many)), **frame)
    assert {row: why.split(",")[0] for row, why in faults.items()} == {
        7: "a coordinate or an offset is not a number: correct it",
        60: "lies at voxel 200 x 250 x 100",
        61: "lies at voxel 2.5 x 495 x 16.2",
    }
    assert np.flatnonzero(np.isnan(found).any(axis=1)).tolist() == [7, 60, 61]
    good = np.delete(np.arange(60), 7)
    np.testing.assert_allclose(found[good], many[good])
    fewer = table_of(xyz("rlnCoordinate{}", many[30:]))  # 2 of 32 are more than 5 %
    with pytest.raises(ValueError, match="2 of 32 particles lie outside"):
        place_particles(fewer, **frame)
    one = table_of(xyz("rlnCoordinate{}", np.vstack([POSITIONS, POSITIONS[:1] * 5])))
    assert list(place_particles(one, **frame)[1]) == [2]
    with pytest.raises(ValueError, match="1 of 1 particles lie outside"):
        place_particles(one.take(np.array([2])), **frame)
    with pytest.raises(ValueError, match="2 particles lack a number"):
        place_particles(table_of(xyz("rlnCoordinate{}", POSITIONS * np.nan)), **frame)


def test_a_voxel_size_that_would_be_ignored_is_refused() -> None:
    table = table_of(xyz("rlnCenteredCoordinate{}Angst", POSITIONS))
    with pytest.raises(ValueError, match="rlnCenteredCoordinateXAngst is in angstrom already"):
        positions(table, coords_voxel_size=6.0)
    with pytest.raises(ValueError, match="positive number of angstrom, given 0"):
        positions(table_of(xyz("rlnCoordinate{}", POSITIONS)), coords_voxel_size=0.0)


def test_coordinates_that_are_no_numbers_are_refused() -> None:
    columns = xyz("rlnCoordinate{}", POSITIONS) | {"rlnCoordinateY": [1.0, np.nan]}
    with pytest.raises(
        ValueError, match=r"1 particles lack a number in rlnCoordinateX.*the first is the 2\. of"
    ):
        positions(table_of(columns))


# With a table of tomograms


@pytest.mark.parametrize("binning", [1.0, 4.0, 6.0, 7.19856])
@pytest.mark.parametrize("size", [(64, 48, 36), (63, 47, 35), (61, 50, 37)])
def test_relion_5_cuts_the_voxel_that_was_written_whatever_size_and_binning(
    size: tuple[int, int, int], binning: float
) -> None:
    info = TomogramInfo(size, 1.7, binning)
    assert info.shape is not None
    assert info.voxel_size is not None
    volume = np.zeros(info.shape, np.float32)
    centre = tuple(edge // 2 for edge in info.shape)
    volume[centre] = 1.0
    frame: dict[str, Any] = {"voxel_size": info.voxel_size, "shape": info.shape, "info": info}
    columns = coordinate_columns(np.array([centre], float), "relion5", **frame)
    # From first principles: the voxel's centre in unbinned pixels, less half the unbinned size.
    pixel_x = centre[2] * binning - size[0] / 2
    np.testing.assert_allclose(columns["rlnCenteredCoordinateXAngst"], pixel_x * 1.7)
    found = coordinates_zyx(table_of(columns), **frame)
    np.testing.assert_allclose(found, [centre], atol=1e-9)
    assert cut(volume, found, 3, periodic=False)[0, 1, 1, 1] == 1.0


def test_the_centre_is_that_of_the_unbinned_size_also_where_binning_leaves_a_rest() -> None:
    # 4401 pixels at binning 4 make 1100 voxels: half of those is 550, RELION 5 means 550.125.
    info = TomogramInfo((4401, 4003, 1002), 1.5, 4.0)
    assert info.shape == (251, 1001, 1100)
    table = table_of(xyz("rlnCenteredCoordinate{}Angst", np.zeros((1, 3))))
    frame: dict[str, Any] = {"voxel_size": 6.0, "shape": info.shape}
    known = coordinates_zyx(table, **frame, info=info)
    np.testing.assert_allclose(known, [[1002 / 8, 4003 / 8, 4401 / 8]])
    guessed = coordinates_zyx(table, **frame)
    np.testing.assert_allclose(guessed, [[251 / 2, 1001 / 2, 1100 / 2]])
    assert np.abs(known - guessed).max() <= 0.5


def test_a_tomogram_of_another_size_than_its_table_says_is_refused() -> None:
    table = table_of(xyz("rlnCenteredCoordinate{}Angst", np.zeros((1, 3))))
    info = TomogramInfo((320, 400, 400), 3.0, 4.0)  # deeper than the volume: it was cropped
    with pytest.raises(
        ValueError, match=r"measures 960 x 1200 x 480 .*says 960 x 1200 x 1200: give the whole"
    ):
        positions(table, info=info)
    with pytest.raises(ValueError, match="give the whole tomogram"):
        coordinate_columns(POSITIONS, "relion5", voxel_size=12.0, shape=SHAPE, info=info)
    assert len(positions(table, info=TomogramInfo((321, 398, 161), 3.0))) == 1


@pytest.mark.parametrize("binning", [1.0, 4.0, 6.0])
@pytest.mark.parametrize("less", [0, 1])
def test_the_real_particles_lie_where_they_lay_after_relion_5(
    shared_data: Path, binning: float, less: int
) -> None:
    table = read_particles(shared_data / "star" / "relion5_particles.star")
    for name, info in read_tomograms(shared_data / "star" / "relion5_tomograms.star").items():
        x, y, z = (edge - less for edge in info.size_xyz)  # 4400 x 6000 x 1400, and odd
        info = TomogramInfo((x, y, z), info.pixel_size, binning)
        assert info.shape is not None
        assert info.voxel_size is not None
        frame: dict[str, Any] = {"voxel_size": info.voxel_size, "shape": info.shape, "info": info}
        some = table.in_tomogram(name)
        before = coordinates_zyx(some, **frame)
        np.testing.assert_allclose(
            before[:, 2], some.rows["rlnCoordinateX"] * 12.0 / (1.667 * binning)
        )
        columns = coordinate_columns(before, "relion5", **frame)
        assert columns["rlnCenteredCoordinateXAngst"].min() < 0  # some lie left of the centre
        again = coordinates_zyx(table_of(columns), **frame)
        np.testing.assert_allclose(again, before, atol=1e-9)
        assert (np.rint(again) == np.rint(before)).all()


def test_warp_is_accepted_in_both_of_its_forms() -> None:
    exported = coordinate_columns(POSITIONS, "warp", voxel_size=12.0, shape=SHAPE)
    names = {"rlnMicrographName": ["a.tomostar"] * 2}
    np.testing.assert_allclose(positions(table_of(exported | names)), POSITIONS)
    # At another binning of the tomogram the exported pixels still hold.
    half = {"voxel_size": 6.0, "shape": tuple(2 * edge for edge in SHAPE)}
    np.testing.assert_allclose(positions(table_of(exported | names), **half), POSITIONS * 2)
    species = xyz("wrpCoordinate{}1", POSITIONS, 12.0) | {"wrpSourceName": ["a.tomostar"] * 2}
    np.testing.assert_allclose(positions(table_of(species)), POSITIONS)


def test_pixel_sizes_that_are_none_are_refused() -> None:
    columns = xyz("rlnCoordinate{}", POSITIONS) | {"rlnTomoTiltSeriesPixelSize": [1.5, 0.0]}
    with pytest.raises(ValueError, match="positive number of angstrom, the table says 0"):
        positions(table_of(columns))


def test_the_picture_of_the_page_shows_what_is_written(tmp_path: Path) -> None:
    script = runpy.run_path(str(ROOT / "docs" / "conventions.py"))
    numbers = {name: script["numbers_of"](name) for name in ("relion3", "relion4", "relion5", "m")}
    # Voxel 5, 1 at binning 2 and 5 angstrom; half of 14 x 10 pixels is 35, 25 angstrom.
    assert numbers == {"relion3": (5, 1), "relion4": (10, 2), "relion5": (15, -15), "m": (50, 10)}
    script["write_figure"](script["draw_conventions"](), tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000
