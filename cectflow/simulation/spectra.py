"""Power spectra of an imaged field, shell by shell, beside what its recipe leads to expect."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from cectflow.simulation.field import SimulatedField, Specimen, field_optics, render_foreign
from cectflow.simulation.half_spectrum import power_spectrum
from cectflow.simulation.imaging import noise_scale

__all__ = ["FieldSpectra", "field_spectra", "shell_average"]


@dataclass(frozen=True, eq=False)
class FieldSpectra:
    """Power per shell of one imaged field, and what its recipe's optics lead to expect.

    White noise of variance v has the power v in every shell; shells run over all directions, the
    missing wedge included.

    Attributes
    ----------
    frequencies
        Of the shells, Å⁻¹, up to the Nyquist frequency.
    signal, noise
        Of the particles and of the noise in the reconstruction; noise is None where there is none.
    tomogram
        Of all that is in the field.
    others
        Of membranes and gold beads, which the SNR does not count; None where there are none.
    expected_signal, expected_noise
        The mean over the recipe's scenes under this field's optics.
    """

    frequencies: Float[NDArray[np.float64], " shell"]
    signal: Float[NDArray[np.float64], " shell"]
    noise: Float[NDArray[np.float64], " shell"] | None
    tomogram: Float[NDArray[np.float64], " shell"]
    others: Float[NDArray[np.float64], " shell"] | None
    expected_signal: Float[NDArray[np.float64], " shell"]
    expected_noise: Float[NDArray[np.float64], " shell"] | None


def shell_average(
    power: Float[Tensor, "z y kx"], *, width: int, voxel_size: float
) -> tuple[Float[NDArray[np.float64], " shell"], Float[NDArray[np.float64], " shell"]]:
    """Mean of a half power spectrum over each shell of the full one, k = 0 excluded.

    Parameters
    ----------
    power
        As :func:`~cectflow.simulation.half_spectrum.power_spectrum` gives it.
    width
        Voxels of the field along x.
    voxel_size
        In Å.

    Returns
    -------
    frequencies
        Å⁻¹, multiples of one over the field's longest edge, up to the Nyquist frequency.
    means
    """
    depth, height = power.shape[:2]
    kz, ky = np.fft.fftfreq(depth)[:, None, None], np.fft.fftfreq(height)[:, None]
    longest = max(depth, height, width)
    radius = np.sqrt(kz**2 + ky**2 + np.fft.rfftfreq(width) ** 2) * longest
    shell = np.round(radius).astype(np.int64)
    # All columns of the half spectrum stand for k and -k but these.
    weights = np.full(power.shape, 2.0)
    weights[..., 0] = 1.0
    if width % 2 == 0:
        weights[..., -1] = 1.0
    weights[0, 0, 0] = 0.0
    shells = np.arange(1, longest // 2 + 1)
    flat, count = shell.ravel(), np.bincount(shell.ravel(), weights.ravel())
    total = np.bincount(flat, (weights * power.cpu().numpy()).ravel())
    return shells / (longest * voxel_size), total[shells] / count[shells]


def field_spectra(specimen: Specimen, field: SimulatedField) -> FieldSpectra:
    """Spectra of a field; its noise is what the tomogram holds beside the imaged density."""
    recipe, snr = specimen.recipe, field.record.requested_snr
    optics = field_optics(specimen, field.draw)
    num_voxels, width = field.tomogram.numel(), recipe.field_shape[2]
    gain = optics.signal.abs() ** 2

    def shells(power: Tensor) -> NDArray[np.float64]:
        return shell_average(power / num_voxels, width=width, voxel_size=recipe.voxel_size)[1]

    density, tomogram = torch.from_numpy(field.density), field.tomogram
    imaged = torch.fft.irfftn(torch.fft.rfftn(density) * optics.signal, s=tomogram.shape)
    particles, others = density, None
    if field.scene.distractors:
        foreign = torch.from_numpy(render_foreign(specimen, field.scene)[0])
        particles, others = density - foreign, shells(power_spectrum(foreign) * gain)
    factor = noise_scale(specimen.expected_power, optics, snr, width=width)
    return FieldSpectra(
        frequencies=shell_average(gain, width=width, voxel_size=recipe.voxel_size)[0],
        signal=shells(power_spectrum(particles) * gain),
        noise=None if snr is None else shells(power_spectrum(tomogram - imaged)),
        tomogram=shells(power_spectrum(tomogram)),
        others=others,
        expected_signal=shells(specimen.expected_power * gain),
        expected_noise=None if snr is None else shells(num_voxels * (factor * optics.noise) ** 2),
    )
