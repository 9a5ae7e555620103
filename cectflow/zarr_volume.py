"""Volumes in Zarr: OME-Zarr images, as copick and the CryoET Data Portal keep tomograms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cectflow.volume_header import judge_voxel_size

__all__ = ["ZARR_SUFFIX", "is_zarr", "read_zarr", "read_zarr_header"]

ZARR_SUFFIX = ".zarr"
ANGSTROM = {"angstrom": 1.0, "nanometer": 10.0, "micrometer": 1e4, None: 1.0}
"""Units of OME-Zarr's axes; copick writes angstrom."""
FAULTS = (LookupError, TypeError, ValueError, AttributeError, OSError, RuntimeError)
"""What zarr raises over a folder that holds something else."""


def is_zarr(path: Path) -> bool:
    """Whether this is a folder that Zarr has made."""
    return path.suffix == ZARR_SUFFIX and path.is_dir()


def read_zarr(path: Path, voxel_size: float | None) -> tuple[NDArray[Any], float]:
    """Voxels ``(z, y, x)`` of the finest scale of an OME-Zarr image or of a Zarr array, loaded.

    Parameters
    ----------
    path
        A folder ``….zarr``.
    voxel_size
        In angstrom; holds instead of what the image says.

    Raises
    ------
    OSError
        If the package zarr is not installed.
    ValueError
        If it is no volume, or its voxel size is missing or cannot be believed.
    """
    array, scale = _open(path)
    shape, size = _shape_of(path, array), _voxel_size_of(path, scale, voxel_size)
    try:
        return np.asarray(array[...]).reshape(shape), size
    except FAULTS as error:
        msg = f"{path} is no volume in Zarr: {error}"
        raise ValueError(msg) from None


def read_zarr_header(
    path: Path, voxel_size: float | None = None
) -> tuple[tuple[int, int, int], float]:
    """Shape ``(z, y, x)`` and voxel size of :func:`read_zarr`; no voxel is read."""
    array, scale = _open(path)
    return _shape_of(path, array), _voxel_size_of(path, scale, voxel_size)


def _open(path: Path) -> tuple[Any, list[float] | None]:
    """Array of the finest scale, not yet read, and the voxels' edges along its axes."""
    try:
        import zarr
    except ModuleNotFoundError:
        msg = f"{path} needs the package zarr: pip install 'cectflow[copick]'"
        raise OSError(msg) from None
    try:
        node: Any = zarr.open(path, mode="r")
        return (node, None) if hasattr(node, "shape") else _finest(node)
    except FAULTS as error:
        msg = f"{path} is no volume in Zarr: {error}"
        raise ValueError(msg) from None


def _shape_of(path: Path, array: Any) -> tuple[int, int, int]:
    """Voxels along z, y and x; axes of time and channel have one entry."""
    shape = tuple(int(length) for length in array.shape)
    while len(shape) > 3 and shape[0] == 1:
        shape = shape[1:]
    if len(shape) != 3 or np.dtype(array.dtype).kind not in "iufb":
        msg = f"{path} holds {array.dtype} of shape {shape}: expected a volume (z, y, x)"
        raise ValueError(msg)
    depth, height, width = shape
    return depth, height, width


def _voxel_size_of(path: Path, scale: list[float] | None, voxel_size: float | None) -> float:
    if voxel_size is not None:
        return voxel_size
    if scale is None or len(scale) < 3:
        msg = f"{path} says no voxel size: give it in angstrom with --voxel-size"
        raise ValueError(msg)
    x, y, z = scale[:-4:-1]
    return judge_voxel_size(path, (x, y, z))


def _finest(group: Any) -> tuple[Any, list[float] | None]:
    """Array of the finest scale, and the voxels' edges in angstrom along its axes."""
    attributes = group.attrs.asdict()
    (image, *_) = attributes.get("ome", attributes)["multiscales"]
    finest = image["datasets"][0]
    scales = [
        [float(edge) for edge in each["scale"]]
        for each in finest.get("coordinateTransformations", ())
        if each["type"] == "scale"
    ]
    units = [ANGSTROM[axis.get("unit") if isinstance(axis, dict) else None]
             for axis in image.get("axes", ())]  # fmt: skip
    if not scales:
        return group[finest["path"]], None
    edges = scales[0]
    if len(units) == len(edges):
        edges = [edge * unit for edge, unit in zip(edges, units, strict=True)]
    return group[finest["path"]], edges
