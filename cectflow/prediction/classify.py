"""Classification of particles: cubes in, the input's table with class and probability out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cectflow.execution import track
from cectflow.particles import ParticleTable
from cectflow.prediction.contract import LoadedNetwork
from cectflow.prediction.source import CubeSource
from cectflow.trust import find_unknown, probabilities_of

__all__ = ["Classification", "classify_particles", "refuse_existing"]


@dataclass(frozen=True, eq=False)
class Classification:
    """Outcome of a classification.

    Attributes
    ----------
    table
        The input's rows, columns and blocks, with ``cectflowClassName``,
        ``cectflowClassNumber`` (from 1), ``cectflowProbability`` and ``cectflowModel`` added,
        and ``rlnClassNumber`` where the input had none. Where the card states how sure the network
        may be, probabilities are calibrated, and ``cectflowUnknown`` is 1 where the particle looks
        like none of the classes; its class is then the least unlikely one.
    counts
        Class name → number of particles, most frequent first.
    mean_probability
        Of the chosen classes.
    num_unknown
        Particles that look like none of the classes; None where the card has no threshold.
    """

    table: ParticleTable
    counts: dict[str, int]
    mean_probability: float
    num_unknown: int | None = None


def classify_particles(network: LoadedNetwork, source: CubeSource) -> Classification:
    """Classification of every particle of a source."""
    rows = len(source.table.rows)
    logits = [
        network.infer(cubes)
        for cubes in track(source.batches(), total=source.num_batches, title="classifying")
    ]
    answers, trust = np.concatenate(logits), network.card.trust
    assert len(answers) == rows
    probabilities = probabilities_of(answers, 1.0 if trust is None else trust.temperature)
    chosen = probabilities.argmax(axis=1)
    names = [network.card.classes[index] for index in chosen]
    columns: dict[str, object] = {
        "cectflowClassName": names,
        "cectflowClassNumber": chosen + 1,
        "cectflowProbability": probabilities[np.arange(rows), chosen].round(6),
        "cectflowModel": [network.label] * rows,
    }
    unknown = None if trust is None else find_unknown(answers, trust)
    if unknown is not None:
        columns["cectflowUnknown"] = unknown.astype(np.int64)
    if "rlnClassNumber" not in source.table.rows:
        columns["rlnClassNumber"] = chosen + 1
    tally = sorted(((names.count(name), name) for name in set(names)), reverse=True)
    return Classification(
        source.table.with_columns(**columns),
        {name: count for count, name in tally},
        float(probabilities.max(axis=1).mean()),
        None if unknown is None else int(unknown.sum()),
    )


def refuse_existing(
    paths: tuple[Path | None, ...], *, overwrite: bool, inputs: tuple[Path, ...] = ()
) -> None:
    """Refuse output paths that exist or whose folder is missing, before any work is done.

    Parameters
    ----------
    paths
        Of the outputs; None: not written.
    overwrite
        Replace files that exist.
    inputs
        Volumes that are read, which no output may replace.

    Raises
    ------
    FileExistsError
        If a file exists and may not be replaced.
    FileNotFoundError
        If a parent folder does not exist.
    ValueError
        If an output is an input, or two outputs are one file.
    """
    taken = {path.resolve(): "is the input" for path in inputs}
    for path in paths:
        if path is None:
            continue
        if path.resolve() in taken:
            msg = f"{path} {taken[path.resolve()]}: give the output another name"
            raise ValueError(msg)
        taken[path.resolve()] = "is given for two outputs"
        if path.exists() and not overwrite:
            msg = f"{path} exists: give another --out, or --overwrite to replace it"
            raise FileExistsError(msg)
        if not path.parent.is_dir():
            msg = f"folder {path.parent} of the output {path.name} does not exist: create it first"
            raise FileNotFoundError(msg)
