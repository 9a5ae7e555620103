"""Classification of particles: cubes in, the input's table with class and probability out.

The particles are worked through in blocks, by this process or by others, and every finished block
is recorded (:mod:`.journal`), so that what ends the work costs one block.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy.typing import NDArray

from cectflow.execution import HERE, Workplace, count_cores, prefetch, run_all
from cectflow.model_card import ModelCard
from cectflow.particles import NOT_PREDICTED, ParticleTable
from cectflow.prediction.contract import InputOptions, LoadedNetwork, NetworkFiles, open_network
from cectflow.prediction.journal import Answers, Journal, open_journal
from cectflow.prediction.mask import masked_with
from cectflow.prediction.source import Block, CubeBatch, CubeSource, read_blocks
from cectflow.trust import find_unknown, probabilities_of

__all__ = [
    "Classification",
    "Classifier",
    "Judgement",
    "classify_particles",
    "judge",
    "refuse_existing",
    "split_blocks",
]

BLOCK_SIZE = 1024
"""Particles that are predicted and recorded together: a second of work or less for a student."""
LANES = 2
"""Threads that read and ask, at least; on two cores more were no faster, and each holds a batch."""
CORES_PER_LANE = 8
"""So many find two parts each in a batch of 64 cubes of 40³, the one they compute and the next."""
ROWS_AT_ONCE = 1 << 14
"""Whose logits are judged together."""
JUDGED_CUBES = 64
"""Of which the contrast can be judged."""
CERTAIN = 5.0
"""Standard errors by which particles must look inverted to be called so."""

Piece = tuple[Block, ...]
"""What is predicted and recorded together: one block, or several of small files."""

Report = Callable[[str], None]


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
class Judgement:
    """What logits mean by a card.

    Attributes
    ----------
    class_ids
        The most probable class from 1; 0 where there is no prediction.
    probabilities
        Calibrated where the card has a temperature, 0 where there is no prediction.
    of_class
        That of the most probable class.
    entropy
        Of the probabilities in nats; 0 is sure, the logarithm of the number of classes is not.
    unknown
        Whether the particle looks like none of the classes; None where the card has no threshold.
    """

    class_ids: NDArray[np.int64]
    probabilities: Float[NDArray[np.float32], "n class"]
    of_class: Float[NDArray[np.float64], " n"]
    entropy: Float[NDArray[np.float64], " n"]
    unknown: NDArray[np.bool_] | None


@dataclass(frozen=True, eq=False)
class Classification:
    """Outcome of a classification.

    Attributes
    ----------
    table
        The input's rows, columns and blocks, with ``cectflowClassName``, ``cectflowClassNumber``
        (from 1), ``cectflowProbability``, ``cectflowEntropy`` (nats), ``cectflowModel`` and
        ``cectflowModelDigest`` added, and ``rlnClassNumber`` where the input had none. Where the
        card states how sure the network may be, probabilities are calibrated, and
        ``cectflowUnknown`` is 1 where the particle looks like none of the classes; its class is
        then the least unlikely one. A particle that could not be predicted is of the class
        ``none``, number 0.
    judgement
        Of every row.
    faults
        Row → why it was not predicted.
    counts
        Class name → number of particles, most frequent first.
    mean_probability
        Of the chosen classes.
    num_unknown
        Particles that look like none of the classes; None where the card has no threshold.
    per_second
        Particles predicted per second by this call, network and reading together.
    """

    table: ParticleTable
    judgement: Judgement = field(repr=False)
    faults: dict[int, str]
    counts: dict[str, int]
    mean_probability: float
    num_unknown: int | None = None
    per_second: float = 0.0


def classify_particles(
    classifier: Classifier,
    source: CubeSource,
    out: Path,
    *,
    outputs: Iterable[Path] = (),
    where: Workplace = HERE,
    block_size: int = BLOCK_SIZE,
    anew: bool = False,
    report: Report,
    finish: Callable[[Classification], None],
) -> Classification:
    """Classification of every particle of a source.

    Parameters
    ----------
    classifier, source
        The network and its cubes.
    out
        The output that ``finish`` writes; the journal is kept beside it until then.
    outputs
        All files that ``finish`` writes, where there are others.
    where
        Processes that read and predict.
    block_size
        Particles that are lost at most when a process is killed.
    anew
        Drop what an earlier run has finished.
    report
        Told what is gone on with, and what looks wrong.
    finish
        Writes the outputs.

    Raises
    ------
    ValueError
        If an earlier run with the same output was of other work.
    """
    network = classifier.open()
    pieces = split_blocks(source, block_size)
    plan = _plan(classifier, network, source, block_size)
    with open_journal(out, plan, anew=anew, outputs=(out, *outputs)) as journal:
        done = _intact(journal, pieces)
        if done:
            report(f"going on: {len(done)} of {len(pieces)} blocks are finished")
        elsewhere = classifier.absolute()  # workers may run in another folder
        jobs = [
            _Job(
                elsewhere,
                tuple(replace(block, path=block.path.absolute()) for block in piece),
                source.options,
                number,
            )
            for number, piece in enumerate(pieces)
            if number not in done
        ]
        began, predicted = time.perf_counter(), 0
        watch = _ContrastWatch(source.card, source.options, report)

        def rate() -> str:
            return f"{predicted / max(time.perf_counter() - began, 1e-3):,.0f} particles/s"

        paths = (elsewhere.network.folder, *{block.path.absolute() for block in source.files})
        for number, answers in run_all(
            _answer, jobs, where=where, title="classifying", paths=paths, status=rate,
            alone=_answer_each,
        ):  # fmt: skip
            journal.record(number, answers)
            predicted += len(answers.logits)
            watch.see(answers)
        seconds = time.perf_counter() - began
        outcome = _assemble(network, source, pieces, journal)
        outcome = replace(outcome, per_second=predicted / seconds if jobs else 0.0)
        finish(outcome)
    return outcome


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


def _intact(journal: Journal, pieces: Sequence[Piece]) -> frozenset[int]:
    """Numbers of the pieces that are finished; files that are damaged are dropped."""
    for number in journal.finished():
        if number >= len(pieces) or journal.read(number, _count(pieces[number])) is None:
            journal.forget(number)
    return journal.finished()


def _count(piece: Piece) -> int:
    return sum(map(len, piece))


def judge(logits: Float[NDArray[np.float32], "n class"], card: ModelCard) -> Judgement:
    """Classes, probabilities and verdicts of logits; those that are no numbers have none."""
    count = len(logits)
    judgement = Judgement(
        np.zeros(count, np.int64), np.zeros(logits.shape, np.float32), np.zeros(count),
        np.zeros(count), None if card.trust is None else np.zeros(count, np.bool_),
    )  # fmt: skip
    for start in range(0, count, ROWS_AT_ONCE):  # what is computed takes many times their memory
        _judge_rows(logits, card, judgement, slice(start, start + ROWS_AT_ONCE))
    return judgement


def _judge_rows(
    logits: NDArray[np.float32], card: ModelCard, judgement: Judgement, rows: slice
) -> None:
    missing = np.asarray(np.isnan(logits[rows]).all(axis=1))
    given = np.where(missing[:, None], np.float32(0.0), logits[rows])
    trust = card.trust
    probabilities = probabilities_of(given, 1.0 if trust is None else trust.temperature)
    probabilities[missing] = 0.0
    lost = -np.log(np.maximum(probabilities, np.finfo(np.float64).tiny))
    judgement.class_ids[rows] = np.where(missing, 0, probabilities.argmax(axis=1) + 1)
    judgement.probabilities[rows] = probabilities
    judgement.of_class[rows] = probabilities.max(axis=1)
    judgement.entropy[rows] = (probabilities * lost).sum(axis=1)
    if trust is not None and judgement.unknown is not None:
        judgement.unknown[rows] = find_unknown(given, trust) & ~missing


@dataclass(frozen=True, eq=False)
class _Job:
    classifier: Classifier
    piece: Piece
    options: InputOptions
    number: int

    def __str__(self) -> str:
        return f"block {self.number}, {_count(self.piece)} particles of {self.piece[0].path}"


def _answer(job: _Job) -> tuple[int, Answers]:
    """What the network says of a piece; what cannot be read is a fault of its particles."""
    (answered,) = _answer_each((job,))
    return answered


def _answer_each(jobs: Sequence[_Job]) -> Iterator[tuple[int, Answers]]:
    """The same of several pieces, one after the other, with the same network."""
    if not jobs:
        return
    classifier = jobs[0].classifier
    network = classifier.open()
    # torch computes one batch after the other, the others a few cubes of any batch at a time.
    in_lanes = classifier.network.runtime in ("onnxruntime", "openvino")
    for job, founds in (_ask_in_lanes if in_lanes else _ask_in_turn)(network, jobs):
        count = _count(job.piece)
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
    network: LoadedNetwork, jobs: Sequence[_Job]
) -> Iterator[tuple[_Job, Iterator[_Found]]]:
    """Answers by threads that each read a batch and ask the network, so that it never waits.

    While one reads, or gathers what the network made of its batch, the network has the other's;
    while a piece is recorded, they are at the next.
    """

    def answer(task: tuple[_Job, int, Piece]) -> _Found:
        job, start, part = task
        (batch,) = read_blocks(part, network.card, job.options)
        return _ask(network, batch.moved(start))

    threads = jobs[0].classifier.network.threads or count_cores()
    lanes = max(LANES, threads // CORES_PER_LANE)
    tasks = ((job, *part) for job in jobs for part in _batches(job))
    with ThreadPoolExecutor(lanes, "lane") as pool:
        found = _map_ahead(pool, answer, tasks, 2 * lanes)
        for job in jobs:
            yield job, islice(found, sum(1 for _ in _batches(job)))


def _batches(job: _Job) -> Iterator[tuple[int, Piece]]:
    """Parts of a piece that are read as one batch, and the places at which they begin."""
    size, place = job.options.batch_size, 0
    for part in _pieces(job.piece, size):
        yield place, part
        place += _count(part)


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
    return batch.kept, network.infer(batch.cubes), _lightness(batch.cubes), batch.faults


def _ask_in_turn(
    network: LoadedNetwork, jobs: Sequence[_Job]
) -> Iterator[tuple[_Job, Iterator[_Found]]]:
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
            answers = there, _lightness(cubes.cpu().numpy())
        yield kept, *answers, faults


def _lightness(cubes: Float[NDArray[np.float32], "n 1 z y x"]) -> NDArray[np.float32]:
    """By how much a cube's middle is lighter than its faces, in deviations of those."""
    edge = cubes.shape[-1]
    inner = slice(edge // 2 - max(1, edge // 10), edge // 2 + max(1, edge // 10) + 1)
    core = cubes[:, 0, inner, inner, inner]
    faces = np.stack([cubes[:, 0, 0], cubes[:, 0, -1]], axis=1)
    axes, exact = (1, 2, 3), np.float64  # in which no sum of float32 overflows
    difference = core.mean(axis=axes, dtype=exact) - faces.mean(axis=axes, dtype=exact)
    return np.asarray(difference / (faces.std(axis=axes, dtype=exact) + 1e-30), np.float32)


class _ContrastWatch:
    """Warns once where particles look lighter than their surroundings to the network."""

    def __init__(self, card: ModelCard, options: InputOptions, report: Report) -> None:
        self._sign = 1.0 if card.contrast == "dark" else -1.0
        self._given = options.contrast
        self._report = report
        self._count, self._sum, self._squares = 0, 0.0, 0.0
        self._told = False

    def see(self, answers: Answers) -> None:
        """Take the cubes of a piece into account."""
        finite = answers.lightness[np.isfinite(answers.lightness)]
        values = self._sign * finite.astype(np.float64)
        self._count += len(values)
        self._sum += float(values.sum())
        self._squares += float(np.square(values).sum())
        if self._told or self._count < JUDGED_CUBES:
            return
        mean = self._sum / self._count
        error = (max(self._squares / self._count - mean**2, 0.0) / self._count) ** 0.5
        if mean > CERTAIN * error:
            self._told = True
            other = "light" if self._given == "dark" else "dark"
            self._report(
                f"warning: particles look {'lighter' if self._sign > 0 else 'darker'} than their "
                f"surroundings ({mean:.2f} ± {error:.2f} deviations in {self._count} cubes), as "
                f"if the contrast were inverted: the input was said to be {self._given}; if it is "
                f"not, start anew with --contrast {other} --overwrite"
            )


def _plan(
    classifier: Classifier, network: LoadedNetwork, source: CubeSource, block_size: int
) -> dict[str, object]:
    """What answers depend on: a change of any of it makes the journal that of other work."""
    options = asdict(source.options)
    for name in ("overwrite", "device", "batch_size", "ctf_correction"):
        del options[name]  # they change nothing but rounding, or nothing at all
    files, places = hashlib.sha256(), hashlib.sha256()
    for block in source.files:
        files.update(f"{block.path} {_stamp(block.path)}\n".encode())
        places.update(f"{len(block)} {block.box} ".encode())
        places.update(block.rows.tobytes() + block.places.tobytes())
    masking = classifier.segmenter
    return {
        "model": network.label,
        "card": network.card.digest(),
        "segmenter": None if masking is None else masking.label,
        "files": files.hexdigest(),
        "particles": places.hexdigest(),
        "block_size": block_size,
        **options,
    }


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _assemble(
    network: LoadedNetwork,
    source: CubeSource,
    pieces: Sequence[Piece],
    journal: Journal,
) -> Classification:
    card, table = network.card, source.table
    logits = np.full((len(table), len(card.classes)), np.nan, np.float32)
    faults = dict(source.faults)
    for number, piece in enumerate(pieces):
        rows = np.concatenate([block.rows for block in piece])
        answers = journal.read(number, len(rows))
        if answers is None:
            msg = (
                f"{journal.folder}: what was recorded of block {number} cannot be read back: give "
                "the same command again, which does that block anew"
            )
            raise OSError(msg)
        logits[rows] = answers.logits
        faults |= {int(rows[place]): why for place, why in answers.faults.items()}
    judgement = judge(logits, card)
    names = pd.array([NOT_PREDICTED, *card.classes], dtype="str").take(judgement.class_ids)
    columns: dict[str, object] = {
        "cectflowClassName": names,
        "cectflowClassNumber": judgement.class_ids,
        "cectflowProbability": judgement.of_class.round(6),
        "cectflowEntropy": judgement.entropy.round(6),
        "cectflowModel": _repeated(network.label, len(table)),
        "cectflowModelDigest": _repeated(card.digest(), len(table)),
    }
    if judgement.unknown is not None:
        columns["cectflowUnknown"] = judgement.unknown.astype(np.int64)
    if "rlnClassNumber" not in table.rows:
        columns["rlnClassNumber"] = judgement.class_ids
    found = np.bincount(judgement.class_ids, minlength=len(card.classes) + 1)[1:]
    order = sorted(range(len(found)), key=lambda index: (-found[index], card.classes[index]))
    predicted = judgement.class_ids > 0
    return Classification(
        table.with_columns(**columns),
        judgement,
        dict(sorted(faults.items())),
        {card.classes[index]: int(found[index]) for index in order if found[index]},
        float(judgement.of_class[predicted].mean()) if predicted.any() else 0.0,
        None if judgement.unknown is None else int(judgement.unknown.sum()),
    )


def _repeated(text: str, count: int) -> object:
    """The same text in each row, in a byte of each."""
    return pd.Categorical.from_codes(np.zeros(count, np.int8), pd.Index([text]))


def refuse_existing(
    paths: Iterable[Path | None],
    *,
    overwrite: bool,
    inputs: Iterable[Path] = (),
    begun: frozenset[Path] = frozenset(),
) -> None:
    """Refuse output paths that exist or whose folder is missing, before any work is done.

    Parameters
    ----------
    paths
        Of the outputs; None: not written.
    overwrite
        Replace files that exist.
    inputs
        Files that are read, which no output may replace.
    begun
        Outputs that an unfinished run may have left, which may be replaced.

    Raises
    ------
    FileExistsError
        If a file exists and may not be replaced.
    FileNotFoundError
        If a parent folder does not exist.
    ValueError
        If an output is an input, or two outputs are one file.
    IsADirectoryError
        If an output is a folder.
    """
    given = [path for path in paths if path is not None]
    taken: dict[Path, str] = {}
    if any(path.exists() for path in given):  # what is absent is no input, of which there are many
        taken = {path.resolve(): "is the input" for path in inputs}
    for path in given:
        resolved = path.resolve()
        if resolved in taken:
            msg = f"{path} {taken[resolved]}: give the output another name"
            raise ValueError(msg)
        taken[resolved] = "is given for two outputs"
        if path.is_dir():
            msg = f"{path} is a folder: expected the name of a file to write"
            raise IsADirectoryError(msg)
        if path.exists() and not overwrite and resolved not in begun:
            msg = f"{path} exists: give another --out, or --overwrite to replace it"
            raise FileExistsError(msg)
        if not path.parent.is_dir():
            msg = f"folder {path.parent} of the output {path.name} does not exist: create it first"
            raise FileNotFoundError(msg)
