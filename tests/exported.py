"""ONNX exports that several tests share, since each takes seconds.

The module of a test that wants it says ``pytest_plugins = ("exported",)``.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from builders import Exported, TinyClassifier, make_card
from once import make_once
from torch import nn

from cectflow.export import export_network
from cectflow.model_card import ModelCard
from cectflow.networks import create_network, network_info
from cectflow.networks.normalisation import NormalisePerCube


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A tiny classifier, exported while in training mode. Do not write to its folder."""
    torch.manual_seed(0)
    network = NormalisePerCube(TinyClassifier())
    network.train()
    folder = make_once("exported", lambda root: export(network, root), tmp_path_factory) / "model"
    network.eval()  # as its export leaves it, which may have been in another process
    told = (folder.parent / "returned.json").read_text(encoding="utf-8")
    return Exported(folder, network, ModelCard.from_json(told))


def export(network: nn.Module, root: Path) -> None:
    """Model folder, and beside it the card that the export returned."""
    card = export_network(network, make_card(), root / "model")
    (root / "returned.json").write_text(card.to_json(), encoding="utf-8")


@pytest.fixture(scope="session")
def semantic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained semantic segmenter of two classes at 10 Å, without a sense of the centre."""
    network, box, names = "strided_ed_small", 16, ("ribosome", "proteasome")
    card = make_card(
        role="segmenter", task="semantic", network=network, num_outputs=3, classes=names,
        labels=names, box=box, voxel_size=10.0, normalisation="tomogram",
    )  # fmt: skip

    def make(root: Path) -> None:
        torch.manual_seed(0)
        export_network(
            create_network(network, num_outputs=3, box=box, centred=False),
            card, root / "semantic", stride=network_info(network).stride,
        )  # fmt: skip

    return make_once("semantic", make, tmp_path_factory) / "semantic"
