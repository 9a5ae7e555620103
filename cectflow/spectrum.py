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

from cectflow.subtomogram import normalise

__all__ = [
    "AXES",
    "LARGEST_GAIN",
    "PowerSum",
    "apply_gain",
    "gain_at",
    "gain_per_frequency",
    "num_shells",
    "shell_numbers",
]

LARGEST_GAIN = 10.0
"""Of an amplitude, over that of most shells. Those that hold next to nothing, beyond what tilt
images fill, stay so."""
COUNTED_VARIANCE = 0.99
"""Share of the wanted variance that is in the shells among which most are counted."""
AXES = (-3, -2, -1)
"""z, y, x."""


@lru_cache(maxsize=8)
def shell_numbers(box: int) -> Int[NDArray[np.int64], "{box} {box} {box}"]:
    """Shell of each frequency of a cube's full spectrum: its radius times the box, rounded."""
    along = np.fft.fftfreq(box) * box
    radius = np.sqrt(along[:, None, None] ** 2 + along[None, :, None] ** 2 + along**2)
    numbers: NDArray[np.int64] = np.floor(radius + 0.5).astype(np.int64)
    numbers.flags.writeable = False  # it is shared
    return numbers


@lru_cache(maxsize=8)
def _half_spectrum(
    box: int,
) -> tuple[Int[NDArray[np.int64], " frequency"], Float[NDArray[np.float64], " frequency"]]:
    """Shell of each frequency that a real cube's half spectrum holds, and how many it stands for.

    Half of the spectrum is left out; between its ends each frequency stands for two.
    """
    numbers = shell_numbers(box)[:, :, : box // 2 + 1]
    counts = np.full(numbers.shape, 2.0)
    counts[:, :, 0] = 1.0
    if box % 2 == 0:
        counts[:, :, -1] = 1.0
    return numbers.ravel(), counts.ravel()


def num_shells(box: int) -> int:
    """How many shells a cube of such an edge has, the mean and the corners included."""
    return int(np.floor(np.sqrt(3.0) * (box // 2) + 0.5)) + 1


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
        self._sums = np.zeros(num_shells(box))

    def add(self, cubes: Float[NDArray[np.float32], "n *one z y x"]) -> None:
        """Take cubes into account."""
        from scipy import fft  # 0.1 s to import, which few need

        numbers, counts = _half_spectrum(self.box)
        for cube in normalise(cubes.reshape(-1, self.box, self.box, self.box)):
            if cube.any():
                power = np.abs(fft.rfftn(cube)).ravel().astype(np.float64) ** 2
                self._sums += np.bincount(numbers, power * counts)
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
        numbers, counts = _half_spectrum(self.box)
        power = self._sums / np.bincount(numbers, counts)
        power[0] = 0.0
        return np.asarray(power / (self.num_cubes * self.box**3))

    def gain_to(self, wanted: Float[NDArray[np.float64], " shell"]) -> tuple[float, ...]:
        """What each shell's amplitude is multiplied by, so that the cubes have the power wanted.

        Parameters
        ----------
        wanted
            Power of other cubes of this box.
        """
        given = self.power
        ratio = np.full(len(given), np.inf)
        np.divide(wanted, given, out=ratio, where=given > 0)
        # Cubes whose background has nearly all of their variance have little elsewhere, and those
        # resampled from larger voxels next to nothing in the outer shells: most have neither.
        usual = np.quantile(ratio[_shells_that_count(wanted, self.box)], 0.25, method="lower")
        ratio = np.minimum(ratio, LARGEST_GAIN**2 * usual)
        ratio[0] = 1.0
        return tuple(np.sqrt(ratio).tolist())


def _shells_that_count(
    wanted: Float[NDArray[np.float64], " shell"], box: int
) -> Int[NDArray[np.int64], " counted"]:
    """Fewest shells, of those that no corner cuts, that have nearly all of the wanted variance.

    Of training data without noise, or that were low-passed, that is not most shells.
    """
    numbers, counts = _half_spectrum(box)
    variance = (wanted * np.bincount(numbers, counts))[1 : box // 2 + 1]
    order = np.argsort(-variance, kind="stable")
    sums = np.cumsum(variance[order])
    few = int(np.searchsorted(sums, COUNTED_VARIANCE * sums[-1])) + 1
    return order[:few] + 1


@lru_cache(maxsize=8)
def gain_per_frequency(
    gain: tuple[float, ...], box: int
) -> Float[NDArray[np.float32], "{box} {box} half"]:
    """Gain of each frequency of a real cube's half spectrum."""
    found: NDArray[np.float32] = np.asarray(gain, np.float32)[
        shell_numbers(box)[:, :, : box // 2 + 1]
    ]
    return found


def gain_at(
    gain: tuple[float, ...], radius: Float[NDArray[np.float64], "*shape"]
) -> Float[NDArray[np.float32], "*shape"]:
    """Gain of frequencies that lie between shells, and of volumes of other shapes.

    Parameters
    ----------
    gain
        Of each shell of cubes of some edge.
    radius
        Cycles per such edge. Up to 1 the gain is that of shell 1: what varies over more than the
        edge of a cube was not measured.
    """
    found: NDArray[np.float32] = np.interp(radius, np.arange(1, len(gain)), gain[1:]).astype(
        np.float32
    )
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
