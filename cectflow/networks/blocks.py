"""Layers that several families of networks share, and how their weights are initialised."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["convolution_pair", "dense_layers", "initialise_weights", "normed_convolution"]


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


def dense_layers(
    inputs: int, units: Sequence[int], *, dropout: float, batch_norm: bool = False
) -> nn.Sequential:
    """Hidden dense layers of the papers' classifiers, each with a ReLU and dropout.

    Parameters
    ----------
    inputs
        Features that come in.
    units
        Of each layer.
    dropout
        Fraction of the units of each layer that is dropped while training.
    batch_norm
        Normalise before each ReLU (the papers do not).
    """
    layers: list[nn.Module] = []
    for outputs in units:
        layers.append(nn.Linear(inputs, outputs, bias=not batch_norm))
        if batch_norm:
            layers.append(_DenseNorm(outputs))
        layers += [nn.ReLU(inplace=True), nn.Dropout(dropout)]
        inputs = outputs
    return nn.Sequential(*layers)


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
