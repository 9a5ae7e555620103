"""Segmentation of whole tomograms: label map, probabilities and picks from a semantic segmenter."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from cectflow.files import remove_leftovers_of, replacing
from cectflow.model_card import Picking
from cectflow.particles import CORNER, ParticleTable
from cectflow.prediction.contract import InputOptions, LoadedNetwork
from cectflow.prediction.picks import Bodies, PickRules, find_bodies, make_picks
from cectflow.prediction.tomogram import (
    TomogramError,
    WholeTomogram,
    costs_itself,
    open_tomogram,
    slabs,
)
from cectflow.prediction.whole_matching import settle_tomogram
from cectflow.prediction.windows import WindowPlan, blend_windows, plan_windows, run_windows
from cectflow.turns import allowed_turns
from cectflow.volume import read_volume
from cectflow.volume_writer import create_scratch, create_volume

__all__ = ["WholeOptions", "WholeOutputs", "WholeSegmentation", "plan_whole", "segment_whole"]

WINDOW_BYTES = {"cpu": 0.8e9, "cuda": 6.0e9}
"""That a window may take while it is computed; cores, maps and libraries come on top."""
LAYERS_ALIVE = 3
"""Widest layers that are in memory at a time: what comes in, what goes out, what was skipped."""
BLENDED_EDGE = 96
"""Largest edge of windows that are blended, where none is given."""
BLENDED_HALO = 0.125
"""Of a window's edge: neighbours overlap by a quarter."""


@dataclass(frozen=True)
class WholeOptions:
    """How to run over a tomogram, and when foreground is a particle.

    Attributes
    ----------
    window
        Largest edge of a window in voxels; None: as large as memory allows.
    blend
        Average overlapping windows instead of keeping exact cores.
    average_turns
        Average over the half turns that keep the missing wedge and the hand.
    rules
        For label map and picks.
    """

    window: int | None = None
    blend: bool = False
    average_turns: bool = False
    rules: PickRules = field(default_factory=PickRules)


@dataclass(frozen=True)
class WholeOutputs:
    """Files to write; None: not written.

    Attributes
    ----------
    labels
        Label map, int8 (int16 beyond 127 labels): 0 background, then the card's labels.
    probabilities
        Of the foreground, float32.
    picks
        STAR file.
    figure
        PNG file.
    """

    labels: Path
    probabilities: Path | None = None
    picks: Path | None = None
    figure: Path | None = None

    @property
    def paths(self) -> tuple[Path | None, ...]:
        """All of them."""
        return self.labels, self.probabilities, self.picks, self.figure


@dataclass(frozen=True, eq=False)
class WholeSegmentation:
    """Outcome of a segmentation.

    Attributes
    ----------
    shares
        Label name → share of the tomogram's voxels.
    picks
        None where none were asked for.
    """

    shares: dict[str, float]
    picks: ParticleTable | None

    @property
    def num_picks(self) -> dict[str, int] | None:
        """Class name → number of picks, most frequent first; None where none were asked for."""
        if self.picks is None:
            return None
        counts = self.picks.rows["cectflowClassName"].value_counts()
        return {str(name): int(count) for name, count in counts.items()}

    def describe(self) -> list[str]:
        """Shares and picks in words."""
        shares = ", ".join(f"{name} {share:.2%}" for name, share in self.shares.items())
        lines = [f"{shares} of the voxels"]
        if self.num_picks is not None:
            named = ", ".join(f"{name} {count}" for name, count in self.num_picks.items())
            lines.append(f"{sum(self.num_picks.values())} particles{': ' if named else ''}{named}")
        return lines

    @property
    def figures(self) -> dict[str, float]:
        """What a run logs."""
        found = {} if self.picks is None else {"particles": float(len(self.picks))}
        return found | {f"share/{name}": share for name, share in self.shares.items()}


def segment_whole(
    network: LoadedNetwork,
    path: Path,
    outputs: WholeOutputs,
    options: InputOptions,
    whole: WholeOptions,
    report: Callable[[str], None],
    *,
    name: str | None = None,
    find_picks: bool = False,
    scratch: Path | None = None,
) -> WholeSegmentation:
    """Label map, probabilities, picks and figure of a whole tomogram, on the tomogram's own grid.

    Parameters
    ----------
    network
        A semantic segmenter.
    path
        MRC volume.
    outputs
        What to write.
    options, whole
        What the user says of the input, and how to run.
    report
        Told what is done.
    name
        Of the tomogram in the table of picks; None: that of the file, up to its first dot.
    find_picks
        Find them though ``outputs`` has no file for them.
    scratch
        Folder for what lies between; None: that of the label map.

    Raises
    ------
    TomogramError
        If the tomogram cannot be read or brought to the card.
    ValueError
        If the window is too small.
    """
    names = network.card.labels or network.card.classes
    for output in outputs.paths:
        if output is not None:
            remove_leftovers_of(output)
    with ExitStack() as stack:
        # Beside the output: a system's temporary folder may be in memory.
        folder = Path(
            stack.enter_context(
                tempfile.TemporaryDirectory(
                    dir=scratch or outputs.labels.parent,
                    prefix=f".{outputs.labels.name}.",
                    suffix=".tmp",
                )
            )
        )
        tomogram = settle_tomogram(
            open_tomogram(path, network.card, options, folder, report), network.card,
            network.label, folder, report, match_spectrum=options.match_spectrum,
        )  # fmt: skip
        foreground, best = _run(network, tomogram, whole, folder, report)
        shares = _write_maps(
            network, tomogram, foreground, best, outputs, whole.rules, names,
            overwrite=options.overwrite,
        )  # fmt: skip
        picks = None
        if outputs.picks is not None or find_picks:
            rules = _with_threshold(whole.rules, network.card.picking, report)
            bodies = find_bodies(foreground, best, len(names), tomogram.voxel_size, rules)
            title = name or path.name.partition(".")[0]
            picks = _pick(bodies, tomogram, names, title, network.label)
            if outputs.picks is not None:
                picks.write(outputs.picks, overwrite=options.overwrite)
    outcome = WholeSegmentation(shares, picks)
    if outputs.figure is not None:
        _draw(path, outputs, outputs.figure, outcome, options)
    return outcome


