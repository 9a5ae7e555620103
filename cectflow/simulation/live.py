"""Live data: the dataset protocol without a disk, simulated ahead of a training by processes.

On another device than the CPU, processes pack and render, and this one images and cuts: cubes are
made where the training is, and never leave it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from cectflow.dataset import Batch
from cectflow.execution import WorkerProcesses, call_brought, single_thread
from cectflow.manifest import Manifest
from cectflow.simulation.extraction import Targets, choose_targets, cut_cubes
from cectflow.simulation.field import (
    RenderedField,
    Specimen,
    draw_field,
    image_rendered,
    render_drawn,
    seed_of,
)

__all__ = ["FIELDS_PER_BLOCK", "LiveSource", "field_maker", "open_live"]

FIELDS_PER_BLOCK = 4
"""Fields whose cubes are shuffled together, so that a batch holds more than neighbours."""
LARGEST_GAP = 100
"""Fields in a row without a subtomogram after which the recipe is taken to give none."""


class LiveSource:
    """A :class:`~cectflow.dataset.BatchSource` whose every pass is of newly simulated fields.

    The seeds of its fields come from the recipe's digest, the name and the generator given to
    :meth:`batches`, in a namespace that no split of a dataset folder shares. A training that
    seeds a generator for each epoch, as :func:`~cectflow.learning.fit.fit` does, therefore sees
    no field twice, and sees the same ones again when it is resumed. Batches do not depend on where
    fields are simulated.

    Parameters
    ----------
    specimen
        What is simulated; batches are on its device.
    manifest
        Of the dataset folder that validates and judges; of the same recipe.
    subtomograms_per_epoch
        Exact length of a pass.
    submit
        Begins :func:`field_maker` of the specimen somewhere: stream and number of a field → what
        it will give.
    ahead
        At most this many fields are begun, waiting or finished. In memory are besides them the
        fields of one block and of the batch before it.
    name
        Sources of other names have other fields: a student does not meet those on which its
        teacher was trained.

    Raises
    ------
    ValueError
        If the manifest is of another recipe, or a number is below 1.
    """

    def __init__(
        self,
        specimen: Specimen,
        manifest: Manifest,
        subtomograms_per_epoch: int,
        submit: Callable[[str, int], Future[Any]],
        *,
        ahead: int,
        name: str = "training",
    ) -> None:
        if manifest.masking is not None:
            msg = (
                f"the dataset is masked with {manifest.masking.segmenter}, live data are not: take "
                "`live` out of the recipe, or give the dataset that it was made from"
            )
            raise ValueError(msg)
        if manifest.recipe_digest != specimen.recipe_digest:
            msg = (
                f"the dataset is of the recipe {manifest.recipe_digest[:12]}…, live data would be "
                f"of {specimen.recipe_digest[:12]}…: give the dataset of this very recipe, "
                f"structures and seed, or none, so that it is simulated"
            )
            raise ValueError(msg)
        for what, number in (("subtomograms_per_epoch", subtomograms_per_epoch), ("ahead", ahead)):
            if number < 1:
                msg = f"{what} is {number}: expected 1 or more"
                raise ValueError(msg)
        self._specimen = specimen
        self._images_here = specimen.device.type != "cpu"
        self._length = subtomograms_per_epoch
        self._submit = submit
        self._ahead = ahead
        self._name = name
        self._manifest = manifest.model_copy(
            update={
                "live_subtomograms": subtomograms_per_epoch, "planned_shards": {}, "shards": {},
            }
        )  # fmt: skip

    @property
    def manifest(self) -> Manifest:
        """Of the dataset, but for its shards: it names the recipe and the length of a pass."""
        return self._manifest

    def __len__(self) -> int:
        return self._length

    def batches(self, batch_size: int, generator: torch.Generator | None = None) -> Iterator[Batch]:
        """Batches of one pass over new fields; all but the last are full.

        Parameters
        ----------
        batch_size
            Cubes of a batch.
        generator
            Another seed, or another use of it, gives other fields; cubes are shuffled within
            blocks of :data:`FIELDS_PER_BLOCK` fields. Without a generator every pass has the
            same fields, of their own, in order.

        Yields
        ------
        Batch
            As of a split of a folder, but without views: no cube comes twice. ``fields`` counts
            the fields of the pass.
        """
        stream, shuffle = f"live-{self._name}-in-order", None
        if generator is not None:
            drawn = int(torch.randint(2**62, (1,), generator=generator))
            stream = f"live-{self._name}-{generator.initial_seed()}-{drawn}"
            # Of its own: the consumer may draw from the other one between two batches.
            shuffle = np.random.default_rng(drawn)
        waiting: list[_Cubes] = []
        missing = self._length
        for block in self._blocks(stream):
            order = np.arange(len(block)) if shuffle is None else shuffle.permutation(len(block))
            chosen = order[:missing]
            missing -= len(chosen)
            cubes = _concatenate([*waiting, block.take(chosen)])
            full = len(cubes) // batch_size * batch_size
            for start in range(0, full, batch_size):
                yield cubes.take(np.arange(start, start + batch_size)).as_batch()
            waiting = [cubes.take(np.arange(full, len(cubes)))]
        if len(waiting[0]):
            yield waiting[0].as_batch()

    def _blocks(self, stream: str) -> Iterator[_Cubes]:
        """Cubes of a few fields together, until there are enough."""
        block: list[_Cubes] = []
        for cubes in self._fields(stream):
            block.append(cubes)
            if len(block) == FIELDS_PER_BLOCK:
                yield _concatenate(block)
                block = []
        if block:
            yield _concatenate(block)

    def _fields(self, stream: str) -> Iterator[_Cubes]:
        """Cubes of field after field, until there are enough; others are simulated meanwhile."""
        pending: deque[Future[Any]] = deque()
        finished, received, gap = 0, 0, 0
        try:
            while received < self._length:
                # No more than will be needed, as far as the fields until now can tell.
                per_field = max(received / max(finished, 1), 1.0)
                while len(pending) < self._ahead and (
                    not pending or received + len(pending) * per_field < self._length
                ):
                    pending.append(self._submit(stream, finished + len(pending)))
                result = pending.popleft().result()
                cubes = _image(self._specimen, result, finished) if self._images_here else result
                finished += 1
                received += len(cubes)
                gap = 0 if len(cubes) else gap + 1
                if gap == LARGEST_GAP:
                    msg = (
                        f"{gap} fields in a row gave no subtomogram: raise occupancy or the "
                        f"abundances, or enlarge field_shape"
                    )
                    raise ValueError(msg)
                yield cubes
        except BrokenProcessPool:
            msg = (
                "a process that simulates live data has died, perhaps for want of memory: use "
                "fewer --workers or a smaller field_shape; the same command goes on from the "
                "last epoch"
            )
            raise ChildProcessError(msg) from None
        finally:
            for future in pending:
                future.cancel()


def field_maker(specimen: Specimen) -> Callable[[str, int], Any]:
    """What other processes make of a field, by its stream and number, for a :class:`LiveSource`.

    All of it, where the specimen is on the CPU; on another device, what is to be imaged there.
    """
    if specimen.device.type == "cpu":
        return partial(_simulate, specimen)
    return partial(_render, specimen.to("cpu"))


@contextmanager
def open_live(
    specimen: Specimen,
    manifest: Manifest,
    subtomograms_per_epoch: int,
    *,
    workers: int = 1,
    name: str = "training",
) -> Iterator[LiveSource]:
    """Live data from worker processes, which end with the context, however that ends.

    Parameters
    ----------
    specimen, manifest, subtomograms_per_epoch, name
        See :class:`LiveSource`.
    workers
        Processes that simulate beside this one. They need not keep up: whoever reads waits.

    Raises
    ------
    ValueError
        As :class:`LiveSource`, or if ``workers`` is below 1.
    """
    with WorkerProcesses(workers, field_maker(specimen)) as executor:
        # While one block is learned the next is made, and no process waits for work.
        ahead = FIELDS_PER_BLOCK + workers
        submit = partial(executor.submit, call_brought)
        yield LiveSource(specimen, manifest, subtomograms_per_epoch, submit, ahead=ahead, name=name)


@dataclass(frozen=True, eq=False)
class _Cubes:
    """Subtomograms, each with the number of its field, where they were cut."""

    subtomograms: Float[Tensor, "n z y x"]
    voxel_labels: Int[Tensor, "n z y x"]
    instances: Int[Tensor, "n z y x"]
    class_ids: Int[Tensor, " n"]
    fields: Int[Tensor, " n"]
    statistics: Float[Tensor, "n 2"]

    def __len__(self) -> int:
        return len(self.class_ids)

    def __reduce__(self) -> tuple[Callable[..., _Cubes], tuple[NDArray[Any], ...]]:
        """As arrays from process to process: of tensors, torch would keep a file open for each."""
        return _cubes_of, tuple(tensor.numpy() for tensor in self._tensors)

    @property
    def _tensors(self) -> tuple[Tensor, ...]:
        return (
            self.subtomograms, self.voxel_labels, self.instances, self.class_ids, self.fields,
            self.statistics,
        )  # fmt: skip

    def take(self, rows: Int[NDArray[np.int64], " m"]) -> _Cubes:
        """Some of them, copied, so that the others can be forgotten."""
        chosen = torch.from_numpy(rows).to(self.subtomograms.device)
        return _Cubes(*(tensor[chosen] for tensor in self._tensors))

    def as_batch(self) -> Batch:
        """As a network is shown them."""
        return Batch(
            self.subtomograms.float()[:, None],
            self.voxel_labels,
            self.instances,
            self.class_ids,
            self.fields,
            statistics=self.statistics,
        )


def _cubes_of(*arrays: NDArray[Any]) -> _Cubes:
    return _Cubes(*map(torch.from_numpy, arrays))


def _concatenate(parts: Sequence[_Cubes]) -> _Cubes:
    return _Cubes(*map(torch.cat, zip(*(part._tensors for part in parts), strict=True)))


@dataclass(frozen=True, eq=False)
class _Rendered:
    """A field that is still to be imaged, as it passes from a process."""

    field: RenderedField
    targets: Targets


def _simulate(specimen: Specimen, stream: str, index: int) -> _Cubes:
    """Cubes of one field of a stream."""
    with single_thread():
        return _image(specimen, _render(specimen, stream, index), index)


def _render(specimen: Specimen, stream: str, index: int) -> _Rendered:
    """What the CPU makes of a field: densities, places and labels."""
    with single_thread():
        field = render_drawn(specimen, draw_field(specimen, stream, index))
        targets = choose_targets(specimen, field, seed_of(specimen, f"{stream}-cut", index))
    # The labels are made; what they were made of need not travel.
    field = replace(field, owners=field.owners[:0], kinds=field.kinds[:0])
    return _Rendered(field, targets)


def _image(specimen: Specimen, rendered: _Rendered, index: int) -> _Cubes:
    """Cubes of a rendered field on the specimen's device."""
    tomogram, record = image_rendered(specimen, rendered.field)
    targets = rendered.targets
    class_ids = targets.rows["rlnClassNumber"].to_numpy(np.int64, copy=True)
    statistics = np.tile(
        np.array([record.median, record.robust_std], np.float32), (len(class_ids), 1)
    )
    numbers = np.full(len(class_ids), index)
    truth = (targets.voxel_labels, targets.instances, class_ids, numbers, statistics)
    return _Cubes(
        cut_cubes(tomogram, targets.centres, specimen.recipe.box),
        *(torch.from_numpy(values).to(specimen.device) for values in truth),
    )
