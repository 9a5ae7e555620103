"""SSN3D, -ED and -ASPP: the segmenters that say which voxels belong to the particle at the centre.

Published by Liu et al., *Deep learning based supervised semantic segmentation of electron
cryo-subtomograms*, ICIP 2018, arXiv:1802.04087. The anatomy follows the authors' released code
(xulabs/projects, ``segmentation/model.py``: ``FCN8``, ``FCN1``, ``FCN_ed``, ``FCN_aspp``); ours
returns logits where theirs ends in a softmax, and takes any number of labels.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cectflow.networks.blocks import convolution_pair, initialise_weights
from cectflow.networks.catalogue import register_network

__all__ = ["SSN3D", "SSN3DEncoderDecoder", "SSN3DPyramid", "ssn3d", "ssn3d_aspp", "ssn3d_ed"]

PAPER = "Liu et al. 2018, arXiv:1802.04087"
WIDTHS = (32, 64, 128)
"""Channels of the encoder's levels; ``ssn3d_aspp`` has the first two."""


class SSN3D(nn.Module):
    """The papers' baseline: a fully convolutional network that adds the scores of three scales.

    The 1³ convolutions on the coarsest scale stand for dense layers; scores are upsampled to the
    nearest neighbour, so the logits come in cubes of 2³ equal voxels.

    Parameters
    ----------
    num_outputs
        Number of labels, background included.
    dropout
        Fraction of the units of the wide 1³ convolutions that is dropped while training.
    skips
        Add the scores of the two finer scales. Without them the authors' ``FCN1`` refines the
        upsampled scores by 1³ convolutions (two, then one: a fourth one there leads nowhere and
        is left out here).
    """

    def __init__(self, num_outputs: int, *, dropout: float = 0.7, skips: bool = True) -> None:
        super().__init__()
        self.encoder = _encoder(WIDTHS)
        self.wide = nn.Sequential(
            nn.Conv3d(WIDTHS[2], 1024, 1),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Conv3d(1024, 1024, 1),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
        )
        self.score = nn.Conv3d(1024, num_outputs, 1)
        self.skips = skips
        if skips:
            self.middle = nn.Sequential(nn.Conv3d(WIDTHS[1], num_outputs, 1))
            self.fine = nn.Sequential(nn.Conv3d(WIDTHS[0], num_outputs, 1))
        else:
            self.middle = nn.Sequential(*(nn.Conv3d(num_outputs, num_outputs, 1) for _ in "12"))
            self.fine = nn.Sequential(nn.Conv3d(num_outputs, num_outputs, 1))
        self.upsample = nn.Upsample(scale_factor=2, mode="nearest")
        initialise_weights(self)

    def forward(self, subtomograms: Float[Tensor, "n 1 z y x"]) -> Float[Tensor, "n outputs z y x"]:
        """Logits of every voxel of normalised cubes."""
        fine, middle, coarse = _encode(self.encoder, subtomograms)
        scores = self.upsample(self.score(self.wide(coarse)))
        scores = scores + self.middle(middle) if self.skips else self.middle(scores)
        scores = self.upsample(scores)
        scores = scores + self.fine(fine) if self.skips else self.fine(scores)
        logits: Tensor = self.upsample(scores)
        return logits


class SSN3DEncoderDecoder(nn.Module):
    """The papers' better network: the decoder narrows step by step and adds features, not scores.

    The last 1³ convolution comes before the last upsampling, where the authors have it after:
    the two commute, and this order computes the same logits from an eighth of the voxels.

    Parameters
    ----------
    num_outputs
        Number of labels, background included.
    """

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.encoder = _encoder(WIDTHS)
        self.decoder = nn.ModuleList([_narrow(128, 128), _narrow(128, 64), _narrow(64, 32)])
        self.skips = nn.ModuleList([nn.Conv3d(WIDTHS[1], 128, 1), nn.Conv3d(WIDTHS[0], 64, 1)])
        self.score = nn.Conv3d(32, num_outputs, 1)
        self.upsample = nn.Upsample(scale_factor=2, mode="nearest")
        initialise_weights(self)

    def forward(self, subtomograms: Float[Tensor, "n 1 z y x"]) -> Float[Tensor, "n outputs z y x"]:
        """Logits of every voxel of normalised cubes."""
        fine, middle, coarse = _encode(self.encoder, subtomograms)
        features = self.upsample(self.decoder[0](coarse)) + self.skips[0](middle)
        features = self.upsample(self.decoder[1](features)) + self.skips[1](fine)
        logits: Tensor = self.upsample(self.score(self.decoder[2](features)))
        return logits


