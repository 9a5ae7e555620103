"""The contract of a model card, enforced: what input must be, and how it is brought there."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Shaped
from numpy.typing import NDArray

from cectflow.execution import Workplace, count_cores
from cectflow.model_card import Contrast, Masking, ModelCard, Variant
from cectflow.runtime import (
    Infer,
    RuntimeName,
    choose_device,
    choose_runtime,
    has_openvino,
    load_runtime,
    load_torch,
)
from cectflow.subtomogram import rescale

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "InputOptions",
    "LoadedNetwork",
    "NetworkFiles",
    "bring_to_card",
    "check_network",
    "load_network",
    "open_network",
    "open_once",
    "report_changes",
    "report_correction",
    "require_rescale",
    "same_voxel_size",
    "share_threads",
    "source_box",
]

LARGEST_PARITY = 0.001
"""Difference of logits between runtimes up to which they are one network, as policies ask for."""
VOXEL_TOLERANCE = 0.01
"""Relative difference of voxel sizes that still counts as equal."""


@dataclass(frozen=True)
class InputOptions:
    """What the user says of the input, and how to run.

    Attributes
    ----------
    voxel_size
        Å; overrides the files' headers.
    contrast
        Of the input: ``dark`` means protein darker than its surroundings.
    rescale
        Bring another voxel size or a larger box to the card's, by Fourier resampling and a
        centred crop.
    device
        ``auto``, ``cpu`` or ``cuda``.
    batch_size
        Cubes at a time.
    overwrite
        Replace existing output.
    runtime
        ``auto``, ``torch``, ``onnxruntime`` or ``openvino``.
    variant
        What the network computes in; its card tells what it loses in each.
    ctf_correction
        Of the input, where the user says so: a warning tells if the network was trained otherwise.
    match_spectrum
        Filter the cubes of each tomogram to the radial power of the training data
        (:mod:`cectflow.prediction.matching`).
    """

    voxel_size: float | None = None
    contrast: Contrast = "dark"
    rescale: bool = False
    device: str = "auto"
    batch_size: int = 64
    overwrite: bool = False
    runtime: str = "auto"
    variant: Variant = "float32"
    ctf_correction: str | None = None
    match_spectrum: bool = False

    @property
    def deciding(self) -> dict[str, object]:
        """Those that answers depend on; the others change nothing but rounding, or nothing."""
        options = asdict(self)
        for name in ("overwrite", "device", "batch_size", "ctf_correction"):
            del options[name]
        return options


@dataclass(frozen=True, eq=False)
class LoadedNetwork:
    """A network ready to predict.

    Attributes
    ----------
    card
        Its contract.
    infer
        Cubes as the card wants them → logits.
    label
        What outputs call it, such as ``cectflow-student/3``.
    device
        ``cpu``, ``cuda`` or one of several GPUs, such as ``cuda:1``.
    infer_there
        The same for cubes that are on the device already; None: it runs on the CPU.
    """

    card: ModelCard
    infer: Infer
    label: str
    device: str = "cpu"
    infer_there: Callable[[Tensor], Tensor] | None = None

    @property
    def masking(self) -> Masking:
        """What data say that were masked with it."""
        return Masking(segmenter=self.label, card_digest=self.card.digest())

    @property
    def headers(self) -> tuple[str, ...]:
        """Lines for the headers of output volumes: what they come from."""
        return f"cectflow {self.label}", f"dataset {self.card.dataset_digest[:36]}"


@dataclass(frozen=True)
class NetworkFiles:
    """A network by its files: what another process needs to open it.

    Attributes
    ----------
    folder
        As the registry resolves it.
    label
        Written into every output.
    device
        ``cpu`` or ``cuda``.
    runtime, variant
        Chosen and checked.
    threads
        On the CPU; None leaves it to the runtime.
    """

    folder: Path
    label: str
    device: str
    runtime: RuntimeName
    variant: Variant
    threads: int | None = None


def check_network(
    folder: Path,
    *,
    tasks: tuple[str, ...],
    label: str,
    device: str,
    runtime: str = "auto",
    variant: Variant = "float32",
) -> NetworkFiles:
    """A model folder's network and how it is to run; nothing of it is loaded but the card.

    Parameters
    ----------
    folder
        As the registry resolves it.
    tasks
        Of which the card must have one.
    label
        Written into every output.
    device
        ``auto``, ``cpu`` or ``cuda``.
    runtime
        A name, or ``auto``: torch on a GPU; for whole tomograms on a CPU onnxruntime, since it
        gives back its memory between windows; for cubes the fastest that is installed, by the
        card's timings. Where the card's parity exceeds :data:`LARGEST_PARITY` only torch, which
        runs the program that was judged.
    variant
        Other ones than ``float32`` are added to the label, such as ``cectflow-student/3+int8``.

    Raises
    ------
    ValueError
        If the card is of another task (the message names the command that fits), does not know
        the variant, or the runtime cannot run it.
    """
    card = ModelCard.from_folder(folder)
    if card.task not in tasks:
        command = "classify" if card.task == "classify" else "segment"
        msg = (
            f"{label} is a {card.role} for the task {card.task!r}: expected one of "
            f"{', '.join(tasks)}; use `cectflow predict {command}` or another --model"
        )
        raise ValueError(msg)
    if variant != "float32" and variant not in card.variants:
        known = ", ".join(["float32", *card.variants])
        msg = (
            f"{label} was not judged in {variant}: expected one of {known}, or another version, "
            f"trained with `variants: [{variant}]` in its recipe"
        )
        raise ValueError(msg)
    chosen = choose_device("cpu" if (device, runtime) == ("auto", "openvino") else device)
    if runtime == "auto" and (chosen, variant) == ("cpu", "float32"):
        runtime = _fastest(card)
    if variant != "float32":
        label = f"{label}+{variant}"
    return NetworkFiles(folder, label, chosen, choose_runtime(runtime, variant, chosen), variant)


def _fastest(card: ModelCard) -> str:
    """Runtime of a network on a CPU in float32."""
    if card.parity is not None and card.parity > LARGEST_PARITY:
        return "torch"
    if card.task == "semantic":
        return "onnxruntime"
    rates = {
        timing.runtime: timing.subtomograms_per_s
        for timing in (card.cost.timings if card.cost else ())
        if (timing.variant, timing.device) == ("float32", "cpu") and timing.batch_size > 1
    }
    # torch takes 2 s to import, which a faster network does not earn back within a thousand cubes.
    installed = ("onnxruntime", *(["openvino"] if has_openvino() else []))
    known = [name for name in installed if name in rates]
    return max(known, key=lambda name: rates[name]) if len(known) == len(installed) else "auto"


def open_network(files: NetworkFiles) -> LoadedNetwork:
    """Network of :func:`check_network`, loaded."""
    card = ModelCard.from_folder(files.folder)
    if files.runtime == "torch" and files.threads is not None:
        import torch

        torch.set_num_threads(files.threads)
    device = _own_device(files.device)
    infer = load_runtime(
        files.folder, files.runtime, variant=files.variant, device=device,
        threads=files.threads, gives_back=card.task == "semantic",
    )  # fmt: skip
    there = None
    if device != "cpu" and files.runtime == "torch":
        there = load_torch(files.folder, device, files.variant)
    return LoadedNetwork(card, infer, files.label, device, there)


@lru_cache(maxsize=2)
def open_once(files: NetworkFiles) -> LoadedNetwork:
    """The same, once in a process."""
    return open_network(files)


def share_threads(files: NetworkFiles, where: Workplace) -> NetworkFiles:
    """The network with its share of the cores, where several processes compute beside each other.

    On a cluster that is one thread: the number of its processes is what its user sets.
    """
    if where.cluster is not None:
        return replace(files, threads=1)
    if where.workers > 1:
        return replace(files, threads=max(1, count_cores() // where.workers))
    return files


def _own_device(device: str) -> str:
    """Of several GPUs, each worker process its own, by turns."""
    import multiprocessing

    identity = multiprocessing.current_process()._identity
    if device != "cuda" or not identity:
        return device
    import torch

    return f"cuda:{(identity[0] - 1) % torch.cuda.device_count()}"


def load_network(
    folder: Path,
    *,
    tasks: tuple[str, ...],
    label: str,
    device: str,
    runtime: str = "auto",
    variant: Variant = "float32",
) -> LoadedNetwork:
    """Network of a model folder, checked and loaded; parameters as of :func:`check_network`."""
    return open_network(
        check_network(
            folder, tasks=tasks, label=label, device=device, runtime=runtime, variant=variant
        )
    )


def source_box(
    card: ModelCard, voxel_size: float, options: InputOptions, report: Callable[[str], None]
) -> int:
    """Box in voxels to cut from a tomogram of this voxel size.

    Raises
    ------
    ValueError
        If the voxel size differs from the card's and rescaling was not asked for.
    """
    if same_voxel_size(voxel_size, card.voxel_size):
        return card.box
    require_rescale(voxel_size, card, options)
    box = math.ceil(card.box * card.voxel_size / voxel_size) + 1
    report(
        f"rescale: cutting {box}³ at {voxel_size:g} Å, Fourier-resampled to {card.voxel_size:g} Å, "
        f"cropped to {card.box}³"
    )
    return box


def bring_to_card(
    cubes: Shaped[NDArray[Any], "n z y x"],
    voxel_size: float,
    card: ModelCard,
    options: InputOptions,
) -> Float[NDArray[np.float32], "n 1 box box box"]:
    """Cubes as the card's network expects them: box, voxel size, contrast.

    Raises
    ------
    ValueError
        If the box or the voxel size differs and rescaling was not asked for, or the cubes are too
        small for the card's box.
    """
    brought = np.asarray(cubes, np.float32)
    box = brought.shape[1]
    if brought.shape[1:] != (box, box, box):
        msg = f"subtomograms of shape {brought.shape[1:]}: expected cubes of {card.box}³"
        raise ValueError(msg)
    if not (same_voxel_size(voxel_size, card.voxel_size) and box == card.box):
        if box * voxel_size < card.box * card.voxel_size * (1 - VOXEL_TOLERANCE):
            msg = (
                f"subtomograms of {box}³ at {voxel_size:g} Å span {box * voxel_size:.0f} Å: "
                f"expected at least {card.box * card.voxel_size:.0f} Å ({card.box}³ at "
                f"{card.voxel_size:g} Å); extract them with a box of at least "
                f"{math.ceil(card.box * card.voxel_size / voxel_size)}"
            )
            raise ValueError(msg)
        if not same_voxel_size(voxel_size, card.voxel_size):
            require_rescale(voxel_size, card, options)
        elif not options.rescale:
            msg = (
                f"subtomograms are {box}³: expected {card.box}³; give --rescale to crop them "
                f"about their centre, or extract them at {card.box}³"
            )
            raise ValueError(msg)
        brought = rescale(brought, voxel_size, card.voxel_size, card.box).astype(np.float32)
    if options.contrast != card.contrast:
        brought = -brought
    return np.ascontiguousarray(brought[:, None])


def report_changes(
    card: ModelCard,
    box: int,
    voxel_size: float,
    options: InputOptions,
    report: Callable[[str], None],
) -> None:
    """Say what is done to subtomograms before the network sees them."""
    if options.contrast != card.contrast:
        report(f"contrast: input is {options.contrast}, {card.contrast} is expected: flipped")
    if box == card.box and same_voxel_size(voxel_size, card.voxel_size):
        return
    report(
        f"rescale: {box}³ at {voxel_size:g} Å, Fourier-resampled to {card.voxel_size:g} Å, "
        f"cropped to {card.box}³"
    )


def report_correction(
    card: ModelCard, options: InputOptions, report: Callable[[str], None]
) -> None:
    """Say which CTF correction the network was trained for, where the input's may be another."""
    given, expected = options.ctf_correction, card.ctf_correction
    if given is None:
        report(
            f"expected are data with ctf_correction {expected}: say with --ctf-correction what "
            "yours have"
        )
    elif given != expected:
        report(
            f"warning: the input's ctf_correction is {given}, the network was trained on "
            f"{expected}: its figures do not hold for these data; reconstruct them so, or train on "
            f"a recipe with `ctf_correction: {given}`"
        )


def same_voxel_size(given: float, expected: float) -> bool:
    """Whether two voxel sizes in Å count as equal."""
    return abs(given - expected) <= VOXEL_TOLERANCE * expected


def require_rescale(voxel_size: float, card: ModelCard, options: InputOptions) -> None:
    """Refuse another voxel size (in Å) than the card's unless rescaling was asked for.

    Raises
    ------
    ValueError
        With both voxel sizes and the remedies.
    """
    if not options.rescale:
        msg = (
            f"voxel size is {voxel_size:g} Å: expected {card.voxel_size:g} Å; give --rescale to "
            f"resample by a factor of {card.voxel_size / voxel_size:.3f}, or --voxel-size if the "
            f"header is wrong"
        )
        raise ValueError(msg)
