"""Fields are imaged, measured and cut on the specimen's device, without copies through the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from cectflow.simulation import statistics
from cectflow.simulation.distractors import Distractors
from cectflow.simulation.extraction import _gather, cut_cubes, simulate_subtomograms
from cectflow.simulation.field import (
    Specimen,
    draw_field,
    image_rendered,
    prepare_specimen,
    render_drawn,
)
from cectflow.simulation.microscope import Microscope, TiltScheme
from cectflow.simulation.optics import SnrStage, optics_of
from cectflow.simulation.recipe import SimulationRecipe
from cectflow.simulation.structure import Structure
from cectflow.subtomogram import cut

Phantom = Callable[[str], Structure]
MakeRecipe = Callable[..., SimulationRecipe]


@pytest.fixture(scope="module")
def specimen(make_recipe: MakeRecipe, phantom: Phantom) -> Specimen:
    recipe = make_recipe(
        distractors=Distractors(gold=3.0),
        tilts=TiltScheme(alignment_jitter=1.0),
        microscope=Microscope(defocus_um=(3.0, 5.0)),
    )
    return prepare_specimen(recipe, [phantom("ring")])


def test_a_specimen_goes_to_a_device_and_its_filters_follow(specimen: Specimen) -> None:
    assert specimen.to("cpu").expected_power is specimen.expected_power
    on_meta = specimen.to("meta")
    assert on_meta.device == torch.device("meta")
    assert on_meta.recipe_digest == specimen.recipe_digest


@pytest.mark.parametrize("snr_stage", ["reconstruction", "projection", "aitom"])
@pytest.mark.parametrize("jitter", [0.0, 2.0])
def test_all_filters_are_made_on_the_device_asked_for(snr_stage: SnrStage, jitter: float) -> None:
    """The device meta holds no values: one that came from, or went to, the host is refused."""
    optics = optics_of(
        (16, 16, 24), 10.0, Microscope(), TiltScheme(), 4.0, "none",
        shifts=((jitter, jitter),) * 41, snr_stage=snr_stage, device="meta",
    )  # fmt: skip
    tensors = (optics.signal, optics.noise, *(optics.at_stage or ()))
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert all(tensor.shape == (16, 16, 13) for tensor in tensors)


def test_a_field_is_copied_once_and_stays(
    specimen: Specimen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One upload of each density; whatever reads a tensor on the host is noticed."""
    rendered = render_drawn(specimen, draw_field(specimen, "train", 0))
    image_rendered(specimen, rendered)  # makes the filters that are kept
    assert rendered.foreign is not None
    centres = np.array([[1.0, 2.0, 3.0], [30.0, 31.0, 0.0]])
    # Only of a CPU's values the median is taken without torch.
    monkeypatch.setattr(statistics, "_median", lambda values: float(values.median()))
    read: list[str] = []
    uploads: list[int] = []
    for name in ("cpu", "numpy", "tolist"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_, name=name: read.append(name))
    original = torch.from_numpy

    def upload(values: Any) -> torch.Tensor:
        uploads.append(values.size)
        return original(values)

    monkeypatch.setattr(torch, "from_numpy", upload)
    tomogram, _ = image_rendered(specimen, rendered)
    cubes = _gather(tomogram.half(), centres, specimen.recipe.box)
    assert not read
    assert uploads == [rendered.density.size, rendered.density.size, centres.size]
    assert cubes.device == tomogram.device


def test_cubes_gathered_on_a_device_are_those_cut_on_the_host() -> None:
    volume = torch.randn((20, 24, 28), generator=torch.Generator().manual_seed(0)).half()
    centres = np.random.default_rng(0).integers(-30, 60, (12, 3)).astype(np.float64)
    expected = cut(volume.numpy(), centres, 16, periodic=True)
    np.testing.assert_array_equal(_gather(volume, centres, 16), expected)
    np.testing.assert_array_equal(cut_cubes(volume.float(), centres, 16), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_makes_the_field_of_the_cpu_but_for_its_noise(
    specimen: Specimen, phantom: Phantom
) -> None:
    quiet = specimen.recipe.model_copy(update={"snr": None})
    host = prepare_specimen(quiet, [phantom("ring")])
    on_host, on_device = (
        simulate_subtomograms(one, "train", 0)[0].cubes.astype(np.float32)
        for one in (host, host.to("cuda"))
    )
    np.testing.assert_allclose(on_device, on_host, atol=1e-2 * on_host.std())
