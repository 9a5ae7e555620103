"""Model folders with untrained networks: prediction is judged by what it reads and writes."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from builders import make_card
from once import make_once

from cectflow.export import export_network
from cectflow.model_card import Role
from cectflow.networks import create_network
from cectflow.networks.normalisation import NormalisePerCube
from cectflow.particles import make_particle_rows, particles_from
from cectflow.volume import Volume
from cectflow.volume_writer import write_stack, write_volume

BOX = 16
VOXEL_SIZE = 12.0
CLASSES = ("ribosome", "proteasome", "apoferritin")


def make_model_folder(
    folder: Path, network: str, role: Role, task: Literal["classify", "target"]
) -> Path:
    """Export an untrained network with a card of this module's box, voxel size and classes."""
    num_outputs = len(CLASSES) if task == "classify" else 2
    card = make_card(
        role=role, task=task, network=network, num_outputs=num_outputs, classes=CLASSES, box=BOX,
        voxel_size=VOXEL_SIZE,
    )  # fmt: skip
    torch.manual_seed(0)
    net = NormalisePerCube(create_network(network, num_outputs=num_outputs, box=BOX))
    export_network(net, card, folder)
    return folder


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:

    def make(root: Path) -> None:
        make_model_folder(root / "classifier", "strided_micro", "student", "classify")

    return make_once("prediction-classifier", make, tmp_path_factory) / "classifier"


@pytest.fixture(scope="session")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Path:

    def make(root: Path) -> None:
        make_model_folder(root / "segmenter", "strided_ed_small", "segmenter", "target")

    return make_once("prediction-segmenter", make, tmp_path_factory) / "segmenter"


@pytest.fixture
def cubes() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(5, BOX, BOX, BOX)).astype(np.float32)


@pytest.fixture
def stack(tmp_path: Path, cubes: np.ndarray) -> Path:
    path = tmp_path / "stack.mrcs"
    write_stack(path, cubes, VOXEL_SIZE)
    return path


@pytest.fixture
def tomogram(tmp_path: Path) -> Path:
    data = np.random.default_rng(2).normal(size=(24, 40, 48)).astype(np.float32)
    path = tmp_path / "tomogram.mrc"
    write_volume(path, Volume(data, VOXEL_SIZE))
    return path


@pytest.fixture
def positions_zyx() -> np.ndarray:
    return np.array([[12.0, 20.0, 24.0], [10.2, 9.7, 30.4], [2.0, 20.0, 40.0], [13.0, 21.0, 26.0]])


@pytest.fixture
def picks(tmp_path: Path, positions_zyx: np.ndarray) -> Path:
    rows = make_particle_rows(positions_zyx, tomogram="tomogram")
    rows["rlnAutopickFigureOfMerit"] = [0.5, 0.25, 0.125, 1.0]
    path = tmp_path / "picks.star"
    particles_from(rows).write(path)
    return path
