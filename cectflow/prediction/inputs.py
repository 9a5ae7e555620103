"""InputFiles: where a user says that the particles are, and the source that this makes."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from cectflow.manifest import SPLITS
from cectflow.model_card import ModelCard
from cectflow.particles import read_particles
from cectflow.prediction.contract import InputOptions
from cectflow.prediction.source import (
    Border,
    CubeSource,
    open_listed,
    open_stacks,
    open_tomograms,
)
from cectflow.star import read_star
from cectflow.tomogram_table import WARP_SUFFIX, TomogramInfo, find_tomogram, read_tomograms
from cectflow.volume import find_stacks, is_volume

__all__ = ["PLACEHOLDER", "InputFiles", "find_tomograms", "list_tomograms"]

PLACEHOLDER = "{name}"
"""In a path: a tomogram's name, in the particle table or in the files of others."""
RECONSTRUCTIONS = ("rlnTomoReconstructedTomogram", "rlnTomoReconstructedTomogramDenoised")
"""Columns of RELION 5's table of tomograms that hold files."""


@dataclass(frozen=True)
class InputFiles:
    """Where the particles are: in subtomograms, or in tomograms with picks.

    Attributes
    ----------
    subtomograms
        Stack, folder, glob, dataset folder, or a STAR file that names subtomograms; or
    tomogram, particles
        a volume and its picks, STAR or CSV. For picks in many tomograms: a glob, a ``.txt`` list,
        a path with ``{name}`` in place of the tomogram's name, or RELION 5's ``tomograms.star``. A
        semantic segmenter takes the volume, or volumes, alone.
    coords_voxel_size
        Å per unit of the picks' coordinates, where they are of another binning.
    border
        What becomes of particles whose cube reaches over a face of the tomogram.
    tomogram_table
        RELION's ``tomograms.star``, for sizes where the files are named otherwise.

    Raises
    ------
    ValueError
        If it is neither subtomograms nor a tomogram with picks, or both.
    """

    subtomograms: str | None = None
    tomogram: str | Path | None = None
    particles: Path | None = None
    coords_voxel_size: float | None = None
    border: Border = "fill"
    tomogram_table: Path | None = None

    def __post_init__(self) -> None:
        given = self.subtomograms is not None, self.tomogram is not None, self.particles is not None
        if given not in {(True, False, False), (False, True, True), (False, True, False)}:
            msg = (
                "expected either --subtomograms, or --tomogram together with --particles, or "
                "--tomogram alone for a semantic segmenter"
            )
            raise ValueError(msg)

    def whole_tomograms(self) -> dict[str, Path | str]:
        """Name → file of each tomogram that is given without picks, or why there is none.

        Raises
        ------
        ValueError
            If the files leave their names open.
        FileNotFoundError
            If there is no such file at all.
        """
        assert self.tomogram is not None
        assert self.particles is None
        return list_tomograms(str(self.tomogram))

    @property
    def volumes(self) -> tuple[Path, ...]:
        """Files that are known without reading a table, which no output may replace."""
        if self.tomogram is not None:
            given = Path(self.tomogram), self.particles, self.tomogram_table
            return tuple(path for path in given if path is not None and is_volume(path))
        assert self.subtomograms is not None
        return _stacks_of(self.subtomograms)

    def open(
        self, card: ModelCard, options: InputOptions, report: Callable[[str], None]
    ) -> CubeSource:
        """Source of the subtomograms; what cannot be brought to the card at all is refused here.

        Raises
        ------
        ValueError
            Among others if the particles of a tomogram are missing.
        """
        if self.subtomograms is not None:
            if self.subtomograms.endswith(".star"):
                path = Path(self.subtomograms)
                return open_listed(read_particles(path), path.parent, card, options, report)
            return open_stacks(_stacks_of(self.subtomograms), card, options, report)
        if self.particles is None:
            what = "outlines" if card.task == "target" else "names"
            msg = (
                f"a {card.role} for the task {card.task!r} {what} particles at known positions: "
                "give --particles PICKS.star; to find them in a whole tomogram use `cectflow "
                "predict segment --model cectflow-tomogram-segmenter@production --picks PICKS.star`"
            )
            raise ValueError(msg)
        table = read_particles(self.particles)
        if not len(table):
            msg = f"{self.particles} holds no particles: expected at least one"
            raise ValueError(msg)
        names = tuple(table.rows_by_tomogram())
        if card.task == "target" and len(names) > 1:
            msg = (
                f"the particles are in {len(names)} tomograms, {names[0]!r}, {names[1]!r} and so "
                "on, and a label map is of one: give the particles of one tomogram at a time"
            )
            raise ValueError(msg)
        tomograms = find_tomograms(str(self.tomogram), names)
        infos, unknown = self._infos(names)
        return open_tomograms(
            table, {**tomograms, **unknown}, card, options, report,
            coords_voxel_size=self.coords_voxel_size, infos=infos, border=self.border,
        )  # fmt: skip

    def _infos(self, names: Sequence[str]) -> tuple[dict[str, TomogramInfo], dict[str, str]]:
        """What a table of tomograms says of those that the particles are in, and why of others not.

        Without a table, nothing.
        """
        path = self.tomogram_table
        if path is None and str(self.tomogram).endswith(".star"):
            path = Path(str(self.tomogram))
        infos: dict[str, TomogramInfo] = {}
        unknown: dict[str, str] = {}
        known = {} if path is None else read_tomograms(path)
        for name in () if path is None else names:
            try:
                infos[name] = known[find_tomogram(known, name)]
            except ValueError as error:
                unknown[name] = f"{path}: {error}"
        return infos, unknown


