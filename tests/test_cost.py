"""Costs are counted as on paper and measured as stated."""

from __future__ import annotations

import pytest
import torch
from builders import BOX, Exported
from torch import nn

from cectflow.cost import (
    count_macs,
    count_parameters,
    count_program,
    measure_cost,
    measure_throughputs,
    measure_timings,
)
from cectflow.execution import single_thread
from cectflow.runtime import RUNTIMES, RuntimeName
from cectflow.timing import Candidate

pytest_plugins = ("exported",)


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cectflow.cost.SECONDS_PER_REPEAT", 0.005)
    monkeypatch.setattr("cectflow.cost.REPEATS", 3)
    monkeypatch.setattr("cectflow.cost.SECONDS_PER_COST", 0.01)


@pytest.mark.parametrize(
    ("network", "parameters", "macs"),
    [
        (nn.Conv3d(1, 4, 3, padding=1), 4 * 27 + 4, 8**3 * 27 * 4),
        (nn.Conv3d(1, 4, 3, stride=2, padding=1, bias=False), 4 * 27, 4**3 * 27 * 4),
        (nn.Conv3d(1, 4, 1), 8, 8**3 * 4),
        (nn.Sequential(nn.Flatten(), nn.Linear(512, 10)), 5130, 5120),
        (nn.Sequential(nn.Conv3d(1, 2, 1), nn.BatchNorm3d(2), nn.ReLU()), 8, 8**3 * 2),
    ],
    ids=["padded", "strided", "pointwise", "dense", "normed"],
)
def test_parameters_and_macs_are_those_on_paper(
    network: nn.Module, parameters: int, macs: int
) -> None:
    assert count_parameters(network) == parameters
    assert count_macs(network, 8) == macs


def test_an_exported_program_counts_as_its_network(exported: Exported) -> None:
    network = exported.network
    assert count_program(exported.folder) == (count_parameters(network), count_macs(network, BOX))


@pytest.mark.usefixtures("_quick")
def test_timings_name_device_and_runtime_and_have_quartiles(exported: Exported) -> None:
    candidates = [Candidate(folder=exported.folder, runtime=name) for name in ("torch", "openvino")]
    timings = measure_timings(candidates, batch_size=2)
    assert [(each.device, each.runtime) for each in timings] == [
        ("cpu", "torch"),
        ("cpu", "openvino"),
    ]
    for each in timings:
        assert each.latency_ms_low <= each.latency_ms <= each.latency_ms_high
        assert each.subtomograms_per_s == pytest.approx(2e3 / each.latency_ms)


def test_counting_leaves_the_network_as_it_was() -> None:
    network = nn.Sequential(nn.Conv3d(1, 2, 1), nn.BatchNorm3d(2))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    count_macs(network, 8)
    assert network.training
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    network.eval()
    count_macs(network, 8)
    assert not network.training


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_throughput_is_positive_and_one_per_folder(
    exported: Exported, runtime: RuntimeName
) -> None:
    candidate = Candidate(folder=exported.folder, runtime=runtime)
    rates = measure_throughputs([candidate] * 2, batch_size=2)
    assert len(rates) == 2
    assert all(rate > 0 for rate in rates)


@pytest.mark.usefixtures("_quick")
def test_the_cost_names_device_batch_and_threads(exported: Exported) -> None:
    with single_thread():
        cost = measure_cost(exported.network, exported.folder)
    assert cost.parameters == 4 * 28 + 4 * (BOX // 4) ** 3 * 2 + 2
    assert cost.macs == BOX**3 * 27 * 4 + 4 * (BOX // 4) ** 3 * 2
    assert cost.subtomograms_per_s > 0
    assert (cost.device, cost.batch_size, cost.threads) == ("cpu", 16, 1)
    assert [(t.runtime, t.batch_size) for t in cost.timings] == [
        (runtime, batch) for runtime in RUNTIMES for batch in (1, 8, 64)
    ]
    assert {(t.variant, t.device, t.threads) for t in cost.timings} == {("float32", "cpu", 1)}
    assert cost.weights_bytes == {
        name: (exported.folder / name).stat().st_size for name in ("model.pt2", "model.onnx")
    }


@pytest.mark.usefixtures("_quick")
def test_batches_that_would_take_long_are_left_out(
    exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cectflow.cost.LONGEST_TIMING", 0.0)
    cost = measure_cost(exported.network, exported.folder)
    assert [(t.runtime, t.batch_size) for t in cost.timings] == [(r, 1) for r in RUNTIMES]


@pytest.mark.usefixtures("_quick")
def test_onnxruntime_gets_the_threads_that_the_cost_names(
    exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    asked = []
    session = onnxruntime.InferenceSession

    def spy(path: str, options: onnxruntime.SessionOptions, **rest: object) -> object:
        asked.append(options.intra_op_num_threads)
        return session(path, options, **rest)

    monkeypatch.setattr(onnxruntime, "InferenceSession", spy)
    with single_thread():
        measure_cost(exported.network, exported.folder)
    assert asked == [1]
