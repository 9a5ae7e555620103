"""Our own networks: a strided residual classifier and a strided residual segmenter.

The papers' networks spend half and more of their multiplications on two convolutions at full
resolution, where a cube holds mostly noise. Ours go to a coarser grid at once, learn
residuals (He et al. 2016, arXiv:1512.03385) and normalise with batch norm, which an export folds
into the convolutions. They use nothing but convolution, transposed convolution, batch norm, ReLU,
addition, mean and nearest upsampling, so ONNX runtimes take them whole.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cectflow.networks.blocks import initialise_weights, normed_convolution
from cectflow.networks.catalogue import register_network

__all__ = [
    "StridedClassifier",
    "StridedSegmenter",
    "append_distance",
    "residual_teacher",
    "strided_ed_base",
    "strided_ed_large",
    "strided_ed_small",
    "strided_micro",
    "strided_nano",
    "strided_small",
]

PAPER = "cectflow, unpublished"


class ResidualBlock(nn.Module):
    """Two 3³ convolutions added to their input; 1³ convolution on the way round where needed.

    Parameters
    ----------
    inputs, outputs
        Channels.
    stride
        Of the first convolution; the size is divided by it and rounded up.
    """

    def __init__(self, inputs: int, outputs: int, *, stride: int = 1) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            normed_convolution(inputs, outputs, stride=stride),
            nn.ReLU(inplace=True),
            normed_convolution(outputs, outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = normed_convolution(inputs, outputs, kernel=1, stride=stride)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, features: Float[Tensor, "n inputs z y x"]) -> Tensor:
        """Features, smaller by the stride."""
        total: Tensor = self.relu(self.residual(features) + self.shortcut(features))
        return total


class StridedClassifier(nn.Module):
    """Classifier that halves the grid at every step and averages over what is left.

    It sees how far each voxel is from the box centre (:func:`distance_from_centre`): in a crowded
    cube an average over all places would otherwise count the neighbours as much as the target.

    Parameters
    ----------
    num_outputs
        Number of classes.
    box
        Edge of the input cube in voxels.
    stem
        Stride of the first convolution; its kernel spans twice as much and one voxel more.
    widths
        Channels of the stem and of each level below it; each halves the size.
    depth
        Blocks of each level.
    block
        ``(inputs, outputs, stride=…)`` → block. Which stem, widths, depth and blocks pay is
        measured by ``benchmarks/student_search.py``.
    """

    def __init__(
        self,
        num_outputs: int,
        box: int,
        *,
        widths: tuple[int, ...],
        stem: int = 2,
        depth: int = 1,
        block: Callable[..., nn.Module] = ResidualBlock,
    ) -> None:
        super().__init__()
        self.box = box
        self.sight: nn.Module = _Distance(box)
        self.stem = nn.Sequential(
            normed_convolution(2, widths[0], kernel=2 * stem + 1, stride=stem),
            nn.ReLU(inplace=True),
        )
        blocks: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            blocks.append(block(inputs, outputs, stride=2))
            blocks += [block(outputs, outputs, stride=1) for _ in range(depth - 1)]
        self.blocks = nn.Sequential(*blocks)
        self.score = nn.Linear(widths[-1], num_outputs)
        initialise_weights(self)

    def forward(self, subtomograms: Float[Tensor, "n 1 z y x"]) -> Float[Tensor, "n outputs"]:
        """Logits of normalised cubes."""
        features = self.blocks(self.stem(self.sight(subtomograms)))
        logits: Tensor = self.score(features.mean(dim=(2, 3, 4)))
        return logits

    def fold(self) -> None:
        """Compute once, for an export, what the distance adds to the first convolution.

        It is the same for every cube of the box. Without it the stem has half the multiplications;
        openvino runs ``strided_nano`` 1.3 to 1.4 times as fast. Call it in evaluation mode, batch
        norms folded.
        """
        convolution = self.stem[0]
        while isinstance(convolution, nn.Sequential):
            convolution = convolution[0]
        assert isinstance(convolution, nn.Conv3d)
        self.stem[0] = _AfterDistance(convolution, self.box)
        self.sight = nn.Identity()


class _Distance(nn.Module):
    """:func:`append_distance` as a layer."""

    def __init__(self, box: int) -> None:
        super().__init__()
        self.box = box

    def forward(self, volumes: Float[Tensor, "n 1 z y x"]) -> Float[Tensor, "n 2 z y x"]:
        """Volumes and distances."""
        return append_distance(volumes, self.box)


class _AfterDistance(nn.Module):
    """A convolution of cubes and distances that is given the cubes only.

    A convolution is linear, so it is the sum of one over the cubes and one over the distances.

    Parameters
    ----------
    convolution
        Of two channels, as it was trained.
    box
        Edge of the cubes in voxels.
    """

    response: Tensor

    def __init__(self, convolution: nn.Conv3d, box: int) -> None:
        super().__init__()
        of_cubes, of_distances = copy.deepcopy(convolution), copy.deepcopy(convolution)
        with torch.no_grad():
            of_cubes.weight = nn.Parameter(convolution.weight[:, :1].clone())
            of_distances.weight = nn.Parameter(convolution.weight[:, 1:].clone())
            of_cubes.bias = None  # it is part of the response
            of_cubes.in_channels = of_distances.in_channels = 1
            distances = append_distance(torch.zeros(1, 1, box, box, box), box)[:, 1:]
            self.register_buffer("response", of_distances(distances))
        self.convolution = of_cubes

    def forward(self, cubes: Float[Tensor, "n 1 z y x"]) -> Tensor:
        """Features."""
        features: Tensor = self.convolution(cubes) + self.response
        return features


class StridedSegmenter(nn.Module):
    """Encoder-decoder of residual blocks on a grid coarser than the input's.

    The stem goes to the grid on which the finest features live, the encoder halves it at every
    level, and the decoder climbs back by the same steps, adding the encoder's features. The last
    layer gives each cell of the stem's grid the logits of its voxels. Which stem, widths and depth
    pay is measured by ``benchmarks/segmenter_search.py``.

    Parameters
    ----------
    num_outputs
        Number of labels, background included.
    box
        Edge of the input cube in voxels: the unit of the distance.
    stem
        Stride of the first convolution; its kernel spans twice as much and one voxel more.
    widths
        Channels of the encoder's levels, the stem's first.
    depth
        Residual blocks of each level below the stem's.
    decoder
        Channels of the decoder's levels, from the stem's down to the last but one; None: as in
        the encoder.
    centred
        See how far each voxel is from the centre (:func:`append_distance`): for the task
        ``target``, where it tells the particle at the centre from its neighbours; zero padding
        would be the only cue without it. The task ``semantic`` must not have it.
    """

    def __init__(
        self,
        num_outputs: int,
        box: int,
        *,
        stem: int,
        widths: tuple[int, ...],
        depth: tuple[int, ...],
        decoder: tuple[int, ...] | None = None,
        centred: bool = True,
    ) -> None:
        super().__init__()
        self.box = box
        self.centred = centred
        self.stem = nn.Sequential(
            normed_convolution(1 + centred, widths[0], kernel=2 * stem + 1, stride=stem),
            nn.ReLU(inplace=True),
        )
        self.encoder = nn.ModuleList(
            nn.Sequential(
                ResidualBlock(finer, coarser, stride=2),
                *(ResidualBlock(coarser, coarser) for _ in range(blocks - 1)),
            )
            for (finer, coarser), blocks in zip(pairwise(widths), depth, strict=True)
        )
        narrow = decoder or widths[:-1]
        self.raises = nn.ModuleList(
            _Raise(coarser, finer) for finer, coarser in pairwise((*narrow, widths[-1]))
        )
        self.skips = nn.ModuleList(
            nn.Identity() if wide == width else normed_convolution(wide, width, kernel=1)
            for wide, width in zip(widths[:-1], narrow, strict=True)
        )
        self.decoder = nn.ModuleList(
            [
                nn.Sequential(normed_convolution(narrow[0], narrow[0]), nn.ReLU(inplace=True)),
                *(ResidualBlock(width, width) for width in narrow[1:]),
            ]
        )
        self.score: nn.Module = nn.Conv3d(narrow[0], num_outputs, 1)
        if stem > 1:
            self.score = nn.ConvTranspose3d(narrow[0], num_outputs, stem, stem)
        initialise_weights(self)

    def forward(self, subtomograms: Float[Tensor, "n 1 z y x"]) -> Float[Tensor, "n outputs z y x"]:
        """Logits of every voxel of normalised volumes whose edges are multiples of the stride."""
        volumes = append_distance(subtomograms, self.box) if self.centred else subtomograms
        levels = [self.stem(volumes)]
        for encode in self.encoder:
            levels.append(encode(levels[-1]))
        features = levels.pop()
        for raise_, skip, decode in reversed(
            list(zip(self.raises, self.skips, self.decoder, strict=True))
        ):
            features = decode(skip(levels.pop()) + raise_(features))
        logits: Tensor = self.score(features)
        return logits


class _Raise(nn.Sequential):
    """1³ convolution to the channels of the finer grid, then nearest upsampling by two."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(
            normed_convolution(inputs, outputs, kernel=1),
            nn.Upsample(scale_factor=2, mode="nearest"),
        )


