"""Layers that several families of networks share, and how their weights are initialised."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["DenseClassifier", "convolution_pair", "initialise_weights", "normed_convolution"]


def normed_convolution(
    inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1
) -> nn.Sequential:
    """Convolution and batch norm, padded so that stride 1 keeps the size.

    The convolution has no bias, since the batch norm brings its own.

    Parameters
    ----------
    inputs, outputs
        Channels.
    kernel
        Odd edge of the kernel.
    stride
        The size is divided by it and rounded up.
    """
    return nn.Sequential(
        nn.Conv3d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False),
        nn.BatchNorm3d(outputs),
    )


def convolution_pair(inputs: int, width: int, *, batch_norm: bool = False) -> nn.Sequential:
    """Two 3³ convolutions that keep the size, each with a ReLU: a level of the papers' networks.

    Parameters
    ----------
    inputs
        Channels that come in.
    width
        Channels of both convolutions.
    batch_norm
        Normalise between convolution and ReLU (the papers do not).
    """
    layers: list[nn.Module] = []
    for channels in (inputs, width):
        layers += [
            normed_convolution(channels, width)
            if batch_norm
            else nn.Conv3d(channels, width, 3, padding=1),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)


class DenseClassifier(nn.Module):
    """Classifier whose convolutions end in dense layers, which fit one box only.

    Parameters
    ----------
    features
        Cubes ``(n, 1, box, box, box)`` → features of any shape.
    inputs
        Number of features of a cube.
    dense
        Units of each hidden dense layer.
    num_outputs
        Number of classes.
    dropout
        Fraction of the units of each hidden dense layer that is dropped while training.
    batch_norm
        Normalise after each hidden dense layer (the papers do not).
    """

    def __init__(
        self,
        features: nn.Module,
        inputs: int,
        dense: Sequence[int],
        num_outputs: int,
        *,
        dropout: float,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        self.features = features
        hidden: list[nn.Module] = []
        for units in dense:
            hidden.append(nn.Linear(inputs, units, bias=not batch_norm))
            if batch_norm:
                hidden.append(_DenseNorm(units))
            hidden += [nn.ReLU(inplace=True), nn.Dropout(dropout)]
            inputs = units
        self.hidden = nn.Sequential(*hidden)
        self.score = nn.Linear(inputs, num_outputs)
        initialise_weights(self)

    def forward(self, subtomograms: Float[Tensor, "n 1 z y x"]) -> Float[Tensor, "n outputs"]:
        """Logits of normalised cubes."""
        features = self.features(subtomograms).flatten(start_dim=1)
        logits: Tensor = self.score(self.hidden(features))
        return logits


class _DenseNorm(nn.BatchNorm1d):
    """Batch norm that takes a batch of one, the rest of a split, by its running statistics."""

    def forward(self, units: Float[Tensor, "n units"]) -> Float[Tensor, "n units"]:
        if self.training and len(units) == 1:
            return F.batch_norm(
                units, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        return super().forward(units)


def initialise_weights(network: nn.Module) -> None:
    """Draw all convolutions and dense layers anew: He where batch norm follows, else Glorot.

    A layer without bias is one that batch norm follows; it gets He's normal weights. All others
    get Glorot's uniform weights and zero bias, the default of Keras and so of the papers' code.

    Without batch norm He's weights are too large for these networks: each max-pool raises the
    mean square of the activations two- to sevenfold, and He's weights keep it. The dense features
    then reach a root mean square of 3 to 4.5, and under the papers' SGD (rate 0.005, momentum
    0.9) 70 to 100 % of the later ReLUs are dead within 100 steps. Glorot's weights halve the mean
    square between layers of equal width; the logits start near zero and the networks learn.
    """
    for layer in network.modules():
        if not isinstance(layer, nn.Conv3d | nn.ConvTranspose3d | nn.Linear):
            continue
        if layer.bias is None:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        else:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
