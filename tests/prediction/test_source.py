"""Sources: what is read for which row, and what is said of what cannot be."""

from __future__ import annotations

import gzip
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from builders import make_card

from cectflow.model_card import ModelCard
from cectflow.particles import ParticleTable, make_particle_rows, particles_from
from cectflow.prediction import source as sources
from cectflow.prediction.asking import split_blocks
from cectflow.prediction.contract import InputOptions
from cectflow.prediction.source import (
    Block,
    CubeSource,
    open_listed,
    open_stacks,
    open_tomograms,
    read_blocks,
)
from cectflow.volume import Volume
from cectflow.volume_writer import write_images, write_stack, write_volume

BOX = 12
CARD = make_card(box=BOX, voxel_size=10.0)
OPTIONS = InputOptions(batch_size=4)


def silent(_: str) -> None:
    pass


def counted(num: int, first: int = 0) -> np.ndarray:
    """Cubes whose voxels are their number."""
    numbers = np.arange(first, first + num, dtype=np.float32)
    return np.broadcast_to(numbers[:, None, None, None], (num, BOX, BOX, BOX))


def listed(folder: Path, names: list[str], card: ModelCard = CARD) -> CubeSource:
    table = particles_from(pd.DataFrame({"rlnImageName": names}))
    return open_listed(table, folder, card, OPTIONS, silent)


def read_all(source: CubeSource, size: int = 1000) -> dict[int, float]:
    """Row → value of its cube."""
    found = {}
    for piece in split_blocks(source, size):
        rows = np.concatenate([block.rows for block in piece])
        for batch in read_blocks(piece, source.card, source.options):
            assert len(batch) <= source.options.batch_size
            assert not batch.faults
            found |= dict(
                zip(rows[batch.kept].tolist(), batch.cubes[:, 0, 0, 0, 0].tolist(), strict=True)
            )
    return found


def test_every_row_reads_the_cube_that_it_names(tmp_path: Path) -> None:
    write_stack(tmp_path / "a.mrcs", counted(5), 10.0)
    write_stack(tmp_path / "b.mrcs", counted(3, 5), 10.0)
    write_stack(tmp_path / "me@home.mrc", counted(1, 8), 10.0)
    names = ["5@a.mrcs", "000001@b.mrcs", "1@a.mrcs", "me@home.mrc", "5@a.mrcs", "3@b.mrcs"]
    source = listed(tmp_path, names)
    for size in (1, 2, 4, 100):
        assert read_all(source, size) == {0: 4.0, 1: 5.0, 2: 0.0, 3: 8.0, 4: 4.0, 5: 7.0}


def test_names_that_lead_nowhere_are_listed_each_with_its_reason(tmp_path: Path) -> None:
    write_stack(tmp_path / "a.mrcs", counted(5), 10.0)
    (tmp_path / "broken.mrcs").write_bytes((tmp_path / "a.mrcs").read_bytes()[:3000])
    write_stack(tmp_path / "small.mrcs", counted(2)[:, :8, :8, :8], 10.0)
    names = [
        "2@a.mrcs", "6@a.mrcs", "0@a.mrcs", "x@a.mrcs", "2@", "", "9" * 30 + "@a.mrcs",
        "gone.mrc", "1@broken.mrcs", "1@small.mrcs", "../a.mrcs", "nan", "1@a.mrcs",
    ]  # fmt: skip
    source = listed(tmp_path, names)
    assert read_all(source) == {0: 1.0, 12: 0.0}
    reasons = {
        1: "a.mrcs holds 5 subtomograms: there is no number 6",
        2: "expected 3@stack.mrcs, counted from 1", 3: "there is no file",
        4: "names no subtomogram", 5: "names no subtomogram", 6: "names no subtomogram",
        7: "there is no file", 8: "is truncated", 9: "small.mrcs: subtomograms of 8³",
        10: "there is no file", 11: "there is no file",
    }  # fmt: skip
    assert source.faults.keys() == reasons.keys()
    for row, reason in reasons.items():
        assert reason in source.faults[row]


def test_a_table_without_any_usable_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file"):
        listed(tmp_path, ["gone.mrc", "1@gone.mrcs"])
    with pytest.raises(ValueError, match="names no subtomogram"):
        listed(tmp_path, ["0@a.mrcs"])
    with pytest.raises(ValueError, match="there are no particles to predict"):
        listed(tmp_path, [])
    table = particles_from(make_particle_rows(np.zeros((1, 3)), tomogram="t"))
    with pytest.raises(ValueError, match=r"no column rlnImageName: .*or --tomogram"):
        open_listed(table, tmp_path, CARD, OPTIONS, silent)


@pytest.mark.parametrize("said", ["general", "optics", "nothing"])
def test_image_stacks_of_relion_5_are_refused_with_the_remedy(tmp_path: Path, said: str) -> None:
    # As many tilts as pixels along an edge: only the table tells this from a cube.
    tilts = BOX if said != "nothing" else 9
    write_images(tmp_path / "1_stack2d.mrcs", np.zeros((tilts, BOX, BOX), np.float32), 10.0)
    rows = pd.DataFrame({"rlnImageName": ["1_stack2d.mrcs"], "rlnOpticsGroup": [1]})
    blocks: dict = {
        "general": {"general": {"rlnTomoSubTomosAre2DStacks": 1}},
        "optics": {
            "optics": pd.DataFrame({"rlnOpticsGroup": [1], "rlnImageDimensionality": [2]}),
        },
        "nothing": {},
    }[said]
    table = ParticleTable({**blocks, "particles": rows}, "particles")
    with pytest.raises(ValueError, match=r"2D images.*--tomogram tomograms.star --particles"):
        open_listed(table, tmp_path, CARD, OPTIONS, silent)


