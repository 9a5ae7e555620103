"""Outputs of a classification beside its STAR file: tables, lists of failures, and a picture."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from cectflow.files import replacing
from cectflow.prediction.classify import NOT_PREDICTED, Classification
from cectflow.prediction.source import CubeSource, read_block

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ClassOutputs", "draw_summary", "summarise", "write_failures", "write_outputs"]

STAR_SUFFIXES = (".star", ".csv")
TABLE_SUFFIXES = (".parquet", ".csv")
PICTURE_SUFFIXES = (".png",)
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
        If the name of a file ends otherwise, or a folder is in its place.
    """

    star: Path
    table: Path | None = None
    per_class: Path | None = None
    summary: Path | None = None

    def __post_init__(self) -> None:
        for path, what, suffixes in (
            (self.star, "particle table", STAR_SUFFIXES),
            (self.table, "table", TABLE_SUFFIXES),
            (self.summary, "picture", PICTURE_SUFFIXES),
        ):
            if path is None:
                continue
            if path.suffix not in suffixes:
                msg = f"{path} would be a {what}: expected a name in {', '.join(suffixes)}"
                raise ValueError(msg)
            if path.is_dir():
                msg = f"{path} is a folder: give the {what} another name"
                raise ValueError(msg)
        if self.per_class is not None and self.per_class.is_file():
            msg = f"{self.per_class} is a file: the STAR files of the classes go into a folder"
            raise ValueError(msg)

    @property
    def failures(self) -> Path:
        """List of the particles that were not predicted; written where there are any."""
        return self.star.with_name(f"{self.star.stem}_failures.csv")

    @property
    def paths(self) -> tuple[Path | None, ...]:
        """What is always written: files, and the folder of the classes."""
        return self.star, self.table, self.summary, self.per_class


def write_outputs(
    outputs: ClassOutputs, outcome: Classification, source: CubeSource, *, overwrite: bool
) -> None:
    """Write all that was asked for; the STAR file comes last, so that it stands for all."""
    classes = source.card.classes
    write_failures(outputs.failures, outcome, overwrite=overwrite)
    if outputs.table is not None:
        frame = _probability_table(outcome, classes)
        with replacing(outputs.table, overwrite=overwrite) as temporary:
            if outputs.table.suffix == ".csv":
                frame.to_csv(temporary, index=False)
            else:
                frame.to_parquet(temporary, index=False)
    if outputs.per_class is not None:
        outputs.per_class.mkdir(exist_ok=True)
        for number, name in enumerate(classes, 1):
            chosen = outcome.judgement.class_ids == number
            path = outputs.per_class / f"{plain_name(name)}.star"
            if chosen.any():
                outcome.table.select(chosen).write(path, overwrite=overwrite)
            else:
                path.unlink(missing_ok=True)  # of an earlier run, which would pass for this one's
    if outputs.summary is not None:
        figure = draw_summary(outcome, source)
        with replacing(outputs.summary, overwrite=overwrite) as temporary:
            figure.savefig(temporary, format="png", dpi=200)
    outcome.table.write(outputs.star, overwrite=overwrite)


def write_failures(path: Path, outcome: Classification, *, overwrite: bool) -> None:
    """Row (from 1), name and reason of each particle without a prediction; no file without any."""
    if not outcome.faults:
        if overwrite:
            path.unlink(missing_ok=True)
        return
    rows = outcome.table.rows
    names = rows["rlnImageName"].astype(str) if "rlnImageName" in rows else None
    tomograms = outcome.table.tomogram_names
    with (
        replacing(path, overwrite=True) as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(("row", "particle", "reason"))
        for row, reason in outcome.faults.items():
            where = names.iloc[row] if names is not None else tomograms[row] if tomograms else ""
            writer.writerow((row + 1, where, reason))


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


def draw_summary(outcome: Classification, source: CubeSource) -> Figure:
    """Particles of each class, how sure of them the network is, and some cubes of each.

    Cubes are evenly spaced in the order of their probabilities, so that the doubtful ones are seen
    too. They are shown as the network saw them: the mean of the central fifth of their sections,
    and each on its own grey scale.
    """
    from cectflow.prediction.figures import Example, draw_classes

    judgement, classes = outcome.judgement, source.card.classes
    examples: dict[str, list[Example]] = {}
    chosen = {name: judgement.class_ids == number for number, name in enumerate(classes, 1)}
    for name, rows in chosen.items():
        order = np.flatnonzero(rows)
        order = order[np.argsort(-judgement.of_class[order], kind="stable")]
        ranks = np.linspace(0, max(len(order) - 1, 0), min(len(order), EXAMPLES)).round()
        examples[name] = [
            Example(_central_section(source, int(row)), float(judgement.of_class[row]))
            for row in order[ranks.astype(np.int64)]
        ]
    unknown = judgement.unknown
    return draw_classes(
        {name: judgement.of_class[rows] for name, rows in chosen.items()},
        examples,
        voxel_size=source.card.voxel_size,
        unknown=None if unknown is None else {name: unknown[rows] for name, rows in chosen.items()},
        missing=len(outcome.faults),
        title=str(outcome.table.rows["cectflowModel"].iloc[0]),
    )


def _central_section(source: CubeSource, row: int) -> np.ndarray:
    for block in source.files:
        (at,) = np.nonzero(block.rows == row)
        if len(at):
            one = replace(block, rows=block.rows[at], places=block.places[at])
            cube = next(iter(read_block(one, source.card, source.options))).cubes[0, 0]
            half = max(1, len(cube) // 10)
            middle = len(cube) // 2
            section: np.ndarray = cube[middle - half : middle + half + 1].mean(axis=0)
            return section
    msg = f"row {row + 1} is in no file of the source"
    raise ValueError(msg)


def _probability_table(outcome: Classification, classes: tuple[str, ...]) -> pd.DataFrame:
    judgement, rows = outcome.judgement, outcome.table.rows
    columns: dict[str, object] = {"row": np.arange(1, len(rows) + 1)}
    for name in ("rlnImageName", "rlnTomoName", "rlnMicrographName", "rlnTomoParticleId"):
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
