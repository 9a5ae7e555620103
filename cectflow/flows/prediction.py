"""Prediction with a registered version or a model folder; imports no training code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cectflow.execution import HERE, Workplace
from cectflow.files import refuse_existing
from cectflow.model_card import CARD_FILE, ModelCard, Variant
from cectflow.particles import NOT_PREDICTED
from cectflow.prediction.asking import Classifier, split_blocks
from cectflow.prediction.classify import (
    BLOCK_SIZE,
    Classification,
    classify_particles,
    plan_work,
)
from cectflow.prediction.contract import (
    InputOptions,
    LoadedNetwork,
    NetworkFiles,
    check_network,
    open_network,
    report_correction,
    share_threads,
)
from cectflow.prediction.inputs import InputFiles
from cectflow.prediction.journal import begun_outputs, peek_journal
from cectflow.prediction.matching import group_by_spectrum, require_spectrum, with_gains
from cectflow.prediction.outputs import ClassOutputs, write_outputs
from cectflow.prediction.source import CubeSource
from cectflow.tracking.bundle import open_model_folder

__all__ = ["find_network", "load_model", "plan_classes", "predict_classes"]

Report = Callable[[str], None]


def predict_classes(
    model: str,
    files: InputFiles,
    out: Path | ClassOutputs,
    options: InputOptions,
    report: Report,
    *,
    mask_with: str | None = None,
    where: Workplace = HERE,
    block_size: int = BLOCK_SIZE,
    opened: Callable[[CubeSource], None] | None = None,
) -> Classification:
    """Classes of particles, written as a STAR file with every row and column of the input.

    What ends the work costs one block at most: the same call goes on from what is finished.

    Parameters
    ----------
    model
        Registered model (NAME, NAME@stage, NAME/VERSION, ``models:/`` URI) or model folder.
    files
        Where the particles are.
    out
        STAR file, or all outputs.
    options
        What the user says of the input.
    report
        Told what is done to the input and what came out.
    mask_with
        Target segmenter, named like the model, that takes the neighbours out of each cube first.
    where
        Processes that read and predict.
    block_size
        Particles of a block.
    opened
        Told what is read, when all is checked and before the work starts.
    """
    outputs = ClassOutputs(out) if isinstance(out, Path) else out
    classifier, source = _prepare(model, files, outputs, options, report, mask_with, where)
    if opened is not None:
        opened(source)
    outcome = classify_particles(
        classifier, source, outputs.star, outputs=_all_files(outputs, source.card), where=where,
        block_size=block_size,
        anew=options.overwrite, report=report,
        finish=lambda done: write_outputs(outputs, done, overwrite=True),
    )  # fmt: skip
    counts = ", ".join(f"{name} {count}" for name, count in outcome.counts.items())
    unknown = "" if outcome.num_unknown is None else f"; {outcome.num_unknown} of them unknown"
    label = classifier.open().label
    report(
        f"{len(outcome.table.rows) - len(outcome.faults)} particles by {label}: {counts}{unknown}; "
        f"mean probability {outcome.mean_probability:.2f}; written to {outputs.star}"
    )
    if outcome.faults:
        report(
            f"{len(outcome.faults)} of {len(outcome.table)} particles could not be predicted: "
            f"class {NOT_PREDICTED}, number 0; why: {outputs.failures}"
        )
    if outcome.num_unknown is None:
        report(
            f"warning: the card of {label} states neither a temperature nor a threshold: "
            "probabilities are not calibrated, and no particle is called unknown; train it again"
        )
    return outcome


def plan_classes(
    model: str,
    files: InputFiles,
    outputs: ClassOutputs,
    options: InputOptions,
    report: Report,
    *,
    mask_with: str | None = None,
    where: Workplace = HERE,
    block_size: int = BLOCK_SIZE,
) -> CubeSource:
    """All that :func:`predict_classes` checks, and what it would do, without doing it."""
    classifier, source = _prepare(model, files, outputs, options, report, mask_with, where)
    network, card = classifier.network, source.card
    groups = group_by_spectrum(source) if options.match_spectrum else []
    filtered = with_gains(source, groups, [None] * len(groups)) if groups else source
    blocks = split_blocks(filtered, block_size)
    particles = sum(map(len, source.files))
    rate = next(
        (
            timing.subtomograms_per_s
            for timing in reversed(card.cost.timings if card.cost else ())
            if (timing.runtime, timing.variant) == (network.runtime, network.variant)
        ),
        None,
    )
    took = "" if rate is None else f"; about {particles / rate / where.workers:.0f} s by its card"
    report(
        f"would classify {particles} of {len(source.table)} particles (files: "
        f"{len(source.particles_per_file)}, "
        f"blocks: {len(blocks)}) with {network.label} ({network.runtime}, {network.variant}, "
        f"{network.device}){took}"
    )
    for row, reason in list(source.faults.items())[:3]:
        report(f"particle {row + 1} could not be predicted: {reason}")
    plan = plan_work(classifier, classifier.open(), source, block_size)
    journal = None if options.overwrite else peek_journal(outputs.star, plan)
    if journal is not None and journal.finished():
        report(f"{len(journal.finished())} blocks are finished already")
    return source


def _prepare(
    model: str,
    files: InputFiles,
    outputs: ClassOutputs,
    options: InputOptions,
    report: Report,
    mask_with: str | None,
    where: Workplace,
) -> tuple[Classifier, CubeSource]:
    """Everything that can be refused, before work starts."""
    refuse_existing(
        outputs.paths, overwrite=options.overwrite, inputs=files.volumes,
        begun=begun_outputs(outputs.star),
    )  # fmt: skip
    network = find_network(
        model, ("classify",), options.device, runtime=options.runtime, variant=options.variant
    )
    network = share_threads(network, where)
    card = ModelCard.from_folder(network.folder)
    segmenter = None
    if mask_with is not None:
        segmenter = share_threads(find_network(mask_with, ("target",), options.device), where)
        masker = ModelCard.from_folder(segmenter.folder)
        if card.masking is None:
            report(f"warning: {network.label} was trained on cubes with their neighbours")
        elif card.masking.card_digest != masker.digest():
            trained = card.masking.segmenter
            report(f"warning: {network.label} was trained on cubes masked with {trained}")
    elif card.masking is not None:
        msg = (
            f"{network.label} was trained on cubes whose neighbours {card.masking.segmenter} took "
            f"out: give --mask-with {card.masking.segmenter}"
        )
        raise ValueError(msg)
    report_correction(card, options, report)
    if options.match_spectrum:
        require_spectrum(card, network.label)
    classifier = Classifier(network, segmenter)
    classifier.open()  # a network that does not load is refused before the particles are looked at
    source = files.open(card, options, report)
    outputs.check_table(source)
    written = [path for path in _all_files(outputs, card) if path.parent.is_dir()]
    refuse_existing(
        written, overwrite=options.overwrite,
        inputs=(*files.volumes, *{block.path for block in source.files}),
        begun=begun_outputs(outputs.star),
    )  # fmt: skip
    return classifier, source


def _all_files(outputs: ClassOutputs, card: ModelCard) -> list[Path]:
    """Every file that may be written, those of the classes too."""
    given = [path for path in outputs.paths if path is not None]
    return [*given, *outputs.class_files(card.classes).values()]


def find_network(
    model: str,
    tasks: tuple[str, ...],
    device: str,
    *,
    runtime: str = "auto",
    variant: Variant = "float32",
) -> NetworkFiles:
    """Verified files of a registered model or a model folder.

    Parameters
    ----------
    model
        Registered model (NAME, NAME@stage, NAME/VERSION, ``models:/`` URI) or model folder.
    tasks
        Of which it must have one.
    device
        ``auto``, ``cpu`` or ``cuda``.
    runtime, variant
        See :func:`~cectflow.prediction.contract.check_network`.

    Raises
    ------
    ValueError
        If there is no such model, or it is of another task.
    """
    folder = Path(model)
    if (folder / CARD_FILE).is_file():
        # A folder needs no registry: MLflow is not even imported.
        label = open_model_folder(folder)
    else:
        from cectflow.tracking.registry import resolve_model

        folder, version = resolve_model(model)
        label = f"{version.name}/{version.version}" if version else folder.name
    return check_network(
        folder, tasks=tasks, label=label, device=device, runtime=runtime, variant=variant
    )


def load_model(
    model: str,
    tasks: tuple[str, ...],
    device: str,
    *,
    runtime: str = "auto",
    variant: Variant = "float32",
) -> LoadedNetwork:
    """Network of :func:`find_network`, loaded."""
    return open_network(find_network(model, tasks, device, runtime=runtime, variant=variant))
