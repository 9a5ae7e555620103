"""RB3D: bottlenecks beside plain convolutions, joined by concatenation.

The network is one of Che et al., *Improved deep learning-based macromolecules structure
classification from electron cryo-tomograms*, Machine Vision and Applications 2018,
arXiv:1707.04885. The anatomy follows the authors' released code (xulabs/projects,
``model_compression/models.py``), which drops half of the dense units; ours returns logits where
theirs ends in a softmax.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cectflow.networks.blocks import DenseClassifier
from cectflow.networks.catalogue import register_network

__all__ = ["rb3d"]

WIDTH = 32
NUM_BLOCKS = 4


class _JoinedBottleneck(nn.Module):
    """A 3³ convolution to half of the channels beside a bottleneck to the other half."""

    def __init__(self) -> None:
        super().__init__()
        half = WIDTH // 2
        self.plain = nn.Conv3d(WIDTH, half, 3, padding=1)
        self.bottleneck = nn.Sequential(
            nn.Conv3d(WIDTH, half, 1),
            nn.ReLU(inplace=True),
            nn.Conv3d(half, WIDTH, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv3d(WIDTH, half, 1),
        )

    def forward(self, features: Float[Tensor, "n channel z y x"]) -> Tensor:
        joined = torch.cat([self.plain(features), self.bottleneck(features)], dim=1)
        return joined.relu()


@register_network(task="classify", stride=1, min_box=8, paper="Che et al. 2017, arXiv:1707.04885")
def rb3d(num_outputs: int, box: int, dropout: float = 0.5) -> nn.Module:
    """RB3D: four bottlenecks at half the grid; nearly all its weights are in the dense layers.

    Parameters
    ----------
    num_outputs
        Number of classes.
    box
        Edge of the input cube in voxels. The first dense layer has 32 × 1024 weights for each
        voxel of half the grid: 262 million at 40³, 1 GB.
    dropout
        Fraction of the dense units dropped while training.
    """
    features = nn.Sequential(
        nn.Conv3d(1, WIDTH, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool3d(2),
        *(_JoinedBottleneck() for _ in range(NUM_BLOCKS)),
    )  # fmt: skip
    inputs = WIDTH * (box // 2) ** 3
    return DenseClassifier(features, inputs, (1024, 1024), num_outputs, dropout=dropout)
