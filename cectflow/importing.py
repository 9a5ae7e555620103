"""Import: a dataset folder from users' own subtomograms with known classes."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from numpy.typing import NDArray

from cectflow.coordinates import PIXEL_SIZES, PLACEMENT_COLUMNS
from cectflow.dataset import Dataset, open_dataset
from cectflow.files import appearing, refuse_existing_folder, sha256_of
from cectflow.manifest import SPLITS, FieldRecord, Manifest, ShardRecord, SplitName
from cectflow.model_card import Contrast, CtfCorrection
from cectflow.particles import ParticleTable, particles_from, read_particles
from cectflow.progress import track
from cectflow.shards import Subtomograms, write_shard
from cectflow.subtomogram import flip_contrast
from cectflow.volume import find_stacks, read_stack

__all__ = ["ImportOptions", "import_subtomograms"]

SHARD_SIZE = 512
"""Cubes at which a shard of imported data is full; a tomogram is never divided."""
LARGEST_DEVIATION = 1e-3
"""Of a file's voxel size from that of most files, relative."""
MAX_LABELLED_CLASSES = 127
"""Voxel labels are int8."""
CLASS_COLUMNS = ("class", "cectflowClassName", "rlnClassNumber")
TOMOGRAM_COLUMNS = ("rlnTomoName", "tomogram", "rlnMicrographName", "wrpSourceName")


@dataclass(frozen=True)
class ImportOptions:
    """What the user says of the cubes that are imported.

    Attributes
    ----------
    class_column
        Holds names or numbers. Where there is no column ``class``, ``cectflowClassName`` and then
        ``rlnClassNumber`` stand in for it.
    classes
        Names in class order; numbers in the table count from 1 in it. None: the names found,
        sorted; numbers become ``class_1`` and so on.
    split
        One split for everything, or ``by-tomogram``: whole tomograms, 80/10/10.
    voxel_size
        Å; None: the headers'.
    contrast, ctf_correction, tilt_range
        Of the cubes; light ones are stored negated, since a dataset folder is dark.
    """

    class_column: str = "class"
    classes: tuple[str, ...] | None = None
    split: SplitName | Literal["by-tomogram"] = "by-tomogram"
    voxel_size: float | None = None
    contrast: Contrast = "dark"
    ctf_correction: CtfCorrection = "none"
    tilt_range: tuple[float, float] = (-60.0, 60.0)


def import_subtomograms(
    subtomograms: str,
    labels: Path,
    folder: Path,
    options: ImportOptions,
    *,
    voxel_labels: Path | None = None,
    commit: str = "unknown",
) -> Dataset:
    """Dataset folder of a user's own cubes with known classes; it appears when it is complete.

    Parameters
    ----------
    subtomograms
        MRC stack, folder or glob; files are taken in the order of their names.
    labels
        STAR or CSV with one row per cube. Where ``rlnImageName`` names the files
        (``000003@stack.mrcs``) it says whose row it is, else rows follow the order of the cubes.
        Tomograms are told by ``rlnTomoName``, ``tomogram``, ``rlnMicrographName`` or
        ``wrpSourceName``; without these each file counts as one tomogram. Columns of position and
        orientation are kept where every row has a number.
    folder
        To be made; it may exist if it is empty.
    options
        What is known of the cubes.
    voxel_labels
        Stack of as many cubes, in the order of the cubes, in which 1 (anything but 0) marks the
        target.
    commit
        Of cectflow, for the manifest.

    Raises
    ------
    FileExistsError
        If the folder exists and is not empty.
    FileNotFoundError
        If there are no cubes, or no such table.
    ValueError
        If box or voxel size differ between files, a value is not finite, rows and cubes do not
        agree, a class cannot be told, or a target is not marked. Nothing is written then.
    """
    refuse_existing_folder(folder)
    cubes = _Cubes.survey(find_stacks(subtomograms), options.voxel_size)
    table = _read_table(labels, options.class_column)
    if len(table) != len(cubes):
        msg = (
            f"{labels} has {len(table)} rows, {subtomograms} has {len(cubes)} subtomograms: "
            f"expected one row for each"
        )
        raise ValueError(msg)
    classes, class_ids = _resolve_classes(table.rows, labels, options)
    rows = _collect_rows(table, labels, cubes, classes, class_ids)
    targets = None if voxel_labels is None else _Cubes.survey((voxel_labels,), cubes.voxel_size)
    if targets is not None:
        _check_targets(targets, cubes, len(classes))
    cubes.check_values()
    inputs = (*cubes.paths, labels, *(() if voxel_labels is None else (voxel_labels,)))
    digests = [sha256_of(path) for path in inputs]
    recipe = asdict(options)
    content = json.dumps([recipe, digests], sort_keys=True)
    plan = _plan_shards(rows["rlnTomoName"], options.split)
    with appearing(folder) as temporary:
        shards = _write_shards(temporary, plan, rows, cubes, targets, options.contrast)
        Manifest(
            kind="imported",
            recipe=json.loads(json.dumps(recipe)),
            recipe_digest=hashlib.sha256(content.encode()).hexdigest(),
            sources=dict(zip(_distinct_names(inputs), digests, strict=True)),
            commit=commit,
            classes=classes,
            box=cubes.box,
            voxel_size=cubes.voxel_size,
            ctf_correction=options.ctf_correction,
            tilt_range=options.tilt_range,
            has_voxel_labels=targets is not None,
            planned_shards={split: len(shards[split]) for split in SPLITS},
            shards=shards,
        ).write(temporary)
    return open_dataset(folder)


