"""A segmenter's logit depends on the input within its reach, and on nothing beyond."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cectflow.networks import create_network, list_networks, network_info

EVERY_SEGMENTER = pytest.mark.parametrize("name", list_networks("segment"))


def without_centre(name: str) -> nn.Module:
    """A segmenter as the task ``semantic`` wants it."""
    torch.manual_seed(0)
    info = network_info(name)
    arguments = {"centred": False} if name.startswith("strided") else {}
    return create_network(name, num_outputs=2, box=info.min_box, **arguments).eval()


def reach_of(name: str) -> int:
    reach = network_info(name).reach
    assert reach is not None
    return reach


def line(name: str) -> tuple[int, int]:
    """Length of a bar that holds a logit and all that it sees, and the logit's cell in it."""
    stride = network_info(name).stride
    cells = -(-reach_of(name) // stride) + 1
    return (2 * cells + 1) * stride, cells * stride


def positive(network: nn.Module) -> nn.Module:
    """The network with means for maxima and positive weights: no dependence is hidden in it."""
    for name, layer in network.named_children():
        if isinstance(layer, nn.MaxPool3d):
            setattr(network, name, nn.AvgPool3d(layer.kernel_size, layer.stride))
        positive(layer)
    for parameter in network.parameters(recurse=False):
        nn.init.constant_(parameter, 1.0)
    return network


@EVERY_SEGMENTER
def test_the_reach_is_the_farthest_voxel_that_counts(name: str) -> None:
    info, (length, cell) = network_info(name), line(name)
    network = positive(without_centre(name).double())
    bar = torch.ones(1, 1, info.min_box, info.min_box, length, dtype=torch.double)
    seen = []
    for x in range(cell, cell + info.stride):  # one of these looks farthest to each side
        bar.grad = None
        network(bar.requires_grad_())[0, 0, 4, 4, x].backward()
        assert bar.grad is not None
        columns = bar.grad.sum(dim=(0, 1, 2, 3)).nonzero()[:, 0]
        seen += [x - int(columns.min()), int(columns.max()) - x]
    assert max(seen) == reach_of(name)


@EVERY_SEGMENTER
def test_what_lies_beyond_the_reach_changes_nothing(name: str) -> None:
    info, (length, cell) = network_info(name), line(name)
    network = without_centre(name)
    bar = torch.randn(1, 1, info.min_box, info.min_box, length)
    for x in (cell, cell + info.stride - 1):
        near = slice(x - reach_of(name), x + reach_of(name) + 1)
        beyond, within = 10.0 * torch.randn_like(bar), bar.clone()
        beyond[..., near] = bar[..., near]
        within[..., near] = 10.0 * torch.randn_like(bar[..., near])
        with torch.no_grad():
            logits: list[Tensor] = [network(volume)[..., x] for volume in (bar, beyond, within)]
        torch.testing.assert_close(logits[0], logits[1], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(logits[0], logits[2])


@EVERY_SEGMENTER
def test_windows_that_overlap_by_the_reach_give_the_logits_of_the_whole(name: str) -> None:
    info = network_info(name)
    halo = -(-reach_of(name) // info.stride) * info.stride
    network, core = without_centre(name), 2 * info.stride
    bar = torch.randn(1, 1, info.min_box, info.min_box, 2 * (halo + core))
    with torch.no_grad():
        whole = network(bar)
        first, second = network(bar[..., : core + 2 * halo]), network(bar[..., core:])
    pieces = [first[..., : halo + core], second[..., halo:]]
    torch.testing.assert_close(torch.cat(pieces, dim=-1), whole, atol=1e-5, rtol=1e-5)


@EVERY_SEGMENTER
def test_a_shift_by_the_stride_shifts_the_logits(name: str) -> None:
    info, reach = network_info(name), reach_of(name)
    network = without_centre(name)
    bar = torch.randn(
        1, 1, info.min_box, info.min_box, (2 * (reach // info.stride) + 5) * info.stride
    )
    with torch.no_grad():
        logits, shifted = network(bar), network(bar.roll(info.stride, dims=-1))
    inside = slice(reach + info.stride, -reach - info.stride)
    torch.testing.assert_close(
        shifted.roll(-info.stride, dims=-1)[..., inside], logits[..., inside], atol=1e-5, rtol=1e-5
    )
