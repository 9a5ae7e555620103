"""copick projects on a file system: picks as particle tables, and particles as picks.

The layout is that of copick 1.31 (github.com/copick/copick, ``impl/filesystem.py``): below each of
two roots, the static and the overlay that is written to, lie
``ExperimentRuns/RUN/Picks/USER_SESSION_OBJECT.json``. A particle is at its location plus the
translation of its transformation, in angstrom from the centre of voxel 0; the rotation takes the
object into the tomogram. The package itself cannot be installed beside MLflow: cryoet-data-portal,
which it needs, and MLflow want different versions of graphql-core.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, FiniteFloat, ValidationError

from cectflow.coordinates import SUBTOMOGRAM_ANGLES
from cectflow.files import replacing
from cectflow.particles import M_SPECIES, NOT_PREDICTED, ParticleTable, particles_from
from cectflow.tomogram_table import WARP_SUFFIX

__all__ = ["CopickProject", "open_project", "read_picks", "write_picks"]

USER = "cectflow"
SESSION = "0"
"""What copick calls the session of a program."""
ANGLES = tuple(f"rlnAngle{name}" for name in ("Rot", "Tilt", "Psi"))
SCORES = ("cectflowProbability", "cectflowScore", "rlnAutopickFigureOfMerit")
"""Columns that are a pick's score, the first that there is."""
CLASSES = ("cectflowClassName", "copickObject")
_INVALID = re.compile(r'[<>:"/\\|?*\x00-\x1f\x7f\s_]')
"""Of names of objects, users and sessions, which a file name joins by underscores."""


@dataclass(frozen=True)
class CopickProject:
    """Where a project's files are, and what may be picked.

    Attributes
    ----------
    overlay
        Folder that is written to.
    static
        Folder that is only read, if there is one.
    objects
        Names of the objects that are particles.
    """

    overlay: Path
    static: Path | None
    objects: tuple[str, ...]

    def runs(self) -> tuple[str, ...]:
        """Names of all runs, which are the tomograms' names."""
        folders = [root / "ExperimentRuns" for root in self._roots]
        found = (run for folder in folders if folder.is_dir() for run in folder.iterdir())
        return tuple(sorted({run.name for run in found if run.is_dir() and run.name[0] != "."}))

    def picks(self) -> Iterator[Path]:
        """Files of picks of all runs; one of the overlay hides that of the same name."""
        for run in self.runs():
            seen: set[str] = set()
            for root in self._roots:
                for path in sorted((root / "ExperimentRuns" / run / "Picks").glob("*.json")):
                    if path.name not in seen and path.name[0] != ".":
                        seen.add(path.name)
                        yield path

    @property
    def _roots(self) -> tuple[Path, ...]:
        return (self.overlay,) if self.static is None else (self.overlay, self.static)


class _Object(BaseModel):
    name: str
    is_particle: bool


class _Config(BaseModel):
    config_type: str = "filesystem"
    pickable_objects: tuple[_Object, ...]
    overlay_root: str
    static_root: str | None = None


class _Location(BaseModel):
    x: FiniteFloat
    y: FiniteFloat
    z: FiniteFloat


class _Point(BaseModel):
    location: _Location
    transformation_: tuple[tuple[FiniteFloat, ...], ...] | None = None
    instance_id: int | None = 0
    score: float | None = 1.0


class _Picks(BaseModel):
    model_config = ConfigDict(coerce_numbers_to_str=True)

    pickable_object_name: str
    user_id: str
    session_id: str
    run_name: str | None = None
    unit: str = "angstrom"
    points: tuple[_Point, ...] | None = ()
    trust_orientation: bool | None = True


def open_project(path: Path) -> CopickProject:
    """The project of a configuration file.

    Raises
    ------
    FileNotFoundError
        If there is no such file, or its overlay is absent.
    ValueError
        If it is no configuration of a project whose files lie on this machine.
    """
    if not path.is_file():
        msg = f"there is no copick configuration {path}"
        raise FileNotFoundError(msg)
    config = _parse(_Config, path, "copick configuration")
    if config.config_type != "filesystem":
        msg = (
            f"{path} is of the type {config.config_type!r}: expected a project on a file system; "
            "`copick sync` brings others there"
        )
        raise ValueError(msg)
    overlay = _folder(path, config.overlay_root)
    if not overlay.is_dir():
        msg = f"{path} says that its overlay is {overlay}, which is no folder"
        raise FileNotFoundError(msg)
    static = None if config.static_root is None else _folder(path, config.static_root)
    objects = tuple(each.name for each in config.pickable_objects if each.is_particle)
    for name in objects:  # each becomes part of a file's name
        if not name or _INVALID.search(name):
            msg = f"{path} has an object {name!r}: expected no spaces, underscores or slashes"
            raise ValueError(msg)
    return CopickProject(overlay, static, objects)


