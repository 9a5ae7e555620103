"""A dataset folder gives each cube once, is the same however it was made, and shows its faults."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray

from cectflow import shards
from cectflow.dataset import Batch, open_dataset
from cectflow.execution import Workplace
from cectflow.files import sha256_of
from cectflow.manifest import FieldRecord, Manifest, ShardRecord, SplitName, read_manifest
from cectflow.shards import Subtomograms, check_dataset, collect_shards, write_shard
from cectflow.simulation.delivery import simulate_dataset
from cectflow.simulation.microscope import TiltScheme
from cectflow.simulation.recipe import SimulationRecipe
from cectflow.simulation.structure import Structure, find_structures, load_structure
from cectflow.volume import read_stack
from cectflow.volume_writer import write_stack

RECIPE = SimulationRecipe(
    seed=3,
    include=("dumbbell", "rod"),
    box=12,
    voxel_size=18.0,
    field_shape=(24, 24, 24),
    fields={"train": 3, "validation": 1, "test": 1},
    occupancy=0.04,
    blur=13.0,
    jitter=18.0,
    snr=(5.0, 5.0),
    tilts=TiltScheme(step=12.0),
)


@pytest.fixture(scope="module")
def structures() -> tuple[Structure, ...]:
    sources = {source.name: source for source in find_structures("builtin")}
    return tuple(load_structure(sources[name]) for name in RECIPE.include)


@pytest.fixture(scope="module")
def simulated(structures: tuple[Structure, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed: see ``folder``."""
    folder = tmp_path_factory.mktemp("simulated") / "dataset"
    simulate_dataset(RECIPE, structures, folder)
    return folder


