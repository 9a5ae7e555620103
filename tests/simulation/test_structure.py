"""Structures: mass, centre and unit are kept, whatever kind of file they come from."""

from __future__ import annotations

import hashlib
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gemmi
import numpy as np
import pytest
from scipy.spatial import cKDTree

from cectflow.simulation.beads import coarse_grain, render_field
from cectflow.simulation.structure import (
    PROTEIN_EXCESS,
    Structure,
    StructureSource,
    find_structures,
    load_structure,
    summarise_structure,
)
from cectflow.volume import Volume
from cectflow.volume_writer import write_volume

# kDa of the assembly as shared/data/README.md counts them: heavy atoms only. Hydrogens are 7.6 % of
# the mean residue's heavy mass.
HEAVY_KDA = {"1oel": 713, "4v1w": 432, "3j9i": 610, "1bxn": 480, "1aon": 781, "1wcm": 410}
NO_ASSEMBLY = r"has no biological assembly: its atoms are taken as the whole complex"

Load = Callable[[str], Structure]


@pytest.fixture(scope="module")
def load(shared_data: Path) -> Load:
    """Structures of the real data by name, each read once; those known to warn do so silently."""
    folder = f"{shared_data / 'structures'},{shared_data / 'maps'}"
    sources = {source.name: source for source in find_structures(folder)}
    loaded: dict[str, Structure] = {}

    def load_once(name: str) -> Structure:
        if name not in loaded:
            if name in {"1xnr", "1gyt"}:
                with pytest.warns(UserWarning, match=NO_ASSEMBLY):
                    loaded[name] = load_structure(sources[name])
            else:
                loaded[name] = load_structure(sources[name])
        return loaded[name]

    return load_once


def write_model(path: Path, residues: list[tuple[str, list[tuple[str, str]]]]) -> Path:
    """Write a PDB file of one chain, atoms 2 angstrom apart along x."""
    structure, chain, position = gemmi.Structure(), gemmi.Chain("A"), 0.0
    for number, (residue_name, atoms) in enumerate(residues, start=1):
        residue = gemmi.Residue()
        residue.name, residue.seqid = residue_name, gemmi.SeqId(str(number))
        for atom_name, element in atoms:
            atom = gemmi.Atom()
            atom.name, atom.element = atom_name, gemmi.Element(element)
            atom.pos = gemmi.Position(position, 10, -5)
            residue.add_atom(atom)
            position += 2
        chain.add_residue(residue)
    model = gemmi.Model(1)
    model.add_chain(chain)
    structure.add_model(model)
    structure.write_pdb(str(path))
    return path


def load_silently(path: Path) -> Structure:
    with pytest.warns(UserWarning, match=NO_ASSEMBLY):
        return load_structure(find_structures(str(path))[0])


ALANINE = ("ALA", [("N", "N"), ("CA", "C"), ("C", "C"), ("O", "O"), ("CB", "C")])


# --- finding --------------------------------------------------------------------------------------


def test_files_folders_and_phantoms_mix_in_the_order_given(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for name in ("b.mrc.gz", "a.CIF", "notes.txt", "c.ent.gz"):
        (tmp_path / "folder" / name).touch()
    (tmp_path / "4V4R.map").touch()
    found = find_structures(f"{tmp_path / '4V4R.map'}, builtin,{tmp_path / 'folder'}")
    assert [(s.name, s.kind) for s in found if s.kind != "builtin"] == [
        ("4v4r", "map"),
        ("a", "atoms"),
        ("b", "map"),
        ("c", "atoms"),
    ]
    assert [s.kind for s in found][1] == "builtin"
    assert all(s.path is None and str(s) == "builtin" for s in found if s.kind == "builtin")


def test_two_structures_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "ring.pdb").touch()
    with pytest.raises(
        ValueError, match=r"two structures are called 'ring': builtin and .*ring\.pdb"
    ):
        find_structures(f"builtin,{tmp_path}")


