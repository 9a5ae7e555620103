"""From a dataset to registered networks: segmenters and teachers, and what all trainings share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from lightning_fabric import Fabric

from cectflow.dataset import BatchSource, Dataset, open_dataset
from cectflow.execution import Workplace
from cectflow.figures import draw_learning_curves
from cectflow.flows.evaluation import log_evaluation
from cectflow.flows.simulation import choose_recipe, load_structures, new_folder, simulate
from cectflow.flows.tuning import tune_picking
from cectflow.learning.fit import Device, FitRecipe, Precision, open_fabric
from cectflow.learning.objective import Classify, Objective, Segment
from cectflow.learning.training import (
    TrainedNetwork,
    make_network,
    train_network,
)
from cectflow.learning.unlabelled import UnlabelledCubes
from cectflow.learning.variants import make_variants
from cectflow.model_card import ModelCard, Role, Variant
from cectflow.recipe import Recipe, TomogramSegmenterRecipe
from cectflow.simulation.field import prepare_specimen
from cectflow.simulation.live import open_live
from cectflow.tracking.lineage import DATASET_TAG
from cectflow.tracking.registry import find_registered, register_model
from cectflow.tracking.runs import Run, cectflow_commit, start_run
from cectflow.tracking.versions import RegisteredVersion, registered_name, role_name

__all__ = [
    "Hardware",
    "Registered",
    "TrainingRequest",
    "open_live_data",
    "open_or_simulate",
    "train_and_register",
    "train_segmenter",
    "train_teacher",
    "train_tomogram_segmenter",
]


@dataclass(frozen=True, eq=False)
class Registered:
    """A trained network and its version in the registry.

    Attributes
    ----------
    trained, version
        See there.
    figures
        Measured beyond the card: a student's retention of its teacher and its control.
    """

    trained: TrainedNetwork
    version: RegisteredVersion
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Hardware:
    """Where a training runs."""

    device: Device = "auto"
    precision: Precision = "auto"
    workers: int = 1
    devices: int = 1

    @property
    def workplace(self) -> Workplace:
        """Where its data are simulated."""
        return Workplace(self.workers)

    def open(self) -> Fabric:
        """Device, precision and number of devices, for a fit; ValueError if they are not there."""
        return open_fabric(self.device, self.precision, self.devices)


@dataclass(frozen=True)
class TrainingRequest:
    """What every training door is asked for, as it was typed."""

    recipe: str = "demo"
    structures: str | None = None
    dataset: Path | None = None
    out: Path | None = None
    seed: int | None = None
    hardware: Hardware = Hardware()

    def prepare(
        self, name: str, report: Callable[[str], None], *, with_students: bool = True
    ) -> tuple[Recipe, Path]:
        """The recipe with its changes, and the folder for the files of a run of this name.

        The folder is reported: whoever interrupts the run goes on with it as ``--out``. The
        recipe's students need not suit where others may take their place (``with_students``).

        Raises
        ------
        ValueError
            If the recipe is unknown or not valid, a network is unknown or does not suit the box,
            or the device is absent, or there are not so many: before any work.
        FileNotFoundError
            If there is no such dataset.
        """
        self.hardware.open()
        if self.dataset is not None:
            open_dataset(self.dataset)
        recipe = choose_recipe(self.recipe, structures=self.structures, seed=self.seed)
        box = recipe.simulation.box
        tomogram, student = recipe.tomogram_segmenter, recipe.student_segmenter
        with torch.device("meta"):
            make_network(recipe.segmenter.fit, "target", 2, box)
            make_network(recipe.teacher, "classify", 2, box)
            if tomogram is not None:
                make_network(tomogram.fit, "semantic", 2, box)
            if with_students:
                make_network(recipe.student.fit, "classify", 2, box)
            if with_students and student is not None:
                make_network(student.fit, "target" if tomogram is None else "semantic", 2, box)
        folder = self.out or new_folder(Path(name).stem)
        report(f"files under {folder}")
        return recipe, folder


def train_segmenter(
    recipe: Recipe, folder: Path, hardware: Hardware, *,
    dataset: Path | None = None, nested: bool = False,
) -> Registered:  # fmt: skip
    """Registered segmenter of the task ``target``; without a dataset the recipe's is simulated."""
    with start_run("train_segmenter", tags={"role": "segmenter"}, nested=nested) as run:
        data = open_or_simulate(recipe, folder, hardware, dataset)
        objective = Segment(recipe.segmenter.loss)
        return train_and_register(
            run, "segmenter", objective, data, recipe.segmenter.fit, recipe, folder, hardware
        )


def train_tomogram_segmenter(
    recipe: Recipe, folder: Path, hardware: Hardware, *,
    dataset: Path | None = None, nested: bool = False,
) -> Registered:  # fmt: skip
    """Registered segmenter of the task ``semantic``; without a dataset the recipe's is simulated.

    Raises
    ------
    ValueError
        If the recipe has no section ``tomogram_segmenter``.
    """
    section = _tomogram_segmenter(recipe)
    with start_run("train_tomogram_segmenter", tags={"role": "segmenter"}, nested=nested) as run:
        data = open_or_simulate(recipe, folder, hardware, dataset)
        objective = Segment(section.loss, section.labels(data.manifest.classes))
        return train_and_register(
            run, "segmenter", objective, data, section.fit, recipe, folder, hardware
        )


