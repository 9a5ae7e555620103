"""The network inside sees zero mean and unit variance, whatever the cube's units."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cectflow.networks.normalisation import NormalisePerCube


def cubes(num: int = 3) -> Tensor:
    return torch.randn(num, 1, 6, 7, 8, generator=torch.Generator().manual_seed(0))


def seen(subtomograms: Tensor) -> Tensor:
    """What the network inside receives."""
    return NormalisePerCube(nn.Identity())(subtomograms)


def test_each_cube_has_zero_mean_and_unit_variance() -> None:
    scale = torch.tensor([1.0, 30.0, 0.01]).reshape(3, 1, 1, 1, 1)
    inside = seen(scale * cubes() + 5 * scale)
    for cube in inside:
        assert cube.mean().item() == pytest.approx(0, abs=1e-5)
        assert cube.var(correction=0).item() == pytest.approx(1, abs=1e-4)


@settings(max_examples=30, deadline=None)
@given(
    exponent=st.integers(-12, 8),
    offset=st.floats(-100, 100),
)
def test_scale_and_offset_change_nothing(exponent: int, offset: float) -> None:
    # The offset is in deviations of the cube.
    scaled = 10.0**exponent * (cubes() + offset)
    torch.testing.assert_close(seen(scaled), seen(cubes()), rtol=1e-3, atol=1e-3)


def test_the_sign_is_kept() -> None:
    torch.testing.assert_close(seen(-cubes()), -seen(cubes()))


def test_cubes_do_not_mix() -> None:
    together = seen(torch.cat([cubes(1), 1000 * cubes(2)[1:]]))
    torch.testing.assert_close(together[:1], seen(cubes(1)))


@pytest.mark.parametrize("value", [0.0, 0.1, -1000.1, 1e-9, 3e7])
def test_a_constant_cube_comes_out_near_zero(value: float) -> None:
    assert seen(torch.full((2, 1, 5, 5, 5), value)).abs().max() < 0.2


def test_a_constant_cube_does_not_poison_the_gradient() -> None:
    weight = nn.Conv3d(1, 1, 1)
    constant = torch.cat([torch.zeros(1, 1, 5, 5, 5), torch.full((1, 1, 5, 5, 5), 7.3)])
    NormalisePerCube(weight)(constant).square().sum().backward()
    assert weight.weight.grad is not None
    assert torch.isfinite(weight.weight.grad).all()
