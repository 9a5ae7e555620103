"""The contract of every network in the catalogue, and the catalogue's own errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cectflow.networks import create_network, list_networks, network_info
from cectflow.networks.catalogue import register_network

EVERY_NETWORK = pytest.mark.parametrize("name", list_networks())

PUBLISHED_PARAMETERS = {
    "dsrf3d_v2": 18_315_574,
    "student_1": 1_013_046,
    "student_2": 505_014,
    "student_3": 160_614,
    "ssn3d": 2_042_342,
    "ssn3d_ed": 895_746,
}
DERIVED_PARAMETERS = {
    "rb3d": 27 * 32 + 32
    + 4 * (27 * 32 * 16 + 16 + 32 * 16 + 16 + 27 * 16 * 32 + 32 + 32 * 16 + 16)
    + 32 * 20**3 * 1024 + 1024 + 1024 * 1024 + 1024 + 1024 * 22 + 22,
    "cb3d": 27 * (64 + 64 * 128 + 128 * 256 + 256 * 256 + 256 * 512 + 3 * 512 * 512)
    + 64 + 128 + 2 * 256 + 4 * 512
    + 512 * 2**3 * 4096 + 4096 + 4096 * 4096 + 4096 + 4096 * 22 + 22,
}  # fmt: skip
"""Written out from the authors' code, for 22 classes at 40³."""
FULL, HALF, QUARTER, EIGHTH = 40**3, 20**3, 10**3, 5**3
"""Voxels of each level of a cube of 40³."""
ENCODER = (
    27 * (32 + 32 * 32) * FULL,
    27 * (32 * 64 + 64 * 64) * HALF,
    27 * (64 * 128 + 128 * 128) * QUARTER,
)
DERIVED_MACS = {
    "ssn3d": sum(ENCODER)
    + (128 * 1024 + 1024 * 1024 + 1024 * 2) * EIGHTH
    + 64 * 2 * QUARTER
    + 32 * 2 * HALF,
    "ssn3d_ed": sum(ENCODER)
    + 128 * 128 * EIGHTH
    + (64 * 128 + 128 * 64) * QUARTER
    + (32 * 64 + 64 * 32 + 32 * 2) * HALF,
    "ssn3d_aspp": sum(ENCODER[:2])
    + (27 * 64 * 128 + 128 * 128 + 2 * 27 * 128 * 128 + 4 * 128 * 2) * QUARTER,
    "rb3d": 27 * 32 * FULL
    + 4 * (27 * 32 * 16 + 32 * 16 + 27 * 16 * 32 + 32 * 16) * HALF
    + 32 * HALF * 1024
    + 1024 * 1024
    + 1024 * 2,
    "cb3d": 27 * 64 * FULL
    + 27 * 64 * 128 * 40 * 20 * 20
    + 27 * (128 * 256 + 256 * 256) * 20 * 10 * 10
    + 27 * (256 * 512 + 512 * 512) * 10 * 5 * 5
    + 27 * 2 * 512 * 512 * 5 * 2 * 2
    + 2 * 4096 * 4096
    + 4096 * 2,
}
"""Written out from the authors' code; the scores are computed before the last upsampling."""


