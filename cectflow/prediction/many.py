"""Segmentation of many tomograms: one after the other or beside each other, whatever ends the work.

Each finished tomogram is recorded in a journal beside the outputs, so that what ends the work costs
the tomograms in hand. One that cannot be segmented costs itself; the journal is then kept, and the
same call does those alone that are mended.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cectflow.execution import HERE, Workplace, run_all
from cectflow.files import remove_leftovers_of
from cectflow.model_card import ModelCard
from cectflow.particles import particles_from
from cectflow.prediction.contract import InputOptions, LoadedNetwork, NetworkFiles, open_once
from cectflow.prediction.inputs import PLACEHOLDER
from cectflow.prediction.journal import Journal, open_journal, peek_journal, stamp_of
from cectflow.prediction.outputs import write_faults
from cectflow.prediction.picks import check_pick_name
from cectflow.prediction.tomogram import TomogramError, check_tomogram
from cectflow.prediction.whole import (
    WholeOptions,
    WholeOutputs,
    WholeSegmentation,
    plan_whole,
    segment_whole,
)

__all__ = ["ManyOutputs", "ManySegmentation", "segment_many"]

PICKS = "picks/"
"""Begins the names of a block's arrays that are columns of the table of picks."""

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
    find_picks: bool
    options: InputOptions
    whole: WholeOptions
    scratch: Path

    def __str__(self) -> str:
        return f"tomogram {self.path}"


@dataclass(frozen=True, eq=False)
class _Found:
    """Of a tomogram: share of each label, and picks where they were asked for."""

    shares: dict[str, float]
    picks: pd.DataFrame | None

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """For the journal."""
        arrays: dict[str, NDArray[Any]] = {
            "shares": np.frombuffer(json.dumps(self.shares).encode(), np.uint8)
        }
        if self.picks is not None:
            for name, column in self.picks.items():
                text = column.dtype == "str"
                arrays[f"{PICKS}{name}"] = column.to_numpy(np.str_ if text else None)
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> _Found:
        """What :meth:`to_arrays` gave."""
        columns = {
            name.removeprefix(PICKS): pd.array(array, dtype="str") if array.dtype.kind == "U"
            else array
            for name, array in arrays.items() if name.startswith(PICKS)
        }  # fmt: skip
        shares = json.loads(arrays["shares"].tobytes())
        return cls(shares, pd.DataFrame(columns) if columns else None)


def segment_many(
    network: NetworkFiles,
    tomograms: Mapping[str, Path | str],
    outputs: ManyOutputs,
    options: InputOptions,
    whole: WholeOptions,
    *,
    where: Workplace = HERE,
    report: Report,
    dry_run: bool = False,
) -> ManySegmentation | None:
    """Label maps, probabilities, picks and figures of many tomograms.

    The same call goes on from the tomograms that are finished, also with others more or less, and
    with those mended that have failed.

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
    dry_run
        Check and tell, and write nothing; the outcome is None.

    Raises
    ------
    ValueError
        If no tomogram can be segmented, or an earlier run with the same outputs was with another
        model or other options.
    """
    files, faults = _check(open_once(network), tomograms, outputs, options, whole)
    if not files:
        _refuse_all(faults)
    plan = {
        "model": network.label,
        "card": ModelCard.from_folder(network.folder).digest(),
        "window": whole.window,
        "blend": whole.blend,
        "average_turns": whole.average_turns,
        **whole.rules.model_dump(),
        **options.deciding,
    }
    blocks = {name: _number_of(name, path) for name, path in files.items()}
    out = outputs.each.labels
    if dry_run:
        journal = None if options.overwrite else peek_journal(out, plan)
        done = {} if journal is None else _finished(journal, outputs, blocks)
        report(
            f"would segment {len(files)} of {len(tomograms)} tomograms with {network.label} "
            f"({network.runtime}, {network.variant}, {network.device}), {len(done)} of which are "
            f"finished; to {out}"
        )
        for name in tomograms:
            report(f"{name}: {faults[name] if name in faults else files[name]}")
        return None
    written = outputs.paths([*tomograms])
    with open_journal(out, plan, anew=options.overwrite, outputs=written) as journal:
        found = _finished(journal, outputs, blocks)
        if found:
            report(f"going on: {len(found)} of {len(files)} tomograms are finished")
        here = where == HERE
        notes = _Notes(report)
        scratch = journal.folder.absolute()
        elsewhere = replace(network, folder=network.folder.absolute())
        jobs = [
            _Job(
                network if here else elsewhere, name, path.absolute(),
                _absolute(outputs.of(name)), outputs.each.picks is not None,
                replace(options, overwrite=True), whole, scratch,
            )
            for name, path in files.items()
            if name not in found
        ]  # fmt: skip
        folders = {job.path.parent for job in jobs} | {out.absolute().parent}
        for job, answer, said in run_all(
            partial(_segment, tell=notes) if here else _segment, jobs, where=where,
            title="segmenting tomograms", paths=(elsewhere.folder, scratch, *sorted(folders)),
        ):  # fmt: skip
            for line in said:
                notes(job.name, line)
            if isinstance(answer, str):
                faults[job.name] = answer
                report(f"{job.name} cannot be segmented: {answer}")
                continue
            journal.record(blocks[job.name], answer.to_arrays())
            found[job.name] = answer
            report(f"{job.name}: {_describe(answer)}")
        journal.is_kept = bool(faults)
        if not found:
            _refuse_all(faults)
        return _assemble(outputs, {name: found[name] for name in files if name in found}, faults)


