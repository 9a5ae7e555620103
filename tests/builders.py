"""Tiny networks, cubes, cards and dataset folders that several tests build upon."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from cectflow.dataset import Batch, Dataset, open_dataset
from cectflow.manifest import SPLITS, FieldRecord, Manifest
from cectflow.model_card import ModelCard, Score, Trust, TypicalLogits
from cectflow.particles import make_particle_rows
from cectflow.shards import Subtomograms, write_shard

BOX = 12
CLASSES = ("small", "large")
RADII = (2.0, 3.5)
FIELDS_PER_SPLIT = 3


class TinyClassifier(nn.Module):
    """Convolution, pool, dropout, dense."""

    def __init__(self, num_outputs: int = 2) -> None:
        super().__init__()
        self.convolution = nn.Conv3d(1, 4, 3, padding=1)
        self.pool = nn.MaxPool3d(4)
        self.dropout = nn.Dropout(0.2)
        self.score = nn.Linear(4 * (BOX // 4) ** 3, num_outputs)

    def forward(self, cubes: Tensor) -> Tensor:
        features = self.pool(self.convolution(cubes).relu()).flatten(1)
        return self.score(self.dropout(features))


class TinySegmenter(nn.Module):
    """Two convolutions, beside them a pooled view of the surroundings."""

    def __init__(self, num_outputs: int = 2) -> None:
        super().__init__()
        self.fine = nn.Conv3d(1, 8, 3, padding=1)
        self.coarse = nn.Conv3d(1, 8, 3, padding=1)
        self.score = nn.Conv3d(16, num_outputs, 3, padding=1)

    def forward(self, cubes: Tensor) -> Tensor:
        coarse = self.coarse(nn.functional.avg_pool3d(cubes, 2)).relu()
        coarse = nn.functional.interpolate(coarse, scale_factor=2.0)
        return self.score(torch.cat([self.fine(cubes).relu(), coarse], dim=1))


def make_ball(radius: float, centre_zyx: tuple[int, int, int] = (BOX // 2,) * 3) -> np.ndarray:
    """True within a radius of a centre, in voxels."""
    squared = sum(
        (grid - c) ** 2 for grid, c in zip(np.indices((BOX,) * 3), centre_zyx, strict=True)
    )
    return squared <= radius**2


def make_cubes(num: int, seed: int = 0) -> Batch:
    """Dark balls in noise; classes alternate and differ in radius; every other has a neighbour."""
    generator = np.random.default_rng(seed)
    cubes = generator.normal(0.0, 0.3, (num, BOX, BOX, BOX)).astype(np.float32)
    labels = np.zeros(cubes.shape, np.int8)
    instances = np.zeros(cubes.shape, np.int16)
    class_ids = np.arange(num) % len(CLASSES) + 1
    for index, class_id in enumerate(class_ids):
        if index % 4 < 2:
            neighbour = make_ball(1.5, (1, 1, 10))
            labels[index][neighbour], instances[index][neighbour] = 1, 2
        target = make_ball(RADII[class_id - 1])
        labels[index][target], instances[index][target] = class_id, 1
    cubes -= 2.0 * (instances > 0)
    return Batch(
        torch.from_numpy(cubes)[:, None],
        torch.from_numpy(labels),
        torch.from_numpy(instances),
        torch.from_numpy(class_ids),
        torch.arange(num) % FIELDS_PER_SPLIT,
        statistics=torch.tensor([[0.0, 0.4]]).repeat(num, 1),
    )


def make_manifest(**changes: Any) -> Manifest:
    """Manifest of a dataset that holds no shards."""
    content: dict[str, Any] = {
        "kind": "simulated",
        "recipe_digest": "a" * 64,
        "classes": CLASSES,
        "box": BOX,
        "voxel_size": 10.0,
        "has_voxel_labels": True,
        "planned_shards": {},
        "shards": {},
    }
    return Manifest(**content | changes)


def make_card(**changes: Any) -> ModelCard:
    """Card of a tiny classifier."""
    content: dict[str, Any] = {
        "role": "teacher",
        "task": "classify",
        "network": "tiny",
        "num_outputs": 2,
        "classes": CLASSES,
        "box": BOX,
        "voxel_size": 10.0,
        "ctf_correction": "none",
        "tilt_range": (-60.0, 60.0),
        "snr_stage": "reconstruction",
        "snr": (0.05, 0.1),
        "noise_spectrum": "white",
        "occupancy": 0.1,
        "jitter": 10.0,
        "dataset_digest": "d" * 64,
        "recipe_digest": "e" * 64,
        "commit": "unknown",
    }
    return ModelCard(**content | changes)


def make_trust(**changes: Any) -> Trust:
    """Of a classifier of two classes whose logits are 4 and 0, give or take 1."""
    content: dict[str, Any] = {
        "temperature": 2.0,
        "ece_before": 0.1,
        "ece_after": 0.02,
        "typical": TypicalLogits(centres=((4.0, 0.0), (0.0, 4.0)), spread=(1.0, 1.0)),
        "unknown_score": "distance",
        "unknown_threshold": -4.0,
        "true_positive_rate": Score(value=0.95, low=0.93, high=0.97),
        "validation_cubes": 100,
    }
    return Trust(**content | changes)


@dataclass
class MemorySource:
    """A BatchSource that holds one batch."""

    content: Batch
    manifest: Manifest

    def __len__(self) -> int:
        return len(self.content)

    def batches(self, batch_size: int, generator: torch.Generator | None = None) -> Iterator[Batch]:
        order = torch.arange(len(self))
        if generator is not None:
            order = torch.randperm(len(self), generator=generator)
        for rows in order.split(batch_size):
            yield take(self.content, rows)


def take(batch: Batch, rows: Tensor) -> Batch:
    """Some cubes of a batch."""
    labels, instances = batch.voxel_labels, batch.instances
    return Batch(
        batch.subtomograms[rows],
        None if labels is None else labels[rows],
        None if instances is None else instances[rows],
        batch.class_ids[rows],
        batch.fields[rows],
        statistics=None if batch.statistics is None else batch.statistics[rows],
    )


def write_dataset(folder: Path, **changes: Any) -> Dataset:
    """Dataset folder of one shard per split, three fields and twelve cubes in each."""
    shards = {}
    for seed, split in enumerate(SPLITS):
        batch = make_cubes(12, seed)
        assert batch.voxel_labels is not None
        assert batch.instances is not None
        names = [f"{split}_{i}" for i in range(FIELDS_PER_SPLIT)]
        rows = pd.concat(
            [make_particle_rows(np.zeros((1, 3)), tomogram=names[i]) for i in batch.fields],
            ignore_index=True,
        )
        rows["rlnClassNumber"] = batch.class_ids.numpy()
        rows["cectflowClassName"] = [CLASSES[i - 1] for i in batch.class_ids]
        content = Subtomograms(
            batch.subtomograms[:, 0].numpy(),
            batch.voxel_labels.numpy(),
            batch.instances.numpy(),
            rows,
        )
        fields = tuple(
            FieldRecord(field=name, mean=-0.1, std=0.5, median=0.0, robust_std=0.4)
            for name in names
        )
        shards[split] = (write_shard(folder, f"{split}/00000", content, fields, 10.0),)
    planned = dict.fromkeys(SPLITS, 1)
    make_manifest(planned_shards=planned, shards=shards, **changes).write(folder)
    return open_dataset(folder)


@dataclass(frozen=True)
class Exported:
    """A model folder, the network in it and the card that the export returned."""

    folder: Path
    network: nn.Module
    card: ModelCard


def write_onnx(path: Path, *, outside: bool = False) -> None:
    """Network that gives back what it gets, after adding a weight."""
    from onnx import TensorProto, helper  # here: most tests do without

    weight = helper.make_tensor("weight", TensorProto.FLOAT, [1], [0.0])
    if outside:
        weight.ClearField("float_data")
        weight.data_location = TensorProto.EXTERNAL
        weight.external_data.add(key="location", value="../../etc/passwd")
    shape = ["n", 1, 8, 8, 8]
    graph = helper.make_graph(
        [helper.make_node("Add", ["cubes", "weight"], ["logits"])],
        "add",
        [helper.make_tensor_value_info("cubes", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape)],
        [weight],
    )
    # Versions that every onnxruntime reads, not the newest of onnx.
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    path.write_bytes(model.SerializeToString())