@dataclass(frozen=True, eq=False)
class _Cubes:
    """Cubes in several files, of one box and voxel size; no file stays open."""

    paths: tuple[Path, ...]
    starts: NDArray[np.int64]
    """Index of each file's first cube, and at the end the number of cubes."""
    box: int
    voxel_size: float

    def __len__(self) -> int:
        return int(self.starts[-1])

    @classmethod
    def survey(cls, paths: tuple[Path, ...], voxel_size: float | None) -> _Cubes:
        shapes, voxel_sizes = [], []
        for path in paths:
            stack, size = read_stack(path, voxel_size=voxel_size)
            shapes.append(stack.shape)
            voxel_sizes.append(size)
        box = Counter(shape[1:] for shape in shapes).most_common(1)[0][0]
        size = Counter(voxel_sizes).most_common(1)[0][0]
        if len(set(box)) > 1:
            msg = f"the subtomograms measure {box} voxels (z, y, x): expected cubes"
            raise ValueError(msg)
        for path, shape, own_size in zip(paths, shapes, voxel_sizes, strict=True):
            if shape[1:] != box or abs(own_size - size) > LARGEST_DEVIATION * size:
                msg = (
                    f"{path} holds {shape[1:]} voxels of {own_size:g} Å, most files {box} of "
                    f"{size:g} Å: expected one box and voxel size; leave it out or import it apart"
                )
                raise ValueError(msg)
        starts = np.cumsum([0, *(shape[0] for shape in shapes)], dtype=np.int64)
        return cls(paths, starts, box[0], size)

    @property
    def file_of(self) -> NDArray[np.int64]:
        """Index of each cube's file."""
        return np.repeat(np.arange(len(self.paths), dtype=np.int64), np.diff(self.starts))

    def read(self, indices: Int[NDArray[np.int64], " n"]) -> Float[NDArray[np.float32], "n z y x"]:
        """The cubes of these indices, in this order."""
        result = np.empty((len(indices), *(self.box,) * 3), np.float32)
        files = np.searchsorted(self.starts, indices, side="right") - 1
        for file in np.unique(files):
            stack, _ = read_stack(self.paths[file], voxel_size=self.voxel_size)
            for row in np.flatnonzero(files == file):
                result[row] = stack[indices[row] - self.starts[file]]
        return result

    def check_values(self) -> None:
        for path in self.paths:
            stack, _ = read_stack(path, voxel_size=self.voxel_size)
            for number, cube in enumerate(stack, start=1):
                if not np.isfinite(cube).all():
                    msg = f"{path}: cube {number} holds values that are not finite; leave it out"
                    raise ValueError(msg)


