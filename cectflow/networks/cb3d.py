"""CB3D: the C3D network of video recognition, for subtomograms.

The network is one of Che et al., *Improved deep learning-based macromolecules structure
classification from electron cryo-tomograms*, Machine Vision and Applications 2018,
arXiv:1707.04885, after C3D (Tran et al. 2015, arXiv:1412.0767). The anatomy follows the authors'
released code (xulabs/projects, ``model_compression/models.py``); ours returns logits where theirs
ends in a softmax.
"""

from __future__ import annotations

from torch import nn

from cectflow.networks.blocks import DenseClassifier, convolution_pair
from cectflow.networks.catalogue import register_network

__all__ = ["cb3d"]


@register_network(
    task="classify", stride=1, min_box=16,
    paper="Che et al. 2017, arXiv:1707.04885, after Tran et al. 2015",
)  # fmt: skip
def cb3d(num_outputs: int, box: int, dropout: float = 0.5) -> nn.Module:
    """CB3D: C3D with convolutions of 64 to 512 channels and two dense 4096.

    The first max-pool leaves z as it is (in videos: the time), and before the last one y and x
    are padded by zeros.

    Parameters
    ----------
    num_outputs
        Number of classes.
    box
        Edge of the input cube in voxels; four halvings need at least 16.
    dropout
        Fraction of the dense units dropped while training.
    """
    features = nn.Sequential(
        nn.Conv3d(1, 64, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool3d((1, 2, 2)),
        nn.Conv3d(64, 128, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool3d(2),
        convolution_pair(128, 256), nn.MaxPool3d(2),
        convolution_pair(256, 512), nn.MaxPool3d(2),
        convolution_pair(512, 512), nn.ConstantPad3d((1, 1, 1, 1, 0, 0), 0.0), nn.MaxPool3d(2),
    )  # fmt: skip
    along_z, along_y = box // 16, (box // 16 + 2) // 2
    inputs = 512 * along_z * along_y**2
    return DenseClassifier(features, inputs, (4096, 4096), num_outputs, dropout=dropout)
