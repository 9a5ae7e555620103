"""Training of one network from a dataset to a model folder, and its evaluation there.

``train_network`` fits, exports, evaluates and measures; ``evaluate_folder`` is what promotion and
`evaluate model` call: the scores of what is shipped, not of what was in memory.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from cectflow.cost import measure_cost
from cectflow.dataset import BatchSource, Dataset, Selection, Split
from cectflow.export import export_network
from cectflow.learning.calibration import measure_trust
from cectflow.learning.fit import FitRecipe, FitResult, Log, fit
from cectflow.learning.objective import Objective
from cectflow.learning.scores import (
    Evaluation,
    baselines,
    evaluate,
)
from cectflow.learning.task import SemanticLabels, check_statistics
from cectflow.learning.unlabelled import UnlabelledCubes, WithUnlabelled
from cectflow.manifest import Manifest, SplitName
from cectflow.model_card import CARD_FILE, Masking, ModelCard, Role, Task, Variant
from cectflow.networks import create_network, list_networks, network_info
from cectflow.networks.normalisation import NormalisePerCube
from cectflow.runtime import RuntimeName, load_runtime
from cectflow.spectrum import PowerSum

__all__ = [
    "TrainedNetwork",
    "check_matches",
    "evaluate_ensemble",
    "evaluate_folder",
    "evaluate_strangers",
    "fit_and_judge",
    "logits_of",
    "make_network",
    "train_network",
]

VOXEL_TOLERANCE = 0.01
"""Relative difference of voxel sizes that still counts as equal, as in prediction."""


@dataclass(frozen=True, eq=False)
class TrainedNetwork:
    """What a training leaves behind.

    Attributes
    ----------
    folder
        The model folder; its card holds scores, baselines, cost and parity.
    card
        As in the folder.
    result
        Of the fit.
    evaluation
        On the test split, by the exported network.
    """

    folder: Path
    card: ModelCard
    result: FitResult
    evaluation: Evaluation


def train_network(
    role: Role,
    objective: Objective,
    dataset: Dataset,
    recipe: FitRecipe,
    *,
    recipe_digest: str,
    fabric: Fabric,
    folder: Path,
    log: Log,
    live: BatchSource | None = None,
    unlabelled: UnlabelledCubes | None = None,
    commit: str = "unknown",
    teacher: str | None = None,
    measure: Callable[[Path], Mapping[str, Any]] | None = None,
) -> TrainedNetwork:
    """Fit a network, export it, and judge the exported network on the test split.

    A second call with the same folder and arguments goes on where the first one was broken off;
    a model that is complete is taken up as it is.

    Parameters
    ----------
    role, objective
        What the network is to be, and what it learns.
    dataset
        Train, validation and test splits; train is not asked for with live data.
    recipe
        Of the fit.
    recipe_digest
        Of the complete recipe, for the card.
    fabric
        Device and precision.
    folder
        For checkpoints (``checkpoints/``) and the model folder (``model/``).
    log
        Receives metrics per epoch.
    live
        What to train on instead of the dataset's train split.
    unlabelled
        Cubes that are shown beside those; the objective must do without their truth.
    commit, teacher
        For the card.
    measure
        Further fields of the card, measured of the exported network in its folder.

    Raises
    ------
    FileExistsError
        If there is a model of another recipe, dataset or teacher in the folder.
    ValueError
        If the network is of another task, the box does not suit it, or a split is missing.
    """
    manifest = dataset.manifest
    live_digest = None if live is None else live.manifest.content_digest()
    unlabelled_digest = None if unlabelled is None else unlabelled.digest
    model_folder = folder / "model"
    if model_folder.exists():
        _refuse_other(
            model_folder, role=role, network=recipe.network, teacher=teacher,
            recipe_digest=recipe_digest, dataset_digest=manifest.content_digest(),
            live_digest=live_digest, unlabelled_digest=unlabelled_digest,
        )  # fmt: skip
    train = dataset.split("train") if live is None else live
    if unlabelled is not None:
        train = WithUnlabelled(train, unlabelled)
    validation, test = dataset.split("validation"), dataset.split("test")
    if objective.task != "classify" and manifest.masking is not None:
        msg = (
            f"{dataset.folder} is masked with {manifest.masking.segmenter}, and a segmenter has to "
            "see the neighbours: give the dataset that it was made from"
        )
        raise ValueError(msg)
    if objective.task == "semantic":
        check_statistics(manifest)
    network = make_network(recipe, objective.task, objective.num_outputs, manifest.box)
    result = fit(
        network, objective, train, validation, recipe,
        fabric=fabric, folder=folder / "checkpoints", log=log,
        provenance={"teacher": teacher or "none", "unlabelled": unlabelled_digest or "none"},
    )  # fmt: skip
    if model_folder.exists():  # finished by an earlier call
        card = ModelCard.from_folder(model_folder)
        return TrainedNetwork(model_folder, card, result, evaluate_folder(model_folder, dataset))
    network.to("cpu")
    # The model folder takes its name when all of it is there, its scores included.
    unfinished = folder / ".model"
    shutil.rmtree(unfinished, ignore_errors=True)
    card = _describe(
        role, objective, recipe, manifest,
        recipe_digest=recipe_digest, live_digest=live_digest,
        unlabelled_digest=unlabelled_digest, commit=commit,
        epochs=result.best_epoch, teacher=teacher,
        spectrum=_spectrum_of(validation),
    )  # fmt: skip
    info = network_info(recipe.network)
    open_shape = info.task == "segment" and manifest.box % info.stride == 0
    card = export_network(network, card, unfinished, stride=info.stride if open_shape else None)
    evaluation = evaluate_folder(unfinished, dataset)
    trust = None
    if objective.task == "classify":
        trust = measure_trust(evaluate_folder(unfinished, dataset, "validation"), evaluation)
    measured = measure(unfinished) if measure else {}  # first: variants add files, which cost
    card = card.model_copy(
        update={
            "scores": evaluation.summary(),
            "baselines": baselines(test, objective.task, objective.labels),
            "trust": trust,
            "cost": measure_cost(network, unfinished),
            **measured,
        }
    )
    (unfinished / CARD_FILE).write_text(card.to_json(), encoding="utf-8")
    unfinished.replace(model_folder)
    return TrainedNetwork(model_folder, card, result, evaluation)


def fit_and_judge(
    objective: Objective,
    train: BatchSource,
    validation: BatchSource,
    tests: Mapping[str, BatchSource],
    recipe: FitRecipe,
    *,
    fabric: Fabric,
    folder: Path,
    log: Log,
    provenance: Mapping[str, str] | None = None,
) -> tuple[FitResult, dict[str, Evaluation]]:
    """Fit a network for a comparison: its scores on several tests, and no model folder.

    A second call with the same folder and arguments goes on where the first one was broken off.

    Parameters
    ----------
    objective, train, validation, recipe, fabric, folder, log, provenance
        See :func:`~cectflow.learning.fit.fit`.
    tests
        Name → source on which the weights of the best epoch are judged.

    Raises
    ------
    ValueError
        As ``fit`` and :func:`make_network`.
    """
    box = train.manifest.box
    network = make_network(recipe, objective.task, objective.num_outputs, box)
    result = fit(
        network, objective, train, validation, recipe,
        fabric=fabric, folder=folder, log=log, provenance=provenance,
    )  # fmt: skip
    network.to(fabric.device).eval()

    def infer(cubes: Tensor) -> Tensor:
        logits: Tensor = network(cubes.to(fabric.device))
        return logits

    scored = {
        name: evaluate(infer, source, objective.task, labels=objective.labels)
        for name, source in tests.items()
    }
    return result, scored


def evaluate_folder(
    folder: Path,
    dataset: Dataset,
    split: SplitName = "test",
    *,
    runtime: RuntimeName = "onnxruntime",
    variant: Variant = "float32",
) -> Evaluation:
    """Scores of a model folder's network on every subtomogram of a split.

    Raises
    ------
    ValueError
        If the dataset is not of the card's classes, box or voxel size.
    """
    infer = logits_of(folder, runtime=runtime, variant=variant)
    return _evaluate((folder,), infer, dataset, split)


def evaluate_ensemble(folders: Sequence[Path], dataset: Dataset) -> Evaluation:
    """Scores of the mean logits of several model folders of one task, on the test split.

    Raises
    ------
    ValueError
        If the dataset is not of their classes, box or voxel size.
    """
    return _evaluate(folders, logits_of(*folders), dataset, "test")


def _evaluate(
    folders: Sequence[Path], infer: Callable[[Tensor], Tensor], dataset: Dataset, split: SplitName
) -> Evaluation:
    cards = [ModelCard.from_folder(folder) for folder in folders]
    for card in cards:
        check_matches(card, dataset)
    labels = None
    if cards[0].task == "semantic":
        labels = SemanticLabels.of_card(cards[0], dataset.manifest.classes)
    return evaluate(infer, dataset.split(split), cards[0].task, labels=labels)


def evaluate_strangers(folder: Path, dataset: Dataset, split: SplitName = "test") -> Evaluation:
    """What a classifier makes of the subtomograms whose classes it does not have.

    There is no accuracy: the class ids are the dataset's, not the network's.

    Raises
    ------
    ValueError
        If the dataset is not of the card's box or voxel size, or the split holds no such classes.
    """
    card = ModelCard.from_folder(folder)
    check_matches(card, dataset, any_classes=True)
    cubes, classes = dataset.split(split), dataset.manifest.classes
    foreign = [number for number, name in enumerate(classes, 1) if name not in card.classes]
    rows = np.flatnonzero(np.isin(cubes.class_ids, foreign))
    if not rows.size:
        msg = (
            f"{dataset.folder}: the {split} split holds only {', '.join(classes)}, which this "
            f"{card.role} knows: give one with other structures or junk"
        )
        raise ValueError(msg)
    found = evaluate(logits_of(folder), Selection(cubes, rows), card.task)
    return replace(found, scores={})


def logits_of(
    *folders: Path, runtime: RuntimeName = "onnxruntime", variant: Variant = "float32"
) -> Callable[[Tensor], Tensor]:
    """The mean logits of model folders' networks, as a function of tensors."""
    members = [load_runtime(folder, runtime, variant=variant) for folder in folders]

    def logits(cubes: Tensor) -> Tensor:
        answers = [torch.from_numpy(infer(cubes.numpy())) for infer in members]
        return torch.stack(answers).mean(dim=0)

    return logits