def test_what_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file or folder '.*1abc\.pdb'.*'builtin'"):
        find_structures(str(tmp_path / "1abc.pdb"))
    with pytest.raises(FileNotFoundError, match=r"no file or folder ''"):
        find_structures("builtin,")
    gone = StructureSource("gone", tmp_path / "gone.pdb", "atoms")
    for read in (load_structure, summarise_structure):
        with pytest.raises(FileNotFoundError, match=r"there is no file .*gone\.pdb"):
            read(gone)


def test_unknown_suffixes_and_barren_folders_show_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "model.xyz").touch()
    with pytest.raises(ValueError, match=r"model\.xyz has no known suffix: .*\.mmcif.*\.gz"):
        find_structures(str(tmp_path / "model.xyz"))
    with pytest.raises(ValueError, match=r"holds no structure: expected files ending in \.pdb"):
        find_structures(str(tmp_path))


# --- atoms ----------------------------------------------------------------------------------------


def test_a_residue_weighs_what_it_is_made_of(tmp_path: Path) -> None:
    structure = load_silently(write_model(tmp_path / "ala.pdb", [ALANINE] * 20))
    residue = 71.08  # Da, with its 5 hydrogens
    assert structure.mass_kda == pytest.approx(20 * residue / 1000, rel=0.02)
    volt = 47.878 * (3 * 2.5088 + 2.2135 + 1.9834 + 5 * 0.5288)
    excess = volt - 4.53 * 1.21 * residue
    assert structure.weights.sum() == pytest.approx(20 * excess, rel=0.02)


def test_explicit_hydrogens_replace_the_implicit_ones(tmp_path: Path) -> None:
    hydrogens = [(name, "H") for name in ("H", "HA", "HB1", "HB2", "HB3")]
    complete = ("ALA", [*ALANINE[1], *hydrogens])
    bare = load_silently(write_model(tmp_path / "bare.pdb", [ALANINE] * 5))
    full = load_silently(write_model(tmp_path / "full.pdb", [complete] * 5))
    polar = load_silently(
        write_model(tmp_path / "polar.pdb", [("ALA", [*ALANINE[1], ("H", "H")]), *[ALANINE] * 4])
    )
    assert len(full.weights) == 50
    assert full.mass_kda == pytest.approx(bare.mass_kda, rel=0.02)
    assert full.weights.sum() == pytest.approx(bare.weights.sum(), rel=0.05)
    assert polar.mass_kda == pytest.approx(bare.mass_kda)


def test_heavy_elements_never_weigh_less_than_ice(tmp_path: Path) -> None:
    ions = [
        (name.upper(), [(name.upper(), name)]) for name in ("Pt", "Se", "I", "U", "Zn", "Na", "X")
    ]
    structure = load_silently(write_model(tmp_path / "ions.pdb", ions))
    assert (structure.weights > 0).all()


def test_waters_and_second_conformations_are_left_out(tmp_path: Path) -> None:
    model = gemmi.read_pdb_string(
        "ATOM      1  CA AALA A   1       0.000   0.000   0.000  0.60 10.00           C\n"
        "ATOM      2  CA BALA A   1       1.000   0.000   0.000  0.40 10.00           C\n"
        "ATOM      3  N   ALA A   1       4.000   0.000   0.000  1.00 10.00           N\n"
        "HETATM    4  O   HOH A   2      90.000   0.000   0.000  1.00 10.00           O\n"
    )
    model.write_pdb(str(tmp_path / "alt.pdb"))
    structure = load_silently(tmp_path / "alt.pdb")
    assert len(structure.weights) == 2
    assert structure.extent < 8


def test_only_the_first_model_counts(tmp_path: Path) -> None:
    path = write_model(tmp_path / "one.pdb", [ALANINE])
    atoms = "".join(line for line in path.read_text().splitlines(True) if line.startswith("ATOM"))
    (tmp_path / "two.pdb").write_text(
        f"MODEL        1\n{atoms}ENDMDL\nMODEL        2\n{atoms}ENDMDL\nEND\n"
    )
    assert len(load_silently(tmp_path / "two.pdb").weights) == len(load_silently(path).weights)


