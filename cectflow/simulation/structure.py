"""Structures: atoms, density maps and phantoms as weighted points in one unit of potential.

:func:`find_structures` turns an argument into sources, :func:`load_structure` reads one, and
:func:`summarise_structure` describes one without building its assembly.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from scipy import ndimage

from cectflow.files import sha256_of
from cectflow.simulation.atoms import PROTEIN_VOLUME, read_atoms
from cectflow.simulation.phantoms import build_phantom, list_phantoms
from cectflow.volume import read_volume

__all__ = [
    "Structure",
    "StructureSource",
    "StructureSummary",
    "find_structures",
    "load_structure",
    "summarise_structure",
]

ATOM_SUFFIXES = (".pdb", ".ent", ".cif", ".mmcif")
MAP_SUFFIXES = (".mrc", ".map")

# Potential of protein in excess of the ice it displaces, in V A^3 per Da, for maps and phantoms:
# the rules for atoms applied to the mean residue C4.94 H7.84 N1.36 O1.48 S0.04 of 111 Da. RNA has
# 3 % more per Da, and 40 % more per volume.
PROTEIN_EXCESS = 4.28
# Part of a map's maximum above which a voxel belongs to the complex: where the 70S ribosome (4v4r)
# has 2.35 MDa. Atomic models of known mass, blurred alike (sigma 6.65 A, 10 A voxels), then have
# 1.07-1.11 (1e6v, 1wcm, 5a1a), 1.25 (1aon, 3j9i) and 1.36 (4v1w, a thin shell) of their mass.
MAP_THRESHOLD = 0.46
# A map sampled at its Nyquist limit is at least as blurred as this Gaussian, in voxels; the
# voxels above the threshold have a sharp edge, and this spread makes it that of the map again.
MAP_SPREAD = 0.665
MAX_ATOMS = 5_000_000
"""Of an assembly: they take about 0.5 GB while it is built. 1ihm's capsid has 0.7 million."""

Kind = Literal["atoms", "map", "builtin"]


@dataclass(frozen=True)
class StructureSource:
    """Where a structure comes from: a name, and a file unless it is built in.

    Parameters
    ----------
    name, path, kind
        Of the structure and its file.
    body
        Of a map that shows several complexes, which one: 1 is the largest; None is all of it.
    """

    name: str
    path: Path | None
    kind: Kind
    body: int | None = None

    def __str__(self) -> str:
        file = "builtin" if self.path is None else str(self.path)
        return file if self.body is None else f"{file}#{self.body}"


@dataclass(frozen=True)
class StructureSummary:
    """What a structure is, known without building its assembly.

    Parameters
    ----------
    name, kind, source
        As of its :class:`StructureSource`.
    mass_kda
        Of the assembly, implicit hydrogens included; of a map an estimate.
    extent
        Twice the largest distance of a point from the centre, in angstrom.
    num_operators
        Operators of the assembly; 1 for maps and phantoms.
    num_atoms
        Atoms of the assembly that are in the file, or points of a map or phantom.
    """

    name: str
    kind: Kind
    mass_kda: float
    extent: float
    num_operators: int
    num_atoms: int
    source: str


@dataclass(frozen=True, eq=False)
class Structure:
    """A complex as weighted points.

    Parameters
    ----------
    name
        Lower case, without suffixes.
    positions_zyx
        In angstrom, from the weighted centre.
    weights
        Integral of the electrostatic potential in excess of vitreous ice, in V A^3.
    mass_kda
        Of the assembly, hydrogens included whether or not the file has them. Of a map it is an
        estimate from its volume.
    spread
        Sigma in angstrom of the Gaussian that each point already stands for: 0 for atoms, 0.665
        voxel for the voxels of a map, since a band-limited map cannot be sharper, and the size
        of its cell for a phantom.
    num_operators
        Operators of the biological assembly; 1 where there is none.
    source
        Path of the file, or ``builtin``.
    digest
        Hexadecimal sha256 of the file's bytes, or of a phantom's numbers.
    """

    name: str
    positions_zyx: Float[NDArray[np.float32], "n 3"]
    weights: Float[NDArray[np.float32], "n"]
    mass_kda: float
    spread: float
    num_operators: int
    source: str
    digest: str

    @property
    def extent(self) -> float:
        """Twice the largest distance of a point from the centre, in angstrom."""
        return 2 * float(np.linalg.norm(self.positions_zyx, axis=1).max())

    @property
    def molecular_volume(self) -> float:
        """Volume in cubic angstrom at 1.21 A^3/Da, the measure of occupancy."""
        return PROTEIN_VOLUME * 1000 * self.mass_kda


