"""What is special to our own networks: plain layers, and a sense of the centre."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from cectflow.cost import count_macs
from cectflow.export import _fold_constants
from cectflow.networks import create_network
from cectflow.networks.ours import StridedSegmenter, _Distance, append_distance


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


@pytest.mark.parametrize("name", ["strided_ed_small", "strided_micro"])
def test_the_network_sees_the_distance(name: str) -> None:
    torch.manual_seed(0)
    near = create_network(name, num_outputs=2, box=16).eval()
    far = create_network(name, num_outputs=2, box=24).eval()
    far.load_state_dict(near.state_dict())
    cubes = torch.zeros(1, 1, 16, 16, 16)
    with torch.no_grad():
        assert not torch.allclose(near(cubes), far(cubes))


@pytest.mark.parametrize("name", ["strided_ed_small", "strided_micro"])
def test_weights_of_one_box_load_into_another(name: str) -> None:
    small = create_network(name, num_outputs=2, box=16)
    large = create_network(name, num_outputs=2, box=24)
    large.load_state_dict(small.state_dict())


@pytest.mark.parametrize("name", ["strided_nano", "residual_teacher"])
def test_what_the_distance_adds_is_folded_into_the_first_convolution(name: str) -> None:
    torch.manual_seed(0)
    network = create_network(name, num_outputs=3, box=13).eval()
    cubes = torch.randn(3, 1, 13, 13, 13)
    with torch.no_grad():
        expected = network(cubes)
        macs = count_macs(network, 13)
        folded = _fold_constants(network)
        torch.testing.assert_close(folded(cubes), expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(network(cubes), expected)
    assert count_macs(folded, 13) < macs


def test_strided_networks_hold_no_layer_that_runtimes_run_slowly() -> None:
    convolutions = (nn.Conv3d, nn.ConvTranspose3d, nn.Linear)
    plain = (*convolutions, nn.BatchNorm3d, nn.ReLU, nn.Identity, nn.Upsample, _Distance)
    for name in ("strided_micro", "strided_ed_small"):
        network = create_network(name, num_outputs=2, box=16)
        leaves = [module for module in network.modules() if not list(module.children())]
        assert all(isinstance(leaf, plain) for leaf in leaves)


def test_a_segmenter_without_a_sense_of_the_centre_judges_all_places_alike() -> None:
    torch.manual_seed(0)
    network = create_network("strided_ed_small", num_outputs=2, box=16, centred=False).eval()
    other = create_network("strided_ed_small", num_outputs=2, box=64, centred=False).eval()
    other.load_state_dict(network.state_dict())
    volume = torch.randn(1, 1, 16, 16, 24)
    with torch.no_grad():
        assert torch.equal(network(volume), other(volume))


def test_a_narrower_decoder_and_any_stem_give_a_logit_for_every_voxel() -> None:
    for stem in (1, 2, 4):
        network = StridedSegmenter(
            3, 16, stem=stem, widths=(4, 6, 8), depth=(1, 1), decoder=(2, 3)
        ).eval()
        assert network(torch.zeros(2, 1, 16, 16, 32)).shape == (2, 3, 16, 16, 32)
