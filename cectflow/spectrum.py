"""Radial power spectra of subtomograms, and the filter that brings one to another.

Noise, defocus and background differ from tomogram to tomogram, and a network that was trained on
one spectrum may take another's for another complex. Cubes that are filtered to the spectrum of the
training data look to the network as those did (amplitude spectrum matching, as in DeePiCt: de
Teresa-Trueba et al., Nature Methods 2023, and in MemBrain-seg: Lamm et al., bioRxiv 2024).

Shell i of a cube of edge n holds the frequencies that round to i / n cycles per voxel; shell 0 is
the mean. Phases, and so all positions and orientations, stay as they are.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray

__all__ = ["AXES", "LARGEST_GAIN", "PowerSum", "apply_gain", "gain_per_frequency", "shell_numbers"]

LARGEST_GAIN = 10.0
"""Of an amplitude. Shells that hold next to nothing, beyond what tilt images fill, have no say."""
AXES = (-3, -2, -1)
"""z, y, x."""


def shell_numbers(box: int) -> Int[NDArray[np.int64], "{box} {box} {box}"]:
    """Shell of each frequency of a cube's full spectrum: its radius times the box, rounded."""
    along = np.fft.fftfreq(box) * box
    radius = np.sqrt(along[:, None, None] ** 2 + along[None, :, None] ** 2 + along**2)
    numbers: NDArray[np.int64] = np.floor(radius + 0.5).astype(np.int64)
    return numbers


class PowerSum:
    """Mean power per shell of cubes that come a batch at a time.

    Each cube counts at zero mean and unit variance, as a network sees it, and without a taper: what
    leaks over its faces is seen too. Cubes that are constant do not count.

    Parameters
    ----------
    box
        Edge of the cubes in voxels.
    """

    def __init__(self, box: int) -> None:
        self.box = box
        self.num_cubes = 0
        self._sum = np.zeros((box, box, box // 2 + 1))

    def add(self, cubes: Float[NDArray[np.float32], "n *one z y x"]) -> None:
        """Take cubes into account."""
        from scipy import fft  # 0.1 s to import, which few need

        for cube in cubes.reshape(-1, self.box, self.box, self.box):
            variance = float(cube.var(dtype=np.float64))
            if variance > 0 and np.isfinite(variance):
                self._sum += np.abs(fft.rfftn(cube)) ** 2 / variance
                self.num_cubes += 1

    @property
    def power(self) -> Float[NDArray[np.float64], " shell"]:
        """Of each shell, 1 for white noise; the mean has none.

        Raises
        ------
        ValueError
            If no cube was added that is not constant.
        """
        if not self.num_cubes:
            msg = "there is no cube that is not constant: expected at least one"
            raise ValueError(msg)
        box = self.box
        numbers = shell_numbers(box)[:, :, : box // 2 + 1]
        # Half of the spectrum is left out; between its ends each frequency stands for two.
        counts = np.full(numbers.shape, 2.0)
        counts[:, :, 0] = 1.0
        if box % 2 == 0:
            counts[:, :, -1] = 1.0
        sums = np.bincount(numbers.ravel(), (self._sum * counts).ravel())
        power = sums / np.bincount(numbers.ravel(), counts.ravel())
        power[0] = 0.0
        return np.asarray(power / (self.num_cubes * box**3))

    def gain_to(self, wanted: Float[NDArray[np.float64], " shell"]) -> tuple[float, ...]:
        """What each shell's amplitude is multiplied by, so that the cubes have the power wanted.

        Parameters
        ----------
        wanted
            Power of other cubes of this box.
        """
        given = self.power
        ratio = np.full(len(given), LARGEST_GAIN**2)
        np.divide(wanted, given, out=ratio, where=given > wanted / LARGEST_GAIN**2)
        ratio[0] = 1.0
        return tuple(np.sqrt(ratio).tolist())


@lru_cache(maxsize=8)
def gain_per_frequency(
    gain: tuple[float, ...], box: int
) -> Float[NDArray[np.float32], "{box} {box} half"]:
    """Gain of each frequency of a real cube's half spectrum."""
    found: NDArray[np.float32] = np.asarray(gain, np.float32)[
        shell_numbers(box)[:, :, : box // 2 + 1]
    ]
    return found


def apply_gain(
    cubes: Float[NDArray[np.float32], "n *one z y x"], gain: tuple[float, ...]
) -> Float[NDArray[np.float32], "n *one z y x"]:
    """Cubes each of whose shells is multiplied by its gain."""
    from scipy import fft  # in float32, and half as long as NumPy's

    filtered = np.empty_like(cubes)
    box = cubes.shape[-1]
    each = gain_per_frequency(gain, box)
    for place, cube in enumerate(cubes):  # one at a time stays in the cache
        filtered[place] = fft.irfftn(fft.rfftn(cube, axes=AXES) * each, (box,) * 3, AXES)
    return filtered
