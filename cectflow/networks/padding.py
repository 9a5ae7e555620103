"""PadToStride: a segmenter that takes any shape, where its grids divide only multiples."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["PadToStride"]


class PadToStride(nn.Module):
    """A segmenter whose volumes are padded to a multiple of its stride, and its logits cropped.

    Padding is zero, the mean of normalised volumes, on both sides, so that the centre, voxel
    ``n // 2`` of each axis, stays the centre. A multiple of the stride goes through unchanged,
    and its export holds no trace of this module.

    Parameters
    ----------
    network
        Normalised volumes whose edges are multiples of the stride → logits of every voxel.
    stride
        In voxels.
    """

    def __init__(self, network: nn.Module, stride: int) -> None:
        super().__init__()
        self.network = network
        self.stride = stride

    def forward(self, volumes: Float[Tensor, "n 1 z y x"]) -> Float[Tensor, "n outputs z y x"]:
        """Logits of every voxel of normalised volumes."""
        edges = volumes.shape[2:]
        if all(edge % self.stride == 0 for edge in edges):
            whole: Tensor = self.network(volumes)
            return whole
        padding: list[int] = []
        inside = []
        for edge in edges:
            padded = -(-edge // self.stride) * self.stride
            before = padded // 2 - edge // 2
            padding = [before, padded - edge - before, *padding]  # F.pad begins with the last axis
            inside.append(slice(before, before + edge))
        logits: Tensor = self.network(F.pad(volumes, padding))
        return logits[:, :, inside[0], inside[1], inside[2]]
