"""Asking: pieces of work in, what the network says of each particle out, at the network's speed.

Reading and asking overlap: in the runtimes that take several batches at once two or more threads
read and ask by turns, beside torch one thread reads ahead.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from cectflow.execution import count_cores, prefetch
from cectflow.prediction.contract import InputOptions, LoadedNetwork, NetworkFiles, open_network
from cectflow.prediction.contrast import measure_lightness
from cectflow.prediction.mask import masked_with
from cectflow.prediction.source import Block, CubeBatch, CubeSource, read_blocks

__all__ = [
    "Answers",
    "Classifier",
    "Job",
    "Piece",
    "answer",
    "answer_each",
    "count_particles",
    "split_blocks",
]

LANES = 2
"""Threads that read and ask, at least; on two cores more were no faster, and each holds a batch."""
CORES_PER_LANE = 8
"""So many find two parts each in a batch of 64 cubes of 40³, the one they compute and the next."""

Piece = tuple[Block, ...]
"""What is predicted and recorded together: one block, or several of small files."""


@dataclass(frozen=True)
class Classifier:
    """The network, and the segmenter that takes the neighbours out first, by their files.

    Any process can open it; each opens it once.
    """

    network: NetworkFiles
    segmenter: NetworkFiles | None = None

    def open(self) -> LoadedNetwork:
        """The network, ready to predict."""
        return _open(self.absolute())

    def absolute(self) -> Classifier:
        """The same, wherever a process runs."""
        network, segmenter = (
            None if files is None else replace(files, folder=files.folder.absolute())
            for files in (self.network, self.segmenter)
        )
        assert network is not None
        return Classifier(network, segmenter)


@lru_cache(maxsize=2)
def _open(classifier: Classifier) -> LoadedNetwork:
    network = open_network(classifier.network)
    if classifier.segmenter is None:
        return network
    return masked_with(network, open_network(classifier.segmenter))


@dataclass(frozen=True, eq=False)
class Answers:
    """What a network said of a piece.

    Attributes
    ----------
    logits
        Of each particle; not a number where it could not be predicted.
    lightness
        By how much the middle of each cube, as the network saw it, is lighter than its faces
        (:func:`~cectflow.prediction.contrast.measure_lightness`).
    faults
        Place in the piece → why that particle could not be predicted.
    """

    logits: Float[NDArray[np.float32], "n class"]
    lightness: Float[NDArray[np.float32], " n"]
    faults: dict[int, str]

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """For the journal."""
        faults = json.dumps({str(place): why for place, why in self.faults.items()})
        return {
            "logits": self.logits,
            "lightness": self.lightness,
            "faults": np.frombuffer(faults.encode(), np.uint8),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], count: int) -> Answers:
        """What :meth:`to_arrays` gave of so many particles.

        Raises
        ------
        ValueError
            If it is of another number of them.
        """
        faults = json.loads(arrays["faults"].tobytes())
        logits, lightness = arrays["logits"], arrays["lightness"]
        if not len(logits) == len(lightness) == count:
            msg = f"answers of {len(logits)} particles: expected {count}"
            raise ValueError(msg)
        return cls(logits, lightness, {int(place): why for place, why in faults.items()})


def split_blocks(source: CubeSource, size: int) -> tuple[Piece, ...]:
    """What is predicted and recorded together: at most so many particles, in the files' order."""
    return tuple(_pieces(source.files, size))


def _pieces(files: Iterable[Block], size: int) -> Iterator[Piece]:
    gathered: list[Block] = []
    room = size
    for block in files:
        # Small files share a piece; a large one begins its own, so that few pieces read two.
        if gathered and len(block) > room:
            yield tuple(gathered)
            gathered, room = [], size
        for start in range(0, len(block), size):
            part = block.part(start, start + size)
            if len(part) == size:
                yield (part,)
            else:
                gathered.append(part)
                room -= len(part)
    if gathered:
        yield tuple(gathered)


def count_particles(piece: Piece) -> int:
    """Of all its blocks."""
    return sum(map(len, piece))


@dataclass(frozen=True, eq=False)
class Job:
    """A piece, and with what it is to be predicted."""

    classifier: Classifier
    piece: Piece
    options: InputOptions
    number: int

    def __str__(self) -> str:
        return (
            f"block {self.number}, {count_particles(self.piece)} particles of {self.piece[0].path}"
        )


def answer(job: Job) -> tuple[int, Answers]:
    """What the network says of a piece; what cannot be read is a fault of its particles."""
    (answered,) = answer_each((job,))
    return answered


