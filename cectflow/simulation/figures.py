"""Pictures that explain a simulation: a field, its power spectra, its optics, the dataset's SNR.

Like those of :mod:`cectflow.figures`: each function returns a matplotlib figure, drawn without a
display. x and k_x point to the right; y, z and k_z (the beam) upwards. Colours are those of Okabe
and Ito, which colour-blind eyes tell apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from cectflow.figures import draw_field
from cectflow.manifest import FieldRecord
from cectflow.simulation.field import SimulatedField, Specimen
from cectflow.simulation.imaging import SNR_RESOLUTION
from cectflow.simulation.microscope import (
    OpticsDraw,
    contrast_transfer,
    contrast_zeros,
    single_number,
)
from cectflow.simulation.optics import Optics
from cectflow.simulation.recipe import SimulationRecipe
from cectflow.simulation.spectra import field_spectra
from cectflow.simulation.tomogram import Tomogram

__all__ = [
    "draw_optics",
    "draw_simulated_field",
    "draw_snr",
    "draw_spectra",
    "draw_tomogram",
]

SIGNAL, NOISE, TOTAL, OTHER = "#0072B2", "#D55E00", "#000000", "#009E73"
MINUS = "\N{MINUS SIGN}"
DECADES = 1e7
"""From the strongest power drawn to the weakest."""
RESOLUTIONS = (400, 200, 120, 80, 60, 50, 40, 35, 30, 25, 20, 17, 15, 12, 10, 8, 7, 6, 5, 4, 3, 2)
"""Å that may be marked on an upper axis."""
TICK_DISTANCE = 0.075
"""Of two marked resolutions, as a share of the axis."""
WIDE = 3.0
"""Ratio of the largest to the smallest SNR above which its axis is logarithmic."""
FARTHEST = 1.6
"""Nyquist frequencies up to which the CTF is drawn, where its first zero lies beyond."""


def draw_simulated_field(specimen: Specimen, field: SimulatedField) -> Figure:
    """Density, tomogram, classes and instances of a field: central xy slices above xz slices."""
    class_of_owner = np.concatenate([[0], field.scene.class_ids])
    return _draw_truth(
        field.density,
        field.tomogram.numpy(),
        class_of_owner[field.owners],
        field.owners,
        specimen,
        field.record,
        f"{field.record.field}: {len(field.scene)} particles",
    )


def draw_tomogram(specimen: Specimen, tomogram: Tomogram, name: str) -> Figure:
    """The same of a whole tomogram."""
    return _draw_truth(
        tomogram.density,
        tomogram.data,
        tomogram.classes,
        tomogram.instances,
        specimen,
        tomogram.record,
        f"{name}: {len(tomogram.class_ids)} particles",
    )


def draw_spectra(specimen: Specimen, field: SimulatedField) -> Figure:
    """Power of signal, noise and tomogram per shell (left), and their SNR per shell (right).

    Full lines are the field's, dashed ones what its recipe leads to expect.
    """
    spectra, record = field_spectra(specimen, field), field.record
    noisy = spectra.noise is not None
    figure = Figure(figsize=(10.5 if noisy else 6.0, 4.3), layout="constrained")
    panels = figure.subplots(1, 2 if noisy else 1, squeeze=False)[0]
    k = spectra.frequencies
    panels[0].plot(k, spectra.tomogram, color=TOTAL, lw=1.2, label="tomogram")
    if spectra.others is not None:
        panels[0].plot(k, spectra.others, color=OTHER, lw=1.2, label="membranes and gold")
    for name, measured, expected, colour in (
        ("noise", spectra.noise, spectra.expected_noise, NOISE),
        ("signal (particles)", spectra.signal, spectra.expected_signal, SIGNAL),
    ):
        if measured is not None and expected is not None:
            panels[0].plot(k, measured, color=colour, lw=1.8, label=f"{name}")
            panels[0].plot(k, expected, "--", color=colour, lw=1.0)
    panels[0].set(ylabel="power per voxel (white noise: its variance)", yscale="log")
    handles, labels = panels[0].get_legend_handles_labels()
    handles.append(Line2D([], [], color="0.4", ls="--", lw=1.0))
    panels[0].legend(handles, [*labels, "expected by the recipe"], frameon=False, fontsize=8)
    title = f"{record.field}: radial power, noise-free"
    highest = float(spectra.tomogram.max())
    panels[0].set_ylim(bottom=max(panels[0].get_ylim()[0], highest / DECADES), top=3 * highest)
    if spectra.noise is not None and spectra.expected_noise is not None:
        for signal, noise, style, thickness in (
            (spectra.signal, spectra.noise, "-", 1.8),
            (spectra.expected_signal, spectra.expected_noise, "--", 1.0),
        ):
            # Where the band is cut off (snr_stage aitom) there is nothing to divide.
            there = noise > highest / DECADES
            panels[1].plot(k[there], signal[there] / noise[there], style, color=SIGNAL,
                           lw=thickness)  # fmt: skip
        panels[1].axhline(1.0, color="0.6", lw=0.8)
        panels[1].set(ylabel="signal power / noise power", yscale="log")
        if k[-1] > 1.0 / SNR_RESOLUTION:
            panels[1].axvspan(0.0, 1.0 / SNR_RESOLUTION, color="0.92", lw=0)
        title = (
            f"{record.field}: SNR in the reconstruction {record.snr_reconstruction:.3g} over all "
            f"frequencies, {record.snr_60:.3g} low-passed to {SNR_RESOLUTION:.0f} Å (grey)"
        )
    for axes in panels:
        axes.set_xlim(0.0, k[-1])
        _frequency_axis(axes)
    figure.suptitle(title, fontsize=10)
    return figure


def draw_optics(optics: Optics, draw: OpticsDraw, recipe: SimulationRecipe) -> Figure:
    """Transfer H(k) of a field in three planes with its missing wedge, and the CTF as a curve.

    Parameters
    ----------
    optics
        Of the draw on the recipe's field.
    draw
        Defoci and tilts.
    recipe
        For shape, voxel size and correction.
    """
    width = recipe.field_shape[2]
    transfer = optics.signal.real.numpy() if optics.signal.is_complex() else optics.signal.numpy()
    column = max(width // 6, 1)
    distance = column / (width * recipe.voxel_size)
    low, high = draw.tilts.range
    # A plane at k_x = 0 would be empty: at any tilt but 0 the wedge takes all of it.
    planes = (
        ("$k_x$", "$k_z$", "plane $k_y$ = 0", _full_plane(transfer[:, 0], width)),
        ("$k_y$", "$k_z$", f"plane $k_x$ = 1/({1 / distance:.0f} Å)",
         np.fft.fftshift(transfer[:, :, column])),
        ("$k_x$", "$k_y$", "plane $k_z$ = 0", _full_plane(transfer[0], width)),
    )  # fmt: skip
    figure = Figure(figsize=(11, 7.2), layout="constrained")
    grid = figure.add_gridspec(2, 3, height_ratios=[1.25, 1])
    largest = float(np.abs(transfer).max()) or 1.0
    nyquist = 0.5 / recipe.voxel_size
    panels = [figure.add_subplot(grid[0, place]) for place in range(3)]
    for axes, (across, up, title, plane) in zip(panels, planes, strict=True):
        image = axes.imshow(
            plane, cmap="RdBu_r", vmin=-largest, vmax=largest, origin="lower", aspect="equal",
            extent=(*_edges(plane.shape[1], nyquist), *_edges(plane.shape[0], nyquist)),
            interpolation="nearest",
        )  # fmt: skip
        axes.set(xlabel=f"{across} (Å⁻¹)", ylabel=f"{up} (Å⁻¹)")
        axes.set_title(title, fontsize=10)
        axes.set_xlim(axes.get_xlim())
        axes.set_ylim(axes.get_ylim())
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_locator(MaxNLocator(4))
    for angle in (low, high):
        # The plane of a tilt by t: k_z cos t + k_x sin t = 0.
        slope = -float(np.tan(np.deg2rad(angle)))
        panels[0].axline((0.0, 0.0), slope=slope, color="black", ls="--", lw=0.8)
        if abs(slope * distance) < nyquist:
            panels[1].axhline(slope * distance, color="black", ls="--", lw=0.8)
    if low < 0 < high:
        for end, anchor in ((0.95 * nyquist, "top"), (-0.95 * nyquist, "bottom")):
            panels[0].text(0.0, end, "missing\nwedge", ha="center", va=anchor, fontsize=8)
    bar = figure.colorbar(image, ax=panels, shrink=0.8, pad=0.01)
    bar.set_label("H(k); negative: protein dark")
    _draw_contrast(figure.add_subplot(grid[1, :]), transfer[0, 0], draw, recipe)
    figure.suptitle(
        f"Transfer H(k) of a tilt series from {low:g}° to {high:g}° (dashed: the outermost tilts), "
        f"CTF correction: {recipe.ctf_correction}".replace("-", MINUS),
        fontsize=10,
    )
    return figure


def draw_snr(
    records: Sequence[FieldRecord], *, stage: str, requested: tuple[float, float]
) -> Figure:
    """Histograms of the fields' SNR: requested and measured (above), and below 60 Å.

    Parameters
    ----------
    records
        Of all fields; those without noise are left out.
    stage
        The recipe's ``snr_stage``.
    requested
        Its ``snr``, shaded.

    Raises
    ------
    ValueError
        If no field has noise.
    """
    rows = [(r.requested_snr, r.snr, r.snr_reconstruction, r.snr_60) for r in records]
    values = np.array([row for row in rows if None not in row], np.float64)
    if not len(values):
        msg = f"none of {len(records)} fields has a measured SNR: there is nothing to draw"
        raise ValueError(msg)
    asked, at_stage, reconstruction, low_passed = values.T
    lower = [("low-passed to 60 Å", low_passed, OTHER)]
    if stage != "reconstruction":
        lower.insert(0, ("full band", reconstruction, SIGNAL))
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    panels = figure.subplots(2, 1)
    panels[0].axvspan(*_widened(*requested), color="0.88", lw=0, label="the recipe's range")
    _histograms(
        panels[0],
        [("requested", asked, TOTAL), ("measured", at_stage, SIGNAL)],
    )
    panels[0].set_xlabel(f"SNR where the recipe defines it ({stage}), full band")
    _histograms(panels[1], lower)
    panels[1].set_xlabel("SNR measured in the reconstruction")
    ratio = at_stage / asked
    error = float(ratio.std(ddof=1) / np.sqrt(len(ratio))) if len(ratio) > 1 else float("nan")
    figure.suptitle(
        f"SNR (variance of signal / variance of noise) of {len(values)} fields; "
        f"measured / requested: {ratio.mean():.3f} ± {error:.3f}",
        fontsize=10,
    )
    return figure


def _draw_truth(
    density: Float[NDArray[np.floating], "z y x"],
    tomogram: Float[NDArray[np.float32], "z y x"],
    classes: Int[NDArray[np.integer], "z y x"],
    instances: Int[NDArray[np.integer], "z y x"],
    specimen: Specimen,
    record: FieldRecord,
    content: str,
) -> Figure:
    noise = "noise-free"
    if record.snr_reconstruction is not None:
        noise = (
            f"SNR in the reconstruction {record.snr_reconstruction:.3g}, low-passed to "
            f"{SNR_RESOLUTION:.0f} Å {record.snr_60:.3g}"
        )
    return draw_field(
        (
            ("density, protein bright", density, "grey"),
            ("tomogram, protein dark", tomogram, "grey"),
            ("class of each voxel", classes, "labels"),
            ("instance of each voxel", instances, "labels"),
        ),
        voxel_size=specimen.recipe.voxel_size,
        title=(
            f"{content}, {record.occupancy:.1%} of the volume, defocus {record.defocus_um:.2f} µm, "
            f"{noise}"
        ),
        classes=tuple(grains.name for grains in specimen.beads),
    )


def _draw_contrast(
    axes: Axes, along_x: NDArray[np.float32], draw: OpticsDraw, recipe: SimulationRecipe
) -> None:
    """CTF of the mean defocus with its zeros, over that part of H which the least tilts fill."""
    nyquist = 0.5 / recipe.voxel_size
    defoci, microscope = np.array(draw.defoci_um), draw.microscope
    mean = float(defoci.mean())
    zeros = contrast_zeros(mean, microscope, FARTHEST * nyquist)
    end = nyquist
    if not len(zeros) or zeros[0] > nyquist:
        end = min(FARTHEST * nyquist, 1.1 * zeros[0]) if len(zeros) else 1.1 * nyquist
    k = np.linspace(0.0, end, 600)
    axes.axhline(0.0, color="0.6", lw=0.8)
    axes.plot(
        k, contrast_transfer(k**2, mean, microscope), color=TOTAL, lw=1.0,
        label=f"CTF at the mean defocus, {mean:.2f} µm",
    )  # fmt: skip
    axes.plot(
        np.fft.rfftfreq(recipe.field_shape[2], recipe.voxel_size), -along_x, ".-", color=SIGNAL,
        lw=1.5, ms=4, label=f"{MINUS}H along $k_x$: with dose, MTF and correction",
    )  # fmt: skip
    shown = zeros[zeros <= end]
    for zero in shown:
        axes.axvline(zero, color=NOISE, ls=":", lw=1.2)
        axes.text(zero, 1.06, f" {1 / zero:.3g} Å", color=NOISE, fontsize=8, va="bottom")
    half = 0.5 * single_number(microscope, "astigmatism_um")
    lowest, highest = float(defoci.min()) - half, float(defoci.max()) + half
    zero_name = "zeros of theory" if len(shown) else "zeros of theory: none here"
    if 0 < lowest < highest:
        zero_name += "; shaded: over all tilts and directions"
        ends = [contrast_zeros(value, microscope, 2 * end) for value in (highest, lowest)]
        for first, last, _ in zip(*ends, shown, strict=False):
            axes.axvspan(first, last, color=NOISE, alpha=0.15, lw=0)
    axes.plot([], [], color=NOISE, ls=":", lw=1.2, label=zero_name)
    if end > nyquist:
        axes.axvspan(nyquist, end, color="0.92", lw=0, label="beyond the Nyquist frequency")
    axes.set(xlim=(0.0, end), ylim=(-1.1, 1.25), ylabel="contrast transfer")
    axes.legend(loc="lower left", frameon=False, fontsize=8)
    _frequency_axis(axes)


def _full_plane(half: NDArray[np.float32], width: int) -> NDArray[np.float32]:
    """A plane of a half spectrum's real part with both signs of k_x, zero frequency in the middle.

    The real part is even: ``Re H(-k) = Re H(k)``.
    """
    columns = np.rint(np.fft.fftfreq(width) * width).astype(np.int64)
    mirrored = half[-np.arange(len(half))]
    return np.fft.fftshift(
        np.where(columns >= 0, half[:, np.abs(columns)], mirrored[:, np.abs(columns)])
    )


def _edges(number: int, nyquist: float) -> tuple[float, float]:
    """Outer edges of the samples of a shifted spectrum."""
    step = 2 * nyquist / number
    first = -(number // 2) * step
    return first - 0.5 * step, first + (number - 0.5) * step


def _frequency_axis(axes: Axes) -> None:
    """Å⁻¹ below and resolution in Å above, without the frame's right side."""
    low, high = axes.get_xlim()
    axes.set_xlabel("spatial frequency (Å⁻¹)")
    axes.spines["right"].set_visible(False)
    marked: list[int] = []
    for resolution in RESOLUTIONS:
        last = 1.0 / marked[-1] if marked else low
        if 1.0 / resolution - last > TICK_DISTANCE * (high - low) and 1.0 / resolution < high:
            marked.append(resolution)
    upper = axes.secondary_xaxis("top")
    upper.set_xticks([1.0 / resolution for resolution in marked], [f"{n}" for n in marked])
    upper.set_xlabel("resolution (Å)")


