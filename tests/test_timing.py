"""A timing says what it measured, and a process of its own says how much memory that took."""

from __future__ import annotations

from pathlib import Path

import pytest
from builders import Exported

from cectflow.timing import Candidate, list_candidates, make_cubes, own_peak, time_alone, time_here

pytest_plugins = ("exported",)


def test_a_timing_names_what_was_run_and_its_quartiles_are_in_order(exported: Exported) -> None:
    candidate = Candidate(folder=exported.folder)
    timing = time_here(candidate.load(1), candidate, 3, 1, seconds=0.0)
    assert (timing.runtime, timing.variant, timing.device) == ("onnxruntime", "float32", "cpu")
    assert (timing.threads, timing.batch_size, timing.calls) == (1, 3, 5)
    assert 0 < timing.latency_ms_low <= timing.latency_ms <= timing.latency_ms_high
    assert timing.subtomograms_per_s == pytest.approx(3e3 / timing.latency_ms)
    assert timing.peak_memory_mb is None


def test_a_process_of_its_own_does_without_torch_and_tells_its_memory(exported: Exported) -> None:
    light = time_alone(Candidate(folder=exported.folder), 2, 1, seconds=0.0)
    heavy = time_alone(Candidate(folder=exported.folder, runtime="torch"), 2, 1, seconds=0.0)
    assert light.peak_memory_mb is not None
    assert heavy.peak_memory_mb is not None
    assert heavy.peak_memory_mb > light.peak_memory_mb + 50


def test_what_the_process_said_is_told_when_it_fails(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"could not be timed: .*holds no model\.onnx"):
        time_alone(Candidate(folder=tmp_path), 1, 1)


def test_only_what_folder_and_runtimes_have_is_listed(exported: Exported) -> None:
    found = list_candidates(
        exported.folder, ("torch", "onnxruntime", "openvino"), ("float32", "int8")
    )
    assert [(c.runtime, c.variant) for c in found] == [
        ("torch", "float32"), ("onnxruntime", "float32"), ("openvino", "float32"),
    ]  # fmt: skip


def test_cubes_are_the_same_every_time(exported: Exported) -> None:
    assert (make_cubes(exported.folder, 2) == make_cubes(exported.folder, 2)).all()


def test_the_own_peak_is_that_of_a_process_with_libraries() -> None:
    assert 0.01 < own_peak() < 100