def _check_targets(targets: _Cubes, cubes: _Cubes, num_classes: int) -> None:
    path = targets.paths[0]
    if (len(targets), targets.box) != (len(cubes), cubes.box):
        msg = (
            f"{path} holds {len(targets)} cubes of {targets.box}³ voxels, there are {len(cubes)} "
            f"subtomograms of {cubes.box}³: expected the same"
        )
        raise ValueError(msg)
    if num_classes > MAX_LABELLED_CLASSES:
        msg = f"{num_classes} classes: voxel labels hold at most {MAX_LABELLED_CLASSES}"
        raise ValueError(msg)
    targets.check_values()
    stack, _ = read_stack(path, voxel_size=targets.voxel_size)
    empty = [number for number, cube in enumerate(stack, start=1) if not cube.any()]
    if empty:
        msg = (
            f"{path} marks no target in {len(empty)} of {len(targets)} cubes, the first is cube "
            f"{empty[0]}: mark each cube's own particle with 1"
        )
        raise ValueError(msg)


def _read_table(path: Path, class_column: str) -> ParticleTable:
    if path.suffix != ".csv":
        return read_particles(path)
    if not path.is_file():
        msg = f"there is no file {path}"
        raise FileNotFoundError(msg)
    texts = {class_column, "rlnImageName", *CLASS_COLUMNS, *TOMOGRAM_COLUMNS}
    try:
        # utf-8-sig: spreadsheets begin their files with a byte order mark.
        rows = pd.read_csv(
            path, dtype=dict.fromkeys(texts, str), keep_default_na=False, encoding="utf-8-sig"
        )
    except (ValueError, pd.errors.ParserError) as error:
        msg = f"{path} is not a CSV file: {error}"
        raise ValueError(msg) from None
    return particles_from(rows)


