"""The one ONNX export that several tests share, since it takes seconds.

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