def test_a_tomogram_among_stacks_is_one_row_with_the_remedy(tmp_path: Path) -> None:
    write_stack(tmp_path / "b.mrcs", counted(2), 10.0)
    write_volume(tmp_path / "a.mrc", Volume(np.zeros((12, 20, 24), np.float32), 10.0))
    paths = [tmp_path / "a.mrc", tmp_path / "b.mrcs"]
    source = open_stacks(paths, CARD, OPTIONS, silent)
    assert read_all(source) == {1: 0.0, 2: 1.0}
    assert "24 x 20 x 12 voxels (x, y, z): expected subtomograms of 12³" in source.faults[0]
    assert "give it as --tomogram" in source.faults[0]


def test_pieces_are_full_and_hold_every_row_once() -> None:
    generator = np.random.default_rng(0)
    for _ in range(200):
        size = int(generator.integers(1, 9))
        counts = generator.integers(1, 20, generator.integers(1, 12))
        starts = np.cumsum([0, *counts])
        files = tuple(
            Block(Path(f"{a}"), np.arange(a, b), np.arange(b - a), BOX) for a, b in pairwise(starts)
        )
        source = CubeSource(particles_from(pd.DataFrame()), files, CARD, OPTIONS)
        pieces = split_blocks(source, size)
        lengths = [sum(map(len, piece)) for piece in pieces]
        assert max(lengths) <= size
        assert min(lengths) >= 1
        rows = np.concatenate([block.rows for piece in pieces for block in piece])
        assert sorted(rows.tolist()) == list(range(starts[-1]))


def test_a_compressed_tomogram_is_unpacked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = np.random.default_rng(0).normal(size=(24, 24, 24)).astype(np.float32)
    write_volume(tmp_path / "t.mrc", Volume(data, 10.0))
    with (tmp_path / "t.mrc").open("rb") as plain, gzip.open(tmp_path / "t.mrc.gz", "wb") as packed:
        shutil.copyfileobj(plain, packed)
    reads = []
    read_volume = sources.read_volume
    monkeypatch.setattr(
        sources, "read_volume",
        lambda path, **options: (reads.append(path), read_volume(path, **options))[1],
    )  # fmt: skip
    table = particles_from(make_particle_rows(np.full((20, 3), 12.0), tomogram="t"))
    source = open_tomograms(table, {"t": tmp_path / "t.mrc.gz"}, CARD, OPTIONS, silent)
    assert len(read_all(source, 3)) == 20
    assert len(reads) == 1
    plain_source = open_tomograms(table, {"t": tmp_path / "t.mrc"}, CARD, OPTIONS, silent)
    assert read_all(plain_source, 3) == read_all(source, 3)


@pytest.mark.parametrize("border", ["fill", "fail"])
def test_particles_over_the_border(tmp_path: Path, border: sources.Border) -> None:
    data = np.ones((24, 24, 24), np.float32)
    write_volume(tmp_path / "t.mrc", Volume(data, 10.0))
    positions = np.array([[12.0, 12, 12], [2, 12, 12], [12, 12, 19], [6, 6, 6], [18, 18, 18]])
    told: list[str] = []
    source = open_tomograms(
        particles_from(make_particle_rows(positions, tomogram="t")), {"t": tmp_path / "t.mrc"},
        CARD, OPTIONS, told.append, border=border,
    )  # fmt: skip
    assert sorted(source.faults) == ([1, 2] if border == "fail" else [])
    assert sorted(read_all(source)) == ([0, 3, 4] if border == "fail" else [0, 1, 2, 3, 4])
    assert [line for line in told if line.startswith("2 of 5 subtomograms reach over the border")]


def test_a_pick_outside_costs_itself_and_many_cost_their_tomogram(tmp_path: Path) -> None:
    write_volume(tmp_path / "t.mrc", Volume(np.ones((24, 24, 24), np.float32), 10.0))
    positions = np.full((42, 3), 12.0)
    positions[[3, 40], 2] = 99, np.nan
    rows = pd.concat(
        [make_particle_rows(positions, tomogram="far"), make_particle_rows(positions, tomogram="t")]
    )
    table = particles_from(rows.iloc[::-1].reset_index(drop=True))
    paths = {"t": tmp_path / "t.mrc", "far": "no such tomogram"}
    source = open_tomograms(table, paths, CARD, OPTIONS, silent)
    assert sorted(source.faults) == [1, 38, *range(42, 84)]
    assert source.faults[1].endswith("t.mrc: a coordinate or an offset is not a number: correct it")
    assert "lies at voxel 99 x 12 x 12, outside the tomogram of 24 x 24 x 24" in source.faults[38]
    assert sorted(read_all(source)) == [row for row in range(42) if row not in (1, 38)]
    positions[5:9, 0] = 50
    far = particles_from(make_particle_rows(positions, tomogram="t"))
    with pytest.raises(ValueError, match=r"5 of 41 particles lie outside .* --coords-voxel-size"):
        open_tomograms(far, paths, CARD, OPTIONS, silent)


def test_rows_of_one_stack_take_little_memory(tmp_path: Path) -> None:
    import tracemalloc

    write_stack(tmp_path / "a.mrcs", counted(100), 10.0)
    numbers = np.arange(100_000) % 100 + 1
    table = particles_from(
        pd.DataFrame({"rlnImageName": [f"{n}@a.mrcs" for n in numbers.tolist()]})
    )
    tracemalloc.start()
    try:
        source = open_listed(table, tmp_path, CARD, OPTIONS, silent)
        pieces = split_blocks(source, 1024)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sum(len(block) for piece in pieces for block in piece) == len(numbers)
    assert peak < 10e6  # a tenth of what a million may: 100 bytes a row