def test_files_without_atoms_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.pdb").touch()
    with pytest.raises(ValueError, match=r"empty\.pdb holds no atoms"):
        load_structure(find_structures(str(tmp_path / "empty.pdb"))[0])
    write_model(tmp_path / "wet.pdb", [("HOH", [("O", "O")])])
    with pytest.raises(ValueError, match=r"wet\.pdb holds no atoms other than water"):
        load_structure(find_structures(str(tmp_path / "wet.pdb"))[0])
    for name, content in (("a.cif", b""), ("b.cif", b"hello"), ("c.pdb.gz", b"no gzip")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} (cannot be read as PDB or mmCIF|holds no)"):
            load_structure(find_structures(str(tmp_path / name))[0])


@pytest.mark.parametrize("name", sorted(HEAVY_KDA))
def test_masses_are_those_known_and_hydrogens(name: str, load: Load) -> None:
    assert load(name).mass_kda == pytest.approx(1.076 * HEAVY_KDA[name], rel=0.02)


def test_the_assembly_of_groel_doubles_its_atoms(load: Load, shared_data: Path) -> None:
    model = gemmi.read_structure(str(shared_data / "structures" / "1oel.pdb.gz"))
    model.remove_waters()
    structure = load("1oel")
    assert structure.num_operators == 2
    assert len(structure.weights) == 2 * model[0].count_atom_sites()
    assert structure.extent < 200  # two rings in contact, not two copies far apart


def test_an_assembly_is_that_of_gemmi(load: Load, shared_data: Path) -> None:
    model = gemmi.read_structure(str(shared_data / "structures" / "3h84.pdb.gz"))
    model.remove_waters()
    model.remove_alternative_conformations()
    model.transform_to_assembly("1", gemmi.HowToNameCopiedChain.AddNumber)
    expected = np.array(gemmi.FlatStructure(model).pos)[:, ::-1]
    positions = load("3h84").positions_zyx.astype(float)
    assert len(positions) == len(expected)
    tree = cKDTree(expected - expected.mean(axis=0))
    distances, matches = tree.query(positions - positions.mean(axis=0))
    assert np.max(distances) < 1e-3
    assert len(np.unique(matches)) == len(expected)


def test_the_first_of_two_assemblies_is_taken(load: Load) -> None:
    assert load("3d2f").mass_kda == pytest.approx(110, rel=0.02)  # two chains of four
    assert load("3gl1").num_operators == 1


def test_an_mmcif_assembly_finds_its_subchains(load: Load) -> None:
    assert len(load("4v1w").weights) == 32736


@pytest.mark.parametrize("name", ["1oel", "1xnr", "4v4r"])
def test_the_weighted_centre_is_the_origin(name: str, load: Load) -> None:
    structure = load(name)
    centre = np.average(structure.positions_zyx.astype(float), axis=0, weights=structure.weights)
    np.testing.assert_allclose(centre, 0, atol=1e-3)


def test_a_virus_capsid_stays_small_in_memory(shared_data: Path) -> None:
    (source,) = find_structures(str(shared_data / "structures" / "1ihm.pdb.gz"))
    tracemalloc.start()
    try:
        summary = summarise_structure(source)
        _, summary_peak = tracemalloc.get_traced_memory()
        structure = load_structure(source)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert summary_peak < 20e6
    assert peak < 200e6
    assert structure.num_operators == summary.num_operators == 60
    assert structure.mass_kda == pytest.approx(1.076 * 8932, rel=0.02)