def _draw(
    path: Path,
    outputs: WholeOutputs,
    figure: Path,
    outcome: WholeSegmentation,
    options: InputOptions,
) -> None:
    """Central slices with outlines and picks."""
    from cectflow.figures import draw_tomogram

    with warnings.catch_warnings():
        # What there is to say of the file was said when it was segmented.
        warnings.simplefilter("ignore")
        with costs_itself(path):
            volume = read_volume(path, voxel_size=options.voxel_size)
    positions = np.zeros((0, 3))
    classes = np.zeros(0, np.int64)
    if outcome.picks is not None:
        rows = outcome.picks.rows
        positions = rows[list(CORNER[::-1])].to_numpy(np.float64)
        classes = rows["rlnClassNumber"].to_numpy(np.int64)
    picture = draw_tomogram(
        volume.data, read_volume(outputs.labels).data, positions, classes,
        tuple(outcome.shares), voxel_size=volume.voxel_size, title=path.name,
    )  # fmt: skip
    with replacing(figure, overwrite=options.overwrite) as temporary:
        picture.savefig(temporary, format="png", dpi=130)


def _run(
    network: LoadedNetwork,
    tomogram: WholeTomogram,
    whole: WholeOptions,
    folder: Path,
    report: Callable[[str], None],
) -> tuple[NDArray[np.float32], NDArray[np.int16]]:
    """Foreground probability and most probable label of every voxel, memory-mapped."""
    plan = plan_whole(network, tomogram.shape, whole)
    turns = allowed_turns(network.card.tilt_range) if whole.average_turns else ("identity",)
    report(
        f"{len(plan)} window{'s' if len(plan) > 1 else ''} of "
        f"{'x'.join(map(str, plan.window))} voxels (z, y, x)"
        + (
            ", blended"
            if whole.blend
            else f", {plan.computed_over_kept:.1f} computed for each kept"
        )
        + (f", averaged over {len(turns)} turns" if len(turns) > 1 else "")
    )
    foreground = create_scratch(folder / "foreground.raw", tomogram.shape, np.float32)
    best = create_scratch(folder / "best.raw", tomogram.shape, np.int16)
    pieces = (
        blend_windows(network.infer, tomogram.read, plan, folder, turns)
        if whole.blend
        else run_windows(network.infer, tomogram.read, plan, turns)
    )
    for region, found in pieces:
        probability = 1.0 - found[0]
        if not np.isfinite(probability).all():
            msg = (
                f"{tomogram.path}: the network's answer is no number in the window at "
                f"{tuple(part.start for part in region)} (z, y, x): are values beyond float32?"
            )
            raise TomogramError(msg)
        padded = tomogram.is_padding(region)
        if padded is not None:
            probability[padded] = 0.0
        foreground[region] = probability
        best[region] = found[1:].argmax(axis=0) + 1
    return foreground, best


def _with_threshold(
    rules: PickRules, tuned: Picking | None, report: Callable[[str], None]
) -> PickRules:
    """The rules, with the score that the network's validation chose where the user chose none."""
    if rules.min_score is not None or tuned is None:
        return rules
    report(
        f"picks: those with a score of {tuned.min_score:.3f} and more, which had a precision of "
        f"{tuned.precision:.2f} and a recall of {tuned.recall:.2f} in {tuned.particles} particles "
        "of the validation fields (--min-score chooses another, 0 keeps all)"
    )
    return rules.model_copy(update={"min_score": tuned.min_score})