def train_teacher(
    recipe: Recipe, folder: Path, hardware: Hardware, *,
    dataset: Path | None = None, nested: bool = False,
) -> Registered:  # fmt: skip
    """Registered teacher; without a dataset the recipe's is simulated."""
    with start_run("train_teacher", tags={"role": "teacher"}, nested=nested) as run:
        data = open_or_simulate(recipe, folder, hardware, dataset)
        objective = Classify(len(data.manifest.classes))
        return train_and_register(
            run, "teacher", objective, data, recipe.teacher, recipe, folder, hardware
        )


def train_and_register(
    run: Run, role: Role, objective: Objective, data: Dataset, fit_recipe: FitRecipe,
    recipe: Recipe, folder: Path, hardware: Hardware, *, teacher: str | None = None,
    unlabelled: UnlabelledCubes | None = None,
    variants: Sequence[Variant] = (),
) -> Registered:  # fmt: skip
    """Fit, judge, log and register one network."""
    manifest = data.manifest
    part = role_name(role, objective.task)
    run.log_config(recipe, "recipe")
    run.set_tags({"devices": str(hardware.devices)})
    run.log_dataset(
        manifest.kind, manifest.content_digest(), str(data.folder.resolve()), "training"
    )
    # What is known of the data outlives their folder: lineage reads it from the run.
    run.log_json(manifest.facts(), "dataset.json")

    def measure(model: Path) -> Mapping[str, object]:
        measured: dict[str, object] = {"variants": make_variants(model, data, variants)}
        if objective.task == "semantic":
            measured["picking"] = tune_picking(model, manifest, recipe.simulation.structures)
        return measured

    with open_live_data(recipe, data, hardware, part) as live:
        if live is not None:
            digest = live.manifest.content_digest()
            run.log_dataset("live", digest, str(data.folder.resolve()), "live")
        trained = train_network(
            role, objective, data, fit_recipe,
            recipe_digest=recipe.digest(),
            fabric=hardware.open(),
            folder=folder / part,
            log=run.log,
            live=live,
            unlabelled=unlabelled,
            commit=cectflow_commit(),
            teacher=teacher,
            measure=measure,
        )  # fmt: skip
    card = trained.card
    run.log_figure(
        draw_learning_curves(trained.result.history, f"{part}: {card.network}"),
        "figures/learning_curves.png",
    )
    log_evaluation(run, trained.folder, card, data, trained.evaluation, card.baselines)
    run.log(_card_metrics(card))
    name = registered_name(role, card.task)
    # A model that an earlier call finished and registered keeps its version.
    version = find_registered(trained.folder, name) or register_model(
        run, trained.folder, name=name, tags={DATASET_TAG: str(data.folder.resolve())}
    )
    return Registered(trained, version)


def _tomogram_segmenter(recipe: Recipe) -> TomogramSegmenterRecipe:
    if recipe.tomogram_segmenter is None:
        msg = (
            "the recipe has no section tomogram_segmenter: add one, such as "
            "`tomogram_segmenter: {fit: {network: strided_ed_small, ...}}`"
        )
        raise ValueError(msg)
    return recipe.tomogram_segmenter


def open_or_simulate(
    recipe: Recipe, folder: Path, hardware: Hardware, dataset: Path | None
) -> Dataset:
    """The dataset of a folder; without one the recipe's, simulated or completed."""
    if dataset is not None:
        return open_dataset(dataset)
    return simulate(recipe, folder / "dataset", where=hardware.workplace, nested=True)


@contextmanager
def open_live_data(
    recipe: Recipe, data: Dataset, hardware: Hardware, name: str
) -> Iterator[BatchSource | None]:
    """Live data of a recipe that asks for them, else None; each name sees fields of its own."""
    if recipe.live is None:
        yield None
        return
    device = hardware.open().device
    specimen = prepare_specimen(recipe.simulation, load_structures(recipe.simulation))
    with open_live(
        specimen.to(str(device)), data.manifest, recipe.live.subtomograms_per_epoch,
        workers=hardware.workers, name=name,
    ) as source:  # fmt: skip
        yield source


def _card_metrics(card: ModelCard) -> Mapping[str, float]:
    """Figures of a card that are worth a column on the web page."""
    metrics = {f"baseline_{name}_iou": value for name, value in card.baselines.items()}
    if card.parity is not None:
        metrics["parity"] = card.parity
    if card.picking is not None:
        metrics["validation_picks_precision"] = card.picking.precision
        metrics["validation_picks_recall"] = card.picking.recall
    if card.trust is not None:
        metrics["temperature"] = card.trust.temperature
        metrics["test_ece_before"] = card.trust.ece_before
        metrics["test_ece_after"] = card.trust.ece_after
        metrics["unknown_threshold"] = card.trust.unknown_threshold
        metrics["test_true_positive_rate"] = card.trust.true_positive_rate.value
    for variant, figures in card.variants.items():
        metrics[f"{variant}_score"] = figures.score.value
        metrics[f"{variant}_difference"] = figures.difference.value
        metrics[f"{variant}_parity"] = figures.parity
        if figures.agreement is not None:
            metrics[f"{variant}_agreement"] = figures.agreement
        metrics[f"{variant}_speedup"] = figures.speedup
    if card.cost is not None:
        metrics["parameters"] = card.cost.parameters
        metrics["macs"] = card.cost.macs
        metrics["subtomograms_per_s"] = card.cost.subtomograms_per_s
    return metrics
