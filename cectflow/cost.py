"""Cost: parameters, multiply-accumulates and measured throughput of networks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cectflow.model_card import Cost, ModelCard, Timing
from cectflow.networks import create_network, network_info
from cectflow.runtime import INT8_FILE, ONNX_FILE, PT2_FILE, RUNTIMES, Infer, load_program
from cectflow.timing import (
    MIN_CALLS,
    WARM_UP_CALLS,
    Candidate,
    list_candidates,
    make_cubes,
    time_here,
)

__all__ = [
    "count_macs",
    "count_parameters",
    "count_program",
    "measure_cost",
    "measure_throughputs",
    "measure_timings",
    "weigh_files",
    "widest_layer",
]

BATCH_SIZE = 16
REPEATS = 7
SECONDS_PER_REPEAT = 0.25
SECONDS_PER_COST = 1.0
BATCH_SIZES = (1, 8, 64)
SECONDS_PER_TIMING = 0.1
LONGEST_TIMING = 3.0
"""Seconds above which a batch of a slow network is left out of its card."""


def count_parameters(network: nn.Module) -> int:
    """Count of the trained numbers."""
    return sum(parameter.numel() for parameter in network.parameters())


def count_macs(network: nn.Module, box: int) -> int:
    """Multiply-accumulate operations of one cube of this edge (convolutions and dense layers)."""
    was_training = network.training
    network.eval()
    macs = _count_macs(network, box)
    network.train(was_training)
    return macs


def count_program(folder: Path) -> tuple[int, int]:
    """Parameters and multiply-accumulates of one cube of a model folder's exported program.

    Its batch norms are part of its convolutions, so a network that has some counts a few
    parameters more before it is exported.

    Parameters
    ----------
    folder
        A model folder.

    Raises
    ------
    FileNotFoundError
        If it lacks the program.
    """
    program = load_program(folder)
    return count_parameters(program), _count_macs(program, ModelCard.from_folder(folder).box)


def _count_macs(network: nn.Module, box: int) -> int:
    device = next((each.device for each in network.parameters()), torch.device("cpu"))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 1, box, box, box, device=device))
    flops: int = counter.get_total_flops()
    return flops // 2


def widest_layer(name: str) -> float:
    """Numbers that the widest layer inside a segmenter holds for each voxel of its input.

    Times four bytes and the voxels it is the memory of one layer; nothing is computed.

    Parameters
    ----------
    name
        Of the catalogue.
    """
    box = 4 * network_info(name).stride
    sizes: list[int] = []

    def note(_: nn.Module, __: object, output: torch.Tensor) -> None:
        sizes.append(output.numel())

    with torch.device("meta"):
        network = create_network(name, num_outputs=2, box=box).eval()
        for layer in network.modules():
            if isinstance(layer, nn.Conv3d):
                layer.register_forward_hook(note)
        with torch.no_grad():
            network(torch.zeros(1, 1, box, box, box))
    return max(sizes) / box**3


def measure_throughputs(
    candidates: Sequence[Candidate], *, batch_size: int = BATCH_SIZE
) -> tuple[float, ...]:
    """Subtomograms per second of several candidates; see :func:`measure_timings`."""
    timings = measure_timings(candidates, batch_size=batch_size)
    return tuple(timing.subtomograms_per_s for timing in timings)


def measure_timings(
    candidates: Sequence[Candidate], *, batch_size: int = BATCH_SIZE
) -> tuple[Timing, ...]:
    """Timings of several candidates, measured by turns.

    Every runtime gets as many threads as torch has.

    The candidates take turns within each repeat, so that a machine that is slow for a while is
    slow for all; median and quartiles are over repeats, after a warm-up.

    Parameters
    ----------
    candidates
        Model folders, each with its runtime and variant; each is measured at its own box.
    batch_size
        Cubes per call.
    """
    threads = torch.get_num_threads()
    runners = [(c.load(threads), make_cubes(c.folder, batch_size)) for c in candidates]
    counts = [_calls_per_repeat(infer, cubes) for infer, cubes in runners]
    latencies: list[list[float]] = [[] for _ in runners]
    for _ in range(REPEATS):
        for (infer, cubes), count, found in zip(runners, counts, latencies, strict=True):
            began = time.perf_counter()
            for _ in range(count):
                infer(cubes)
            found.append((time.perf_counter() - began) / count)
    timings = []
    for candidate, count, found in zip(candidates, counts, latencies, strict=True):
        low, median, high = np.quantile(found, [0.25, 0.5, 0.75])
        timings.append(
            Timing(
                runtime=candidate.runtime,
                variant=candidate.variant,
                device=candidate.device,
                threads=threads,
                batch_size=batch_size,
                calls=count * REPEATS,
                latency_ms=1e3 * median,
                latency_ms_low=1e3 * low,
                latency_ms_high=1e3 * high,
                subtomograms_per_s=batch_size / median,
            )
        )
    return tuple(timings)


def measure_cost(network: nn.Module, folder: Path) -> Cost:
    """Cost of a network and its model folder on this machine's CPU, in a few seconds.

    Latencies are float32's, of every runtime that is installed, in this process, for batches of 1,
    8 and 64; batches that would take longer than :data:`LONGEST_TIMING` are left out. The whole
    table, with variants and peak memories, is `cectflow evaluate cost`'s.
    """
    card = ModelCard.from_folder(folder)
    threads = torch.get_num_threads()
    timings: list[Timing] = []
    for candidate in list_candidates(folder, RUNTIMES, ("float32",)):
        infer = candidate.load(threads)
        if candidate.runtime == "onnxruntime":
            common = time_here(infer, candidate, BATCH_SIZE, threads, seconds=SECONDS_PER_COST)
        expected = 0.0  # seconds of a timing, for each cube of its batch
        for batch_size in BATCH_SIZES:
            if expected * batch_size <= LONGEST_TIMING:
                found = time_here(infer, candidate, batch_size, threads, seconds=SECONDS_PER_TIMING)
                timings.append(found)
                expected = (MIN_CALLS + WARM_UP_CALLS) / found.subtomograms_per_s
    return Cost(
        parameters=count_parameters(network),
        macs=count_macs(network, card.box),
        subtomograms_per_s=common.subtomograms_per_s,
        batch_size=BATCH_SIZE,
        device=common.device,
        threads=threads,
        weights_bytes=weigh_files(folder),
        timings=tuple(timings),
    )


def weigh_files(folder: Path) -> dict[str, int]:
    """Bytes of each file of weights in a model folder."""
    paths = [folder / name for name in (PT2_FILE, ONNX_FILE, INT8_FILE)]
    return {path.name: path.stat().st_size for path in paths if path.is_file()}


def _calls_per_repeat(
    infer: Infer, cubes: np.ndarray[tuple[int, ...], np.dtype[np.float32]]
) -> int:
    """Count of the calls that take about a quarter of a second, after one to warm up."""
    infer(cubes)
    began = time.perf_counter()
    infer(cubes)
    return max(1, round(SECONDS_PER_REPEAT / max(time.perf_counter() - began, 1e-6)))