def find_structures(argument: str) -> tuple[StructureSource, ...]:
    """Structure sources that an argument names, in its order.

    Parameters
    ----------
    argument
        ``builtin``, or files and folders, separated by commas; a folder stands for all its
        structures in alphabetical order. ``MAP#1`` is the largest of the separate bodies that a
        map shows, ``MAP#2`` the next; their names end in ``_1`` and ``_2``.

    Raises
    ------
    FileNotFoundError
        If there is no such file or folder.
    ValueError
        If a file's suffix is unknown, a folder holds no structure, two have the same name, or a
        body is asked of a file that is no map.
    """
    found: dict[str, StructureSource] = {}
    for source in _list_sources(argument):
        if source.name in found:
            msg = (
                f"two structures are called {source.name!r}: {found[source.name]} and {source}: "
                "expected one of each name; leave one out or rename a file"
            )
            raise ValueError(msg)
        found[source.name] = source
    return tuple(found.values())


def load_structure(source: StructureSource) -> Structure:
    """Weighted points of a source, centred, in the unit shared by all kinds.

    Atoms: biological assembly 1 of the first model, one of alternative conformations at full
    occupancy, without waters. Weights are the factors at zero angle of Peng et al. (1996), Acta
    Cryst. A52, 257 (as in gemmi), with mean implicit hydrogens where the file has none, minus the
    ice displaced by 1.21 (protein and ligands) or 0.91 (nucleic acid) A^3/Da. Metals, and whatever
    is heavier than chlorine, displace their van der Waals sphere; unknown elements count as carbon.
    An atom on an axis of the assembly is copied onto itself.

    Maps: the voxels above 0.46 of the maximum, weighted by density, protein bright; of a body
    (``MAP#1``) those that touch one another by their faces. Their volume at
    1.21 A^3/Da gives the mass, an estimate: at 10 A voxels right for ribosomes, 10 % too high for
    compact proteins, up to 40 % for hollow ones. Their weights sum to what protein of it has.

    Raises
    ------
    FileNotFoundError
        If the file is gone.
    ValueError
        If the file cannot be read, holds no atoms, is a map that is empty or dark or has not that
        many bodies, or if its assembly has more than 5 million atoms.

    Warns
    -----
    UserWarning
        If a file has no biological assembly (its atoms are taken as they are), or a map taken whole
        looks like several complexes.
    """
    if source.path is None:
        return _load_phantom(source)
    if source.kind == "map":
        return _load_map(source, source.path)
    return _load_atoms(source, source.path)


def summarise_structure(source: StructureSource) -> StructureSummary:
    """Mass, extent and counts of a source; of atoms, the assembly is never built.

    Raises and warns like :func:`load_structure`.
    """
    if source.kind == "atoms" and source.path is not None:
        atoms = read_atoms(source.path)
        mass_kda, extent, num_operators = atoms.mass_kda(), atoms.extent(), len(atoms.copies)
        num_atoms = sum(len(copy.chosen) for copy in atoms.copies)
    else:  # these have no more points than they need
        structure = load_structure(source)
        mass_kda, extent, num_operators = structure.mass_kda, structure.extent, 1
        num_atoms = len(structure.weights)
    return StructureSummary(
        name=source.name,
        kind=source.kind,
        mass_kda=mass_kda,
        extent=extent,
        num_operators=num_operators,
        num_atoms=num_atoms,
        source=str(source),
    )


def _list_sources(argument: str) -> Iterator[StructureSource]:
    for part in (text.strip() for text in argument.split(",")):
        path = Path(part)
        if part == "builtin":
            yield from (StructureSource(name, None, "builtin") for name in list_phantoms())
        elif part and path.is_dir():
            yield from _list_folder(path)
        elif part and path.is_file():
            yield _source_of_file(path)
        elif (found := re.fullmatch(r"(.+)#([1-9]\d*)", part)) and Path(found[1]).is_file():
            yield _source_of_body(_source_of_file(Path(found[1])), int(found[2]))
        else:
            msg = (
                f"there is no file or folder {part!r} (given {argument!r}): expected 'builtin', or "
                "files and folders separated by commas"
            )
            raise FileNotFoundError(msg)


def _list_folder(folder: Path) -> Iterator[StructureSource]:
    paths = [path for path in sorted(folder.iterdir()) if path.is_file() and _suffix(path)]
    if not paths:
        msg = f"folder {folder} holds no structure: expected files ending in {_known_suffixes()}"
        raise ValueError(msg)
    yield from (_source_of_file(path) for path in paths)


def _source_of_file(path: Path) -> StructureSource:
    suffix = _suffix(path)
    if suffix is None:
        msg = f"{path} has no known suffix: expected one of {_known_suffixes()}"
        raise ValueError(msg)
    kind: Kind = "map" if suffix.removesuffix(".gz") in MAP_SUFFIXES else "atoms"
    return StructureSource(path.name.lower().removesuffix(suffix), path, kind)


def _source_of_body(whole: StructureSource, body: int) -> StructureSource:
    if whole.kind != "map":
        msg = f"{whole}#{body}: expected a map before the #; atoms have an assembly, not bodies"
        raise ValueError(msg)
    return replace(whole, name=f"{whole.name}_{body}", body=body)