def _widened(low: float, high: float) -> tuple[float, float]:
    """The interval, or a narrow one about a single value."""
    return (low, high) if high > 1.02 * low else (low / 1.01, high * 1.01)


def _histograms(axes: Axes, groups: Sequence[tuple[str, NDArray[np.float64], str]]) -> None:
    """Histograms over one set of bins, with the mean of each marked; the first is an outline."""
    together = np.concatenate([values for _, values, _ in groups])
    low, high = _widened(float(together.min()), float(together.max()))
    number = int(np.clip(2 * np.sqrt(len(groups[0][1])), 8, 40))
    is_wide = high > WIDE * low
    spread = np.geomspace if is_wide else np.linspace
    # A little more than the values, which rounding would put outside.
    bins = spread(low * (1 - 1e-6), high * (1 + 1e-6), number + 1)
    for place, (name, values, colour) in enumerate(groups):
        outlined = place == 0 and len(groups) > 1
        axes.hist(
            values, bins=bins.tolist(), color=colour, lw=1.5, alpha=1.0 if outlined else 0.6,
            histtype="step" if outlined else "stepfilled", zorder=3 if outlined else 2,
            label=f"{name}, mean {values.mean():.3g} (dashed)",
        )  # fmt: skip
        axes.axvline(float(values.mean()), color=colour, ls="--", lw=1.2, zorder=4)
    if is_wide:
        axes.set_xscale("log")
        steps = (1.0, 2.0, 5.0) if high < 100 * low else (1.0,)
        axes.xaxis.set_major_locator(LogLocator(subs=steps))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel("number of fields")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
