"""Power per shell: of white noise, of a wave, and of a field's signal and noise."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from cectflow.simulation.field import Specimen, field_optics, prepare_specimen, simulate_field
from cectflow.simulation.half_spectrum import power_spectrum
from cectflow.simulation.recipe import SimulationRecipe
from cectflow.simulation.spectra import field_spectra, shell_average
from cectflow.simulation.structure import Structure

MakeRecipe = Callable[..., SimulationRecipe]
Phantom = Callable[[str], Structure]


@pytest.mark.parametrize("shape", [(32, 32, 32), (24, 40, 33), (17, 16, 48)])
def test_white_noise_has_its_variance_in_every_shell(shape: tuple[int, int, int]) -> None:
    volume = 3.0 * np.random.default_rng(0).standard_normal(shape)
    power = power_spectrum(torch.from_numpy(volume)) / volume.size
    frequencies, means = shell_average(power, width=shape[2], voxel_size=10.0)
    # The same by the full spectrum, every frequency on its own.
    full = np.abs(np.fft.fftn(volume)) ** 2 / volume.size
    k = np.stack(np.meshgrid(*(np.fft.fftfreq(n, 10.0) for n in shape), indexing="ij"))
    distance = np.rint(np.linalg.norm(k, axis=0) * 10.0 * max(shape))
    assert frequencies[-1] == pytest.approx(max(shape) // 2 / max(shape) / 10.0)
    for shell, (frequency, mean) in enumerate(zip(frequencies, means, strict=True), start=1):
        values = full[distance == shell]
        assert frequency == pytest.approx(shell / (max(shape) * 10.0))
        assert mean == pytest.approx(values.mean(), rel=1e-9)
        # Half of them are mirrors; the power of each is exponentially distributed.
        assert abs(mean - 9.0) < 4.5 * 9.0 / np.sqrt(len(values) / 2)


def test_a_wave_is_in_its_own_shell_alone() -> None:
    shape, amplitude = (24, 30, 36), 2.0
    y = np.arange(30)[:, None]
    volume = np.broadcast_to(amplitude * np.cos(2 * np.pi * 5 * y / 30), shape) + 7.0
    power = power_spectrum(torch.from_numpy(volume.copy())) / volume.size
    frequencies, means = shell_average(power, width=36, voxel_size=8.0)
    shell = int(np.argmin(np.abs(frequencies - 5 / (30 * 8.0))))
    assert means[shell] > 1.0
    # Neither elsewhere nor, though the mean is 7, at k = 0.
    assert np.delete(means, shell).max() < 1e-20 * means[shell]


def test_signal_and_noise_of_a_field_make_up_its_tomogram(specimen: Specimen) -> None:
    field = simulate_field(specimen, "train", 0)
    found = field_spectra(specimen, field)
    assert found.noise is not None
    assert found.expected_noise is not None
    assert found.others is None
    # They differ by twice the cross term, which is bounded (Cauchy and Schwarz).
    cross = np.abs(found.tomogram - found.signal - found.noise)
    assert (cross <= 2 * np.sqrt(found.signal * found.noise) * (1 + 1e-4)).all()
    assert cross.max() > 0
    # Most frequencies, in the outer shells, are noise alone and as strong as expected.
    outer = found.frequencies > 0.4 / specimen.recipe.voxel_size
    np.testing.assert_allclose(found.noise[outer] / found.expected_noise[outer], 1.0, atol=0.12)
    ratio = found.signal / found.expected_signal
    assert 0.6 < np.median(ratio) < 1.6
    # Power summed over all frequencies is the variance, and nearly all signal is within Nyquist.
    edge = specimen.recipe.field_shape[0]
    shells = np.arange(1, edge // 2 + 1)
    counts = 4 * np.pi * (shells**2 + 1 / 12)
    optics = field_optics(specimen, field.draw)
    imaged = torch.fft.rfftn(torch.from_numpy(field.density)) * optics.signal
    signal = torch.fft.irfftn(imaged, s=field.density.shape).numpy()
    assert (counts * found.signal).sum() / edge**3 == pytest.approx(signal.var(), rel=0.1)


def test_membranes_and_gold_are_not_counted_as_signal(
    make_recipe: MakeRecipe, phantom: Phantom
) -> None:
    specimen = prepare_specimen(
        make_recipe(distractors={"gold": 2, "gold_diameter": (80.0, 100.0)}, occupancy=0.05),
        [phantom("rod")],
    )
    index = next(i for i in range(20) if simulate_field(specimen, "train", i).scene.distractors)
    found = field_spectra(specimen, simulate_field(specimen, "train", index))
    assert found.others is not None
    band = found.frequencies < 0.25 / specimen.recipe.voxel_size
    assert found.others[band].sum() > 3 * found.signal[band].sum()
    assert 0.4 < np.median(found.signal / found.expected_signal) < 2.5


def test_without_noise_there_is_none(make_recipe: MakeRecipe, phantom: Phantom) -> None:
    specimen = prepare_specimen(make_recipe(snr=None), [phantom("rod")])
    found = field_spectra(specimen, simulate_field(specimen, "train", 0))
    assert found.noise is None
    assert found.expected_noise is None
    np.testing.assert_allclose(found.tomogram, found.signal, rtol=1e-3)