def _suffix(path: Path) -> str | None:
    name = path.name.lower()
    packing = ".gz" if name.endswith(".gz") else ""
    stem = name.removesuffix(".gz")
    for suffix in (*ATOM_SUFFIXES, *MAP_SUFFIXES):
        if stem.endswith(suffix) and stem != suffix:
            return suffix + packing
    return None


def _known_suffixes() -> str:
    return f"{', '.join((*ATOM_SUFFIXES, *MAP_SUFFIXES))}, each also with .gz"


def _load_phantom(source: StructureSource) -> Structure:
    phantom = build_phantom(source.name)
    masses = np.full(len(phantom.positions_zyx), phantom.point_volume / PROTEIN_VOLUME)
    return Structure(
        name=source.name,
        positions_zyx=_centred(phantom.positions_zyx, masses),
        weights=(PROTEIN_EXCESS * masses).astype(np.float32),
        mass_kda=float(masses.sum()) / 1000,
        spread=phantom.spread,
        num_operators=1,
        source=str(source),
        digest=phantom.digest,
    )


def _load_map(source: StructureSource, path: Path) -> Structure:
    digest = _digest(path)
    volume = read_volume(path)
    data = np.asarray(volume.data, np.float32)
    highest, lowest = float(data.max()), float(data.min())
    if not (np.isfinite(highest) and highest > max(-lowest, 0)):
        msg = (
            f"map {path} ranges from {lowest:g} to {highest:g}: expected bright protein on a "
            "background of 0; if its protein is dark, negate it"
        )
        raise ValueError(msg)
    inside = data > MAP_THRESHOLD * highest
    inside = _choose_body(source, inside)
    mass = int(inside.sum()) * volume.voxel_size**3 / PROTEIN_VOLUME
    weights = data[inside].astype(np.float64)
    weights *= PROTEIN_EXCESS * mass / weights.sum()
    return Structure(
        name=source.name,
        positions_zyx=_centred(np.argwhere(inside) * volume.voxel_size, weights),
        weights=weights.astype(np.float32),
        mass_kda=mass / 1000,
        spread=MAP_SPREAD * volume.voxel_size,
        num_operators=1,
        source=str(source),
        digest=digest,
    )


def _choose_body(
    source: StructureSource, inside: Bool[NDArray[np.bool], "z y x"]
) -> Bool[NDArray[np.bool], "z y x"]:
    """Voxels of the body that the source names; of all, with a warning where they look several."""
    labels, num_bodies = ndimage.label(inside)
    sizes = np.bincount(labels.ravel())[1:]
    order = np.argsort(-sizes, kind="stable")
    if source.body is None:
        if num_bodies > 1 and 2 * sizes[order[1]] > sizes[order[0]]:
            msg = (
                f"map {source} holds separate bodies of {sizes[order[0]]} and {sizes[order[1]]} "
                f"voxels and is read as one complex: if it shows several, give {source}#1 or "
                f"{source}#2"
            )
            warnings.warn(msg, stacklevel=1)
        return inside
    if source.body > num_bodies:
        msg = (
            f"map {source.path} holds {num_bodies} separate bodies, the largest of "
            f"{', '.join(map(str, sizes[order[:5]]))} voxels: expected #1 to #{num_bodies}, "
            f"given #{source.body}"
        )
        raise ValueError(msg)
    chosen: Bool[NDArray[np.bool], "z y x"] = labels == order[source.body - 1] + 1
    return chosen


def _load_atoms(source: StructureSource, path: Path) -> Structure:
    digest = _digest(path)
    atoms = read_atoms(path)
    num_atoms = sum(len(copy.chosen) for copy in atoms.copies)
    if num_atoms > MAX_ATOMS:
        msg = (
            f"{path}: {len(atoms.copies)} operators make an assembly of {num_atoms} atoms, "
            f"{atoms.extent() / 10:.0f} nm across: expected at most {MAX_ATOMS}; give a density "
            f"map of it, or a file with fewer operators"
        )
        raise ValueError(msg)
    weights = np.concatenate([atoms.weights[copy.chosen] for copy in atoms.copies])
    return Structure(
        name=source.name,
        positions_zyx=_centred(np.concatenate(list(atoms.each_copy_zyx())), weights),
        weights=weights.astype(np.float32),
        mass_kda=atoms.mass_kda(),
        spread=0.0,
        num_operators=len(atoms.copies),
        source=str(source),
        digest=digest,
    )


def _centred(
    positions_zyx: NDArray[Any], weights: NDArray[Any]
) -> Float[NDArray[np.float32], "n 3"]:
    centre = np.average(positions_zyx, axis=0, weights=weights)
    centred: Float[NDArray[np.float32], "n 3"] = (positions_zyx - centre).astype(np.float32)
    return centred


def _digest(path: Path) -> str:
    if not path.is_file():
        msg = f"there is no file {path}"
        raise FileNotFoundError(msg)
    return sha256_of(path)
