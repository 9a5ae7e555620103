"""What is special to SSN3D, SSN3D-ED and SSN3D-ASPP."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cectflow.networks import create_network
from cectflow.networks.ssn3d import SSN3DEncoderDecoder, SSN3DPyramid


def test_without_skips_only_the_refined_scores_reach_the_output() -> None:
    network = create_network("ssn3d", num_outputs=2, box=8, skips=False)
    assert sum(parameter.numel() for parameter in network.parameters()) == 2_042_342 - 196 + 3 * 6
    logits = network.eval()(torch.randn(1, 1, 8, 8, 8))
    torch.testing.assert_close(logits, logits[..., :1, :1, :1].expand_as(logits))


def test_skips_bring_in_the_finer_scales() -> None:
    logits = create_network("ssn3d", num_outputs=2, box=8).eval()(torch.randn(1, 1, 8, 8, 8))
    coarse = F.avg_pool3d(logits, 8)
    assert not torch.allclose(logits, coarse.expand_as(logits))


@pytest.mark.parametrize("name", ["ssn3d", "ssn3d_aspp", "ssn3d_ed"])
def test_weights_serve_larger_cubes(name: str) -> None:
    network = create_network(name, num_outputs=2, box=8).eval()
    assert network(torch.zeros(1, 1, 8, 16, 24)).shape == (1, 2, 8, 16, 24)


def test_the_last_convolution_commutes_with_upsampling() -> None:
    # The authors upsample 32 channels first; the network upsamples the scores instead.
    network = SSN3DEncoderDecoder(2).eval()
    narrowed: list[torch.Tensor] = []
    network.decoder[2].register_forward_hook(lambda _, __, output: narrowed.append(output))
    with torch.no_grad():
        logits = network(torch.randn(1, 1, 16, 16, 16))
        as_published = network.score(nn.Upsample(scale_factor=2)(narrowed[0]))
    torch.testing.assert_close(logits, as_published)


def test_the_pyramid_has_the_parameters_of_its_anatomy() -> None:
    network = create_network("ssn3d_aspp", num_outputs=2, box=8)
    encoder = (27 + 1) * 32 + (27 * 32 + 1) * (32 + 64) + (27 * 64 + 1) * 64
    dilated = (27 * 64 + 1) * 128
    branches = (128 + 1) * 128 + 2 * (27 * 128 + 1) * 128
    expected = encoder + dilated + branches + (4 * 128 + 1) * 2
    assert sum(parameter.numel() for parameter in network.parameters()) == expected == 1_318_434


def test_the_pyramid_scores_the_features_it_came_from_and_three_ranges() -> None:
    network = SSN3DPyramid(2).eval()
    seen: dict[str, torch.Tensor] = {}
    network.dilated.register_forward_hook(lambda _, __, output: seen.update(features=output))
    with torch.no_grad():
        logits = network(torch.randn(1, 1, 16, 16, 16))
        features = seen["features"]
        near, middle, far = (branch(features) for branch in network.branches)
        pyramid = torch.cat([near, middle, far, features], dim=1)
        as_published = network.score(nn.Upsample(scale_factor=4)(pyramid))
    torch.testing.assert_close(logits, as_published)
    assert [branch[0].dilation[0] for branch in network.branches] == [1, 2, 4]
