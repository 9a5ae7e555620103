"""Cubes that are cut where the network runs: a tomogram crosses to the GPU once.

A stack of cubes is read and sent in batches; of a tomogram the whole volume is sent, and each batch
is a gather on the device. What comes out is what :func:`cectflow.prediction.source.read_block`
gives, as tensors on the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from cectflow.model_card import ModelCard
from cectflow.prediction.contract import InputOptions, same_voxel_size
from cectflow.prediction.source import Block, read_block
from cectflow.spectrum import AXES, gain_per_frequency
from cectflow.subtomogram import resampling_matrix
from cectflow.volume import read_volume

__all__ = ["DeviceBatch", "cut_on_device", "read_block_on_device", "read_blocks_on_device"]

DeviceBatch = tuple[Float[Tensor, "n 1 box box box"], NDArray[np.int64], dict[int, str]]
"""Cubes that can be predicted, their places in the block, and why others cannot."""


def read_block_on_device(
    block: Block, card: ModelCard, options: InputOptions, device: str
) -> Iterator[DeviceBatch]:
    """Cubes of a tomogram's block as the network expects them, on a device.

    Parameters
    ----------
    block
        Of a tomogram.
    card, options
        The contract, and what the user says of the input.
    device
        As torch names it.

    Raises
    ------
    ValueError, OSError
        If the tomogram cannot be read.
    """
    volume, voxel_size = _uploaded(block.path, options.voxel_size, device)
    matrix = None
    if not same_voxel_size(voxel_size, card.voxel_size):
        matrix = torch.from_numpy(
            resampling_matrix(block.box, card.voxel_size / voxel_size, card.box)
        ).to(device)
    gain = None
    if block.gain is not None:
        gain = torch.from_numpy(gain_per_frequency(block.gain, card.box)).to(device)
    for start in range(0, len(block), options.batch_size):
        cubes = cut_on_device(volume, block.places[start : start + options.batch_size], block.box)
        sound = torch.isfinite(cubes.sum(dim=(1, 2, 3), dtype=torch.float64)).cpu().numpy()
        faults = {
            start + int(place): f"{block.path}: the subtomogram of particle "
            f"{int(block.rows[start + place]) + 1} holds values that are not finite: leave it out"
            for place in np.flatnonzero(~sound)
        }
        if faults:
            cubes = cubes[torch.from_numpy(sound).to(device)]
        if matrix is not None:
            for axis in (1, 2, 3):
                cubes = (cubes.movedim(axis, -1) @ matrix.T).movedim(-1, axis)
        if options.contrast != card.contrast:
            cubes = -cubes
        if gain is not None and len(cubes):
            cubes = torch.fft.irfftn(torch.fft.rfftn(cubes, dim=AXES) * gain, (card.box,) * 3, AXES)
        yield cubes[:, None].contiguous(), start + np.flatnonzero(sound), faults


def read_blocks_on_device(
    blocks: Iterable[Block], card: ModelCard, options: InputOptions, device: str
) -> Iterator[DeviceBatch]:
    """Cubes of several blocks; those of stacks are sent in batches.

    A file that cannot be read is a fault of its particles.
    """
    start = 0
    for block in blocks:
        done = 0
        try:
            for cubes, kept, faults in _read_one(block, card, options, device):
                moved = {start + place: why for place, why in faults.items()}
                yield cubes, start + kept, moved
                done += len(kept) + len(faults)
        except (OSError, ValueError) as error:
            why = str(error) if str(block.path) in str(error) else f"{block.path}: {error}"
            faults = dict.fromkeys(range(start + done, start + len(block)), why)
            yield torch.empty(0, 1, *[card.box] * 3), np.empty(0, np.int64), faults
        start += len(block)


def _read_one(
    block: Block, card: ModelCard, options: InputOptions, device: str
) -> Iterator[DeviceBatch]:
    if not block.of_stack:
        yield from read_block_on_device(block, card, options, device)
        return
    for batch in read_block(block, card, options):
        yield torch.from_numpy(batch.cubes).to(device), batch.kept, batch.faults


def cut_on_device(
    volume: Float[Tensor, "z y x"], centres_zyx: NDArray[np.float64], box: int
) -> Float[Tensor, "n box box box"]:
    """As :func:`cectflow.subtomogram.cut` without periodicity: missing voxels get the cube's mean.

    Parameters
    ----------
    volume
        On any device.
    centres_zyx
        In voxels, 0-based; halves are rounded up.
    box
        Edge of the cubes in voxels.

    Raises
    ------
    ValueError
        If a cube has no voxel inside.
    """
    device = volume.device
    corners = np.floor(np.asarray(centres_zyx, np.float64) + 0.5).astype(np.int64) - box // 2
    steps = torch.arange(box, device=device)
    places, valid = [], []
    for axis, edge in enumerate(volume.shape):
        along = torch.from_numpy(corners[:, axis]).to(device)[:, None] + steps
        valid.append((along >= 0) & (along < edge))
        places.append(along.clamp(0, edge - 1))
    z, y, x = places
    cubes = volume[z[:, :, None, None], y[:, None, :, None], x[:, None, None, :]].float()
    within = valid[0][:, :, None, None] & valid[1][:, None, :, None] & valid[2][:, None, None, :]
    if bool(within.all()):
        return cubes
    counts = within.sum(dim=(1, 2, 3), keepdim=True)
    if not bool((counts > 0).all()):
        row = int((counts.flatten() == 0).nonzero()[0])
        msg = (
            f"the cube of row {row}, centred at voxel {corners[row] + box // 2} (z, y, x), has no "
            f"voxel inside the volume of {tuple(volume.shape)}: check the coordinates"
        )
        raise ValueError(msg)
    total = torch.where(within, cubes, 0.0).sum(dim=(1, 2, 3), keepdim=True, dtype=torch.float64)
    return torch.where(within, cubes, (total / counts).float())


@lru_cache(maxsize=1)
def _uploaded(path: Path, voxel_size: float | None, device: str) -> tuple[Tensor, float]:
    """The last tomogram that was asked for: its blocks follow one another."""
    volume = read_volume(path, voxel_size=voxel_size)
    data = np.asarray(volume.data)
    if data.dtype.kind != "f":
        data = data.astype(np.float32)  # torch has few unsigned integers
    return torch.from_numpy(np.array(data)).to(device), volume.voxel_size
