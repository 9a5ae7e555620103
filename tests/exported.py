"""The one ONNX export that several tests share, since it takes seconds.

The module of a test that wants it says ``pytest_plugins = ("exported",)``.
"""

from __future__ import annotations

import pytest
import torch
from builders import Exported, TinyClassifier, make_card

from cectflow.export import export_network
from cectflow.networks.normalisation import NormalisePerCube


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A tiny classifier, exported while in training mode. Do not write to its folder."""
    torch.manual_seed(0)
    network = NormalisePerCube(TinyClassifier())
    network.train()
    folder = tmp_path_factory.mktemp("exported") / "model"
    return Exported(folder, network, export_network(network, make_card(), folder))
