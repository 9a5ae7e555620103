"""What is special to our own networks: plain layers, and a sense of the centre."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from cectflow.networks import create_network
from cectflow.networks.ours import distance_from_centre


@pytest.mark.parametrize("box", [7, 8])
def test_distance_is_zero_at_the_centre_voxel_and_one_half_a_box_away(box: int) -> None:
    distance = distance_from_centre(box)
    centre = box // 2
    assert distance[centre, centre, centre] == 0
    assert distance.argmin() == (centre * box + centre) * box + centre
    assert distance[0, centre, centre] == pytest.approx(centre / (box / 2))
    assert distance[0, 0, 0] == pytest.approx(math.sqrt(3) * centre / (box / 2))


@pytest.mark.parametrize("name", ["strided_ed", "strided_micro", "strided_small"])
def test_the_network_sees_the_distance_and_keeps_it_out_of_its_weights(name: str) -> None:
    network = create_network(name, num_outputs=2, box=12).eval()
    assert "distance" not in network.state_dict()
    cubes = torch.zeros(1, 1, 12, 12, 12)
    with torch.no_grad():
        before = network(cubes)
        network.get_buffer("distance").zero_()
        assert not torch.allclose(network(cubes), before)


@pytest.mark.parametrize("name", ["strided_ed", "strided_micro"])
def test_weights_of_one_box_load_into_another(name: str) -> None:
    small = create_network(name, num_outputs=2, box=12)
    large = create_network(name, num_outputs=2, box=16)
    large.load_state_dict(small.state_dict())


def test_strided_networks_hold_no_layer_that_runtimes_run_slowly() -> None:
    plain = (nn.Conv3d, nn.BatchNorm3d, nn.ReLU, nn.Identity, nn.Upsample, nn.Linear)
    for name in ("strided_micro", "strided_ed"):
        network = create_network(name, num_outputs=2, box=12)
        leaves = [module for module in network.modules() if not list(module.children())]
        assert all(isinstance(leaf, plain) for leaf in leaves)
