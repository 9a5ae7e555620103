"""Classification of particles: cubes in, the input's table with class and probability out.

The particles are worked through in blocks, by this process or by others, and every finished block
is recorded (:mod:`.journal`), so that what ends the work costs one block.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cectflow.execution import HERE, Workplace, run_all
from cectflow.particles import NOT_PREDICTED, ParticleTable
from cectflow.prediction.asking import (
    Answers,
    Classifier,
    Job,
    Piece,
    answer,
    answer_each,
    count_particles,
    split_blocks,
)
from cectflow.prediction.contract import LoadedNetwork
from cectflow.prediction.contrast import ContrastWatch
from cectflow.prediction.journal import Journal, open_journal, stamp_of
from cectflow.prediction.judging import Judgement, judge
from cectflow.prediction.matching import group_by_spectrum, settle_spectrum
from cectflow.prediction.source import CubeSource

__all__ = ["BLOCK_SIZE", "Classification", "classify_particles", "plan_work"]

BLOCK_SIZE = 1024
"""Particles that are predicted and recorded together: a second of work or less for a student."""

Report = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Classification:
    """Outcome of a classification.

    Attributes
    ----------
    table
        The input's rows, columns and blocks, with ``cectflowClassName``, ``cectflowClassNumber``
        (from 1), ``cectflowProbability``, ``cectflowEntropy`` (nats), ``cectflowModel`` and
        ``cectflowModelDigest`` added, and ``rlnClassNumber`` where the input had none of another
        program. Where the
        card states how sure the network may be, probabilities are calibrated, and
        ``cectflowUnknown`` is 1 where the particle looks like none of the classes; its class is
        then the least unlikely one. A particle that could not be predicted is of the class
        ``none``, number 0.
    source
        What was read, with its filters.
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
    source: CubeSource = field(repr=False)
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
    plan = plan_work(classifier, network, source, block_size)
    with open_journal(out, plan, anew=anew, outputs=(out, *outputs)) as journal:
        source = settle_spectrum(source, network.label, report, journal)
        pieces = split_blocks(source, block_size)
        done = _intact(journal, pieces)
        if done:
            report(f"going on: {len(done)} of {len(pieces)} blocks are finished")
        elsewhere = classifier.absolute()  # workers may run in another folder
        jobs = [
            Job(
                elsewhere,
                tuple(replace(block, path=block.path.absolute()) for block in piece),
                source.options,
                number,
            )
            for number, piece in enumerate(pieces)
            if number not in done
        ]
        began, predicted = time.perf_counter(), 0
        watch = ContrastWatch(source.card, source.options, report)

        def rate() -> str:
            return f"{predicted / max(time.perf_counter() - began, 1e-3):,.0f} particles/s"

        paths = (elsewhere.network.folder, *{block.path.absolute() for block in source.files})
        for number, answers in run_all(
            answer, jobs, where=where, title="classifying", paths=paths, status=rate,
            alone=answer_each,
        ):  # fmt: skip
            journal.record(number, answers.to_arrays())
            predicted += len(answers.logits)
            watch.see(answers.lightness)
        seconds = time.perf_counter() - began
        outcome = _assemble(network, source, pieces, journal)
        outcome = replace(outcome, per_second=predicted / seconds if jobs else 0.0)
        finish(outcome)
    return outcome


def _answers_of(piece: Piece) -> Callable[[Mapping[str, NDArray[Any]]], Answers]:
    """Reads what the journal has of a piece."""
    return partial(Answers.from_arrays, count=count_particles(piece))


def _intact(journal: Journal, pieces: Sequence[Piece]) -> frozenset[int]:
    """Numbers of the pieces that are finished; files that are damaged are dropped."""
    for number in journal.finished():
        if number >= len(pieces) or journal.read(number, _answers_of(pieces[number])) is None:
            journal.forget(number)
    return journal.finished()


def plan_work(
    classifier: Classifier, network: LoadedNetwork, source: CubeSource, block_size: int
) -> dict[str, object]:
    """What answers depend on: a change of any of it makes the journal that of other work."""
    files, places = hashlib.sha256(), hashlib.sha256()
    for block in source.files:
        files.update(f"{block.path} {stamp_of(block.path)}\n".encode())
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
        **_filters(source),
        **source.options.deciding,
    }


def _filters(source: CubeSource) -> dict[str, str]:
    """Which particles share a filter, where there are filters: the table may have other names."""
    if not source.options.match_spectrum:
        return {}
    content = hashlib.sha256()
    for group in group_by_spectrum(source):
        content.update(group.name.encode())
        for number, places in group.parts:
            content.update(f" {number} ".encode() + places.tobytes())
    return {"spectra": content.hexdigest()}


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
        answers = journal.read(number, _answers_of(piece))
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
    if not _has_foreign_class(table.rows):
        columns["rlnClassNumber"] = judgement.class_ids
    found = np.bincount(judgement.class_ids, minlength=len(card.classes) + 1)[1:]
    order = sorted(range(len(found)), key=lambda index: (-found[index], card.classes[index]))
    predicted = judgement.class_ids > 0
    return Classification(
        table.with_columns(**columns),
        source,
        judgement,
        dict(sorted(faults.items())),
        {card.classes[index]: int(found[index]) for index in order if found[index]},
        float(judgement.of_class[predicted].mean()) if predicted.any() else 0.0,
        None if judgement.unknown is None else int(judgement.unknown.sum()),
    )


def _has_foreign_class(rows: pd.DataFrame) -> bool:
    """Whether ``rlnClassNumber`` is another program's: an earlier prediction's own is replaced."""
    if "rlnClassNumber" not in rows:
        return False
    own = rows.get("cectflowClassNumber")
    return own is None or not rows["rlnClassNumber"].equals(own)


def _repeated(text: str, count: int) -> object:
    """The same text in each row, in a byte of each."""
    return pd.Categorical.from_codes(np.zeros(count, np.int8), pd.Index([text]))
