"""What is special to our own networks: plain layers, and a sense of the centre."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from cectflow.networks import create_network
from cectflow.networks.ours import append_distance


@pytest.mark.parametrize("edge", [7, 8])
def test_distance_is_zero_at_the_centre_and_one_half_a_box_away(edge: int) -> None:
    volumes = torch.randn(2, 1, edge, edge, edge)
    appended = append_distance(volumes, box=8)
    assert torch.equal(appended[:, :1], volumes)
    distance, centre = appended[1, 1], edge // 2
    assert distance[centre, centre, centre] == 0
    assert distance.argmin() == (centre * edge + centre) * edge + centre
    assert distance[0, centre, centre] == pytest.approx(centre / 4)
    assert distance[0, 0, 0] == pytest.approx(math.sqrt(3) * centre / 4)


def test_a_larger_volume_shows_the_same_distances_about_its_centre() -> None:
    small = append_distance(torch.zeros(1, 1, 6, 7, 8), box=8)
    large = append_distance(torch.zeros(1, 1, 12, 11, 10), box=8)
    assert torch.equal(large[..., 3:9, 2:9, 1:9], small)


@pytest.mark.parametrize("name", ["strided_ed", "strided_micro"])
def test_the_network_sees_the_distance(name: str) -> None:
    torch.manual_seed(0)
    near = create_network(name, num_outputs=2, box=12).eval()
    far = create_network(name, num_outputs=2, box=24).eval()
    far.load_state_dict(near.state_dict())
    cubes = torch.zeros(1, 1, 12, 12, 12)
    with torch.no_grad():
        assert not torch.allclose(near(cubes), far(cubes))


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
