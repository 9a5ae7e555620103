"""Parts of a batch are the batch, however many there are and whoever reads them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from builders import MemorySource, make_cubes, make_manifest, write_dataset

from cectflow.dataset import Batch, BatchSource, Dataset, Selection
from cectflow.learning.shares import HandOut, Part, Share, read_parts
from cectflow.turns import HALF_TURNS


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("of", [1, 2, 3, 7])
@pytest.mark.parametrize("size", [1, 2, 5, 12])
def test_every_cube_counts_in_one_share(size: int, of: int) -> None:
    shares = [Share(number, of) for number in range(of)]
    counts = [share.count(size) for share in shares]
    counted = [i for s in shares if s.count(size) for i in range(size)[s.place(size)]]
    assert counted == list(range(size))
    assert sum(counts) == size
    assert max(counts) - min(counts) <= 1
    # A share without a cube of its own takes one, that counts nothing.
    assert all(len(range(size)[share.place(size)]) >= 1 for share in shares)


def read(source: BatchSource, share: Share, seed: int | None = 3) -> list[Part]:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return list(read_parts(source, 5, share, tuple(HALF_TURNS), generator))


def together(parts: list[Part]) -> Batch:
    """The whole batch of parts."""
    counted = [part.batch for part in parts if part.count]
    columns = zip(*(vars(batch).values() for batch in counted), strict=True)
    return Batch(*(None if values[0] is None else torch.cat(values) for values in columns))


@pytest.mark.parametrize("kind", ["split", "selection", "memory"])
@pytest.mark.parametrize("seed", [3, None])
def test_shares_together_are_the_batches_of_one_process(
    kind: str, seed: int | None, dataset: Dataset
) -> None:
    split = dataset.split("train")
    sources: dict[str, BatchSource] = {
        "split": split,
        "selection": Selection(split, np.arange(11)),  # its last batch is of one cube
        "memory": MemorySource(make_cubes(11), make_manifest()),
    }
    whole = read(sources[kind], Share(), seed)
    shares = [read(sources[kind], Share(number, 3), seed) for number in range(3)]
    for expected, *parts in zip(whole, *shares, strict=True):
        assert {part.whole for part in parts} == {len(expected.batch)}
        for ours, theirs in zip(
            vars(together(parts)).values(), vars(expected.batch).values(), strict=True
        ):
            assert ours is theirs is None or torch.equal(ours, theirs)


def test_what_one_process_hands_out_is_what_each_would_read(dataset: Dataset) -> None:
    split = dataset.split("train")
    hand_out = HandOut(lambda epoch: iter(read(split, Share(), epoch)), 2)
    for epoch in (1, 2):
        expected = [read(split, Share(number, 2), epoch) for number in range(2)]
        for parts in zip(*expected, strict=True):
            for number in (1, 0):  # whoever comes first
                handed = hand_out(number, epoch)
                assert handed is not None
                assert torch.equal(handed.batch.subtomograms, parts[number].batch.subtomograms)
                assert (handed.count, handed.whole) == (parts[number].count, parts[number].whole)
        assert [hand_out(number, epoch) for number in (0, 1)] == [None, None]


def test_a_share_of_a_folder_reads_no_other_cube(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = dataset.split("train")
    asked: list[int] = []
    original = type(split).read

    def count(self: object, indices: np.ndarray) -> Batch:
        asked.append(len(indices))
        return original(split, indices)

    monkeypatch.setattr(type(split), "read", count)
    read(split, Share(1, 2))
    assert asked == [3, 3, 1]
