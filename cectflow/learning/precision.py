"""Mixed precision: bfloat16 or float16 within a network, and where that is wrong."""

from __future__ import annotations

from typing import Any

import torch
from lightning_fabric.plugins import MixedPrecision
from torch import Tensor, nn

__all__ = ["MixedInside", "refuse_small_grids"]


class MixedInside(MixedPrecision):
    """Mixed precision within the network only: cubes reach it in float32.

    Fabric's own would round them first, and unnormalised cubes do not stand that: of a cube of
    mean 1000 and deviation 1 bfloat16, which has 8 bits, leaves steps of 4.
    """

    def convert_input(self, data: Any) -> Any:
        """As it is."""
        return data


def refuse_small_grids(network: nn.Module, box: int) -> None:
    """Refuse to train a network in bfloat16 on a CPU where a kernel is wider than its grid.

    The gradients of such convolutions are wrong there by as much as their size, or not finite
    (torch 2.13 with oneDNN; 3³ kernels on 2³ voxels, 5³ on 4³); all others agree with float32 to
    0.3 %.
    """
    narrow: list[str] = []

    def look(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, nn.Conv3d)
        grid = tuple(inputs[0].shape[2:])
        if any(size < kernel for size, kernel in zip(grid, layer.kernel_size, strict=True)):
            narrow.append(f"{layer.kernel_size} on {grid} voxels")

    handles = [
        layer.register_forward_pre_hook(look)
        for layer in network.modules()
        if isinstance(layer, nn.Conv3d)
    ]
    mode = network.training
    with torch.no_grad():
        network.eval()(next(network.parameters()).new_zeros(1, 1, box, box, box))
    network.train(mode)
    for handle in handles:
        handle.remove()
    if narrow:
        msg = (
            f"in bfloat16 on a CPU torch computes wrong gradients of kernels wider than their "
            f"grid, here {narrow[0]}: use precision float32, or a larger box"
        )
        raise ValueError(msg)