def plan_whole(
    network: LoadedNetwork, shape: tuple[int, int, int], whole: WholeOptions
) -> WindowPlan:
    """Windows over a tomogram of a shape ``(z, y, x)`` at the card's voxel size.

    Raises
    ------
    ValueError
        If the network cannot run over tomograms, or the window is too small for it.
    """
    # torch comes with the catalogue, 2 s: only whole tomograms need it.
    from cectflow.cost import widest_layer
    from cectflow.networks import network_info

    info = network_info(network.card.network)
    if info.reach is None:
        msg = f"{info.name} looks at a whole cube at once: it cannot run over a tomogram"
        raise ValueError(msg)
    # torch.export takes an axis of a single stride for a constant.
    smallest = max(info.min_box, 2 * info.stride)
    if whole.blend:
        edge = whole.window or BLENDED_EDGE
        return plan_windows(
            shape, stride=info.stride, halo=max(1, int(BLENDED_HALO * edge)), smallest=smallest,
            edge=edge,
        )  # fmt: skip
    # The logits are there twice: as the network gives them, and as probabilities of the core;
    # the window itself twice where it is turned.
    numbers = LAYERS_ALIVE * widest_layer(info.name) + 2 * network.card.num_outputs + 2
    return plan_windows(
        shape, stride=info.stride, halo=info.reach, smallest=smallest, edge=whole.window,
        voxels=int(WINDOW_BYTES[network.device.partition(":")[0]] / (4 * numbers)),
    )  # fmt: skip


def _write_maps(
    network: LoadedNetwork,
    tomogram: WholeTomogram,
    foreground: NDArray[np.float32],
    best: NDArray[np.int16],
    outputs: WholeOutputs,
    rules: PickRules,
    names: tuple[str, ...],
    *,
    overwrite: bool,
) -> dict[str, float]:
    """Write the maps on the tomogram's own grid; share of the voxels of each label."""
    shape = tomogram.source_shape
    kind = np.int8 if len(names) <= np.iinfo(np.int8).max else np.int16
    counts = np.zeros(len(names) + 1, np.int64)
    with ExitStack() as stack:

        def create(path: Path, dtype: type[np.generic]) -> NDArray[Any]:
            return stack.enter_context(
                create_volume(
                    path, shape, tomogram.source_voxel_size, dtype, overwrite=overwrite,
                    labels=network.headers,
                )
            )  # fmt: skip

        labels = create(outputs.labels, kind)
        kept = create(outputs.probabilities, np.float32) if outputs.probabilities else None
        on_grid = _OnSourceGrid(tomogram)
        for depths, _, _ in slabs(shape):
            probability = on_grid.linear(foreground, depths)
            slab = np.where(probability > rules.probability, on_grid.nearest(best, depths), 0)
            labels[depths] = slab
            counts += np.bincount(slab.ravel(), minlength=len(counts))
            if kept is not None:
                kept[depths] = probability
    return dict(zip(names, (counts[1:] / counts.sum()).tolist(), strict=True))


class _OnSourceGrid:
    """Maps at the card's voxel size, read on the grid of the tomogram's file."""

    def __init__(self, tomogram: WholeTomogram) -> None:
        self.is_same = not tomogram.is_resampled
        ratio = tomogram.source_voxel_size / tomogram.voxel_size
        self.places = [
            np.clip((np.arange(length) + 0.5) * ratio - 0.5, 0, new - 1)
            for length, new in zip(tomogram.source_shape, tomogram.shape, strict=True)
        ]
        self.shape = tomogram.shape

    def linear(
        self, volume: NDArray[np.float32], depths: slice
    ) -> Float[NDArray[np.float32], "z y x"]:
        """Trilinear interpolation of a slab."""
        if self.is_same:
            return np.asarray(volume[depths])
        along_y, along_x = (_hats(self.places[axis], self.shape[axis]) for axis in (1, 2))
        result = []
        for place in self.places[0][depths]:
            below = int(place)
            above = min(below + 1, self.shape[0] - 1)
            part = np.float32(place - below)
            plane = (1 - part) * volume[below] + part * volume[above]
            result.append(along_y @ (plane @ along_x.T))
        return np.asarray(np.clip(np.stack(result), 0.0, 1.0), np.float32)

    def nearest(self, volume: NDArray[np.int16], depths: slice) -> NDArray[np.int16]:
        """Values of the nearest voxels of a slab."""
        if self.is_same:
            return np.asarray(volume[depths])
        z, y, x = (np.floor(places + 0.5).astype(np.int64) for places in self.places)
        return np.asarray(volume[np.ix_(z[depths], y, x)])


def _hats(places: NDArray[np.float64], num: int) -> Float[NDArray[np.float32], "place {num}"]:
    """Matrix from voxels to their linear interpolation at places."""
    distances = np.abs(places[:, None] - np.arange(num))
    hats: NDArray[np.float32] = np.maximum(1.0 - distances.astype(np.float32), np.float32(0.0))
    return hats


def _pick(
    bodies: Bodies, tomogram: WholeTomogram, names: tuple[str, ...], name: str, model: str
) -> ParticleTable:
    positions = bodies.centres_zyx
    if tomogram.is_resampled:
        ratio = tomogram.voxel_size / tomogram.source_voxel_size
        positions = (positions + 0.5) * ratio - 0.5
    return make_picks(
        bodies, positions, names, tomogram=name,
        voxel_size=tomogram.source_voxel_size,
        volumes=np.asarray(bodies.voxels * tomogram.voxel_size**3, np.float64),
        model=model,
    )  # fmt: skip