def append_distance(volumes: Float[Tensor, "n 1 z y x"], box: int) -> Float[Tensor, "n 2 z y x"]:
    """Volumes and, as a second channel, the distance of every voxel from their centre.

    It is computed from the shape at hand, so that an exported network takes any shape, and is
    measured in half boxes: 0 at voxel ``n // 2`` of each axis and 1 half a box away from it. A
    larger volume about the same particle shows the network what it was trained on, and more.

    Parameters
    ----------
    volumes
        With the particle at the centre.
    box
        Edge in voxels of the cubes on which the network is trained.
    """
    axes = [
        (torch.arange(edge, device=volumes.device) - edge // 2) / (box / 2)
        for edge in volumes.shape[2:]
    ]
    z, y, x = torch.meshgrid(*axes, indexing="ij")
    distance = (z.square() + y.square() + x.square()).sqrt()
    distance = distance.to(volumes.dtype).expand(volumes.shape[0], 1, -1, -1, -1)
    return torch.cat([volumes, distance], dim=1)


@register_network(task="classify", stride=1, min_box=12, paper=PAPER)
def residual_teacher(num_outputs: int, box: int) -> nn.Module:
    """Teacher of ours: two residual blocks a level from the full grid; 24, 48, 96, 192 channels.

    It costs about as much as DSRF3D-v2 and has a quarter of its weights: no dense layer sees the
    grid.

    Parameters
    ----------
    num_outputs
        Number of classes.
    box
        Edge of the input cube in voxels; the unit of the distance channel.
    """
    return StridedClassifier(num_outputs, box, stem=1, widths=(24, 48, 96, 192), depth=2)


@register_network(task="classify", stride=1, min_box=12, paper=PAPER)
def strided_nano(num_outputs: int, box: int) -> nn.Module:
    """Smallest student of ours: strided stem, two residual blocks; 8, 16, 24 channels.

    Parameters
    ----------
    num_outputs
        Number of classes.
    box
        Edge of the input cube in voxels; the unit of the distance channel.
    """
    return StridedClassifier(num_outputs, box, widths=(8, 16, 24))


@register_network(task="classify", stride=1, min_box=12, paper=PAPER)
def strided_micro(num_outputs: int, box: int) -> nn.Module:
    """Compact student of ours: 5³ strided stem and two residual blocks; 16, 32, 40 channels.

    Parameters
    ----------
    num_outputs
        Number of classes.
    box
        Edge of the input cube in voxels; the unit of the distance channel.
    """
    return StridedClassifier(num_outputs, box, widths=(16, 32, 40))


@register_network(task="segment", stride=4, min_box=8, reach=26, paper=PAPER)
def strided_ed_base(num_outputs: int, box: int, centred: bool = True) -> nn.Module:
    """Segmenter of ours for every day: residual encoder-decoder; 8, 24, 48 channels.

    Its stem keeps the full grid, with few channels: that outlines better than more channels on
    half the grid for the same multiplications, though not in the same time.

    Parameters
    ----------
    num_outputs
        Number of labels, background included.
    box
        Edge of the input cube in voxels: the unit of the distance channel.
    centred
        See the distance from the centre: true for the task ``target``, false for ``semantic``.
    """
    return StridedSegmenter(
        num_outputs, box, stem=1, widths=(8, 24, 48), depth=(1, 2), centred=centred
    )


@register_network(task="segment", stride=4, min_box=8, reach=26, paper=PAPER)
def strided_ed_large(num_outputs: int, box: int, centred: bool = True) -> nn.Module:
    """Segmenter of ours for the last points: residual encoder-decoder; 16, 48, 96 channels.

    As costly as the networks of paper (a), a fifth below ``ssn3d_ed``, which it is to be held
    against.

    Parameters
    ----------
    num_outputs
        Number of labels, background included.
    box
        Edge of the input cube in voxels: the unit of the distance channel.
    centred
        See the distance from the centre: true for the task ``target``, false for ``semantic``.
    """
    return StridedSegmenter(
        num_outputs, box, stem=1, widths=(16, 48, 96), depth=(1, 2), centred=centred
    )


@register_network(task="segment", stride=4, min_box=8, reach=21, paper=PAPER)
def strided_ed_small(num_outputs: int, box: int, centred: bool = True) -> nn.Module:
    """Compact segmenter of ours: residual encoder-decoder from half the grid; 24, 48 channels.

    A third level outlines about as well for the same multiplications, but sees more than twice as
    far, and whole tomograms pay for that: windows overlap by the reach.

    Parameters
    ----------
    num_outputs
        Number of labels, background included.
    box
        Edge of the input cube in voxels: the unit of the distance channel.
    centred
        See the distance from the centre: true for the task ``target``, false for ``semantic``.
    """
    return StridedSegmenter(num_outputs, box, stem=2, widths=(24, 48), depth=(2,), centred=centred)


@register_network(task="classify", stride=1, min_box=12, paper=PAPER)
def strided_small(num_outputs: int, box: int) -> nn.Module:
    """Student of ours for the last points of accuracy; 24, 64, 96 channels.

    Parameters
    ----------
    num_outputs
        Number of classes.
    box
        Edge of the input cube in voxels; the unit of the distance channel.
    """
    return StridedClassifier(num_outputs, box, widths=(24, 64, 96))