def find_tomograms(given: str, names: Sequence[str]) -> dict[str, Path | str]:
    """Name in a particle table → file of the tomogram, or why there is none.

    Parameters
    ----------
    given
        A volume, folder, glob, ``.txt`` list of paths (from here or from the list's folder), path
        with ``{name}``, or RELION 5's table of tomograms. In a list or glob a file fits a name if
        its own begins so and goes on with no letter or digit (``TS_1`` is ``TS_1.mrc`` or
        ``TS_1_10.00Apx.mrc``, not ``TS_10.mrc``). A single volume is that of a single name.
    names
        As in the table; one empty name where it names none.

    Raises
    ------
    ValueError
        If several files fit one name, or names that are parts of paths hold more than a name.
    FileNotFoundError
        If there is no such file at all.
    """
    if PLACEHOLDER in given and tuple(names) == ("",):
        msg = (
            f"the particles name no tomogram, which {PLACEHOLDER} in {given!r} stands for: "
            "expected a column rlnTomoName or rlnMicrographName, or the file of one tomogram"
        )
        raise ValueError(msg)
    if PLACEHOLDER in given:
        return {name: _existing(given.replace(PLACEHOLDER, _plain(name))) for name in names}
    if given.endswith(".star"):
        return _of_table(Path(given), names)
    paths = _listed(given)
    if len(paths) == len(names) == 1 and (is_volume(Path(given)) or not names[0]):
        return {names[0]: paths[0]}
    if tuple(names) == ("",):
        msg = f"the particles name no tomogram, and {given} are {len(paths)}: expected one"
        raise ValueError(msg)
    return {name: _fitting(name, paths, given) for name in names}


def list_tomograms(given: str) -> dict[str, Path | str]:
    """Name → file of all tomograms there are, in order, or why there is none.

    Parameters
    ----------
    given
        As of :func:`find_tomograms`. In place of ``{name}`` stands each tomogram's name; a table of
        tomograms states names; the name of any other file ends at its first dot.

    Raises
    ------
    ValueError
        If several files bear one name.
    FileNotFoundError
        If there is no such file at all.
    """
    if given.endswith(".star"):
        return _all_of_table(Path(given))
    if PLACEHOLDER in given:
        named = _named_files(given)
    else:
        named = [(path.name.partition(".")[0], path) for path in dict.fromkeys(_listed(given))]
    found: dict[str, Path | str] = {}
    for name, path in named:
        if not name:
            msg = f"{path} begins with a dot, so nothing of it is the tomogram's name: rename it"
            raise ValueError(msg)
        if name in found:
            msg = (
                f"{found[name]} and {path} would both be called {name!r}: say what the name is "
                f"with a path that holds {PLACEHOLDER}"
            )
            raise ValueError(msg)
        found[name] = path if is_volume(path) else f"there is no tomogram {path}"
    return found


def _named_files(given: str) -> list[tuple[str, Path]]:
    """Name and path of the files of a pattern with ``{name}``, the same wherever it stands."""
    first, *others = given.split(PLACEHOLDER)
    pattern = re.escape(first) + "(?P<name>[^/]+)" + "(?P=name)".join(map(re.escape, others))
    named: list[tuple[str, Path]] = []
    for file in sorted(glob.glob("*".join(map(glob.escape, (first, *others))))):
        fitting = re.fullmatch(pattern, file)
        if fitting is not None and is_volume(Path(file)):
            named.append((fitting["name"], Path(file)))
    if not named:
        msg = f"no tomogram at {given!r}: no file has a name so"
        raise FileNotFoundError(msg)
    return named


def _all_of_table(table: Path) -> dict[str, Path | str]:
    """Every tomogram of RELION 5's table."""
    found: dict[str, Path | str] = {}
    for name, file in _files_of_table(table).items():
        base = name.removesuffix(WARP_SUFFIX)
        if base in found:
            msg = f"{table} describes the tomogram {base!r} more than once: remove one of them"
            raise ValueError(msg)
        try:
            _plain(name)
        except ValueError as error:
            found[base] = str(error)
        else:
            found[base] = _beside(table, file)
    return found


