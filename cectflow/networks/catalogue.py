"""The catalogue of networks: how a network is declared, listed, described and created.

A network enters it with :func:`register_network` and leaves it by name with
:func:`create_network`; :func:`list_networks` and :func:`network_info` tell what there is. The
catalogue knows no family: each family's file registers its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, TypeVar, get_args

from torch import nn

from cectflow.networks.padding import PadToStride

__all__ = ["NetworkInfo", "create_network", "list_networks", "network_info", "register_network"]

NetworkTask = Literal["classify", "segment"]
Builder = TypeVar("Builder", bound=Callable[..., nn.Module])


@dataclass(frozen=True)
class NetworkInfo:
    """What the catalogue knows of a network before it is created."""

    name: str
    task: NetworkTask
    """``classify``: logits ``(n, num_outputs)``; ``segment``: ``(n, num_outputs, z, y, x)``."""
    stride: int
    """A segmenter pads its input to a multiple of it; 1 for classifiers."""
    min_box: int
    """Smallest edge of the input cube, in voxels."""
    reach: int | None
    """Farthest distance along an axis, in voxels, at which the input changes a segmenter's logit;
    None for classifiers. It is exact: windows that start at multiples of the stride and overlap
    so that every kept voxel has this many beside it, on every side where the volume goes on,
    give the logits of the whole volume (of networks without a sense of the centre)."""
    paper: str
    summary: str
    _build: Callable[..., nn.Module] = field(repr=False)

    @property
    def arguments(self) -> tuple[str, ...]:
        """Names of the network's own arguments."""
        return tuple(inspect.signature(self._build).parameters)[2:]  # after num_outputs and box


_CATALOGUE: dict[str, NetworkInfo] = {}


def register_network(
    *, task: NetworkTask, stride: int, min_box: int, paper: str, reach: int | None = None
) -> Callable[[Builder], Builder]:
    """Return a decorator that enters a function ``(num_outputs, box, **arguments)``.

    The function's name becomes the catalogue name, the first line of its docstring the summary.

    Parameters
    ----------
    task
        ``classify`` or ``segment``.
    stride
        What the edges of a segmenter's input must be a multiple of; 1 for classifiers.
    min_box
        Smallest edge of the input cube that the network takes, in voxels.
    paper
        Where the network was published.
    reach
        Of a segmenter: see :class:`NetworkInfo`.

    Raises
    ------
    ValueError
        If the name is taken, or a segmenter does not state its reach.
    """

    def register(build: Builder) -> Builder:
        name = build.__name__
        if name in _CATALOGUE:
            msg = f"network {name!r} is registered already: give the new one another name"
            raise ValueError(msg)
        if task == "segment" and reach is None:
            msg = f"segmenter {name!r} states no reach: give it, whole tomograms need it as halo"
            raise ValueError(msg)
        summary = (inspect.getdoc(build) or "").partition("\n")[0]
        _CATALOGUE[name] = NetworkInfo(name, task, stride, min_box, reach, paper, summary, build)
        return build

    return register


def create_network(name: str, *, num_outputs: int, box: int, **arguments: object) -> nn.Module:
    """Create a freshly initialised network.

    It takes normalised float32 cubes ``(n, 1, z, y, x)`` and returns logits, ``(n, num_outputs)``
    from a classifier and ``(n, num_outputs, z, y, x)`` from a segmenter. A segmenter takes volumes
    of any shape (:class:`~cectflow.networks.padding.PadToStride`), a classifier the box only. The
    weights are drawn from torch's global generator.

    Parameters
    ----------
    name
        One of :func:`list_networks`.
    num_outputs
        Classes of a classifier; labels of a segmenter, background included.
    box
        Edge of the input cube in voxels.
    arguments
        The network's own, for instance ``dropout``.

    Raises
    ------
    ValueError
        If the name or an argument is unknown, there are fewer than two outputs, or the box is
        too small.
    """
    info = network_info(name)
    _check_arguments(info, arguments)
    if num_outputs < 2:
        msg = (
            f"{name} was asked for {num_outputs} outputs; expected at least 2: "
            "count the background of a segmenter, too"
        )
        raise ValueError(msg)
    _check_box(info, box)
    network = info._build(num_outputs, box, **arguments)
    return PadToStride(network, info.stride) if info.task == "segment" else network


def list_networks(task: str | None = None) -> tuple[str, ...]:
    """Names of all networks, sorted.

    Parameters
    ----------
    task
        ``classify`` or ``segment`` lists these only.

    Raises
    ------
    ValueError
        If there is no such task.
    """
    tasks = get_args(NetworkTask)
    if task is not None and task not in tasks:
        msg = f"unknown task {task!r}: expected one of {', '.join(tasks)}"
        raise ValueError(msg)
    return tuple(sorted(name for name, info in _CATALOGUE.items() if task in {None, info.task}))


def network_info(name: str) -> NetworkInfo:
    """What the catalogue knows of a network.

    Raises
    ------
    ValueError
        If the name is unknown; the message lists the known ones.
    """
    if name not in _CATALOGUE:
        msg = f"unknown network {name!r}: expected one of {', '.join(list_networks())}"
        raise ValueError(msg)
    return _CATALOGUE[name]


def _check_arguments(info: NetworkInfo, arguments: dict[str, object]) -> None:
    known = info.arguments
    unknown = [name for name in arguments if name not in known]
    if unknown:
        msg = (
            f"{info.name} has no argument {', '.join(unknown)}: "
            f"expected {', '.join(known) or 'none'}"
        )
        raise ValueError(msg)


def _check_box(info: NetworkInfo, box: int) -> None:
    if box < info.min_box:
        msg = (
            f"subtomogram is {box}³; {info.name} needs at least {info.min_box}³: "
            f"cut or pad to {info.min_box}³"
        )
        raise ValueError(msg)