def _resolve_classes(
    rows: pd.DataFrame, labels: Path, options: ImportOptions
) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Class names in order, and the class_id of each row."""
    wanted = options.class_column
    candidates = CLASS_COLUMNS if wanted == CLASS_COLUMNS[0] else (wanted,)
    column = next((name for name in candidates if name in rows), None)
    if column is None:
        msg = (
            f"{labels} has no column {' or '.join(candidates)}: its columns are "
            f"{', '.join(map(str, rows.columns))}; name the one of the classes with --class-column"
        )
        raise ValueError(msg)
    texts = _as_texts(rows[column], labels)
    are_numbers = all(text.isdecimal() for text in texts)
    found = sorted(set(texts), key=int) if are_numbers else sorted(set(texts))
    if options.classes is None:
        names = tuple(f"class_{text}" for text in found) if are_numbers else tuple(found)
        return names, np.array([found.index(text) + 1 for text in texts], np.int64)
    classes = options.classes
    if len(set(classes)) < len(classes) or not all(map(_is_writable, classes)):
        msg = f"classes are {', '.join(classes)}: expected distinct names without quotes"
        raise ValueError(msg)
    if set(found) <= set(classes):
        return classes, np.array([classes.index(text) + 1 for text in texts], np.int64)
    if are_numbers and int(found[0]) >= 1 and int(found[-1]) <= len(classes):
        return classes, np.array([int(text) for text in texts], np.int64)
    unknown = [text for text in found if text not in classes]
    msg = (
        f"column {column} of {labels} holds {', '.join(unknown)}: expected any of "
        f"{', '.join(classes)}, or numbers from 1 to {len(classes)}"
    )
    raise ValueError(msg)


def _as_texts(column: pd.Series[Any], labels: Path) -> list[str]:
    """Names as they are; whole numbers without decimals."""
    texts = []
    for number, value in enumerate(column, start=1):
        is_whole = isinstance(value, float | np.floating) and float(value).is_integer()
        text = str(int(value)) if is_whole else str(value).strip()
        if pd.isna(value) or not _is_writable(text):
            msg = (
                f"{labels}: column {column.name} holds {text!r} in row {number}: expected a name "
                f"without quotes, or a number"
            )
            raise ValueError(msg)
        texts.append(text)
    return texts


def _is_writable(text: str) -> bool:
    """Whether a STAR file gives a text back as it was."""
    is_plain = text.isprintable() and text.strip() == text and not set(text) & set("\"'#")
    return is_plain and text not in ("", "nan", "<NA>")


def _collect_rows(
    table: ParticleTable,
    labels: Path,
    cubes: _Cubes,
    classes: tuple[str, ...],
    class_ids: NDArray[np.int64],
) -> pd.DataFrame:
    """Rows of the dataset; the index of each is that of its cube."""
    matched = _match_images(table.rows, cubes)
    indices = np.arange(len(cubes)) if matched is None else matched
    files = _distinct_names(cubes.paths)
    file_of = cubes.file_of[indices]
    column = next((name for name in TOMOGRAM_COLUMNS if name in table.rows), None)
    tomograms = (
        [files[file] for file in file_of]
        if column is None
        else _as_texts(table.rows[column], labels)
    )
    numbers = indices - cubes.starts[file_of] + 1
    # The class number comes first: a line of a STAR file must not begin with a name like data_1.
    rows = pd.DataFrame(
        {
            "rlnClassNumber": class_ids,
            "cectflowClassName": [classes[class_id - 1] for class_id in class_ids],
            "rlnTomoName": tomograms,
            "rlnImageName": [
                f"{number:06d}@{files[file]}" for number, file in zip(numbers, file_of, strict=True)
            ],
            **_positions(table),
        },
    )
    return rows.set_index(indices)


def _positions(table: ParticleTable) -> dict[str, NDArray[np.float64]]:
    """Columns of position and orientation, and the pixel sizes that positions are counted in."""
    columns = {str(name): table.rows[name] for name in table.rows}
    if "rlnCoordinateX" not in columns:
        plain = {"x": "rlnCoordinateX", "y": "rlnCoordinateY", "z": "rlnCoordinateZ"}
        columns = {plain.get(name, name): column for name, column in columns.items()}
    for block in table.blocks.values():
        if isinstance(block, pd.DataFrame) and {"rlnOpticsGroup"} <= {*columns} & {*block.columns}:
            groups = block.drop_duplicates("rlnOpticsGroup").set_index("rlnOpticsGroup")
            for name in set(PIXEL_SIZES) & {*groups.columns} - {*columns}:
                columns[name] = columns["rlnOpticsGroup"].map(groups[name])
    numbers = {
        name: pd.to_numeric(column, errors="coerce").to_numpy(np.float64)
        for name, column in columns.items()
        if PLACEMENT_COLUMNS.fullmatch(name)
    }
    return {name: values for name, values in numbers.items() if np.isfinite(values).all()}


def _match_images(rows: pd.DataFrame, cubes: _Cubes) -> NDArray[np.int64] | None:
    """Index of each row's cube by its image name; None where no name is that of a file."""
    if "rlnImageName" not in rows:
        return None
    files: dict[tuple[str, ...], int] = {}
    for file, path in enumerate(cubes.paths):
        parts = path.absolute().parts
        for start in range(len(parts)):
            files[parts[start:]] = -1 if parts[start:] in files else file
    names = [str(name) for name in rows["rlnImageName"]]
    found = [_find_image(name, files, cubes) for name in names]
    if all(index is None for index in found):
        return None
    first_row: dict[int, int] = {}
    for row, (name, index) in enumerate(zip(names, found, strict=True), start=1):
        if index is None or first_row.setdefault(index, row) < row:
            fault = (
                "which is none of the subtomograms"
                if index is None
                else f"as does row {first_row[index]}"
            )
            msg = f"row {row} of the labels names {name}, {fault}: expected each of them once"
            raise ValueError(msg)
    return np.array(found, np.int64)


