"""Distances between the surfaces of two masks, in Å."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from scipy import ndimage

__all__ = ["surface_distances"]

PERCENTILE = 95.0


def surface_distances(
    predicted: Bool[NDArray[np.bool_], "n z y x"],
    truth: Bool[NDArray[np.bool_], "n z y x"],
    voxel_size: float,
) -> Float[NDArray[np.float64], "n 2"]:
    """Mean symmetric surface distance and 95 % Hausdorff distance of each pair of masks.

    The surface is the voxels of a mask that share a face with one outside; where a mask leaves
    the cube it has none. Each voxel of one surface has a distance from the nearest of the other.
    The mean is over the voxels of both; the Hausdorff distance is the larger of the two 95th
    percentiles (Taha and Hanbury 2015, doi 10.1186/s12880-015-0068-x, sections on HD and AVD).
    torchmetrics has these for planes only.

    Parameters
    ----------
    predicted, truth
        Masks.
    voxel_size
        In Å.

    Returns
    -------
    NDArray
        In Å. Two masks without surface agree: 0. Where only one has none there is no distance:
        NaN, for the caller to count as missed and to leave out of means.
    """
    found = np.full((len(truth), 2), np.nan)
    for row, masks in enumerate(zip(predicted, truth, strict=True)):
        surfaces = [mask & ~ndimage.binary_erosion(mask, border_value=1) for mask in masks]
        shown = [surface.any() for surface in surfaces]
        if not any(shown):
            found[row] = 0.0
        if not all(shown):
            continue
        # Nothing beyond both surfaces matters: a small box is as good, and faster.
        (box,) = ndimage.find_objects((surfaces[0] | surfaces[1]).astype(np.int8))
        first, second = (surface[box] for surface in surfaces)
        there = ndimage.distance_transform_edt(~second)[first]
        back = ndimage.distance_transform_edt(~first)[second]
        found[row, 0] = np.concatenate([there, back]).mean()
        found[row, 1] = max(np.percentile(there, PERCENTILE), np.percentile(back, PERCENTILE))
    return found * voxel_size
