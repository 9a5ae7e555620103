"""Masking: neighbours leave the cubes before a classifier sees them."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import NDArray

from cectflow.model_card import Contrast
from cectflow.prediction.contract import LoadedNetwork, same_voxel_size

__all__ = ["mask_neighbours", "masked_with", "noise_like", "refuse_other_cubes"]

EDGE = 3.0
"""Voxels over which the mask falls from one to zero, outside the outline."""


def mask_neighbours(
    cubes: Float[NDArray[np.float32], "n z y x"],
    outlines: Bool[NDArray[np.bool_], "n z y x"],
    *,
    seed: int = 0,
) -> Float[NDArray[np.float32], "n z y x"]:
    """Cubes in which only the outlined particle is left.

    Within the outline nothing changes; over ``EDGE`` voxels outside it the cube gives way, by a
    raised cosine, to noise of random phases and the cube's own amplitudes: it has the mean, the
    deviation, the missing wedge and the transfer function of the cube. With the mean instead of
    noise a classifier was lost: accuracy 0.17, where it had 0.62 unmasked and 0.60 with noise
    (recipe of ``benchmarks/masking.py``). A cube without any outline is returned as it is.

    Parameters
    ----------
    cubes
        In any units.
    outlines
        True in the voxels of the target.
    seed
        Of the phases. The same cube is always filled in the same way, whatever its batch.
    """
    from scipy.ndimage import distance_transform_edt  # 0.2 s to import, for few predictions

    masked = cubes.copy()
    for index, (cube, outline) in enumerate(zip(cubes, outlines, strict=True)):
        if not outline.any():
            continue
        distance = distance_transform_edt(~outline)
        weight = 0.5 * (1.0 + np.cos(np.pi * np.clip(distance / EDGE, 0.0, 1.0)))
        masked[index] = weight * cube + (1.0 - weight) * noise_like(cube, seed)
    return masked


def masked_with(network: LoadedNetwork, segmenter: LoadedNetwork) -> LoadedNetwork:
    """A classifier that sees no neighbours: a segmenter outlines the target of each cube first.

    Parameters
    ----------
    network
        Of the task ``classify``.
    segmenter
        Of the task ``target``.

    Raises
    ------
    ValueError
        If the two expect different boxes, voxel sizes or contrasts.
    """
    card = network.card
    refuse_other_cubes(
        segmenter, network.label,
        box=card.box, voxel_size=card.voxel_size, contrast=card.contrast,
    )  # fmt: skip

    def infer(cubes: Float[NDArray[np.float32], "n 1 z y x"]) -> NDArray[np.float32]:
        logits = segmenter.infer(cubes)
        return network.infer(mask_neighbours(cubes[:, 0], logits[:, 1] > logits[:, 0])[:, None])

    label = f"{network.label} masked with {segmenter.label}"
    return LoadedNetwork(network.card, infer, label)


def refuse_other_cubes(
    segmenter: LoadedNetwork, whose: str, *, box: int, voxel_size: float, contrast: Contrast
) -> None:
    """Refuse to mask cubes that are not such as a segmenter was trained on.

    Parameters
    ----------
    segmenter
        Of the task ``target``.
    whose
        Names the cubes in the message.
    box, voxel_size, contrast
        Of the cubes, in voxels and Å.

    Raises
    ------
    ValueError
        If one of them differs from the segmenter's.
    """
    card = segmenter.card
    if not same_voxel_size(card.voxel_size, voxel_size):
        difference = f"voxel size {card.voxel_size:g} Å", f"{voxel_size:g} Å"
    elif card.box != box:
        difference = f"box {card.box}", str(box)
    elif card.contrast != contrast:
        difference = f"contrast {card.contrast}", contrast
    else:
        return
    msg = (
        f"{segmenter.label} was trained with {difference[0]}, {whose} has {difference[1]}: mask "
        "with a segmenter of the same recipe"
    )
    raise ValueError(msg)


def noise_like(
    cube: Float[NDArray[np.float32], "z y x"], seed: int
) -> Float[NDArray[np.float64], "z y x"]:
    """Noise with a cube's amplitude in every Fourier coefficient, its mean included."""
    white = np.fft.rfftn(np.random.default_rng(seed).normal(size=cube.shape))
    white[0, 0, 0] = 1.0  # of amplitude 1 and phase 0: the mean keeps its sign
    spectrum = np.fft.rfftn(cube)
    amplitude = np.abs(spectrum)
    amplitude[0, 0, 0] = spectrum[0, 0, 0].real
    noise: NDArray[np.float64] = np.fft.irfftn(
        amplitude * white / np.abs(white), s=cube.shape, axes=(0, 1, 2)
    )
    return noise