def read_picks(path: Path, query: str) -> ParticleTable:
    """Picks of a project as a table over all of its runs, in angstrom from the corner.

    Parameters
    ----------
    path
        The project's configuration.
    query
        ``OBJECT`` or ``OBJECT:USER/SESSION``, as copick writes it; ``*`` stands for anything.

    Returns
    -------
    ParticleTable
        With ``rlnTomoName`` (the run), M's ``wrpCoordinateX1/Y1/Z1`` (angstrom from the corner),
        RELION's angles where a pick is turned, ``rlnAutopickFigureOfMerit`` (the score),
        ``copickObject``, ``copickUser``, ``copickSession`` and ``copickInstance``.

    Raises
    ------
    FileNotFoundError, ValueError
        As :func:`open_project`; also if nothing fits the query or a file of picks is damaged.
    """
    project = open_project(path)
    name, _, origin = query.partition(":")
    pattern = f"{origin.replace('/', '_') if origin else '*_*'}_{name}.json"
    files = [each for each in project.picks() if fnmatchcase(each.name, pattern)]
    rows: list[dict[str, Any]] = []
    turns: list[NDArray[np.float64]] = []
    for file in files:
        picks = _parse(_Picks, file, "copick file of picks")
        if picks.unit != "angstrom":
            msg = f"{file} counts in {picks.unit}: expected angstrom"
            raise ValueError(msg)
        for point in picks.points or ():
            pose = _pose(point, file)
            place = np.array([point.location.x, point.location.y, point.location.z]) + pose[:3, 3]
            turns.append(pose[:3, :3] if picks.trust_orientation else np.eye(3))
            rows.append(
                {
                    "rlnTomoName": file.parents[1].name,
                    **dict(zip(M_SPECIES, place.tolist(), strict=True)),
                    "rlnAutopickFigureOfMerit": 1.0 if point.score is None else point.score,
                    "copickObject": picks.pickable_object_name,
                    "copickUser": picks.user_id,
                    "copickSession": picks.session_id,
                    "copickInstance": point.instance_id or 0,
                }
            )
    if not rows:
        known = sorted({each.stem for each in project.picks()})
        shown = f"{', '.join(known[:8])}{' …' if len(known) > 8 else ''}" if known else "none"
        msg = f"{path} holds no picks {query!r}: there are (USER_SESSION_OBJECT) {shown}"
        raise ValueError(msg)
    table = pd.DataFrame(rows)
    turned = np.asarray(~np.isclose(turns, np.eye(3)).all(axis=(1, 2)))
    if turned.any():
        angles = _angles(np.array(turns), turned)
        table = table.assign(**dict(zip(ANGLES, angles.T, strict=True)))
    return particles_from(table)


def write_picks(
    path: Path,
    table: ParticleTable,
    positions_xyz: Float[NDArray[np.float64], "n 3"],
    *,
    objects: Mapping[str, str],
    session: str = SESSION,
    overwrite: bool = False,
) -> tuple[Path, ...]:
    """Write particles as picks of the user ``cectflow``, a file for each run and object.

    Parameters
    ----------
    path
        The project's configuration.
    table
        Particles with the names of their tomograms, which are runs of the project, and of their
        classes; those that could not be predicted are left out.
    positions_xyz
        In angstrom from the centre of voxel 0, offsets subtracted.
    objects
        Class → object of the project that it is; others have their own name. An object under the
        empty name is what all particles of a table without classes are.
    session
        Of the picks.
    overwrite
        Replace files of the same session.

    Raises
    ------
    ValueError
        If a class or tomogram is none of the project's, or nothing is left to write.
    FileExistsError
        If there are such files, and they are not to be overwritten. Nothing is written then.
    """
    project = open_project(path)
    if not session or _INVALID.search(session):
        msg = f"session {session!r}: expected a name without spaces, underscores or slashes"
        raise ValueError(msg)
    runs = _runs(table, project, path)
    names = _objects(table, project, path, objects)
    score = next((name for name in SCORES if name in table.rows), None)
    scores = np.ones(len(table)) if score is None else table.rows[score].to_numpy(np.float64)
    poses = np.tile(np.eye(4), (len(table), 1, 1))
    poses[:, :3, :3] = _rotations(table.rows)
    groups: dict[Path, list[int]] = {}
    for row, (run, name) in enumerate(zip(runs, names, strict=True)):
        if name:
            folder = project.overlay / "ExperimentRuns" / run / "Picks"
            groups.setdefault(folder / f"{USER}_{session}_{name}.json", []).append(row)
    if not groups:
        msg = f"there are no particles to write to {path}"
        raise ValueError(msg)
    existing = [file for file in groups if file.exists()]
    if existing and not overwrite:
        msg = f"{existing[0]} exists: choose another --session, or replace it with --overwrite"
        raise FileExistsError(msg)
    for file, rows in groups.items():
        picks = {
            "pickable_object_name": names[rows[0]],
            "user_id": USER,
            "session_id": session,
            "run_name": runs[rows[0]],
            "unit": "angstrom",
            "points": [
                {
                    "location": dict(zip("xyz", positions_xyz[row].tolist(), strict=True)),
                    "transformation_": poses[row].tolist(),
                    "instance_id": 0,
                    "score": float(scores[row]),
                }
                for row in rows
            ],
            "trust_orientation": not {*ANGLES, *SUBTOMOGRAM_ANGLES}.isdisjoint(table.rows.columns),
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file, overwrite=overwrite) as temporary:
            temporary.write_text(json.dumps(picks, indent=1), encoding="utf-8")
    return tuple(groups)


