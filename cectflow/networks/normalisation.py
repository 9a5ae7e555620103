"""NormalisePerCube: a network that first brings each cube to zero mean and unit variance."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["NormalisePerCube"]

EPSILON = 1e-6
"""Deviation per mean below which float32 holds rounding errors only: such a cube is constant."""
TINY = 1e-30
"""Keeps a cube of zeros from a division by zero."""


class NormalisePerCube(nn.Module):
    """A network whose input needs no preparation: the normalisation is part of its graph.

    Training, export and prediction all run this module, so they cannot normalise differently.
    Any scale and offset of a cube give the same logits; a constant cube comes out near zero.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, subtomograms: Float[Tensor, "n 1 z y x"]) -> Tensor:
        """Logits of cubes in any units.

        Parameters
        ----------
        subtomograms
            Protein dark, as the card states.
        """
        axes = (1, 2, 3, 4)
        mean = subtomograms.mean(dim=axes, keepdim=True)
        centred = subtomograms - mean
        deviation = centred.square().mean(dim=axes, keepdim=True).sqrt()
        logits: Tensor = self.network(
            centred / torch.maximum(deviation, EPSILON * mean.abs() + TINY)
        )
        return logits