def small_network(name: str, num_outputs: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return create_network(name, num_outputs=num_outputs, box=network_info(name).min_box)


def small_cubes(name: str, number: int) -> Tensor:
    box = network_info(name).min_box
    return torch.randn(number, 1, box, box, box, generator=torch.Generator().manual_seed(1))


def count_parameters(name: str, num_outputs: int, box: int = 40) -> int:
    with torch.device("meta"):
        network = create_network(name, num_outputs=num_outputs, box=box)
    return sum(parameter.numel() for parameter in network.parameters())


def count_macs(name: str, num_outputs: int, box: int = 40) -> int:
    """Multiply-accumulate operations of convolutions and dense layers for one cube."""
    total = 0

    def add(layer: nn.Module, _: object, output: Tensor) -> None:
        nonlocal total
        voxels = output[0, 0].numel()
        total += voxels * next(layer.parameters()).numel()  # the weight comes before the bias

    with torch.device("meta"):
        network = create_network(name, num_outputs=num_outputs, box=box).eval()
        for layer in network.modules():
            if isinstance(layer, nn.Conv3d | nn.Linear):
                layer.register_forward_hook(add)
        network(torch.empty(1, 1, box, box, box))
    return total


@EVERY_NETWORK
def test_a_network_returns_one_logit_per_output(name: str) -> None:
    cubes = small_cubes(name, 2)
    logits = small_network(name).eval()(cubes)
    space = tuple(cubes.shape[2:]) if network_info(name).task == "segment" else ()
    assert logits.shape == (2, 3, *space)
    assert logits.isfinite().all()
    assert not torch.allclose(logits.sum(dim=1), torch.ones(()))  # no softmax inside


@EVERY_NETWORK
def test_every_parameter_gets_a_finite_gradient(name: str) -> None:
    network = small_network(name).train()
    network(small_cubes(name, 4)).square().sum().backward()
    for parameter_name, parameter in network.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.any(), parameter_name


@EVERY_NETWORK
def test_a_batch_of_one_can_be_trained_on(name: str) -> None:
    assert small_network(name).train()(small_cubes(name, 1)).isfinite().all()


@EVERY_NETWORK
def test_training_starts_near_even_odds(name: str) -> None:
    # Glorot's weights after dropout and batch norm lead to 1.8, all others to less than 1; He's
    # without batch norm to 4 to 6 even before dropout, and the papers' SGD kills such networks.
    assert small_network(name).train()(small_cubes(name, 4)).square().mean().sqrt() < 3


@EVERY_NETWORK
def test_logits_of_a_cube_do_not_depend_on_its_batch(name: str) -> None:
    network, cubes = small_network(name).eval(), small_cubes(name, 3)
    with torch.no_grad():
        together = network(cubes)
        for index in range(3):
            torch.testing.assert_close(
                network(cubes[index : index + 1]), together[index : index + 1], atol=1e-5, rtol=1e-5
            )


@EVERY_NETWORK
def test_weights_come_back_identical_from_a_state_dict(name: str) -> None:
    network, cubes = small_network(name).eval(), small_cubes(name, 1)
    torch.manual_seed(99)
    other = create_network(name, num_outputs=3, box=network_info(name).min_box).eval()
    other.load_state_dict(network.state_dict())
    with torch.no_grad():
        assert torch.equal(other(cubes), network(cubes))


@EVERY_NETWORK
def test_the_exported_network_gives_the_same_logits_for_any_batch(name: str) -> None:
    network = small_network(name).eval()
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(
        network, (small_cubes(name, 2),), dynamic_shapes=(batch,), strict=False
    )
    exported = program.module()
    with torch.no_grad():
        for number in (1, 3):
            cubes = small_cubes(name, number)
            torch.testing.assert_close(exported(cubes), network(cubes), atol=1e-5, rtol=1e-5)


@EVERY_NETWORK
def test_a_box_below_the_minimum_is_refused(name: str) -> None:
    smallest = network_info(name).min_box
    with pytest.raises(ValueError, match=rf"{smallest - 1}³; {name} needs at least {smallest}³"):
        create_network(name, num_outputs=2, box=smallest - 1)


@EVERY_NETWORK
def test_every_network_is_described(name: str) -> None:
    info = network_info(name)
    assert info.name == name
    assert info.summary.endswith(".")
    assert info.paper
    assert info.task == "segment" or info.stride == 1


@pytest.mark.parametrize(
    ("name", "parameters"), (PUBLISHED_PARAMETERS | DERIVED_PARAMETERS).items()
)
def test_parameters_are_those_of_the_papers(name: str, parameters: int) -> None:
    num_outputs = 2 if network_info(name).task == "segment" else 22
    assert count_parameters(name, num_outputs) == parameters


@pytest.mark.parametrize(
    ("name", "gigamacs"),
    [("dsrf3d_v2", 3.83), ("student_1", 2.23), ("student_2", 2.20), ("student_3", 0.565)],
)
def test_multiplications_are_those_of_the_papers(name: str, gigamacs: float) -> None:
    assert count_macs(name, 22) / 1e9 == pytest.approx(gigamacs, abs=0.005)


@pytest.mark.parametrize(("name", "macs"), DERIVED_MACS.items())
def test_multiplications_are_those_of_the_anatomy(name: str, macs: int) -> None:
    assert count_macs(name, 2) == macs


@pytest.mark.parametrize(
    ("name", "most_parameters", "published", "times_cheaper"),
    [
        ("strided_nano", 40_000, "dsrf3d_v2", 100),
        ("strided_micro", 150_000, "dsrf3d_v2", 40),
        ("strided_small", 900_000, "dsrf3d_v2", 15),
        ("residual_teacher", 5_000_000, "dsrf3d_v2", 1),
        ("strided_ed_small", 250_000, "ssn3d_ed", 9),
        ("strided_ed_base", 300_000, "ssn3d_ed", 4),
        ("strided_ed_large", 1_100_000, "ssn3d_ed", 1),
    ],
)
def test_our_networks_are_small_and_cheap(
    name: str, most_parameters: int, published: str, times_cheaper: int
) -> None:
    num_outputs = 2 if network_info(name).task == "segment" else 22
    assert count_parameters(name, num_outputs) <= most_parameters
    assert times_cheaper * count_macs(name, num_outputs) < count_macs(published, num_outputs)


def test_a_list_of_one_task_holds_only_that_task() -> None:
    assert "ssn3d" in list_networks("segment")
    assert "ssn3d" not in list_networks("classify")
    assert sorted(list_networks("segment") + list_networks("classify")) == list(list_networks())


def test_an_unknown_task_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown task 'denoise': expected one of classify, seg"):
        list_networks("denoise")


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown network 'resnet': .*dsrf3d_v2, .*ssn3d, "):
        create_network("resnet", num_outputs=2, box=40)


def test_an_unknown_argument_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="ssn3d has no argument depth: expected dropout, skips"):
        create_network("ssn3d", num_outputs=2, box=8, depth=3)
    with pytest.raises(ValueError, match="ssn3d_ed has no argument depth: expected none"):
        create_network("ssn3d_ed", num_outputs=2, box=8, depth=3)


def test_one_output_is_refused() -> None:
    with pytest.raises(ValueError, match="asked for 1 outputs; expected at least 2"):
        create_network("ssn3d", num_outputs=1, box=8)


def test_a_name_is_registered_once() -> None:
    def ssn3d(num_outputs: int, box: int) -> nn.Module:
        raise AssertionError

    with pytest.raises(ValueError, match="'ssn3d' is registered already"):
        register_network(task="segment", stride=8, min_box=8, reach=1, paper="none")(ssn3d)


def test_a_segmenter_states_its_reach() -> None:
    def blind(num_outputs: int, box: int) -> nn.Module:
        raise AssertionError

    with pytest.raises(ValueError, match="'blind' states no reach"):
        register_network(task="segment", stride=8, min_box=8, paper="none")(blind)
    assert all(network_info(name).reach is None for name in list_networks("classify"))