def answer_each(jobs: Sequence[Job]) -> Iterator[tuple[int, Answers]]:
    """The same of several pieces, one after the other, with the same network."""
    if not jobs:
        return
    classifier = jobs[0].classifier
    network = classifier.open()
    # torch computes one batch after the other, the others a few cubes of any batch at a time.
    in_lanes = classifier.network.runtime in ("onnxruntime", "openvino")
    for job, founds in (_ask_in_lanes if in_lanes else _ask_in_turn)(network, jobs):
        count = count_particles(job.piece)
        logits = np.full((count, len(network.card.classes)), np.nan, np.float32)
        lightness = np.full(count, np.nan, np.float32)
        faults: dict[int, str] = {}
        for kept, answers, lighter, wrong in founds:
            faults |= wrong
            finite = np.isfinite(answers).all(axis=1)
            for place in kept[~finite].tolist():
                faults[place] = "the network's answer is no number: are the values beyond float32?"
            logits[kept[finite]] = answers[finite]
            lightness[kept[finite]] = lighter[finite]
        yield job.number, Answers(logits, lightness, faults)


_Task = TypeVar("_Task")
_Found = tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32], dict[int, str]]
"""Places in a piece, their logits and lightness, and what is wrong with others."""


def _ask_in_lanes(
    network: LoadedNetwork, jobs: Sequence[Job]
) -> Iterator[tuple[Job, Iterator[_Found]]]:
    """Answers by threads that each read a batch and ask the network, so that it never waits.

    While one reads, or gathers what the network made of its batch, the network has the other's;
    while a piece is recorded, they are at the next.
    """

    def ask(task: tuple[Job, int, Piece]) -> _Found:
        job, start, part = task
        (batch,) = read_blocks(part, network.card, job.options)
        return _ask(network, batch.moved(start))

    threads = jobs[0].classifier.network.threads or count_cores()
    lanes = max(LANES, threads // CORES_PER_LANE)
    tasks = ((job, *part) for job in jobs for part in _batches(job))
    with ThreadPoolExecutor(lanes, "lane") as pool:
        found = _map_ahead(pool, ask, tasks, 2 * lanes)
        for job in jobs:
            yield job, islice(found, sum(1 for _ in _batches(job)))


def _batches(job: Job) -> Iterator[tuple[int, Piece]]:
    """Parts of a piece that are read as one batch, and the places at which they begin."""
    size, place = job.options.batch_size, 0
    for part in _pieces(job.piece, size):
        yield place, part
        place += count_particles(part)


def _map_ahead(
    pool: ThreadPoolExecutor,
    function: Callable[[_Task], _Found],
    tasks: Iterable[_Task],
    ahead: int,
) -> Iterator[_Found]:
    """Results in the order of the tasks, of which so many are in hand."""
    waiting, in_hand = iter(tasks), deque[Future[_Found]]()
    while True:
        room = ahead - len(in_hand)
        in_hand.extend(pool.submit(function, task) for task in islice(waiting, room))
        if not in_hand:
            return
        yield in_hand.popleft().result()


def _ask(network: LoadedNetwork, batch: CubeBatch) -> _Found:
    if not len(batch):
        nothing = np.zeros((0, len(network.card.classes)), np.float32)
        return batch.kept, nothing, nothing[:, 0], batch.faults
    return batch.kept, network.infer(batch.cubes), measure_lightness(batch.cubes), batch.faults


def _ask_in_turn(
    network: LoadedNetwork, jobs: Sequence[Job]
) -> Iterator[tuple[Job, Iterator[_Found]]]:
    """Answers by batches, which a thread reads while the network is at work."""
    ask = _ask_prefetched if network.infer_there is None else _ask_there
    for job in jobs:
        yield job, ask(network, job.piece, job.options)


def _ask_prefetched(
    network: LoadedNetwork, piece: Piece, options: InputOptions
) -> Iterator[_Found]:
    for batch in prefetch(read_blocks(piece, network.card, options)):
        yield _ask(network, batch)


def _ask_there(network: LoadedNetwork, piece: Piece, options: InputOptions) -> Iterator[_Found]:
    """Of cubes that are cut on the device."""
    from cectflow.prediction.on_device import read_blocks_on_device

    card, device = network.card, network.device
    assert network.infer_there is not None
    for cubes, kept, faults in read_blocks_on_device(piece, card, options, device):
        answers = np.zeros((0, len(card.classes)), np.float32), np.zeros(0, np.float32)
        if len(kept):
            there = network.infer_there(cubes).cpu().numpy()
            answers = there, measure_lightness(cubes.cpu().numpy())
        yield kept, *answers, faults