class SSN3DPyramid(nn.Module):
    """The papers' dilated network: one level fewer, then an atrous spatial pyramid.

    The pyramid (Chen et al. 2017, arXiv:1706.05587) sees three ranges side by side without
    another loss of resolution. As in :class:`SSN3DEncoderDecoder`, the scores are upsampled
    where the authors upsample the features, here of 512 channels: a 64th of the multiplications.

    Parameters
    ----------
    num_outputs
        Number of labels, background included.
    """

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.encoder = _encoder(WIDTHS[:2])
        self.dilated = _dilated(WIDTHS[1], 128, dilation=2)
        self.branches = nn.ModuleList(
            [_narrow(128, 128), _dilated(128, 128, dilation=2), _dilated(128, 128, dilation=4)]
        )
        self.score = nn.Conv3d(4 * 128, num_outputs, 1)
        self.upsample = nn.Upsample(scale_factor=4, mode="nearest")
        initialise_weights(self)

    def forward(self, subtomograms: Float[Tensor, "n 1 z y x"]) -> Float[Tensor, "n outputs z y x"]:
        """Logits of every voxel of normalised cubes."""
        features = self.dilated(self.encoder[1](self.encoder[0](subtomograms)))
        pyramid = [branch(features) for branch in self.branches]
        logits: Tensor = self.upsample(self.score(torch.cat([*pyramid, features], dim=1)))
        return logits


@register_network(task="segment", stride=8, min_box=8, reach=21, paper=PAPER)
def ssn3d(num_outputs: int, box: int, dropout: float = 0.7, skips: bool = True) -> nn.Module:
    """SSN3D, the papers' baseline segmenter: fully convolutional, scores of three scales added.

    Parameters
    ----------
    num_outputs
        Number of labels, background included.
    box
        Edge of the input cube in voxels; the weights serve any multiple of 8.
    dropout
        Fraction dropped while training: Keras's ``Dropout(0.7)`` of the authors' code drops 70 %.
    skips
        Add the scores of the two finer scales.
    """
    return SSN3D(num_outputs, dropout=dropout, skips=skips)


@register_network(task="segment", stride=4, min_box=8, reach=33, paper=PAPER)
def ssn3d_aspp(num_outputs: int, box: int) -> nn.Module:
    """SSN3D-ASPP, the papers' dilated segmenter: two levels, then an atrous spatial pyramid.

    Parameters
    ----------
    num_outputs
        Number of labels, background included.
    box
        Edge of the input cube in voxels; the weights serve any multiple of 4.
    """
    return SSN3DPyramid(num_outputs)


@register_network(task="segment", stride=8, min_box=8, reach=21, paper=PAPER)
def ssn3d_ed(num_outputs: int, box: int) -> nn.Module:
    """SSN3D-ED, the papers' encoder-decoder segmenter: skips of features, no dropout.

    Parameters
    ----------
    num_outputs
        Number of labels, background included.
    box
        Edge of the input cube in voxels; the weights serve any multiple of 8.
    """
    return SSN3DEncoderDecoder(num_outputs)


def _encoder(widths: tuple[int, ...]) -> nn.ModuleList:
    """Levels of two convolutions and a max-pool, each halving the size."""
    channels = (1, *widths[:-1])
    return nn.ModuleList(
        nn.Sequential(convolution_pair(inputs, width), nn.MaxPool3d(2))
        for inputs, width in zip(channels, widths, strict=True)
    )


def _encode(
    encoder: nn.ModuleList, subtomograms: Float[Tensor, "n 1 z y x"]
) -> tuple[Tensor, Tensor, Tensor]:
    """Features at a half, a quarter and an eighth of the size."""
    fine = encoder[0](subtomograms)
    middle = encoder[1](fine)
    return fine, middle, encoder[2](middle)


def _dilated(inputs: int, outputs: int, *, dilation: int) -> nn.Sequential:
    convolution = nn.Conv3d(inputs, outputs, 3, padding=dilation, dilation=dilation)
    return nn.Sequential(convolution, nn.ReLU(inplace=True))


def _narrow(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv3d(inputs, outputs, 1), nn.ReLU(inplace=True))
