"""Prediction logged as an MLflow run: what was read, what came out, how fast."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from cectflow.execution import HERE, Workplace
from cectflow.files import sha256_of
from cectflow.flows.prediction import predict_classes
from cectflow.prediction.classify import BLOCK_SIZE, Classification
from cectflow.prediction.contract import InputOptions
from cectflow.prediction.inputs import InputFiles
from cectflow.prediction.outputs import ClassOutputs, summarise
from cectflow.prediction.source import Block
from cectflow.tracking.registry import find_version
from cectflow.tracking.runs import Run

if TYPE_CHECKING:  # numba and much of scipy come with it: classifying does without
    from cectflow.prediction.whole import WholeOutputs

__all__ = ["log_classes", "log_segments"]

HASHED_BYTES = 16 * 2**30
"""Of volumes whose digests are taken, half a minute's work; later ones are named by size and
time."""


def log_classes(
    run: Run,
    model: str,
    files: InputFiles,
    outputs: ClassOutputs,
    options: InputOptions,
    report: Callable[[str], None],
    *,
    mask_with: str | None = None,
    where: Workplace = HERE,
    block_size: int = BLOCK_SIZE,
) -> Classification:
    """Classification of particles with its inputs, figures and files in a run.

    Inputs are logged before the work starts, so that a run that is killed has them too. Where some
    particles could not be predicted, they are counted as ``failed``, and the tag ``outcome`` is
    ``incomplete``.

    Parameters
    ----------
    run
        Receives it.
    model, files, outputs, options, report, mask_with, where, block_size
        As of :func:`~cectflow.flows.prediction.predict_classes`.
    """
    if not Path(model).is_dir():
        run.log_input_model(find_version(model))

    outcome = predict_classes(
        model, files, outputs, options, report, mask_with=mask_with, where=where,
        block_size=block_size,
        opened=lambda source: _log_inputs(run, files, source.particles_per_file),
    )  # fmt: skip
    table = outcome.table
    figures: dict[str, float | int] = {
        f"count/{name}": count for name, count in outcome.counts.items()
    }
    figures |= {"particles": len(table), "failed": len(outcome.faults)}
    figures |= {"probability": outcome.mean_probability, "per_second": outcome.per_second}
    predicted = outcome.judgement.class_ids > 0
    if predicted.any():
        figures["entropy"] = float(outcome.judgement.entropy[predicted].mean())
    if outcome.num_unknown is not None:
        figures["unknown"] = outcome.num_unknown
    run.log(figures)
    run.set_tags(
        {
            "predicted_with": str(table.rows["cectflowModel"].iloc[0]),
            "outcome": "incomplete" if outcome.faults else "complete",
        }
    )
    run.log_json(
        [
            {"class": name, "particles": count, "probability": probability, "entropy": entropy}
            for name, count, probability, entropy in summarise(outcome)
        ],
        "classes.json",
    )
    if options.match_spectrum:
        run.log_json(_describe_filters(outcome.source.files), "spectra.json")
    for path in (outputs.star, outputs.table, outputs.summary, outputs.failures):
        if path is not None and path.is_file():
            run.log_files(path)
    return outcome


def log_segments(
    run: Run,
    model: str,
    files: InputFiles,
    outputs: WholeOutputs,
    options: InputOptions,
    report: Callable[[str], None],
    where: Workplace = HERE,
) -> bool:
    """Segmentation with its inputs, figures and files in a run; of many tomograms without the maps.

    Where some tomograms could not be segmented, they are counted as ``failed``, and the tag
    ``outcome`` is ``incomplete``.

    Parameters
    ----------
    run
        Receives it.
    model, files, outputs, options, report, where
        As of :func:`~cectflow.flows.segmentation.predict_segments`.

    Returns
    -------
    bool
        Whether all tomograms were segmented.
    """
    from cectflow.flows.segmentation import predict_segments
    from cectflow.prediction.many import ManyOutputs, ManySegmentation

    if not Path(model).is_dir():
        run.log_input_model(find_version(model))
    volumes = files.volumes
    if files.tomogram is not None and files.particles is None:
        given = files.whole_tomograms().values()
        volumes = tuple(path for path in given if isinstance(path, Path))
    _log_inputs(run, files, dict.fromkeys(volumes))
    outcome = predict_segments(model, files, outputs, options, report, where=where)
    assert outcome is not None
    run.log(outcome.figures)
    complete, last = True, outputs.labels
    if isinstance(outcome, ManySegmentation):
        complete, last = not outcome.faults, ManyOutputs(outputs).failures
        run.log_json(outcome.shares, "shares.json")
    run.set_tags({"outcome": "complete" if complete else "incomplete"})
    for path in (outputs.picks, last):
        if path is not None and path.is_file():
            run.log_files(path)
    return complete


def _describe_filters(blocks: Iterable[Block]) -> list[dict[str, object]]:
    """Each filter once, small tomograms share one, with its particles and their files."""
    filtered: dict[tuple[float, ...] | None, list[Block]] = {}
    for block in blocks:
        filtered.setdefault(block.gain, []).append(block)
    return [
        {
            "gain": gain,
            "particles": sum(map(len, own)),
            "files": list(dict.fromkeys(str(block.path) for block in own)),
        }
        for gain, own in filtered.items()
    ]


def _log_inputs(run: Run, files: InputFiles, volumes: Mapping[Path, int | None]) -> None:
    """Names, sizes and digests of the particle file and the volumes.

    Parameters
    ----------
    run, files
        As of :func:`log_classes`.
    volumes
        Volume → number of particles read from it, where they are known.
    """
    if files.particles is not None:
        where = str(files.particles.resolve())
        run.log_dataset(files.particles.name, sha256_of(files.particles), where, "particles")
    if not volumes:
        return
    hashed = 0
    described: list[dict[str, object]] = []
    for path, particles in volumes.items():
        stat = path.stat()
        hashed += stat.st_size
        described.append(
            {
                "path": str(path.resolve()),
                "particles": particles,
                "bytes": stat.st_size,
                "modified": datetime.fromtimestamp(stat.st_mtime, UTC).isoformat(),
                # Zarr is a folder: named by size and time, too.
                "sha256": sha256_of(path) if hashed <= HASHED_BYTES and path.is_file() else None,
            }
        )
    run.log_json(described, "volumes.json")
    together = hashlib.sha256(
        repr([each["sha256"] or (each["bytes"], each["modified"]) for each in described]).encode()
    ).hexdigest()
    first = next(iter(volumes))
    more = f" and {len(volumes) - 1} more" if len(volumes) > 1 else ""
    given = str(files.tomogram or files.subtomograms)
    run.log_dataset(f"{first.name}{more}", together, given, "volumes")
