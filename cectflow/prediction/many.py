"""Segmentation of many tomograms: one after the other or beside each other, whatever ends the work.

Each finished tomogram is recorded in a journal beside the outputs, so that what ends the work costs
the tomograms in hand; one that cannot be segmented costs itself.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cectflow.execution import HERE, Workplace, run_all
from cectflow.files import remove_leftovers_of
from cectflow.model_card import ModelCard
from cectflow.particles import particles_from, read_particles
from cectflow.prediction.contract import (
    InputOptions,
    LoadedNetwork,
    NetworkFiles,
    open_network,
)
from cectflow.prediction.inputs import PLACEHOLDER
from cectflow.prediction.journal import Journal, open_journal, stamp_of
from cectflow.prediction.outputs import write_faults
from cectflow.prediction.tomogram import TomogramError
from cectflow.prediction.whole import WholeOptions, WholeOutputs, segment_whole

__all__ = ["ManyOutputs", "ManySegmentation", "segment_many"]

Report = Callable[[str], None]


@dataclass(frozen=True)
class ManyOutputs:
    """Files to write of many tomograms, in whose names ``{name}`` stands for each tomogram's.

    Attributes
    ----------
    each
        Of a tomogram. Picks whose name has no ``{name}`` are one table of all tomograms.

    Raises
    ------
    ValueError
        If tomograms would overwrite each other's files.
    """

    each: WholeOutputs

    def __post_init__(self) -> None:
        for option, path in (
            ("--out", self.each.labels),
            ("--probabilities", self.each.probabilities),
            ("--figure", self.each.figure),
        ):
            if path is not None and PLACEHOLDER not in path.name:
                msg = (
                    f"{option} {path} would be one file of many tomograms: put {PLACEHOLDER} into "
                    f"its name, such as {path.with_name(f'{PLACEHOLDER}{path.suffix}')}"
                )
                raise ValueError(msg)
        for path in self.each.paths:
            if path is not None and PLACEHOLDER in str(path.parent):
                msg = f"{path}: {PLACEHOLDER} stands in the name of a file, not of its folder"
                raise ValueError(msg)

    def of(self, name: str) -> WholeOutputs:
        """Of one tomogram; without the table that is of all."""
        named = [
            None if path is None else path.with_name(path.name.replace(PLACEHOLDER, name))
            for path in self.each.paths
        ]
        labels, probabilities, picks, figure = named
        assert labels is not None
        return WholeOutputs(
            labels, probabilities, None if self.all_picks is not None else picks, figure
        )

    @property
    def all_picks(self) -> Path | None:
        """The one table of all picks, where it is asked for."""
        picks = self.each.picks
        return picks if picks is not None and PLACEHOLDER not in picks.name else None

    @property
    def failures(self) -> Path:
        """List of the tomograms that were not segmented; written where there are any."""
        labels = self.each.labels
        rest = labels.stem.replace(PLACEHOLDER, "").strip("-_. ") or "tomograms"
        return labels.with_name(f"{rest}_failures.csv")

    def paths(self, names: Sequence[str]) -> list[Path]:
        """All files that may be written."""
        each = [path for name in names for path in self.of(name).paths]
        return [path for path in (*each, self.all_picks, self.failures) if path is not None]


@dataclass(frozen=True, eq=False)
class ManySegmentation:
    """Outcome of a segmentation of many tomograms.

    Attributes
    ----------
    shares
        Tomogram → label name → share of its voxels.
    faults
        Tomogram → why it was not segmented.
    num_picks
        Class name → number of picks, most frequent first; None where none were asked for.
    """

    shares: dict[str, dict[str, float]]
    faults: dict[str, str]
    num_picks: dict[str, int] | None

    @property
    def figures(self) -> dict[str, float]:
        """What a run logs: shares are means over the tomograms."""
        found = {"tomograms": float(len(self.shares)), "failed": float(len(self.faults))}
        if self.num_picks is not None:
            found["particles"] = float(sum(self.num_picks.values()))
        names = next(iter(self.shares.values()))
        for name in names:
            mean = np.mean([shares[name] for shares in self.shares.values()])
            found[f"share/{name}"] = float(mean)
        return found


@dataclass(frozen=True, eq=False)
class _Job:
    """A tomogram, and with what it is to be segmented; ``scratch`` is for what lies between."""

    network: NetworkFiles
    name: str
    path: Path
    outputs: WholeOutputs
    options: InputOptions
    whole: WholeOptions
    number: int
    scratch: Path

    def __str__(self) -> str:
        return f"tomogram {self.path}"


@dataclass(frozen=True)
class _Found:
    """Of a tomogram: shares and picks of each class, or a fault."""

    shares: dict[str, float]
    picks: dict[str, int] | None
    fault: str | None

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """For the journal."""
        return {"found": np.frombuffer(json.dumps(asdict(self)).encode(), np.uint8)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> _Found:
        """What :meth:`to_arrays` gave."""
        return cls(**json.loads(arrays["found"].tobytes()))


def segment_many(
    network: NetworkFiles,
    tomograms: Mapping[str, Path | str],
    outputs: ManyOutputs,
    options: InputOptions,
    whole: WholeOptions,
    *,
    where: Workplace = HERE,
    report: Report,
) -> ManySegmentation:
    """Label maps, probabilities, picks and figures of many tomograms.

    The same call goes on from the tomograms that are finished.

    Parameters
    ----------
    network
        A semantic segmenter.
    tomograms
        Name → volume, or why there is none.
    outputs
        What to write.
    options, whole
        As of :func:`~cectflow.prediction.whole.segment_whole`; ``options.overwrite`` starts anew.
    where
        Processes, each of which has one tomogram at a time.
    report
        Told what is done and found, tomogram by tomogram.

    Raises
    ------
    ValueError
        If no tomogram could be segmented, or an earlier run with the same outputs was of other
        work.
    """
    paths = {name: path.absolute() for name, path in tomograms.items() if isinstance(path, Path)}
    faults = {name: path for name, path in tomograms.items() if isinstance(path, str)}
    card = ModelCard.from_folder(network.folder)
    files = hashlib.sha256()
    for name, path in paths.items():
        files.update(f"{name} {path} {stamp_of(path)}\n".encode())
    plan = {
        "model": network.label,
        "card": card.digest(),
        "tomograms": files.hexdigest(),
        "files": [None if path is None else path.name for path in outputs.each.paths],
        "window": whole.window,
        "blend": whole.blend,
        "average_turns": whole.average_turns,
        "rules": whole.rules.model_dump(),
        **options.deciding,
    }
    names = [*paths]
    with open_journal(
        outputs.each.labels, plan, anew=options.overwrite, outputs=outputs.paths([*tomograms])
    ) as journal:
        done = _intact(journal, outputs, names)
        if done:
            report(f"going on: {len(done)} of {len(names)} tomograms are finished")
        absolute = replace(network, folder=network.folder.absolute())
        folder = journal.folder.absolute()
        jobs = [
            _Job(
                absolute, name, paths[name], _outputs_of(outputs, name, number, folder),
                replace(options, overwrite=True), whole, number, folder,
            )
            for number, name in enumerate(names)
            if number not in done
        ]  # fmt: skip
        shared = (absolute.folder, folder, *paths.values())
        told: set[str] = set()
        for number, found, said in run_all(
            _segment, jobs, where=where, title="segmenting tomograms", paths=shared
        ):
            journal.record(number, found.to_arrays())
            *notes, result = said
            for line in (*(note for note in notes if note not in told), result):
                report(f"{names[number]}: {line}")
            told.update(notes)  # what holds for all is said once
        return _assemble(journal, outputs, names, faults, options)


def _outputs_of(outputs: ManyOutputs, name: str, number: int, folder: Path) -> WholeOutputs:
    """Absolute paths of a tomogram's files; picks for the table of all are kept in the journal."""
    own = outputs.of(name)
    absolute = WholeOutputs(
        own.labels.absolute(), *(path and path.absolute() for path in own.paths[1:])
    )
    if outputs.all_picks is None:
        return absolute
    return replace(absolute, picks=_kept_picks(folder, number))


