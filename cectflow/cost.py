"""Cost: parameters, multiply-accumulates and measured throughput of networks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cectflow.model_card import Cost, ModelCard
from cectflow.networks import create_network, network_info
from cectflow.runtime import Infer, RuntimeName, load_runtime

__all__ = [
    "count_macs",
    "count_parameters",
    "measure_cost",
    "measure_throughputs",
    "widest_layer",
]

BATCH_SIZE = 16
REPEATS = 7
SECONDS_PER_REPEAT = 0.25


def count_parameters(network: nn.Module) -> int:
    """Count of the trained numbers."""
    return sum(parameter.numel() for parameter in network.parameters())


def count_macs(network: nn.Module, box: int) -> int:
    """Multiply-accumulate operations of one cube of this edge (convolutions and dense layers)."""
    device = next(network.parameters()).device
    was_training = network.training
    network.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 1, box, box, box, device=device))
    network.train(was_training)
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
    folders: Sequence[Path], *, runtime: RuntimeName = "onnxruntime", batch_size: int = BATCH_SIZE
) -> tuple[float, ...]:
    """Subtomograms per second of several model folders on the CPU, measured by turns.

    Every runtime gets as many threads as torch has.

    The networks take turns within each repeat, so that a machine that is slow for a while is
    slow for all; the median over repeats is returned, after a warm-up.

    Parameters
    ----------
    folders
        Model folders; each is measured at its own box.
    runtime
        The same for all.
    batch_size
        Cubes per call.
    """
    runners = [_runner(folder, runtime, batch_size) for folder in folders]
    counts = [_calls_per_repeat(infer, cubes) for infer, cubes in runners]
    rates: list[list[float]] = [[] for _ in runners]
    for _ in range(REPEATS):
        for (infer, cubes), count, found in zip(runners, counts, rates, strict=True):
            began = time.perf_counter()
            for _ in range(count):
                infer(cubes)
            found.append(count * batch_size / (time.perf_counter() - began))
    return tuple(float(np.median(found)) for found in rates)


def measure_cost(network: nn.Module, folder: Path) -> Cost:
    """Cost of a network and its model folder on this machine's CPU."""
    card = ModelCard.from_folder(folder)
    (rate,) = measure_throughputs([folder])
    return Cost(
        parameters=count_parameters(network),
        macs=count_macs(network, card.box),
        subtomograms_per_s=rate,
        batch_size=BATCH_SIZE,
        device="cpu",
        threads=torch.get_num_threads(),
    )


def _runner(
    folder: Path, runtime: RuntimeName, batch_size: int
) -> tuple[Infer, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
    box = ModelCard.from_folder(folder).box
    cubes = np.random.default_rng(0).normal(size=(batch_size, 1, box, box, box))
    infer = load_runtime(folder, runtime, threads=torch.get_num_threads())
    return infer, cubes.astype(np.float32)


def _calls_per_repeat(
    infer: Infer, cubes: np.ndarray[tuple[int, ...], np.dtype[np.float32]]
) -> int:
    """Count of the calls that take about a quarter of a second, after one to warm up."""
    infer(cubes)
    began = time.perf_counter()
    infer(cubes)
    return max(1, round(SECONDS_PER_REPEAT / max(time.perf_counter() - began, 1e-6)))
