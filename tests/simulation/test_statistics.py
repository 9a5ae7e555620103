"""Statistics of a field are those of numpy, for any values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cectflow.simulation.statistics import ROBUST_SAMPLE, measure_statistics
from cectflow.subtomogram import robust_statistics

VALUES = st.floats(-1e6, 1e6, width=32) | st.sampled_from([0.0, -0.0, 1e-42, -1e-42, 3.0, -3.0])


@settings(deadline=None)  # numba compiles in the first
@given(arrays(np.float32, st.tuples(st.just(3), st.just(5), st.sampled_from([1, 3, 7])),
              elements=VALUES))  # fmt: skip
def test_median_and_deviation_are_those_of_numpy(values: np.ndarray) -> None:
    found = measure_statistics(torch.from_numpy(values))
    median, deviation = robust_statistics(values)
    assert found.median == median
    assert found.robust_std == pytest.approx(deviation, abs=1e-40)


@pytest.mark.parametrize("offset", [0.0, -1000.0])
def test_mean_and_deviation_are_those_of_numpy(offset: float) -> None:
    values = np.random.default_rng(0).normal(offset, 2.0, (32, 48, 64)).astype(np.float32)
    found = measure_statistics(torch.from_numpy(values))
    assert found.mean == pytest.approx(values.mean(dtype=np.float64), rel=1e-6, abs=1e-6)
    assert found.std == pytest.approx(values.std(dtype=np.float64), rel=1e-5)


def test_a_large_field_is_sampled_throughout() -> None:
    generator = torch.Generator().manual_seed(0)
    ramp = torch.arange(80.0)[:, None, None] + 0.01 * torch.arange(128)  # along z and along x
    field = ramp + torch.randn((80, 128, 128), generator=generator)
    assert field.numel() > 4 * ROBUST_SAMPLE
    found, (median, deviation) = measure_statistics(field), robust_statistics(field.numpy())
    assert found.median == pytest.approx(median, abs=0.005 * deviation)
    assert found.robust_std == pytest.approx(deviation, rel=0.005)