def _find_image(name: str, files: dict[tuple[str, ...], int], cubes: _Cubes) -> int | None:
    number, _, file_name = name.rpartition("@")
    parts = Path(file_name).parts
    suffixes = (parts[start:] for start in range(len(parts)))
    file = next((files[suffix] for suffix in suffixes if suffix in files), None)
    if file is None:
        return None
    if file < 0:
        msg = f"several subtomogram files are called {file_name}: name them with their folders"
        raise ValueError(msg)
    count = int(cubes.starts[file + 1] - cubes.starts[file])
    if number.isdecimal() and 1 <= int(number) <= count:
        return int(cubes.starts[file]) + int(number) - 1
    return int(cubes.starts[file]) if count == 1 and not number else None


def _plan_shards(
    tomograms: pd.Series[Any], split: SplitName | Literal["by-tomogram"]
) -> dict[SplitName, list[list[str]]]:
    """Tomograms of every shard of every split."""
    counts = tomograms.value_counts()
    names = sorted(counts.index)
    chosen: dict[SplitName, list[str]] = {name: [] for name in SPLITS}
    if split == "by-tomogram":
        # By digest: a tomogram's place depends on names alone, not on the order of files.
        order = sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
        tenth = max(1, round(len(names) / 10))
        num_test = tenth if len(names) >= 2 else 0
        num_validation = tenth if len(names) >= 3 else 0
        chosen["test"] = sorted(order[:num_test])
        chosen["validation"] = sorted(order[num_test : num_test + num_validation])
        chosen["train"] = sorted(order[num_test + num_validation :])
    else:
        chosen[split] = names
    plan: dict[SplitName, list[list[str]]] = {}
    for name, members in chosen.items():
        plan[name], filled = [], SHARD_SIZE
        for tomogram in members:
            if filled + counts[tomogram] > SHARD_SIZE:
                plan[name].append([])
                filled = 0
            plan[name][-1].append(tomogram)
            filled += counts[tomogram]
    return plan


def _write_shards(
    folder: Path,
    plan: dict[SplitName, list[list[str]]],
    rows: pd.DataFrame,
    cubes: _Cubes,
    targets: _Cubes | None,
    contrast: Contrast,
) -> dict[str, tuple[ShardRecord, ...]]:
    jobs = [
        (split, f"{split}/{number:05d}", tomograms)
        for split in SPLITS
        for number, tomograms in enumerate(plan[split])
    ]
    shards: dict[str, tuple[ShardRecord, ...]] = dict.fromkeys(SPLITS, ())
    for split, name, tomograms in track(jobs, total=len(jobs), title="importing"):
        members = rows[rows["rlnTomoName"].isin(tomograms)]
        content = _read_content(members, cubes, targets, contrast)
        fields = tuple(
            _measure(tomogram, content.cubes[(members["rlnTomoName"] == tomogram).to_numpy()])
            for tomogram in tomograms
        )
        record = write_shard(folder, name, content, fields, cubes.voxel_size)
        shards[split] = (*shards[split], record)
    return shards


def _read_content(
    members: pd.DataFrame, cubes: _Cubes, targets: _Cubes | None, contrast: Contrast
) -> Subtomograms:
    indices = members.index.to_numpy(np.int64)
    data = cubes.read(indices)
    stored = flip_contrast(data) if contrast == "light" else data
    rows = members.reset_index(drop=True)
    if targets is None:
        return Subtomograms(stored, None, None, rows)
    instances = (targets.read(indices) != 0).astype(np.int16)
    class_ids = rows["rlnClassNumber"].to_numpy(np.int8)
    return Subtomograms(
        stored, instances.astype(np.int8) * class_ids[:, None, None, None], instances, rows
    )


def _measure(tomogram: str, cubes: NDArray[np.float32]) -> FieldRecord:
    mean, std = (float(measure(cubes, dtype=np.float64)) for measure in (np.mean, np.std))
    return FieldRecord(field=tomogram, mean=mean, std=std, num_particles=len(cubes))


def _distinct_names(paths: Sequence[Path]) -> list[str]:
    """File names, or whole paths where two have the same name."""
    names = Counter(path.name for path in paths)
    return [path.name if names[path.name] == 1 else str(path) for path in paths]