def check_matches(card: ModelCard, dataset: Dataset, *, any_classes: bool = False) -> None:
    """Refuse a dataset that is not what a card's network expects.

    Parameters
    ----------
    card, dataset
        To be compared.
    any_classes
        A classifier may be shown others than it knows.

    Raises
    ------
    ValueError
        Naming what differs.
    """
    manifest = dataset.manifest
    pairs: dict[str, tuple[object, object]] = {
        "box": (manifest.box, card.box),
        "contrast": (manifest.contrast, card.contrast),
        "masking": (_named(manifest.masking), _named(card.masking)),
    }
    if not math.isclose(manifest.voxel_size, card.voxel_size, rel_tol=VOXEL_TOLERANCE):
        pairs["voxel size (Å)"] = (manifest.voxel_size, card.voxel_size)
    if card.task == "classify" and not any_classes:
        pairs["classes"] = (manifest.classes, card.classes)
    if card.task == "semantic":
        check_statistics(manifest)
    for name, (given, expected) in pairs.items():
        if given != expected:
            msg = f"{dataset.folder}: {name} is {given}, this {card.role} expects {expected}"
            raise ValueError(msg)


def _named(masking: Masking | None) -> str:
    return "none" if masking is None else f"{masking.segmenter} ({masking.card_digest[:12]})"