def _stacks_of(given: str) -> tuple[Path, ...]:
    """Stacks of a file, folder, glob or dataset folder (all its splits, in order)."""
    folder = Path(given)
    if (folder / "manifest.json").is_file():
        from cectflow.dataset import open_dataset  # which imports torch: 2 s

        shards = open_dataset(folder).manifest.shards
        return tuple(
            folder / f"{shard.name}.mrcs" for split in SPLITS for shard in shards.get(split, ())
        )
    if given.endswith(".star"):
        return (folder,)
    return find_stacks(given)


def _listed(given: str) -> list[Path]:
    path = Path(given)
    if path.suffix == ".txt":
        paths = _of_list(path)
    elif is_volume(path):
        paths = [path]
    elif path.is_dir():
        paths = list(find_stacks(given))
    else:
        paths = sorted(Path(name) for name in glob.glob(given, recursive=True))
    if not paths:
        if path.suffix == ".txt":
            msg = f"the list {given} names no tomogram: expected paths, one a line"
            raise ValueError(msg)
        msg = f"no tomogram at {given!r}: expected a volume, a glob, a .txt list or '…{{name}}…'"
        raise FileNotFoundError(msg)
    return paths


def _of_list(path: Path) -> list[Path]:
    """Paths of a text file, one a line; what is not there from here is so from its folder."""
    if not path.is_file():
        msg = f"there is no list {path}"
        raise FileNotFoundError(msg)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        msg = f"{path} is no text: expected a list of tomograms, a path a line"
        raise ValueError(msg)
    lines = [line.strip() for line in text.splitlines()]
    given = [Path(line) for line in lines if line and not line.startswith("#")]
    return [each if is_volume(each) else path.parent / each for each in given]


def _fitting(name: str, paths: Sequence[Path], given: str) -> Path | str:
    base = Path(name).name.removesuffix(WARP_SUFFIX)
    for suffix in (".mrc", ".rec"):
        base = base.removesuffix(suffix)
    if not base:
        return f"the particles name no tomogram ({name!r}), and there are {len(paths)} at {given}"
    exact = [path for path in paths if path.name.split(".")[0] == base or path.stem == base]
    fitting = exact or [
        path
        for path in paths
        if path.name.startswith(base) and not path.name[len(base) : len(base) + 1].isalnum()
    ]
    if len(fitting) > 1:
        msg = (
            f"{len(fitting)} files at {given} fit the tomogram {name!r}, {fitting[0]} and "
            f"{fitting[1]}: say which with a path that holds {PLACEHOLDER}"
        )
        raise ValueError(msg)
    if not fitting:
        return f"there is no file for the tomogram {name!r} among {len(paths)} at {given}"
    return fitting[0]


def _of_table(table: Path, names: Sequence[str]) -> dict[str, Path | str]:
    """Files that RELION 5's table of tomograms names, from here or from the table's folder."""
    files = _files_of_table(table)
    return {name: _described(name, files, table) for name in names}


def _files_of_table(table: Path) -> dict[str, str]:
    files: dict[str, str] = {}
    for block in read_star(table).values():
        rows = pd.DataFrame([block]) if isinstance(block, dict) else block
        column = next((each for each in RECONSTRUCTIONS if each in rows), None)
        if column is not None and "rlnTomoName" in rows:
            names = rows["rlnTomoName"].astype(str)
            twice = names[names.duplicated()]
            if len(twice):
                msg = f"{table} describes the tomogram {twice.iloc[0]!r} more than once"
                raise ValueError(msg)
            files |= dict(zip(names, rows[column].astype(str), strict=True))
    if not files:
        msg = (
            f"{table} names no reconstructions ({', '.join(RECONSTRUCTIONS)}): give their files as "
            f"--tomogram 'folder/{PLACEHOLDER}.mrc', and this table as --tomogram-table"
        )
        raise ValueError(msg)
    return files


def _described(name: str, files: Mapping[str, str], table: Path) -> Path | str:
    stem = name.removesuffix(WARP_SUFFIX)
    known = next((files[key] for key in (name, stem, stem + WARP_SUFFIX) if key in files), None)
    if known is None:
        return f"{table} does not describe the tomogram {name!r}"
    return _beside(table, known)


def _beside(table: Path, file: str) -> Path | str:
    """A file that a table names: from here, or else from the table's folder."""
    return _existing(file if is_volume(Path(file)) else str(table.parent / file))


def _existing(path: str) -> Path | str:
    return Path(path) if is_volume(Path(path)) else f"there is no tomogram {path}"


def _plain(name: str) -> str:
    """A tomogram's name as a part of a path; one that would lead elsewhere is refused."""
    base = name.removesuffix(WARP_SUFFIX)
    if not base or base.startswith(".") or "/" in base or "\\" in base or "\0" in base:
        msg = (
            f"the tomogram {name!r} cannot be put in place of {PLACEHOLDER}: expected a plain name "
            "without slashes; give a glob or a .txt list of the files"
        )
        raise ValueError(msg)
    return base
