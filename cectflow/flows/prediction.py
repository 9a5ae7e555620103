"""Prediction with a registered version or a model folder; imports no training code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cectflow.model_card import CARD_FILE
from cectflow.prediction.classify import Classification, classify_particles, refuse_existing
from cectflow.prediction.contract import InputOptions, LoadedNetwork, load_network
from cectflow.prediction.mask import masked_with
from cectflow.prediction.segment import Segmentation, segment_stack, segment_tomogram
from cectflow.prediction.source import InputFiles, TomogramSource

__all__ = ["predict_classes", "predict_segments"]

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
    refuse_existing((out,), overwrite=options.overwrite)
    network = _load(model, ("classify",), options.device)
    if mask_with is not None:
        network = masked_with(network, _load(mask_with, ("target",), options.device))
    outcome = classify_particles(network, files.open(network.card, options, report))
    outcome.table.write(out, overwrite=options.overwrite)
    counts = ", ".join(f"{name} {count}" for name, count in outcome.counts.items())
    report(
        f"{len(outcome.table.rows)} particles by {network.label}: {counts}; "
        f"mean probability {outcome.mean_probability:.2f}; written to {out}"
    )
    return outcome


def predict_segments(
    model: str,
    files: InputFiles,
    out: Path,
    probabilities: Path | None,
    options: InputOptions,
    report: Report,
) -> Segmentation:
    """Label map of a tomogram's particles, or label stack of subtomograms.

    Parameters
    ----------
    model, files, options, report
        As for :func:`predict_classes`, with a target segmenter.
    out
        Label map (int16: row number of the particle) or label stack (int8: 1 is the target).
    probabilities
        Of the foreground, float32; None: not written.
    """
    refuse_existing((out, probabilities), overwrite=options.overwrite)
    network = _load(model, ("target",), options.device)
    source = files.open(network.card, options, report)
    if isinstance(source, TomogramSource):
        outcome = segment_tomogram(network, source, out, probabilities, overwrite=options.overwrite)
    else:
        outcome = segment_stack(network, source, out, probabilities, overwrite=options.overwrite)
    report(
        f"{outcome.num_particles} particles by {network.label}: {outcome.mean_voxels:.0f} voxels "
        f"on average, {outcome.num_empty} without any; written to {out}"
    )
    return outcome


def _load(model: str, tasks: tuple[str, ...], device: str) -> LoadedNetwork:
    folder = Path(model)
    if (folder / CARD_FILE).is_file():
        # A folder needs no registry: MLflow is not even imported.
        return load_network(folder, tasks=tasks, label=folder.resolve().name, device=device)
    from cectflow.tracking.registry import resolve_model

    resolved, version = resolve_model(model)
    label = f"{version.name}/{version.version}" if version else resolved.name
    return load_network(resolved, tasks=tasks, label=label, device=device)