def _refuse_other(model_folder: Path, **identity: str | None) -> None:
    """Refuse a finished model that is not the one that a call would train."""
    card = ModelCard.from_folder(model_folder)
    others = [name for name, wanted in identity.items() if getattr(card, name) != wanted]
    if not (model_folder.parent / "checkpoints").is_dir():
        others.append("origin, its checkpoints are gone")
    if others:
        named = " and ".join(name.replace("_digest", "") for name in others)
        msg = f"{model_folder} is of another {named}: give another folder, or remove it first"
        raise FileExistsError(msg)


def make_network(recipe: FitRecipe, task: Task, num_outputs: int, box: int) -> nn.Module:
    """Freshly initialised network of a recipe for a task.

    Networks of the tasks ``classify`` and ``target`` include the normalisation of each cube; those
    of ``semantic`` do not, and do without the distance from the centre.

    Raises
    ------
    ValueError
        If the network is of another kind, has no such argument, or does not take the box.
    """
    kind = "classify" if task == "classify" else "segment"
    info = network_info(recipe.network)
    if info.task != kind:
        msg = (
            f"network {recipe.network!r} is of another task: expected one that can {kind}, "
            f"{', '.join(list_networks(kind))}"
        )
        raise ValueError(msg)
    if task == "semantic" and box % info.stride:
        # A network is exported for volumes of any shape only if the window needs no padding.
        msg = (
            f"windows are {box}³; {recipe.network} segments tomograms in multiples of "
            f"{info.stride}: set box to {-(-box // info.stride) * info.stride}"
        )
        raise ValueError(msg)
    arguments = dict(recipe.arguments)
    if task == "semantic" and "centred" in info.arguments:
        arguments = {"centred": False} | arguments
    if task == "semantic" and arguments.get("centred"):
        msg = (
            f"arguments of {recipe.network} say centred: true, but in the task semantic no "
            f"particle is at the centre: leave it out"
        )
        raise ValueError(msg)
    torch.manual_seed(recipe.seed)
    network = create_network(recipe.network, num_outputs=num_outputs, box=box, **arguments)
    return network if task == "semantic" else NormalisePerCube(network)


