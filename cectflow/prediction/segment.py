"""Segmentation of targets: the particle at the centre of each cube, in stacks or in a tomogram."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from cectflow.prediction.contract import LoadedNetwork
from cectflow.prediction.source import CubeSource
from cectflow.progress import track
from cectflow.subtomogram import rescale
from cectflow.volume import read_volume
from cectflow.volume_writer import create_volume, write_stack

__all__ = ["Segmentation", "segment_stack", "segment_tomogram"]

FOREGROUND = 0.5
"""Probability above which a voxel belongs to the target."""


@dataclass(frozen=True)
class Segmentation:
    """Outcome of a segmentation.

    Attributes
    ----------
    num_particles
        Subtomograms segmented.
    mean_voxels
        Mean number of foreground voxels of a particle.
    num_empty
        Particles without any foreground voxel.
    """

    num_particles: int
    mean_voxels: float
    num_empty: int

    @property
    def figures(self) -> dict[str, float]:
        """What a run logs."""
        return {"particles": float(self.num_particles), "voxels": self.mean_voxels}


def segment_stack(
    network: LoadedNetwork,
    source: CubeSource,
    labels: Path,
    probabilities: Path | None,
    *,
    overwrite: bool = False,
) -> Segmentation:
    """Label stack of subtomograms, in the table's order: int8, 1 is the target, 0 all else.

    Parameters
    ----------
    network, source
        A target segmenter and its cubes.
    labels, probabilities
        Output stacks at the card's box and voxel size; the second, float32, only when asked for.
    overwrite
        Replace existing files.
    """
    # Read file by file, written row by row.
    rows = np.concatenate([block.rows for block in source.files])
    foreground = np.concatenate(list(_foreground(network, source)))[np.argsort(rows)]
    masks = foreground > FOREGROUND
    voxel_size = network.card.voxel_size
    headers = network.headers
    write_stack(labels, masks.astype(np.int8), voxel_size, overwrite=overwrite, labels=headers)
    if probabilities is not None:
        write_stack(probabilities, foreground, voxel_size, overwrite=overwrite, labels=headers)
    sizes = masks.sum(axis=(1, 2, 3))
    return Segmentation(len(masks), float(sizes.mean()), int((sizes == 0).sum()))


def segment_tomogram(
    network: LoadedNetwork,
    source: CubeSource,
    labels: Path,
    probabilities: Path | None,
    *,
    overwrite: bool = False,
) -> Segmentation:
    """Label map of a tomogram: int16, the row number of the particle (from 1) in each voxel.

    A voxel that two particles claim belongs to the more probable one. Voxels in no particle's
    cube are background.

    Parameters
    ----------
    network, source
        A target segmenter, the tomogram and its particles.
    labels, probabilities
        Output volumes of the tomogram's shape; the second is float32.
    overwrite
        Replace existing files.

    Raises
    ------
    ValueError
        If there are more particles than int16 can number.
    """
    number = len(source.table.rows)
    if number > np.iinfo(np.int16).max:
        msg = f"{number} particles: at most {np.iinfo(np.int16).max} fit a label map; split them"
        raise ValueError(msg)
    if len(source.files) > 1:
        msg = (
            f"the particles are in {len(source.files)} tomograms, a label map is of one: "
            "give those of one at a time"
        )
        raise ValueError(msg)
    (block,) = source.files
    volume = read_volume(block.path, voxel_size=source.options.voxel_size)
    shape, voxel_size = volume.shape, volume.voxel_size
    headers = network.headers
    sizes: list[int] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        best = stack.enter_context(
            create_volume(
                probabilities or folder / "probabilities.mrc", shape, voxel_size, np.float32,
                overwrite=overwrite, labels=headers,
            )
        )  # fmt: skip
        owner = stack.enter_context(
            create_volume(labels, shape, voxel_size, np.int16, overwrite=overwrite, labels=headers)
        )
        centres = np.floor(block.places + 0.5).astype(np.int64)  # as the cubes are cut
        number_of = block.rows + 1
        index = 0
        for cubes in _foreground(network, source):
            for cube in _to_tomogram(cubes, network, voxel_size):
                sizes.append(int((cube > FOREGROUND).sum()))
                _paste(cube, centres[index], int(number_of[index]), best, owner)
                index += 1
    voxels = np.array(sizes)
    return Segmentation(number, float(voxels.mean()), int((voxels == 0).sum()))


def _foreground(
    network: LoadedNetwork, source: CubeSource
) -> Iterator[Float[NDArray[np.float32], "n z y x"]]:
    """Probability of the target in each voxel, batch by batch."""
    for cubes in track(source.batches(), total=source.num_batches, title="segmenting"):
        logits = network.infer(cubes).astype(np.float64)
        yield (1.0 / (1.0 + np.exp(logits[:, 0] - logits[:, 1]))).astype(np.float32)


def _to_tomogram(
    cubes: Float[NDArray[np.float32], "n box box box"], network: LoadedNetwork, voxel_size: float
) -> Float[NDArray[np.float32], "n edge edge edge"]:
    """Probabilities on the tomogram's grid."""
    card = network.card
    box = int(card.box * card.voxel_size / voxel_size + 1e-6)
    if box == card.box:
        return cubes
    return np.clip(rescale(cubes, card.voxel_size, voxel_size, box), 0.0, 1.0).astype(np.float32)


def _paste(
    cube: NDArray[np.float32],
    centre: NDArray[np.int64],
    number: int,
    best: NDArray[np.float32],
    owner: NDArray[np.int16],
) -> None:
    """Enter a particle's probabilities into the maps; what lies outside the tomogram is dropped."""
    corner = centre - np.array(cube.shape) // 2
    low = np.maximum(corner, 0)
    # A cube that lies outside altogether has nothing to paste: high must not fall below low.
    high = np.maximum(np.minimum(corner + cube.shape, best.shape), low)
    inside = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    local = cube[tuple(slice(a, b) for a, b in zip(low - corner, high - corner, strict=True))]
    more = local > best[inside]
    best[inside] = np.where(more, local, best[inside])
    owner[inside] = np.where(more & (local > FOREGROUND), np.int16(number), owner[inside])
