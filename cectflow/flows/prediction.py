"""Prediction with a registered version or a model folder; imports no training code."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

from cectflow.files import replacing
from cectflow.model_card import CARD_FILE, Variant
from cectflow.prediction.classify import Classification, classify_particles, refuse_existing
from cectflow.prediction.contract import InputOptions, LoadedNetwork, load_network
from cectflow.prediction.mask import masked_with
from cectflow.prediction.picks import PickRules
from cectflow.prediction.segment import Segmentation, segment_stack, segment_tomogram
from cectflow.prediction.source import InputFiles, TomogramSource
from cectflow.prediction.whole import (
    WholeOptions,
    WholeOutputs,
    WholeSegmentation,
    segment_whole,
)
from cectflow.tracking.bundle import open_model_folder
from cectflow.volume import STACK_SUFFIXES, read_volume

__all__ = ["load_model", "predict_classes", "predict_segments"]

Report = Callable[[str], None]


def predict_classes(
    model: str,
    files: InputFiles,
    out: Path,
    options: InputOptions,
    report: Report,
    *,
    mask_with: str | None = None,
) -> Classification:
    """Classes of particles, written as a STAR file with every row and column of the input.

    Parameters
    ----------
    model
        Registered model (NAME, NAME@stage, NAME/VERSION, ``models:/`` URI) or model folder.
    files
        Where the particles are.
    out
        STAR file.
    options
        What the user says of the input.
    report
        Told what is done to the input and what came out.
    mask_with
        Target segmenter, named like the model, that takes the neighbours out of each cube first.
    """
    refuse_existing((out,), overwrite=options.overwrite, inputs=files.volumes)
    network = load_model(
        model, ("classify",), options.device, runtime=options.runtime, variant=options.variant
    )
    trained = network.card.masking
    if mask_with is not None:
        segmenter = load_model(mask_with, ("target",), options.device)
        if trained is None:
            report(f"warning: {network.label} was trained on cubes with their neighbours")
        elif trained.card_digest != segmenter.card.digest():
            report(f"warning: {network.label} was trained on cubes masked with {trained.segmenter}")
        network = masked_with(network, segmenter)
    elif trained is not None:
        msg = (
            f"{network.label} was trained on cubes whose neighbours {trained.segmenter} took out: "
            f"give --mask-with {trained.segmenter}"
        )
        raise ValueError(msg)
    outcome = classify_particles(network, files.open(network.card, options, report))
    outcome.table.write(out, overwrite=options.overwrite)
    counts = ", ".join(f"{name} {count}" for name, count in outcome.counts.items())
    unknown = "" if outcome.num_unknown is None else f"; {outcome.num_unknown} of them unknown"
    report(
        f"{len(outcome.table.rows)} particles by {network.label}: {counts}{unknown}; "
        f"mean probability {outcome.mean_probability:.2f}; written to {out}"
    )
    if outcome.num_unknown is None:
        report(
            f"warning: the card of {network.label} states neither a temperature nor a threshold: "
            "probabilities are not calibrated, and no particle is called unknown; train it again"
        )
    return outcome


def predict_segments(
    model: str,
    files: InputFiles,
    out: Path,
    probabilities: Path | None,
    options: InputOptions,
    report: Report,
    *,
    picks: Path | None = None,
    figure: Path | None = None,
    whole: WholeOptions | None = None,
) -> Segmentation | WholeSegmentation:
    """Label map of a tomogram or of its particles, or label stack of subtomograms.

    Parameters
    ----------
    model, files, options, report
        As for :func:`predict_classes`, with a target segmenter, or with a semantic segmenter and
        a tomogram alone.
    out
        Label map (int16: row number of the particle; of a semantic segmenter int8: number of the
        label) or label stack (int8: 1 is the target).
    probabilities
        Of the foreground, float32; None: not written.
    picks, figure
        STAR file of the particles found, and PNG of central slices; only of a whole tomogram.
    whole
        How to run over a whole tomogram; None: as is best for most.

    Raises
    ------
    ValueError
        If the network's task and the files do not fit; the message names the model that does.
    """
    outputs = WholeOutputs(out, probabilities, picks, figure)
    refuse_existing(outputs.paths, overwrite=options.overwrite, inputs=files.volumes)
    for path in (out, probabilities):
        if path is not None and path.suffix not in STACK_SUFFIXES:
            msg = f"{path} would be an MRC file: expected a name in {', '.join(STACK_SUFFIXES)}"
            raise ValueError(msg)
    network = load_model(
        model, ("target", "semantic"), options.device,
        runtime=options.runtime, variant=options.variant,
    )  # fmt: skip
    if network.card.task == "semantic":
        return _predict_whole(network, files, outputs, options, whole or WholeOptions(), report)
    source = files.open(network.card, options, report)
    if picks is not None or figure is not None or whole is not None:
        msg = (
            f"{network.label} is for the task 'target': --picks, --figure and the options of whole "
            "tomograms need a semantic segmenter, such as cectflow-tomogram-segmenter@production"
        )
        raise ValueError(msg)
    if isinstance(source, TomogramSource):
        outcome = segment_tomogram(network, source, out, probabilities, overwrite=options.overwrite)
    else:
        outcome = segment_stack(network, source, out, probabilities, overwrite=options.overwrite)
    report(
        f"{outcome.num_particles} particles by {network.label}: {outcome.mean_voxels:.0f} voxels "
        f"on average, {outcome.num_empty} without any; written to {out}"
    )
    return outcome


def _predict_whole(
    network: LoadedNetwork,
    files: InputFiles,
    outputs: WholeOutputs,
    options: InputOptions,
    whole: WholeOptions,
    report: Report,
) -> WholeSegmentation:
    if files.tomogram is None or files.particles is not None:
        msg = (
            f"{network.label} is for the task 'semantic', which labels a whole tomogram by itself: "
            "give --tomogram alone; to outline known particles use --model "
            "cectflow-segmenter@production"
        )
        raise ValueError(msg)
    if outputs.picks is None and whole.rules != PickRules(probability=whole.rules.probability):
        msg = (
            "--min-volume, --max-volume, --nms-radius and --min-score choose among picks, which "
            "are not asked for: give --picks"
        )
        raise ValueError(msg)
    outcome = segment_whole(network, files.tomogram, outputs, options, whole, report)
    shares = ", ".join(f"{name} {share:.2%}" for name, share in outcome.shares.items())
    report(
        f"{files.tomogram} by {network.label}: {shares} of the voxels; written to {outputs.labels}"
    )
    if outcome.picks is not None:
        counts = outcome.picks.rows["cectflowClassName"].value_counts()
        named = ", ".join(f"{name} {count}" for name, count in counts.items())
        report(f"{len(outcome.picks)} particles{': ' if named else ''}{named}; {outputs.picks}")
    if outputs.figure is not None:
        _draw(files.tomogram, outputs, outcome, options)
        report(f"slices: {outputs.figure}")
    return outcome


def _draw(
    tomogram: Path, outputs: WholeOutputs, outcome: WholeSegmentation, options: InputOptions
) -> None:
    """Central slices with outlines and picks."""
    from cectflow.figures import draw_tomogram

    with warnings.catch_warnings():
        # What there is to say of the file was said when it was segmented.
        warnings.simplefilter("ignore")
        volume = read_volume(tomogram, voxel_size=options.voxel_size)
    positions = np.zeros((0, 3))
    classes = np.zeros(0, np.int64)
    if outcome.picks is not None:
        rows = outcome.picks.rows
        positions = rows[[f"rlnCoordinate{axis}" for axis in "ZYX"]].to_numpy(np.float64)
        classes = rows["rlnClassNumber"].to_numpy(np.int64)
    picture = draw_tomogram(
        volume.data, read_volume(outputs.labels).data, positions, classes,
        tuple(outcome.shares), voxel_size=volume.voxel_size, title=tomogram.name,
    )  # fmt: skip
    assert outputs.figure is not None
    with replacing(outputs.figure, overwrite=options.overwrite) as temporary:
        picture.savefig(temporary, format="png", dpi=130)


def load_model(
    model: str,
    tasks: tuple[str, ...],
    device: str,
    *,
    runtime: str = "auto",
    variant: Variant = "float32",
) -> LoadedNetwork:
    """Network of a registered model or a model folder.

    Parameters
    ----------
    model
        Registered model (NAME, NAME@stage, NAME/VERSION, ``models:/`` URI) or model folder.
    tasks
        Of which it must have one.
    device
        ``auto``, ``cpu`` or ``cuda``.
    runtime, variant
        See :func:`~cectflow.prediction.contract.load_network`.

    Raises
    ------
    ValueError
        If there is no such model, or it is of another task.
    """
    folder = Path(model)
    if (folder / CARD_FILE).is_file():
        # A folder needs no registry: MLflow is not even imported.
        return load_network(
            folder, tasks=tasks, label=open_model_folder(folder),
            device=device, runtime=runtime, variant=variant,
        )  # fmt: skip
    from cectflow.tracking.registry import resolve_model

    resolved, version = resolve_model(model)
    label = f"{version.name}/{version.version}" if version else resolved.name
    return load_network(
        resolved, tasks=tasks, label=label, device=device, runtime=runtime, variant=variant
    )