def _check(
    network: LoadedNetwork,
    tomograms: Mapping[str, Path | str],
    outputs: ManyOutputs,
    options: InputOptions,
    whole: WholeOptions,
) -> tuple[dict[str, Path], dict[str, str]]:
    """Tomograms whose headers say that they can be segmented, and why others cannot."""
    files: dict[str, Path] = {}
    faults: dict[str, str] = {}
    shapes: set[tuple[int, int, int]] = set()
    for name, path in tomograms.items():
        if isinstance(path, str):
            faults[name] = path
            continue
        try:
            shapes.add(check_tomogram(path, network.card, options))
            check_pick_name(name, outputs.each.picks)
            files[name] = path
        except ValueError as error:
            faults[name] = str(error)
    for shape in shapes:
        plan_whole(network, shape, whole)  # a window that is too small is so for most
    return files, faults


def _refuse_all(faults: Mapping[str, str]) -> NoReturn:
    name, reason = next(iter(faults.items()))
    msg = f"none of {len(faults)} tomograms can be segmented; the first, {name}: {reason}"
    raise ValueError(msg)


def _number_of(name: str, path: Path) -> int:
    """Of a tomogram's block in the journal: another one for another file, or one that changed."""
    try:
        stamp = stamp_of(path)
    except OSError:
        stamp = (0, 0)  # it has vanished: whoever reads it will say so
    content = f"{name}\0{os.fspath(path.absolute())}\0{stamp}"
    return int(hashlib.sha256(os.fsencode(content)).hexdigest()[:15], 16)


def _absolute(outputs: WholeOutputs) -> WholeOutputs:
    """Of a worker that may run in another folder."""
    labels, *others = (path and path.absolute() for path in outputs.paths)
    assert labels is not None
    return WholeOutputs(labels, *others)


def _finished(
    journal: Journal, outputs: ManyOutputs, blocks: Mapping[str, int]
) -> dict[str, _Found]:
    """What was found in tomograms all of whose files are there."""
    found: dict[str, _Found] = {}
    recorded = journal.finished()
    for name, number in blocks.items():
        answer = journal.read(number, _Found.from_arrays) if number in recorded else None
        if answer is None or (outputs.each.picks is not None and answer.picks is None):
            continue
        if all(path is None or path.is_file() for path in outputs.of(name).paths):
            found[name] = answer
    return found


class _Notes:
    """Says of tomograms what is to say of them; what holds for all is said once."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._told: set[str] = set()

    def __call__(self, name: str, line: str) -> None:
        if line not in self._told:
            self._told.add(line)
            self._report(f"{name}: {line}")


def _segment(
    job: _Job, tell: Callable[[str, str], None] | None = None
) -> tuple[_Job, _Found | str, list[str]]:
    """What was found, or why nothing could be; and what is to be said of it, if not at once."""
    said: list[str] = []
    try:
        outcome = segment_whole(
            open_once(job.network), job.path, job.outputs, job.options, job.whole,
            said.append if tell is None else partial(tell, job.name),
            name=job.name, find_picks=job.find_picks, scratch=job.scratch,
        )  # fmt: skip
    except TomogramError as error:
        return job, str(error), said
    picks = None if outcome.picks is None else outcome.picks.rows
    return job, _Found(outcome.shares, picks), said


def _describe(found: _Found) -> str:
    picks = None if found.picks is None else particles_from(found.picks)
    return "; ".join(WholeSegmentation(found.shares, picks).describe())


def _assemble(
    outputs: ManyOutputs, found: Mapping[str, _Found], faults: Mapping[str, str]
) -> ManySegmentation:
    """Outcome of all; writes the list of failures and the table of all picks."""
    write_faults(outputs.failures, ("tomogram", "reason"), [*faults.items()])
    tables = [each.picks for each in found.values() if each.picks is not None]
    counts: Counter[str] = Counter()
    for table in tables:
        counts.update(table["cectflowClassName"])
    if outputs.all_picks is not None:
        remove_leftovers_of(outputs.all_picks)
        # An empty table says nothing of how its columns are kept, but for the last word.
        rows = [table for table in tables if len(table)] or tables[:1]
        together = particles_from(pd.concat(rows, ignore_index=True))
        together.write(outputs.all_picks, overwrite=True)
    picks = None if outputs.each.picks is None else dict(counts.most_common())
    return ManySegmentation({name: each.shares for name, each in found.items()}, {**faults}, picks)