def test_an_assembly_of_1680_operators_is_refused_before_it_is_built(tmp_path: Path) -> None:
    """As of the capsid of PBCV-1 (1m4x)."""
    path = write_model(tmp_path / "capsid.cif", [ALANINE] * 700)
    model = gemmi.read_structure(str(write_model(tmp_path / "unit.pdb", [ALANINE] * 700)))
    model.setup_entities()
    assembly, generator = gemmi.Assembly("1"), gemmi.Assembly.Gen()
    generator.subchains = [chain.subchains()[0].subchain_id() for chain in model[0]]
    for index in range(1680):
        operator = gemmi.Assembly.Operator()
        operator.name = str(index + 1)
        operator.transform = gemmi.Transform(gemmi.Mat33(), gemmi.Vec3(0, 0, 10.0 * index))
        generator.operators.append(operator)
    assembly.generators.append(generator)
    model.assemblies.append(assembly)
    model.make_mmcif_document().write_file(str(path))
    (source,) = find_structures(str(path))
    tracemalloc.start()
    try:
        summary = summarise_structure(source)
        with pytest.raises(
            ValueError, match=r"1680 operators make an assembly of 5880000 atoms, \d+ nm across: "
        ):
            load_structure(source)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (summary.num_operators, summary.num_atoms) == (1680, 5_880_000)
    assert peak < 20e6


@pytest.mark.parametrize("name", ["1xnr", "1gyt"])
def test_a_file_without_an_assembly_warns_and_is_taken_as_it_is(
    name: str, shared_data: Path
) -> None:
    source = next(s for s in find_structures(str(shared_data / "structures")) if s.name == name)
    with pytest.warns(UserWarning, match=rf"{name}\..*{NO_ASSEMBLY}") as warned:
        structure = load_structure(source)
    assert len(warned) == 1
    assert structure.num_operators == 1


def test_nucleic_acid_is_heavier_per_dalton_and_per_volume(load: Load) -> None:
    ratio = _weight_per_da(load("1xnr")) / _weight_per_da(load("1oel"))
    assert 1.02 < ratio < 1.2


def test_the_digest_is_that_of_the_file(load: Load, shared_data: Path) -> None:
    content = (shared_data / "structures" / "3qm1.pdb.gz").read_bytes()
    assert load("3qm1").digest == hashlib.sha256(content).hexdigest()


# --- against gemmi --------------------------------------------------------------------------------


def read_dry(path: Path) -> gemmi.Structure:
    model = gemmi.read_structure(str(path))
    model.remove_waters()
    if np.array(gemmi.FlatStructure(model).altlocs).any():
        model.remove_alternative_conformations()
    return model


