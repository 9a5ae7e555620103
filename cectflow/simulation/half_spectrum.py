"""Half spectra: real volumes in Fourier space, in the layout of ``rfftn``.

Of k and -k, which have conjugate values in the spectrum of a real volume, they hold one: kx >= 0.
White noise is drawn in them and variances are summed over them (Parseval), part by part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Inexact
from torch import Tensor

__all__ = [
    "CHUNK",
    "Variance",
    "draw_white",
    "frequencies",
    "multiplicity",
    "power_spectrum",
    "sections",
    "squared",
    "volume_of",
]

CHUNK = 2**20
"""Values over which a step works at once: few enough for a CPU's cache."""


def power_spectrum(density: Float[Tensor, "z y x"]) -> Float[Tensor, "z y kx"]:
    """Squared modulus of a field's half spectrum."""
    return squared(torch.fft.rfftn(density))


def volume_of(
    spectrum: Inexact[Tensor, "z y kx"], shape: tuple[int, int, int]
) -> Float[Tensor, "z y x"]:
    """Volume of a half spectrum; a large one is overwritten, so that no copy of it is needed."""
    if spectrum.numel() <= CHUNK:
        small: Tensor = torch.fft.irfftn(spectrum, s=shape)
        return small
    for rows in sections(spectrum.transpose(0, 1)):
        spectrum[:, rows] = torch.fft.ifft(spectrum[:, rows], dim=0)
    volume = torch.empty(shape, device=spectrum.device)
    for part in sections(spectrum):
        volume[part] = torch.fft.irfftn(spectrum[part], s=shape[1:], dim=(1, 2))
    return volume


def draw_white(shape: Sequence[int], generator: torch.Generator) -> Inexact[Tensor, "z y kx"]:
    """Half spectrum of unit white noise, drawn in Fourier space on the generator's device."""
    depth, height, width = shape
    size = (depth, height, width // 2 + 1)
    white = torch.randn((*size, 2), generator=generator, device=generator.device)
    spectrum = torch.view_as_complex(white.mul_(np.sqrt(0.5 * depth * height * width)))
    # These planes hold both k and -k, and a real volume has conjugate values there.
    for plane in {0, width // 2} if width % 2 == 0 else {0}:
        values = spectrum[:, :, plane]
        mirror = values.flip(0, 1).roll((1, 1), (0, 1)).conj()
        spectrum[:, :, plane] = (values + mirror) / np.sqrt(2.0)
    return spectrum


def frequencies(
    shape: tuple[int, ...], voxel_size: float, device: str
) -> tuple[Float[Tensor, "z 1 1"], Float[Tensor, "1 y 1"], Float[Tensor, "1 1 kx"]]:
    """Spatial frequencies in Å⁻¹ of the half spectrum, ready to broadcast."""
    depth, height, width = shape
    kind: Any = {"dtype": torch.float64, "device": device}
    return (
        torch.fft.fftfreq(depth, voxel_size, **kind)[:, None, None],
        torch.fft.fftfreq(height, voxel_size, **kind)[None, :, None],
        torch.fft.rfftfreq(width, voxel_size, **kind)[None, None, :],
    )


def squared(spectrum: Inexact[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Squared modulus of real or complex values."""
    if spectrum.is_complex():
        parts = torch.view_as_real(spectrum)
        return parts[..., 0] ** 2 + parts[..., 1] ** 2
    return spectrum**2


def multiplicity(width: int, device: str) -> Float[Tensor, " kx"]:
    """How many samples of the full spectrum each kx of the half spectrum stands for."""
    twice = torch.full((width // 2 + 1,), 2.0, dtype=torch.float64, device=device)
    twice[0] = 1.0
    if width % 2 == 0:
        twice[-1] = 1.0
    return twice


class Variance:
    """Variance of a real volume, k = 0 excluded, from parts of its half power spectrum."""

    def __init__(self, shape: Sequence[int]) -> None:
        self._num_voxels = float(np.prod(shape, dtype=np.float64))
        self._width = shape[2]
        self._columns: Tensor | None = None

    def add(self, power: Float[Tensor, "part y kx"]) -> None:
        """Add the next sections kz of the power spectrum."""
        columns = power.sum(dim=(0, 1)).to(torch.float64)
        if self._columns is None:
            columns[0] -= power[0, 0, 0]
            self._columns = columns
        else:
            self._columns += columns

    @property
    def total(self) -> float:
        """Of the parts added until now, of which the first must begin at k = 0."""
        assert self._columns is not None
        counts = multiplicity(self._width, str(self._columns.device))
        return float(self._columns @ counts) / self._num_voxels**2


def sections(spectrum: Tensor) -> Iterator[slice]:
    """Slices along the first axis, each of at most ``CHUNK`` values or of one index."""
    length = len(spectrum)
    step = max(CHUNK // max(spectrum[0].numel(), 1), 1)
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))
