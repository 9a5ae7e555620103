"""Outputs of a classification beside its STAR file: tables, lists of failures, and a picture."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy.typing import NDArray

from cectflow.files import remove_leftovers_of, replacing
from cectflow.particles import NOT_PREDICTED
from cectflow.prediction.classify import Classification
from cectflow.prediction.source import CubeSource, read_block
from cectflow.star import refuse_unwritable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ClassOutputs", "draw_summary", "summarise", "write_faults", "write_outputs"]

STAR_SUFFIXES = (".star", ".csv")
TABLE_SUFFIXES = (".parquet", ".csv")
SUMMARY_SUFFIXES = (".png",)
IDENTITY_COLUMNS = ("rlnImageName", "rlnTomoName", "rlnMicrographName", "rlnTomoParticleId")
"""Columns of the input that the table of probabilities repeats."""
EXAMPLES = 6
"""Cubes of each class in the picture."""


@dataclass(frozen=True)
class ClassOutputs:
    """Files of a classification; None: not written.

    Attributes
    ----------
    star
        The input's table with the answers (CSV where the name ends so).
    table
        Parquet or CSV: position in the input, class, and the probability of every class.
    per_class
        Folder with a STAR file for each class.
    summary
        PNG: how many of each class, how sure, and some cubes of each.

    Raises
    ------
    ValueError
        If the table's name ends otherwise.
    """

    star: Path
    table: Path | None = None
    per_class: Path | None = None
    summary: Path | None = None

    def __post_init__(self) -> None:
        for path, what, suffixes in (
            (self.star, "a particle table", STAR_SUFFIXES),
            (self.table, "a table", TABLE_SUFFIXES),
            (self.summary, "a picture", SUMMARY_SUFFIXES),
        ):
            if path is not None and path.suffix not in suffixes:
                msg = f"{path} would be {what}: expected a name in {', '.join(suffixes)}"
                raise ValueError(msg)

    @property
    def failures(self) -> Path:
        """List of the particles that were not predicted; written where there are any."""
        return self.star.with_name(f"{self.star.stem}_failures.csv")

    @property
    def paths(self) -> tuple[Path | None, ...]:
        """Files beside those of the classes."""
        return self.star, self.failures, self.table, self.summary

    def class_files(self, classes: Sequence[str]) -> dict[str, Path]:
        """STAR file of each class, if they were asked for; no two classes share one.

        Raises
        ------
        NotADirectoryError
            If the folder is a file.
        FileNotFoundError
            If the folder could not be made: its own folder is missing.
        """
        if self.per_class is None:
            return {}
        if self.per_class.exists() and not self.per_class.is_dir():
            msg = f"{self.per_class} is a file: expected a folder for the STAR files of the classes"
            raise NotADirectoryError(msg)
        if not self.per_class.parent.is_dir():
            msg = f"folder {self.per_class.parent} of {self.per_class} does not exist: create it"
            raise FileNotFoundError(msg)
        files: dict[str, Path] = {}
        taken: set[str] = set()
        for number, name in enumerate(classes, 1):
            plain = plain_name(name)
            if plain.lower() in taken:  # some file systems do not tell a from A
                plain = f"{plain}_{number}"
            taken.add(plain.lower())
            files[name] = self.per_class / f"{plain}.star"
        return files

    def check_table(self, source: CubeSource) -> None:
        """Refuse a particle table that could not be written as STAR.

        Raises
        ------
        ValueError
            With the first column or text that a STAR file would not give back.
        """
        if self.star.suffix == ".star" or self.per_class is not None:
            try:
                refuse_unwritable(source.table.blocks)
            except ValueError as error:
                msg = f"the particles cannot be written as STAR: {error}; give --out a name in .csv"
                raise ValueError(msg) from None


def write_outputs(outputs: ClassOutputs, outcome: Classification, *, overwrite: bool) -> None:
    """Write all that was asked for; the STAR file comes last, so that it stands for all."""
    classes = outcome.source.card.classes
    files = outputs.class_files(classes)
    for path in (*outputs.paths, *files.values()):
        if path is not None:
            remove_leftovers_of(path)
    _write_failures(outputs.failures, outcome)
    if outputs.table is not None:
        frame = _probability_table(outcome, classes)
        with replacing(outputs.table, overwrite=overwrite) as temporary:
            if outputs.table.suffix == ".csv":
                frame.to_csv(temporary, index=False)
            else:
                frame.to_parquet(temporary, index=False)
    if outputs.per_class is not None:
        outputs.per_class.mkdir(exist_ok=True)
    for number, path in enumerate(files.values(), 1):
        chosen = outcome.judgement.class_ids == number
        if chosen.any():
            outcome.table.select(chosen).write(path, overwrite=overwrite)
        elif overwrite:
            path.unlink(missing_ok=True)
    if outputs.summary is not None:
        figure = draw_summary(outcome)
        with replacing(outputs.summary, overwrite=overwrite) as temporary:
            figure.savefig(temporary, format="png", dpi=200)
    outcome.table.write(outputs.star, overwrite=overwrite)


def _write_failures(path: Path, outcome: Classification) -> None:
    """Row (from 1), name and reason of each particle without a prediction."""
    rows = outcome.table.rows
    column = next((name for name in IDENTITY_COLUMNS if name in rows), None)
    names = np.full(len(rows), "") if column is None else rows[column].to_numpy()
    faults = [(row + 1, names[row], reason) for row, reason in outcome.faults.items()]
    write_faults(path, ("row", "particle", "reason"), faults)


def write_faults(path: Path, header: Sequence[str], faults: Sequence[Sequence[object]]) -> None:
    """Write a list of what could not be predicted, and why; where all was, remove an older one."""
    remove_leftovers_of(path)
    if not faults:
        path.unlink(missing_ok=True)
        return
    with (
        replacing(path, overwrite=True) as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(faults)


def summarise(outcome: Classification) -> list[tuple[str, int, float, float]]:
    """Class name, number of particles, their mean probability and entropy; most frequent first."""
    judgement = outcome.judgement
    names = outcome.table.rows["cectflowClassName"].to_numpy()
    rows = []
    for name, count in outcome.counts.items():
        chosen = names == name
        means = judgement.of_class[chosen].mean(), judgement.entropy[chosen].mean()
        rows.append((name, count, float(means[0]), float(means[1])))
    return rows


def draw_summary(outcome: Classification) -> Figure:
    """Particles of each class, how sure of them the network is, and some cubes of each.

    Cubes are evenly spaced in the order of their probabilities, so that the doubtful ones are seen
    too. They are shown as the network saw them: the mean of the central fifth of their sections,
    and each on its own grey scale.
    """
    from cectflow.prediction.figures import Example, draw_classes

    source, judgement = outcome.source, outcome.judgement
    classes = source.card.classes
    of_class, unknown = judgement.of_class, judgement.unknown
    chosen = {
        name: np.flatnonzero(judgement.class_ids == number)
        for number, name in enumerate(classes, 1)
    }
    shown: dict[str, NDArray[np.int64]] = {}
    for name, rows in chosen.items():
        order = rows[np.argsort(-of_class[rows], kind="stable")]
        ranks = np.linspace(0, max(len(order) - 1, 0), min(len(order), EXAMPLES)).round()
        shown[name] = order[ranks.astype(np.int64)]
    sections = _central_sections(source, np.concatenate([*shown.values()]))
    return draw_classes(
        {name: of_class[rows] for name, rows in chosen.items()},
        {
            name: [
                Example(sections[row], float(of_class[row]))
                for row in rows.tolist()
                if row in sections
            ]
            for name, rows in shown.items()
        },
        voxel_size=source.card.voxel_size,
        unknown=None if unknown is None else {name: unknown[rows] for name, rows in chosen.items()},
        missing=int((judgement.class_ids == 0).sum()),
        title=str(outcome.table.rows["cectflowModel"].iloc[0]),
    )


def _central_sections(
    source: CubeSource, rows: NDArray[np.int64]
) -> dict[int, Float[NDArray[np.float32], "y x"]]:
    """Row → mean of the central fifth of its cube's sections."""
    sections: dict[int, Float[NDArray[np.float32], "y x"]] = {}
    for block in source.files:
        for place in np.flatnonzero(np.isin(block.rows, rows)).tolist():
            batch = next(read_block(block.part(place, place + 1), source.card, source.options))
            if not len(batch):
                continue
            cube = batch.cubes[0, 0]
            middle, half = len(cube) // 2, max(1, len(cube) // 10)
            section = cube[middle - half : middle + half + 1].mean(axis=0)
            sections[int(block.rows[place])] = section
    return sections


def _probability_table(outcome: Classification, classes: tuple[str, ...]) -> pd.DataFrame:
    judgement, rows = outcome.judgement, outcome.table.rows
    columns: dict[str, object] = {"row": np.arange(1, len(rows) + 1)}
    for name in IDENTITY_COLUMNS:
        if name in rows:
            columns[name] = rows[name].to_numpy()
    columns["class_name"] = rows["cectflowClassName"].to_numpy()
    columns["class_id"] = judgement.class_ids
    columns |= {
        f"probability_{name}": judgement.probabilities[:, index].astype(np.float32)
        for index, name in enumerate(classes)
    }
    columns["entropy"] = judgement.entropy.astype(np.float32)
    if judgement.unknown is not None:
        columns["unknown"] = judgement.unknown
    columns["model"] = rows["cectflowModel"].to_numpy()
    return pd.DataFrame(columns)


def plain_name(name: str) -> str:
    """A class name as a file name: 4v94#1 becomes 4v94_1."""
    return re.sub(r"[^\w.-]", "_", name).lstrip(".") or NOT_PREDICTED
