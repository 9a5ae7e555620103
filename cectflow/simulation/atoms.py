"""Atoms: coordinates, masses and potentials of a PDB or mmCIF file, and its assembly's operators.

An atom weighs its electron scattering factor at zero angle, as potential, less the ice that it
displaces. Hydrogens that a file lacks are added to their heavy atoms on average.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gemmi
import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray

__all__ = ["ICE_POTENTIAL", "PROTEIN_VOLUME", "VOLT_PER_FACTOR", "Atoms", "Copy", "read_atoms"]

# Integral of an atom's potential over its electron scattering factor at zero angle:
# h^2 / (2 pi m_e e), in V A^2.
VOLT_PER_FACTOR = 47.878
# Potential of vitreous ice in V: water of 0.93 g/cm^3 from the same factors.
ICE_POTENTIAL = 4.53
# Partial specific volumes in A^3/Da: 0.73 cm^3/g and 0.55 cm^3/g.
PROTEIN_VOLUME = 1.21
NUCLEIC_VOLUME = 0.91

# Hydrogens per heavy atom. Protein: residues at pH 7 in the frequencies of UniProt. Nucleic acid:
# counted in 16S RNA with its hydrogens (1xnr), oxygens of the phosphates added.
_PROTEIN_HYDROGENS = {"C": 1.23, "N": 1.18, "O": 0.10, "S": 0.36}
_NUCLEIC_HYDROGENS = {"C": 0.80, "N": 0.55, "O": 0.14}
# Complete models have 1.0 (protein) or 0.6 (RNA) hydrogens per heavy atom, polar ones only 0.2.
_FEWEST_HYDROGENS = 0.4


@dataclass(frozen=True, eq=False)
class Copy:
    """An operator of an assembly, and the atoms that it copies.

    Attributes
    ----------
    chosen
        Their indices.
    rotation, shift
        Position ``z y x`` → ``rotation @ position + shift``, in Å.
    """

    chosen: Int[NDArray[np.int64], "m"]
    rotation: Float[NDArray[np.float64], "3 3"]
    shift: Float[NDArray[np.float64], "3"]


@dataclass(frozen=True, eq=False)
class Atoms:
    """The atoms of a file, once, and the copies that make up its assembly.

    Attributes
    ----------
    positions_zyx
        In Å, as in the file.
    masses
        In Da, with implicit hydrogens.
    weights
        Potential in excess of the ice that each displaces, V Å³.
    copies
        At least one.
    """

    positions_zyx: Float[NDArray[np.float64], "n 3"]
    masses: Float[NDArray[np.float64], "n"]
    weights: Float[NDArray[np.float64], "n"]
    copies: tuple[Copy, ...]

    def mass_kda(self) -> float:
        """Of the assembly."""
        return sum(float(self.masses[copy.chosen].sum()) for copy in self.copies) / 1000

    def each_copy_zyx(self) -> Iterator[Float[NDArray[np.float64], "m 3"]]:
        """Positions in Å of the atoms of one copy after another."""
        for copy in self.copies:
            yield self.positions_zyx[copy.chosen] @ copy.rotation.T + copy.shift

    def extent(self) -> float:
        """Diameter of the assembly about its centre in Å, seen copy by copy."""
        totals = np.array([self.weights[copy.chosen].sum() for copy in self.copies])
        centres = [
            np.average(positions, axis=0, weights=self.weights[copy.chosen])
            for positions, copy in zip(self.each_copy_zyx(), self.copies, strict=True)
        ]
        centre = np.average(centres, axis=0, weights=totals)
        return 2 * max(
            float(np.linalg.norm(positions - centre, axis=1).max())
            for positions in self.each_copy_zyx()
        )


def read_atoms(path: Path) -> Atoms:
    """Atoms of the first model, without water, and the copies of the first assembly.

    Parameters
    ----------
    path
        PDB or mmCIF, packed or not. A file without an assembly is warned of: its atoms are one.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it cannot be read, or holds no atoms with coordinates.
    """
    structure = _read_model(path)
    flat = gemmi.FlatStructure(structure)
    positions_zyx = np.array(flat.pos, np.float64)[:, ::-1]
    if len(positions_zyx) == 0 or not np.isfinite(positions_zyx).all():
        msg = f"{path} holds no atoms other than water, or some without coordinates"
        raise ValueError(msg)
    elements = np.array(flat.element_names)
    chains = [(chain.name, residue) for chain in structure[0] for residue in chain]
    lengths = [len(residue) for _, residue in chains]
    nucleic = [gemmi.find_tabulated_residue(res.name).is_nucleic_acid() for _, res in chains]
    masses, weights = _weigh(elements, np.repeat(np.array(nucleic, bool), lengths))
    names = np.repeat([name for name, _ in chains], lengths)
    subchains = np.repeat([residue.subchain for _, residue in chains], lengths)
    copies = tuple(_find_copies(structure.assemblies, names, subchains))
    if not copies:
        msg = f"{path} has no biological assembly: its atoms are taken as the whole complex"
        warnings.warn(msg, stacklevel=1)  # of one place, so that it is shown once per file
        copies = (Copy(np.arange(len(masses)), np.eye(3), np.zeros(3)),)
    return Atoms(positions_zyx, masses, weights, copies)


def _read_model(path: Path) -> gemmi.Structure:
    """First model without water and alternatives, and with all hydrogens or none."""
    if not path.is_file():
        msg = f"there is no file {path}"
        raise FileNotFoundError(msg)
    try:
        structure = gemmi.read_structure(str(path))
    except (IndexError, OSError, RuntimeError, ValueError) as error:
        msg = f"{path} cannot be read as PDB or mmCIF: {error}"
        raise ValueError(msg) from None
    del structure[1:]
    structure.setup_entities()
    structure.remove_waters()
    # Only where there are any: gemmi also takes neighbours of equal number for alternatives.
    if np.array(gemmi.FlatStructure(structure).altlocs).any():
        structure.remove_alternative_conformations()
    is_hydrogen = np.isin(np.array(gemmi.FlatStructure(structure).element_names), [b"H", b"D"])
    if is_hydrogen.sum() < _FEWEST_HYDROGENS * (~is_hydrogen).sum():
        structure.remove_hydrogens()
    return structure


def _find_copies(
    assemblies: gemmi.AssemblyList, chains: NDArray[Any], subchains: NDArray[Any]
) -> Iterator[Copy]:
    """Each copy in the first assembly, which names chains (PDB) or subchains (mmCIF)."""
    for generator in assemblies[0].generators if assemblies else ():
        named = np.isin(chains, generator.chains) | np.isin(subchains, generator.subchains)
        chosen = np.flatnonzero(named)  # shared by all copies: there may be thousands
        for operator in generator.operators if len(chosen) else ():
            rotation_xyz = np.array(operator.transform.mat.tolist())
            shift_xyz = np.array(operator.transform.vec.tolist())
            yield Copy(chosen, rotation_xyz[::-1, ::-1], shift_xyz[::-1])


def _weigh(
    elements: NDArray[Any], nucleic: Bool[NDArray[np.bool], "n"]
) -> tuple[Float[NDArray[np.float64], "n"], Float[NDArray[np.float64], "n"]]:
    """Mass in Da and potential in excess of ice in V A^3 of each atom, with implicit hydrogens."""
    masses, weights = np.zeros(len(elements)), np.zeros(len(elements))
    bare = not np.isin(elements, [b"H", b"D"]).any()
    for name in np.unique(elements):
        for is_nucleic in (False, True):
            chosen = (elements == name) & (nucleic == is_nucleic)
            mass, weight = _weigh_atom(name.decode(), is_nucleic=is_nucleic, bare=bare)
            masses[chosen], weights[chosen] = mass, weight
    return masses, weights


def _weigh_atom(name: str, *, is_nucleic: bool, bare: bool) -> tuple[float, float]:
    element = gemmi.Element("C" if name == "X" else name)
    hydrogen = gemmi.Element("H")
    per_atom = _NUCLEIC_HYDROGENS if is_nucleic else _PROTEIN_HYDROGENS
    num_hydrogens = per_atom.get(element.name, 0.0) if bare else 0.0
    mass = element.weight + num_hydrogens * hydrogen.weight
    volume = mass * (NUCLEIC_VOLUME if is_nucleic else PROTEIN_VOLUME)
    if element.is_metal or element.atomic_number > gemmi.Element("Cl").atomic_number:
        volume = min(volume, 4 / 3 * np.pi * element.vdw_r**3)
    factor = _factor_at_zero(element) + num_hydrogens * _factor_at_zero(hydrogen)
    return mass, VOLT_PER_FACTOR * factor - ICE_POTENTIAL * volume


def _factor_at_zero(element: gemmi.Element) -> float:
    """Electron scattering factor in angstrom; beyond californium, that of californium."""
    coefficients = element.c4322 or gemmi.Element("Cf").c4322
    return float(sum(coefficients.a))