def _spectrum_of(split: Split) -> tuple[float, ...]:
    """Mean power per shell of a split's cubes, as a card states it."""
    total = PowerSum(split.manifest.box)
    for batch in split.batches(64):
        total.add(batch.subtomograms.numpy())
    return tuple(float(f"{power:.5g}") for power in total.power)


def _describe(
    role: Role, objective: Objective, recipe: FitRecipe, manifest: Manifest, *,
    recipe_digest: str, live_digest: str | None, unlabelled_digest: str | None, commit: str,
    epochs: int, teacher: str | None, spectrum: tuple[float, ...],
) -> ModelCard:  # fmt: skip
    """Card of what is known before anything is measured: network, data and descent."""
    labels = objective.labels
    return ModelCard(
        role=role,
        task=objective.task,
        network=recipe.network,
        num_outputs=objective.num_outputs,
        classes=manifest.classes if labels is None else labels.classes,
        labels=() if labels is None else labels.names,
        normalisation="cube" if labels is None else "tomogram",
        box=manifest.box,
        voxel_size=manifest.voxel_size,
        contrast=manifest.contrast,
        ctf_correction=manifest.ctf_correction,
        tilt_range=manifest.tilt_range,
        snr_stage=manifest.snr_stage,
        snr=manifest.snr,
        # Fields of live data are not kept to be asked; those of validation are of their recipe.
        snr_60=manifest.mean_snr_60("train" if live_digest is None else "validation"),
        noise_spectrum=manifest.noise_spectrum,
        spectrum=spectrum,
        occupancy=manifest.occupancy,
        jitter=manifest.jitter,
        masking=manifest.masking,
        dataset_digest=manifest.content_digest(),
        live_digest=live_digest,
        unlabelled_digest=unlabelled_digest,
        recipe_digest=recipe_digest,
        commit=commit,
        epochs=epochs,
        teacher=teacher,
    )
