"""CB3D: the C3D network of video recognition, for subtomograms.

The network is one of Che et al., *Improved deep learning-based macromolecules structure
classification from electron cryo-tomograms*, Machine Vision and Applications 2018,
arXiv:1707.04885, after C3D (Tran et al. 2015, arXiv:1412.0767). The anatomy follows the authors'
released code (xulabs/projects, ``model_compression/models.py``); ours returns logits where theirs
ends in a softmax.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from cectflow.networks.blocks import convolution_pair, dense_layers, initialise_weights
from cectflow.networks.catalogue import register_network

__all__ = ["CB3D", "cb3d"]


class CB3D(nn.Module):
    """Classifier of five levels of 3³ convolutions with max-pools, and two dense layers of 4096.

    The first max-pool leaves z as it is (in videos: the time), and before the last one y and x
    are padded by zeros.

    Parameters
    ----------
    num_outputs
        Number of classes.
    box
        Edge of the input cube in voxels; the dense layers fit this box only.
    dropout
        Fraction of the dense units that is dropped while training.
    """

    def __init__(self, num_outputs: int, box: int, *, dropout: float) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv3d(1, 64, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool3d((1, 2, 2)),
            nn.Conv3d(64, 128, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool3d(2),
            convolution_pair(128, 256), nn.MaxPool3d(2),
            convolution_pair(256, 512), nn.MaxPool3d(2),
            convolution_pair(512, 512), nn.ConstantPad3d((1, 1, 1, 1, 0, 0), 0.0),
            nn.MaxPool3d(2),
        )  # fmt: skip
        along_z, along_y = box // 16, (box // 16 + 2) // 2
        self.hidden = dense_layers(512 * along_z * along_y**2, (4096, 4096), dropout=dropout)
        self.score = nn.Linear(4096, num_outputs)
        initialise_weights(self)

    def forward(self, subtomograms: Float[Tensor, "n 1 z y x"]) -> Float[Tensor, "n outputs"]:
        """Logits of normalised cubes."""
        logits: Tensor = self.score(self.hidden(self.features(subtomograms).flatten(start_dim=1)))
        return logits


@register_network(
    task="classify", stride=1, min_box=16,
    paper="Che et al. 2017, arXiv:1707.04885, after Tran et al. 2015",
)  # fmt: skip
def cb3d(num_outputs: int, box: int, dropout: float = 0.5) -> nn.Module:
    """CB3D: C3D with convolutions of 64 to 512 channels and two dense 4096.

    Parameters
    ----------
    num_outputs
        Number of classes.
    box
        Edge of the input cube in voxels; four halvings need at least 16.
    dropout
        Fraction of the dense units dropped while training.
    """
    return CB3D(num_outputs, box, dropout=dropout)