def density_of_gemmi(
    path: Path, sigma: float, centre_xyz: np.ndarray, edge: int, spacing: float
) -> np.ndarray:
    """Potential in V of a file's atoms, blurred, by gemmi's electron density calculator."""
    structure = read_dry(path)
    structure.cell = gemmi.UnitCell(*[edge * spacing] * 3, 90, 90, 90)
    structure.spacegroup_hm = "P 1"
    for cra in structure[0].all():
        cra.atom.pos += gemmi.Position(*(edge // 2 * spacing - centre_xyz))
        cra.atom.b_iso, cra.atom.occ = 8 * np.pi**2 * sigma**2, 1.0
        cra.atom.aniso = gemmi.SMat33f(0, 0, 0, 0, 0, 0)
    calculator = gemmi.DensityCalculatorE()
    calculator.cutoff = 1e-7
    calculator.grid.set_unit_cell(structure.cell)
    calculator.grid.set_size(edge, edge, edge)
    calculator.add_model_density_to_grid(structure[0])
    return 47.878 * np.array(calculator.grid).transpose(2, 1, 0)


@pytest.mark.parametrize("name", ["1s3x", "1u6g", "1xnr"])
def test_density_agrees_with_that_of_gemmi(name: str, load: Load, shared_data: Path) -> None:
    """Where they must differ, by ice and missing hydrogens, they differ by a known factor."""
    sigma, spacing, edge = 6.75, 10.0, 32
    (path,) = (shared_data / "structures").glob(f"{name}.*")
    structure = load(name)
    flat = gemmi.FlatStructure(read_dry(path))
    assert len(flat.pos) == len(structure.weights)
    centre_zyx = np.array(flat.pos)[:, ::-1].mean(0) - structure.positions_zyx.mean(0)
    theirs = density_of_gemmi(path, sigma, centre_zyx[::-1], edge, spacing)
    # The potential of the atoms in the file, from their factors at zero angle.
    elements = [gemmi.Element(e.decode()) for e in np.array(flat.element_names)]
    factors = np.array([sum(element.c4322.a) for element in elements])
    assert theirs.sum() * spacing**3 == pytest.approx(47.878 * factors.sum(), rel=5e-3)
    beads = coarse_grain(structure)
    ours, _ = render_field(
        (beads,),
        np.array([1]),
        np.full((1, 3), edge / 2),
        np.zeros((1, 3)),
        shape=(edge, edge, edge),
        voxel_size=spacing,
        sigma=sigma,
        thresholds=np.array([1e9]),
    )
    factor = float(structure.weights.sum() / (47.878 * factors.sum()))
    # Excess of protein over ice 4.28 V A^3/Da, of its bare heavy atoms' potential about 10.
    assert 0.35 < factor < 0.55
    error = ours - factor * theirs
    assert np.sqrt((error**2).mean() / ((factor * theirs) ** 2).mean()) < 0.05
    assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.998


# --- maps and the common unit ---------------------------------------------------------------------


def _weight_per_da(structure: Structure) -> float:
    return float(structure.weights.sum(dtype=float)) / structure.mass_kda / 1000


@pytest.mark.parametrize("name", ["1oel", "3j9i", "1xnr", "4v4r", "5mrc", "ring"])
def test_maps_atoms_and_phantoms_share_one_unit(name: str, load: Load) -> None:
    if name == "ring":
        structure = next(load_structure(s) for s in find_structures("builtin") if s.name == name)
    else:
        structure = load(name)
    assert _weight_per_da(structure) == pytest.approx(PROTEIN_EXCESS, rel=0.25)
    assert structure.molecular_volume == pytest.approx(1210 * structure.mass_kda)


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("4v4r", 2300, 2500), ("5mrc", 3000, 3700), ("4cr2", 1300, 1700), ("6utj", 700, 1100)],
)
def test_maps_have_sensible_masses(name: str, low: float, high: float, load: Load) -> None:
    structure = load(name)
    assert low < structure.mass_kda < high
    assert structure.spread == pytest.approx(6.65)
    assert structure.num_operators == 1


def write_map(path: Path, data: np.ndarray) -> StructureSource:
    write_volume(path, Volume(data.astype(np.float32), 8.0))
    return find_structures(str(path))[0]


def test_a_block_keeps_its_volume_and_its_place(tmp_path: Path) -> None:
    data = np.zeros((12, 10, 8))
    data[2:8, 3:7, 1:4] = 5
    structure = load_structure(write_map(tmp_path / "block.mrc", data))
    assert structure.molecular_volume == pytest.approx(72 * 8**3)
    np.testing.assert_allclose(np.ptp(structure.positions_zyx, axis=0), [40, 24, 16])
    np.testing.assert_allclose(structure.positions_zyx.mean(axis=0), 0, atol=1e-4)
    assert structure.spread == pytest.approx(0.665 * 8)


def test_a_map_of_two_complexes_warns(tmp_path: Path) -> None:
    data = np.zeros((8, 8, 20))
    data[2:6, 2:6, 2:6] = data[2:6, 2:6, 12:15] = 1
    source = write_map(tmp_path / "two.mrc", data)
    with pytest.warns(
        UserWarning, match=r"separate bodies of 64 and 48 voxels .* give .*two\.mrc#1"
    ):
        load_structure(source)
    data[2:6, 2:6, 13:15] = 0  # a crumb is no complex
    load_structure(write_map(tmp_path / "crumb.mrc", data))


