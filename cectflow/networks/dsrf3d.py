"""DSRF3D-v2 and its compressed students: plain convolution pairs, max-pools and dense layers.

The teacher is DSRF3D-v2 ("deep small receptive field") of Che et al., *Improved deep
learning-based macromolecules structure classification from electron cryo-tomograms*, Machine
Vision and Applications 2018, arXiv:1707.04885. The students are those of Guo et al., *Model
compression for faster structural separation of macromolecules captured by cellular electron
cryo-tomography*, ICIAR 2018, arXiv:1801.10597. The anatomy follows the authors' released code
(xulabs/projects, ``model_compression/models.py``); ours returns logits where theirs ends in a
softmax.
"""

from __future__ import annotations

from torch import nn

from cectflow.networks.blocks import DenseClassifier, convolution_pair
from cectflow.networks.catalogue import register_network

__all__ = [
    "DSRF3D",
    "dsrf3d_v2",
    "dsrf3d_v2_bn",
    "student_1",
    "student_2",
    "student_3",
]

TEACHER_PAPER = "Che et al. 2017, arXiv:1707.04885"
STUDENT_PAPER = "Guo et al. 2018, arXiv:1801.10597"


class DSRF3D(DenseClassifier):
    """Classifier of levels, each a pair of 3³ convolutions and a max-pool, then dense layers.

    Parameters
    ----------
    num_outputs
        Number of classes.
    box
        Edge of the input cube in voxels; the dense layers fit this box only.
    widths
        Channels of each level.
    pool
        Edge and stride of every max-pool; what is left over at the far border is dropped.
    dense
        Units of each hidden dense layer.
    dropout
        Fraction of the units of each hidden dense layer that is dropped while training.
    batch_norm
        Normalise after each convolution and each hidden dense layer.
    """

    def __init__(
        self,
        num_outputs: int,
        box: int,
        *,
        widths: tuple[int, ...],
        pool: int,
        dense: tuple[int, ...],
        dropout: float,
        batch_norm: bool = False,
    ) -> None:
        levels: list[nn.Module] = []
        channels = 1
        for width in widths:
            levels += [convolution_pair(channels, width, batch_norm=batch_norm), nn.MaxPool3d(pool)]
            channels = width
        inputs = channels * (box // pool ** len(widths)) ** 3
        super().__init__(
            nn.Sequential(*levels), inputs, dense, num_outputs, dropout=dropout,
            batch_norm=batch_norm,
        )  # fmt: skip


@register_network(task="classify", stride=1, min_box=8, paper=TEACHER_PAPER)
def dsrf3d_v2(num_outputs: int, box: int, dropout: float = 0.7) -> nn.Module:
    """DSRF3D-v2, the papers' teacher: convolution pairs of 32, 64, 128 and two dense 1024.

    Parameters
    ----------
    num_outputs
        Number of classes.
    box
        Edge of the input cube in voxels.
    dropout
        Fraction of the dense units dropped while training: Keras's ``Dropout(0.7)`` of the
        authors' code drops 70 % and keeps 30 %.
    """
    return DSRF3D(
        num_outputs, box, widths=(32, 64, 128), pool=2, dense=(1024, 1024), dropout=dropout
    )


@register_network(task="classify", stride=1, min_box=8, paper=f"{TEACHER_PAPER}; batch norm ours")
def dsrf3d_v2_bn(num_outputs: int, box: int, dropout: float = 0.7) -> nn.Module:
    """DSRF3D-v2 with batch norm before each ReLU: trains faster, costs the same folded.

    The dense layers have it too: dropout of 70 % multiplies the mean square of what follows by
    3.3, twice, so without it training starts at logits of a standard deviation of 3 to 5 and
    lags behind throughout (toy problem of four classes, box 16, 90 steps, two seeds each of SGD
    and Adam: loss over the last 15 steps 0.10 to 0.42, against 0.55 to 0.89).

    Parameters
    ----------
    num_outputs
        Number of classes.
    box
        Edge of the input cube in voxels.
    dropout
        Fraction of the dense units dropped while training, as in :func:`dsrf3d_v2`.
    """
    return DSRF3D(
        num_outputs,
        box,
        widths=(32, 64, 128),
        pool=2,
        dense=(1024, 1024),
        dropout=dropout,
        batch_norm=True,
    )


@register_network(task="classify", stride=1, min_box=27, paper=STUDENT_PAPER)
def student_1(num_outputs: int, box: int) -> nn.Module:
    """Student 1 of the papers: DSRF3D with max-pools of 3 and one dense layer; 32, 64, 128.

    Parameters
    ----------
    num_outputs
        Number of classes.
    box
        Edge of the input cube in voxels; three floored max-pools of 3 need at least 27.
    """
    return DSRF3D(num_outputs, box, widths=(32, 64, 128), pool=3, dense=(1024,), dropout=0.0)


@register_network(task="classify", stride=1, min_box=27, paper=STUDENT_PAPER)
def student_2(num_outputs: int, box: int) -> nn.Module:
    """Student 2 of the papers: as student 1 with 32, 64, 64 channels.

    Its parameters are those of :func:`student_1`.
    """
    return DSRF3D(num_outputs, box, widths=(32, 64, 64), pool=3, dense=(1024,), dropout=0.0)


@register_network(task="classify", stride=1, min_box=27, paper=STUDENT_PAPER)
def student_3(num_outputs: int, box: int) -> nn.Module:
    """Student 3 of the papers: as student 1 with 16, 32, 32 channels.

    Its parameters are those of :func:`student_1`.
    """
    return DSRF3D(num_outputs, box, widths=(16, 32, 32), pool=3, dense=(1024,), dropout=0.0)