@pytest.fixture
def folder(simulated: Path, tmp_path: Path) -> Path:
    """Copy that a test may damage."""
    return Path(shutil.copytree(simulated, tmp_path / "dataset"))


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def edit_manifest(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def edit_stack(folder: Path, name: str, edit: Callable[[NDArray[Any]], None]) -> None:
    """Change a stack of the training split and state its new digest."""
    path = folder / "train" / name
    stack, voxel_size = read_stack(path, mmap=False)
    edit(stack)
    write_stack(path, stack, voxel_size, overwrite=True)

    def restate(manifest: dict[str, Any]) -> None:
        for shard in manifest["shards"]["train"]:
            if name in shard["sha256"]:
                shard["sha256"][name] = sha256_of(path)

    edit_manifest(folder, restate)


# Simulation


def test_a_simulated_folder_is_sound_and_complete(simulated: Path) -> None:
    assert check_dataset(simulated) == ()
    manifest = open_dataset(simulated).manifest
    assert manifest.is_complete
    assert [len(manifest.shards[split]) for split in ("train", "validation", "test")] == [3, 1, 1]
    assert manifest.classes == ("dumbbell", "rod")
    assert manifest.mean_snr_60("train") is not None
    assert sorted(path.name for path in (simulated / "train").iterdir())[:4] == [
        "00000.mrcs",
        "00000.star",
        "00000_instances.mrcs",
        "00000_labels.mrcs",
    ]


def test_two_workers_write_the_same_bytes_as_one(
    simulated: Path, structures: tuple[Structure, ...], tmp_path: Path
) -> None:
    simulate_dataset(RECIPE, structures, tmp_path / "dataset", where=Workplace(2))
    assert contents(tmp_path / "dataset") == contents(simulated)


def test_a_restart_writes_what_is_missing_and_nothing_else(
    simulated: Path, folder: Path, structures: tuple[Structure, ...]
) -> None:
    for path in folder.glob("train/00001*"):
        path.unlink()
    edit_manifest(folder, lambda manifest: manifest["shards"]["train"].pop(1))
    kept = folder / "train" / "00000.mrcs"
    os.utime(kept, (1, 1))
    with pytest.raises(ValueError, match=r"incomplete: 4 of 5 shards; run .* again"):
        open_dataset(folder)
    simulate_dataset(RECIPE, structures, folder)
    assert contents(folder) == contents(simulated)
    assert kept.stat().st_mtime == 1


def test_another_simulation_does_not_go_on_in_the_folder(
    folder: Path, structures: tuple[Structure, ...], tmp_path: Path
) -> None:
    before = contents(folder)
    other = RECIPE.model_copy(update={"seed": 4})
    with pytest.raises(FileExistsError, match="holds another dataset"):
        simulate_dataset(other, structures, folder)
    assert contents(folder) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty: give another folder"):
        simulate_dataset(RECIPE, structures, tmp_path / "mine")


# Opening


def test_a_folder_without_a_manifest_is_refused_with_the_commands_that_make_one(
    tmp_path: Path,
) -> None:
    with pytest.raises(FileNotFoundError, match=r"no manifest.json; .*`cectflow dataset import`"):
        open_dataset(tmp_path)


def test_an_incomplete_folder_still_shows_its_manifest(folder: Path) -> None:
    edit_manifest(folder, lambda manifest: manifest["shards"]["test"].clear())
    with pytest.raises(ValueError, match="incomplete: 4 of 5"):
        open_dataset(folder)
    assert not read_manifest(folder).is_complete


def test_a_manifest_with_unknown_keys_is_refused(folder: Path) -> None:
    edit_manifest(folder, lambda manifest: manifest.update(colour="red"))
    with pytest.raises(ValueError, match=r"manifest\.json is no valid Manifest: colour"):
        open_dataset(folder)


def test_the_manifest_comes_back_and_names_the_data(simulated: Path) -> None:
    manifest = read_manifest(simulated)
    assert Manifest.from_json(manifest.to_json()) == manifest
    moved = manifest.model_copy(update={"commit": "another"})
    assert moved.content_digest() == manifest.content_digest()
    fewer = manifest.model_copy(update={"shards": {**manifest.shards, "test": ()}})
    assert fewer.content_digest() != manifest.content_digest()


# Batches


def test_shuffled_batches_give_each_cube_once_and_a_seed_repeats_them(simulated: Path) -> None:
    train = open_dataset(simulated).split("train")
    in_order = torch.cat([batch.subtomograms for batch in train.batches(1000)])
    assert len(in_order) == len(train) == train.manifest.count("train")

    def shuffled(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        batches = list(train.batches(7, generator))
        assert [len(batch) for batch in batches[:-1]] == [7] * (len(batches) - 1)
        return torch.cat([batch.subtomograms for batch in batches])

    assert torch.equal(shuffled(1), shuffled(1))
    assert not torch.equal(shuffled(1), shuffled(2))
    assert not torch.equal(shuffled(1), in_order)
    ordered = {cube.numpy().tobytes() for cube in in_order}
    assert len(ordered) == len(train)
    assert {cube.numpy().tobytes() for cube in shuffled(1)} == ordered


def test_a_batch_holds_what_the_files_hold(simulated: Path) -> None:
    train = open_dataset(simulated).split("train")
    stacks = {
        kind: np.concatenate(
            [read_stack(simulated / "train" / f"{i:05d}{kind}.mrcs")[0] for i in range(3)]
        )
        for kind in ("", "_labels", "_instances")
    }
    indices = np.array([len(train) - 1, 0, 5, 0])
    batch = train.read(indices)
    assert batch.voxel_labels is not None
    assert batch.instances is not None
    assert batch.subtomograms.dtype == torch.float32
    np.testing.assert_array_equal(batch.subtomograms[:, 0], stacks[""][indices].astype("f4"))
    np.testing.assert_array_equal(batch.voxel_labels, stacks["_labels"][indices])
    np.testing.assert_array_equal(batch.instances, stacks["_instances"][indices])
    target = batch.voxel_labels[batch.instances == 1]
    assert set(target.tolist()) <= set(batch.class_ids.tolist())
    assert batch.fields.tolist() == [2, 0, 0, 0]
    moved = batch.to(torch.device("cpu"))
    assert isinstance(moved, Batch)
    assert torch.equal(moved.subtomograms, batch.subtomograms)


def test_a_split_holds_no_file_open(simulated: Path) -> None:
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 0
    train = open_dataset(simulated).split("train")
    for _ in train.batches(4):
        pass
    after = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 0
    assert after == before


def test_an_absent_split_is_refused_with_those_there_are(tmp_path: Path) -> None:
    make_unlabelled(tmp_path)
    with pytest.raises(ValueError, match="has no validation split: it holds train, test"):
        open_dataset(tmp_path).split("validation")


def test_a_dataset_without_voxel_labels_gives_batches_without_them(tmp_path: Path) -> None:
    make_unlabelled(tmp_path)
    assert check_dataset(tmp_path) == ()
    (batch,) = open_dataset(tmp_path).split("train").batches(8)
    assert batch.voxel_labels is None
    assert batch.instances is None
    assert batch.to(torch.device("cpu")).instances is None
    assert batch.class_ids.tolist() == [1, 2]
    assert batch.fields.tolist() == [0, 1]


def make_unlabelled(folder: Path) -> None:
    """Dataset of two fields in one shard, in training and in test."""
    shards = {}
    for split in ("train", "test"):
        fields = tuple(FieldRecord(field=f"{split}-{i}", mean=0.0, std=1.0) for i in range(2))
        rows = pd.DataFrame(
            {"rlnTomoName": [record.field for record in fields], "rlnClassNumber": [1, 2]}
        )
        cubes = np.random.default_rng(0).normal(size=(2, 4, 4, 4)).astype(np.float32)
        content = Subtomograms(cubes, None, None, rows)
        shards[split] = (write_shard(folder, f"{split}/00000", content, fields, 10.0),)
    Manifest(
        kind="imported",
        recipe_digest="0" * 64,
        classes=("a", "b"),
        box=4,
        voxel_size=10.0,
        has_voxel_labels=False,
        planned_shards={"train": 1, "test": 1},
        shards=shards,
    ).write(folder)


# Faults


def test_a_changed_byte_is_found(folder: Path) -> None:
    path = folder / "train" / "00001_labels.mrcs"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert check_dataset(folder) == (f"{path}: digest differs from the manifest's",)


def test_a_missing_file_is_found(folder: Path) -> None:
    path = folder / "train" / "00002.star"
    path.unlink()
    assert check_dataset(folder) == (f"{path}: missing",)


def test_a_file_that_the_manifest_does_not_list_is_found(folder: Path) -> None:
    def forget(manifest: dict[str, Any]) -> None:
        del manifest["shards"]["train"][0]["sha256"]["00000_labels.mrcs"]

    edit_manifest(folder, forget)
    assert check_dataset(folder) == ("train/00000: the manifest lists no 00000_labels.mrcs",)


def test_a_field_in_two_splits_is_found(folder: Path) -> None:
    def leak(manifest: dict[str, Any]) -> None:
        leaked = manifest["shards"]["train"][0]["fields"][0]
        manifest["shards"]["test"][0]["fields"].append(leaked)

    edit_manifest(folder, leak)
    assert check_dataset(folder) == ("field train-00000 is in train and test",)


def test_a_field_in_two_shards_and_rows_of_an_unknown_field_are_found(folder: Path) -> None:
    def confuse(manifest: dict[str, Any]) -> None:
        manifest["shards"]["train"][1]["fields"] = manifest["shards"]["train"][0]["fields"]

    edit_manifest(folder, confuse)
    assert check_dataset(folder) == (
        "train/00001: rows of fields that the manifest does not list",
        "field train-00000 is in train and train",
    )


def test_labels_of_no_class_are_found(folder: Path) -> None:
    edit_stack(folder, "00000_labels.mrcs", lambda stack: stack.__setitem__(stack == 2, 3))
    faults = check_dataset(folder)
    assert "train/00000: voxel labels outside 0..2" in faults


def test_a_missing_target_is_found(folder: Path) -> None:
    def hide(stack: NDArray[Any]) -> None:
        stack[4][stack[4] == 1] = 9

    edit_stack(folder, "00000_instances.mrcs", hide)
    assert check_dataset(folder) == ("train/00000: cube 4 has no target of its class",)


def test_instances_without_a_class_are_found(folder: Path) -> None:
    edit_stack(folder, "00001_instances.mrcs", lambda stack: stack.__setitem__(stack == 0, 7))
    assert check_dataset(folder) == (
        "train/00001: voxel labels and instances disagree on background",
    )


def test_fewer_cubes_than_rows_are_found(folder: Path) -> None:
    def cut(manifest: dict[str, Any]) -> None:
        manifest["shards"]["train"][0]["count"] -= 1

    edit_manifest(folder, cut)
    (fault,) = check_dataset(folder)
    assert fault.startswith("train/00000: shape")


def test_fewer_classes_and_another_voxel_size_are_found(folder: Path) -> None:
    edit_manifest(folder, lambda manifest: manifest.update(classes=["dumbbell"], voxel_size=17.0))
    faults = check_dataset(folder)
    assert "train/00000: class numbers outside 1..1" in faults
    assert "train/00000: voxel labels outside 0..1" in faults
    assert "train/00000: voxel size 18 Å, not 17 Å" in faults


# Shards


def test_a_failed_shard_leaves_nothing_and_keeps_the_earlier_one(tmp_path: Path) -> None:
    make_unlabelled(tmp_path)
    before = contents(tmp_path)
    cubes = np.full((1, 4, 4, 4), np.nan, np.float32)
    rows = pd.DataFrame({"rlnTomoName": ["a"], "rlnClassNumber": [1]})
    with pytest.raises(ValueError, match="subtomogram 0 has values that are not finite"):
        write_shard(tmp_path, "train/00000", Subtomograms(cubes, None, None, rows), (), 10.0)
    assert contents(tmp_path) == before


def test_a_failure_loses_no_finished_shard_though_the_manifest_is_written_seldom(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = read_manifest(folder)
    (record,) = whole.shards["test"]
    monkeypatch.setattr(shards, "time", SimpleNamespace(monotonic=itertools.count().__next__))
    listed: list[int] = []

    def finished() -> Iterator[tuple[SplitName, ShardRecord]]:
        for number in (3, 1, 2):
            yield "test", record.model_copy(update={"name": f"test/{number:05d}"})
            listed.append(len(read_manifest(folder).shards["test"]))
        msg = "the disk is full"
        raise OSError(msg)

    with pytest.raises(OSError, match="full"):
        collect_shards(folder, whole, finished())
    assert listed == [2, 2, 2]  # writing takes as long as the rest
    names = [shard.name for shard in read_manifest(folder).shards["test"]]
    assert names == ["test/00000", "test/00001", "test/00002", "test/00003"]


def test_a_manifest_that_cannot_be_written_does_not_hide_what_failed_first(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = read_manifest(folder)
    (record,) = whole.shards["test"]
    ticks = iter([0.0, 0.0, 10.0, 10.0])  # the second shard is not listed at once
    monkeypatch.setattr(shards, "time", SimpleNamespace(monotonic=ticks.__next__))

    def finished() -> Iterator[tuple[SplitName, ShardRecord]]:
        yield "test", record.model_copy(update={"name": "test/00001"})
        yield "test", record.model_copy(update={"name": "test/00002"})
        monkeypatch.setattr(Manifest, "write", refuse)
        msg = "a worker has died"
        raise ChildProcessError(msg)

    def refuse(manifest: Manifest, folder: Path) -> None:
        msg = f"no space is left in {folder}"
        raise OSError(msg)

    with pytest.raises(ChildProcessError, match="died") as failure:
        collect_shards(folder, whole, finished())
    assert "manifest.json could not be written either: no space" in failure.value.__notes__[0]


def test_shards_that_are_finished_together_are_listed_together(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = read_manifest(folder)
    (record,) = whole.shards["test"]
    hours = iter([0.0, 1.0, 1.001, 1.001, 1.002, 2.0, 2.001])
    monkeypatch.setattr(shards, "time", SimpleNamespace(monotonic=hours.__next__))

    def finished() -> Iterator[tuple[SplitName, ShardRecord]]:
        for number in (1, 2):
            yield "test", record.model_copy(update={"name": f"test/{number:05d}"})
            assert len(read_manifest(folder).shards["test"]) == 1 + number

    collect_shards(folder, whole, finished())


def test_a_dataset_that_is_finished_is_left_as_it_is(folder: Path) -> None:
    path = folder / "manifest.json"
    before = path.stat().st_mtime_ns
    assert collect_shards(folder, read_manifest(folder), ()) == read_manifest(folder)
    assert path.stat().st_mtime_ns == before