def test_the_bodies_of_a_map_are_told_apart(tmp_path: Path) -> None:
    data = np.zeros((8, 8, 20))
    data[2:6, 2:6, 2:6], data[2:6, 2:6, 12:15] = 1, 2
    path = tmp_path / "two.mrc"
    write_map(path, data)
    sources = find_structures(f"{path}#1,{path}#2")
    assert [source.name for source in sources] == ["two_1", "two_2"]
    assert [str(source) for source in sources] == [f"{path}#1", f"{path}#2"]
    first, second = map(load_structure, sources)
    assert [len(body.weights) for body in (first, second)] == [64, 48]
    np.testing.assert_allclose(np.ptp(first.positions_zyx, axis=0), [24, 24, 24])
    np.testing.assert_allclose(np.ptp(second.positions_zyx, axis=0), [24, 24, 16])
    assert summarise_structure(sources[1]).num_atoms == 48
    with pytest.raises(ValueError, match=r"2 separate bodies, .* 64, 48 voxels: .* given #3"):
        load_structure(find_structures(f"{path}#3")[0])


def test_only_maps_have_bodies(tmp_path: Path) -> None:
    path = write_model(tmp_path / "ala.pdb", [ALANINE])
    with pytest.raises(ValueError, match=r"ala\.pdb#1: expected a map before the #"):
        find_structures(f"{path}#1")
    with pytest.raises(FileNotFoundError, match=r"no file or folder '.*ala\.pdb#0'"):
        find_structures(f"{path}#0")


@pytest.mark.parametrize("file", ["4v94.mrc.gz", "EMD-3197.map.gz"])
def test_the_two_complexes_of_a_real_map_are_alike(file: str, shared_data: Path) -> None:
    path = shared_data / "maps" / file
    first, second = (load_structure(source) for source in find_structures(f"{path}#1,{path}#2"))
    with pytest.warns(UserWarning, match="separate bodies"):
        whole = load_structure(find_structures(str(path))[0])
    assert first.mass_kda + second.mass_kda == pytest.approx(whole.mass_kda, rel=1e-3)
    assert max(first.extent, second.extent) < whole.extent
    if file.startswith("4v94"):  # two TRiC side by side, of 0.95 MDa by their sequence
        assert max(first.extent, second.extent) < 0.7 * whole.extent
        assert first.mass_kda == pytest.approx(second.mass_kda, rel=0.01)
        assert first.mass_kda == pytest.approx(950, rel=0.2)


@pytest.mark.parametrize("sign", [-1, 0])
def test_dark_and_empty_maps_are_refused(sign: int, tmp_path: Path) -> None:
    data = np.zeros((8, 8, 8))
    data[2:6, 2:6, 2:6] = sign
    with pytest.raises(ValueError, match=r"expected bright protein on a background of 0"):
        load_structure(write_map(tmp_path / "dark.mrc", data))


# --- summaries ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["1bxn", "3d2f", "4v1w", "4v4r"])
def test_a_summary_agrees_with_its_structure(name: str, load: Load, shared_data: Path) -> None:
    folders = f"{shared_data / 'structures'},{shared_data / 'maps'}"
    source = next(s for s in find_structures(folders) if s.name == name)
    summary, structure = summarise_structure(source), load(name)
    assert summary.mass_kda == pytest.approx(structure.mass_kda)
    assert summary.extent == pytest.approx(structure.extent, rel=1e-4)
    assert summary.num_operators == structure.num_operators
    assert summary.num_atoms == len(structure.weights)
    assert (summary.name, summary.kind, summary.source) == (name, source.kind, str(source.path))


def test_a_phantom_has_a_summary() -> None:
    source = find_structures("builtin")[0]
    summary, structure = summarise_structure(source), load_structure(source)
    assert (summary.mass_kda, summary.extent) == (structure.mass_kda, structure.extent)
    assert (summary.kind, summary.source, summary.num_operators) == ("builtin", "builtin", 1)