def _parse(kind: type[Any], path: Path, what: str) -> Any:
    try:
        return kind.model_validate_json(path.read_bytes())
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(map(str, fault["loc"]))
        msg = f"{path} is no {what}: {place or 'the file'}: {fault['msg']}"
        raise ValueError(msg) from None


def _folder(config: Path, root: str) -> Path:
    scheme, mark, rest = root.partition("://")
    if mark and scheme not in ("local", "file"):
        msg = (
            f"{config} has files at {root}: expected local:// and a folder; `copick sync` brings "
            "others there"
        )
        raise ValueError(msg)
    given = Path(rest if mark else root)
    # copick counts from where it runs; a project that moved lies beside its configuration.
    return given if given.is_absolute() or given.is_dir() else config.parent / given


def _pose(point: _Point, file: Path) -> Float[NDArray[np.float64], "4 4"]:
    if point.transformation_ is None:
        return np.eye(4)
    if [len(row) for row in point.transformation_] != [4] * 4:
        msg = f"{file}: a transformation is a matrix of 4 x 4"
        raise ValueError(msg)
    return np.array(point.transformation_, np.float64)


def _angles(
    turns: Float[NDArray[np.float64], "n 3 3"], turned: NDArray[np.bool_]
) -> Float[NDArray[np.float64], "n 3"]:
    """RELION's rot, tilt and psi of rotations that take an object into the tomogram."""
    from scipy.spatial.transform import Rotation  # 0.2 s to import, for few tables

    angles = np.zeros((len(turns), 3))
    angles[turned] = Rotation.from_matrix(turns[turned]).inv().as_euler("ZYZ", degrees=True)
    return angles


def _rotations(rows: pd.DataFrame) -> Float[NDArray[np.float64], "n 3 3"]:
    """What takes each particle into the tomogram: that of its subtomogram after its own."""
    result = np.tile(np.eye(3), (len(rows), 1, 1))
    for columns in (SUBTOMOGRAM_ANGLES, ANGLES):
        if {*columns} <= {*rows.columns} and len(rows):
            from scipy.spatial.transform import Rotation

            given = rows[list(columns)].to_numpy(np.float64)
            result = result @ Rotation.from_euler("ZYZ", given, degrees=True).inv().as_matrix()
    return np.asarray(result)


def _runs(table: ParticleTable, project: CopickProject, path: Path) -> list[str]:
    names = [name.removesuffix(WARP_SUFFIX) for name in table.tomogram_names]
    known = project.runs()
    unknown = sorted({*names} - {*known})
    if unknown or not names:
        given = repr(unknown[0]) if unknown else "no tomogram"
        msg = f"the particles name {given}; the runs of {path} are {', '.join(known) or 'none'}"
        raise ValueError(msg)
    return names


def _objects(
    table: ParticleTable, project: CopickProject, path: Path, objects: Mapping[str, str]
) -> list[str]:
    """Object of each particle; empty where it has no class."""
    column = next((name for name in CLASSES if name in table.rows), None)
    classes = [""] * len(table) if column is None else list(map(str, table.rows[column]))
    if column is None and "" not in objects:
        msg = f"the particles have no classes ({', '.join(CLASSES)}): say what they are, --object X"
        raise ValueError(msg)
    found = {each: objects.get(each, objects.get("", each)) for each in dict.fromkeys(classes)}
    if NOT_PREDICTED in found:
        found[NOT_PREDICTED] = ""
    for each, name in found.items():
        if name and name not in project.objects:
            msg = (
                f"{path} knows no particle {name!r}; it knows {', '.join(project.objects)}: say "
                f"which of them {each or name!r} is with --object {each or 'CLASS'}=NAME, or add it"
            )
            raise ValueError(msg)
    return [found[each] for each in classes]
