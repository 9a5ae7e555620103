"""Segmenters take any shape: padded about the centre to their stride, and cropped."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cectflow.networks import create_network, list_networks, network_info
from cectflow.networks.padding import PadToStride


class Recording(nn.Module):
    """Gives every voxel its own value as both logits, and keeps what it was shown."""

    def forward(self, volumes: Tensor) -> Tensor:
        self.shown = volumes
        return volumes.expand(-1, 2, -1, -1, -1)


def test_padding_is_zero_goes_to_the_next_multiple_and_keeps_the_centre() -> None:
    volumes = torch.randn(2, 1, 9, 12, 5)
    network = Recording()
    logits = PadToStride(network, 4)(volumes)
    assert network.shown.shape == (2, 1, 12, 12, 8)
    assert torch.equal(logits, volumes.expand(-1, 2, -1, -1, -1))
    assert torch.equal(network.shown[..., 12 // 2, 12 // 2, 8 // 2], volumes[..., 4, 6, 2])
    assert network.shown.count_nonzero() == volumes.numel()


def test_a_multiple_of_the_stride_goes_through_untouched() -> None:
    volumes = torch.randn(1, 1, 8, 4, 12)
    network = Recording()
    PadToStride(network, 4)(volumes)
    assert network.shown is volumes


@pytest.mark.parametrize("name", list_networks("segment"))
def test_every_segmenter_takes_any_shape(name: str) -> None:
    torch.manual_seed(0)
    info = network_info(name)
    edges = [info.min_box + 1, info.min_box + 2, info.min_box + 3]
    padded = -(-edges[-1] // info.stride) * info.stride
    before = [padded // 2 - edge // 2 for edge in edges]
    z, y, x = (slice(first, first + edge) for first, edge in zip(before, edges, strict=True))
    network = create_network(name, num_outputs=3, box=info.min_box).eval()
    volume = torch.randn(1, 1, *edges)
    around = torch.zeros(1, 1, padded, padded, padded)
    around[:, :, z, y, x] = volume
    with torch.no_grad():
        torch.testing.assert_close(network(volume), network(around)[:, :, z, y, x])
