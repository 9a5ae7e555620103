"""Embeddings: what the last dense layer is shown, of networks and of exported programs alike."""

from __future__ import annotations

import pytest
import torch
from builders import Exported

from cectflow.networks import create_network
from cectflow.networks.embedding import embed, tapped_embedding
from cectflow.networks.normalisation import NormalisePerCube
from cectflow.runtime import load_program

pytest_plugins = ("exported",)


@pytest.mark.parametrize("name", ["strided_nano", "dsrf3d_v2_bn", "student_3", "cb3d", "rb3d"])
def test_the_last_dense_layer_makes_the_logits_of_the_embedding(name: str) -> None:
    torch.manual_seed(0)
    box = 27 if name == "student_3" else 16
    network = NormalisePerCube(create_network(name, num_outputs=3, box=box)).eval()
    cubes = torch.randn(2, 1, box, box, box)
    with torch.no_grad():
        logits, embedding = embed(network, cubes)
        dense = [layer for layer in network.modules() if isinstance(layer, torch.nn.Linear)][-1]
        torch.testing.assert_close(dense(embedding), logits)
        torch.testing.assert_close(network(cubes), logits)


def test_an_exported_program_has_the_embedding_of_its_network(exported: Exported) -> None:
    cubes = torch.randn(5, 1, 12, 12, 12)
    program = load_program(exported.folder)
    with torch.no_grad():
        logits, embedding = embed(program, cubes)
        expected_logits, expected = embed(exported.network.eval(), cubes)
    torch.testing.assert_close(logits, expected_logits)
    torch.testing.assert_close(embedding, expected)


def test_nothing_is_left_behind_in_a_tapped_network() -> None:
    network = create_network("strided_nano", num_outputs=3, box=16).eval()
    with tapped_embedding(network) as seen:
        network(torch.zeros(2, 1, 16, 16, 16))
    network(torch.zeros(2, 1, 16, 16, 16))
    assert [tuple(features.shape) for features in seen] == [(2, 24)]


def test_a_segmenter_has_no_embedding() -> None:
    network = create_network("strided_ed_small", num_outputs=2, box=16)
    with pytest.raises(ValueError, match="has no dense layer, so cubes have no embedding"):
        embed(network, torch.zeros(1, 1, 16, 16, 16))