def _kept_picks(folder: Path, number: int) -> Path:
    return folder / f"{number:07d}.star"


def _intact(journal: Journal, outputs: ManyOutputs, names: Sequence[str]) -> frozenset[int]:
    """Numbers of the tomograms that are finished and whose files are there."""
    for number in journal.finished():
        found = journal.read(number, _Found.from_arrays) if number < len(names) else None
        if found is not None and found.fault is None:
            expected = _outputs_of(outputs, names[number], number, journal.folder).paths
            if all(path is None or path.is_file() for path in expected):
                continue
        journal.forget(number)  # what has failed is tried again, too
    return journal.finished()


def _segment(job: _Job) -> tuple[int, _Found, list[str]]:
    said: list[str] = []
    for path in job.outputs.paths:
        if path is not None:
            remove_leftovers_of(path)
    try:
        outcome = segment_whole(
            _open(job.network), job.path, job.outputs, job.options, job.whole, said.append,
            name=job.name, scratch=job.scratch,
        )  # fmt: skip
    except TomogramError as error:
        return job.number, _Found({}, None, str(error)), [*said, f"cannot be segmented: {error}"]
    said.append("; ".join(outcome.describe()))
    return job.number, _Found(outcome.shares, outcome.num_picks, None), said


@lru_cache(maxsize=1)
def _open(network: NetworkFiles) -> LoadedNetwork:
    return open_network(network)


def _assemble(
    journal: Journal,
    outputs: ManyOutputs,
    names: Sequence[str],
    faults: Mapping[str, str],
    options: InputOptions,
) -> ManySegmentation:
    """Outcome of all; writes the list of failures and the table of all picks."""
    shares: dict[str, dict[str, float]] = {}
    failed = dict(faults)
    counts: Counter[str] = Counter()
    tables: list[pd.DataFrame] = []
    for number, name in enumerate(names):
        found = journal.read(number, _Found.from_arrays)
        if found is None:
            msg = (
                f"{journal.folder}: what was recorded of the tomogram {name!r} cannot be read "
                "back: give the same command again, which does it anew"
            )
            raise OSError(msg)
        if found.fault is not None:
            failed[name] = found.fault
            continue
        shares[name] = found.shares
        counts.update(found.picks or {})
        if outputs.all_picks is not None:
            tables.append(read_particles(_kept_picks(journal.folder, number)).rows)
    if not shares:
        name, reason = next(iter(failed.items()))
        msg = f"none of {len(failed)} tomograms could be segmented; the first, {name}: {reason}"
        raise ValueError(msg)
    write_faults(
        outputs.failures, ("tomogram", "reason"), [*failed.items()], overwrite=options.overwrite
    )
    if outputs.all_picks is not None:
        rows = pd.concat(tables, ignore_index=True)
        particles_from(rows).write(outputs.all_picks, overwrite=True)
    picks = None if outputs.each.picks is None else dict(counts.most_common())
    return ManySegmentation(shares, failed, picks)
