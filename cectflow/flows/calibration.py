"""From real subtomograms to a recipe that simulates their like."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cectflow.figures import draw_radial_power
from cectflow.files import replacing
from cectflow.flows.simulation import load_structures
from cectflow.model_card import Contrast
from cectflow.particles import read_particles
from cectflow.progress import track
from cectflow.recipe import Recipe
from cectflow.simulation.calibration.calibrate import Calibration, calibrate
from cectflow.simulation.calibration.noise_fit import estimate_defocus, noise_shows_defocus
from cectflow.simulation.calibration.radial_power import (
    MIN_CUBES,
    PowerRatio,
    RadialPower,
    compare_power,
    radial_power,
)
from cectflow.simulation.field import prepare_specimen, simulate_field
from cectflow.simulation.recipe import SimulationRecipe
from cectflow.simulation.structure import Structure
from cectflow.subtomogram import cut
from cectflow.volume import find_stacks, read_stack

__all__ = ["CalibrationInput", "calibrate_recipe", "simulate_radial_power"]


@dataclass(frozen=True)
class CalibrationInput:
    """Real subtomograms and what is known of them.

    Attributes
    ----------
    stack
        MRC stack, folder or glob.
    particles
        STAR or CSV. With ``rlnImageName`` (``000003@stack.mrcs``) its rows choose the cubes of one
        stack; else it has one row for each. Names of tomograms are taken from it.
    voxel_size
        Å; None: the header's.
    mask_radius
        Å, or None.
    snr
        In the reconstruction, or None.
    contrast
        Of the cubes, or None.
    keep_defocus
        Do not estimate the defocus.
    hold_out
        Tomogram whose cubes take no part in the calibration and judge it.
    """

    stack: str
    particles: Path | None = None
    voxel_size: float | None = None
    mask_radius: float | None = None
    snr: float | None = None
    contrast: Contrast | None = None
    keep_defocus: bool = False
    hold_out: str | None = None


def calibrate_recipe(
    recipe: Recipe,
    given: CalibrationInput,
    out: Path,
    *,
    overwrite: bool = False,
    tell: Callable[[str], None] = print,
) -> Calibration:
    """Write a recipe calibrated on real subtomograms, and a figure that shows how well it fits.

    The figure is of the cubes that calibrated it, or of the tomogram that was held out; simulated
    cubes then have that tomogram's own defocus, where its noise shows it.

    Parameters
    ----------
    recipe
        Whose settings are kept but for noise spectrum, tilt range, defocus range and SNR.
    given
        The subtomograms.
    out
        YAML file; the figure takes its name with ``.png``.
    overwrite
        Replace them if they exist.
    tell
        Receives each finding as a line.

    Raises
    ------
    ValueError
        If the file's name is not a recipe's, the cubes cannot calibrate it, or there is no such
        tomogram to hold out.
    FileExistsError
        If an output exists and is not to be overwritten.
    """
    picture = out.with_suffix(".png")
    if out.suffix not in {".yaml", ".yml"}:
        msg = f"{out} is to be a recipe: give it a name that ends in .yaml"
        raise ValueError(msg)
    with (
        replacing(out, overwrite=overwrite) as new_recipe,
        replacing(picture, overwrite=overwrite) as new_picture,
    ):
        cubes, voxel_size, tomograms = _read_cubes(given)
        held_out = _find_held_out(given, tomograms, len(cubes))
        structures = load_structures(recipe.simulation)
        found = calibrate(
            prepare_specimen(recipe.simulation, structures),
            cubes[~held_out],
            voxel_size,
            tomograms=None if tomograms is None else np.array(tomograms)[~held_out].tolist(),
            mask_radius=given.mask_radius,
            snr=given.snr,
            contrast=given.contrast,
            fit_defocus=not given.keep_defocus,
        )
        for line in _findings(found):
            tell(line)
        judging, fitted, checked, origin = cubes, None, found.recipe, ""
        if given.hold_out is not None:
            judging, fitted, origin = cubes[held_out], found.measured, f" of {given.hold_out}"
            if noise_shows_defocus(checked) and not given.keep_defocus:
                defocus = estimate_defocus(checked, judging)
                microscope = checked.microscope.model_copy(update={"defocus_um": defocus})
                checked = checked.model_copy(update={"microscope": microscope})
                tell(f"defocus of {given.hold_out}, held out: {defocus:.2f} µm")
        real = radial_power(judging)
        simulated = simulate_radial_power(checked, structures, len(judging), cubes.shape[-1])
        found_ratio = compare_power(real, simulated, fitted=fitted)
        figure = draw_radial_power(
            real.frequencies,
            (real.power, real.standard_error),
            (found_ratio.scale * simulated.power, found_ratio.scale * simulated.standard_error),
            voxel_size=voxel_size,
            title=f"{real.num_cubes} real subtomograms{origin}, {simulated.num_cubes} simulated",
        )
        tell(_judge(found_ratio))
        calibrated = recipe.model_copy(update={"simulation": found.recipe})
        new_recipe.write_text(calibrated.to_yaml(), encoding="utf-8")
        figure.savefig(new_picture, dpi=80, format="png")
    tell(f"{out}: recipe; {picture}: simulated against real radial power")
    return found


def simulate_radial_power(
    recipe: SimulationRecipe, structures: tuple[Structure, ...], number: int, box: int
) -> RadialPower:
    """Radial power of cubes about the particles of a recipe's fields, of a purpose of their own.

    Parameters
    ----------
    recipe, structures
        What to simulate.
    number
        Of cubes, at least; all of a field's are taken, since they cost nothing more.
    box
        Edge of the cubes in voxels.
    """
    specimen = prepare_specimen(recipe, structures)
    cubes: list[NDArray[np.float32]] = []
    # Several fields: defocus and SNR differ between them, and cubes of one share neighbours.
    fields = 8
    while True:
        for index in track(range(len(cubes), fields), total=fields, title="simulating"):
            field = simulate_field(specimen, "calibration", index)
            centres = np.round(field.scene.positions_zyx)
            cubes.append(cut(field.tomogram.numpy(), centres, box, periodic=True))
        if sum(map(len, cubes)) >= number:
            return radial_power(np.concatenate(cubes))
        fields *= 2


def _read_cubes(given: CalibrationInput) -> tuple[NDArray[Any], float, list[str] | None]:
    """The chosen cubes, their voxel size and the names of their tomograms."""
    paths = find_stacks(given.stack)
    read = [read_stack(path, voxel_size=given.voxel_size) for path in paths]
    kinds = {(cubes.shape[1:], round(size, 3)) for cubes, size in read}
    shape = read[0][0].shape[1:]
    if len(kinds) > 1 or len(set(shape)) > 1:
        msg = (
            f"{given.stack} holds volumes of {', '.join(str(kind[0]) for kind in kinds)} voxels: "
            "expected cubes of one edge and one voxel size"
        )
        raise ValueError(msg)
    cubes = np.concatenate([np.asarray(stack, np.float32) for stack, _ in read])
    voxel_size = read[0][1]
    if given.particles is None:
        return cubes, voxel_size, None
    rows = read_particles(given.particles).rows
    if "rlnImageName" in rows:
        chosen = [_number_in_stack(str(name), paths, len(cubes)) for name in rows["rlnImageName"]]
        cubes = cubes[chosen]
    elif len(rows) != len(cubes):
        msg = (
            f"{given.particles} has {len(rows)} rows for {len(cubes)} cubes and no rlnImageName: "
            "expected one row for each"
        )
        raise ValueError(msg)
    columns = [name for name in ("rlnTomoName", "rlnMicrographName") if name in rows]
    names = [str(name) for name in rows[columns[0]]] if columns else None
    return cubes, voxel_size, names


def _find_held_out(
    given: CalibrationInput, tomograms: list[str] | None, number: int
) -> NDArray[np.bool_]:
    """Which cubes are of the tomogram that is held out."""
    if given.hold_out is None:
        return np.zeros(number, np.bool_)
    names = sorted(set(tomograms or ()))
    if given.hold_out not in names:
        msg = (
            f"hold_out is {given.hold_out!r}: expected one of the tomograms that --particles "
            f"names, which are {', '.join(names) or 'none: give rlnTomoName there'}"
        )
        raise ValueError(msg)
    held_out = np.array([name == given.hold_out for name in tomograms or ()])
    if min(held_out.sum(), (~held_out).sum()) < MIN_CUBES:
        msg = (
            f"{held_out.sum()} cubes are of {given.hold_out}, {(~held_out).sum()} of others: "
            f"expected at least {MIN_CUBES} of each"
        )
        raise ValueError(msg)
    return held_out


def _number_in_stack(name: str, paths: tuple[Path, ...], number: int) -> int:
    """Index of ``000003@stack.mrcs`` among the cubes of the one stack given."""
    index, at, file = name.partition("@")
    fits = at and index.isdigit() and len(paths) == 1 and Path(file).name == paths[0].name
    if not (fits and 1 <= int(index) <= number):
        msg = (
            f"rlnImageName is {name!r}: expected N@{paths[0].name} with N from 1 to {number}, "
            "and one stack given"
        )
        raise ValueError(msg)
    return int(index) - 1


def _findings(found: Calibration) -> list[str]:
    lines = []
    if (tilts := found.tilt_range) is not None:
        lines.append(
            f"tilt range: {tilts.lowest:.0f} ± {np.ceil(tilts.lowest_error):.0f}° to "
            f"{tilts.highest:.0f} ± {np.ceil(tilts.highest_error):.0f}° about y"
        )
    lines += [f"defocus of {name}: {value:.2f} µm" for name, value in found.defoci.items()]
    spectrum = found.recipe.microscope.noise_spectrum
    if not isinstance(spectrum, str):
        lines.append(f"noise spectrum of the tilt images: {len(spectrum.power)} frequencies")
    return [*lines, found.snr.reasoning, *found.notes]


def _judge(found: PowerRatio) -> str:
    missed = ", ".join(
        f"{ratio:.2f} ± {error:.2f} at {frequency:.3f}"
        for frequency, ratio, error, agrees in zip(
            found.frequencies, found.ratio, found.standard_error, found.agrees, strict=True
        )
        if not agrees
    )
    return (
        f"simulated over real radial power, 0.05 to 0.45 cycles/voxel: {found.ratio.min():.2f} to "
        f"{found.ratio.max():.2f}; {found.agrees.sum()} of {len(found.ratio)} shells agree within "
        f"15 % or 2 standard errors{f'; not {missed}' if missed else ''}"
    )
