"""What the benchmarks of classifiers share: budgets, data, and how ours are trained."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure

from benchmarks.segmentation import BUILTIN, DATA, REAL
from cectflow.dataset import Dataset
from cectflow.execution import Workplace
from cectflow.flows.simulation import load_structures
from cectflow.learning.fit import Device, FitRecipe, Precision
from cectflow.learning.losses import DistillationLoss
from cectflow.manifest import Manifest
from cectflow.model_card import ModelCard
from cectflow.recipe import load_recipe
from cectflow.simulation.delivery import simulate_dataset
from cectflow.simulation.microscope import Microscope
from cectflow.simulation.recipe import SimulationRecipe

OURS = FitRecipe(network="strided_micro", epochs=1, batch_size=32, learning_rate=0.004)
"""All `epochs` are the plan's."""
SOFT = DistillationLoss(kl=1.0, temperature=2.0)
HEADLINE = "snr_0.01_to_0.1"
SNRS = (0.1, 0.03, 0.01)
BOX_OF_COST = 40


@dataclass(frozen=True)
class Plan:
    """Sizes and budgets of one run of the benchmark.

    Attributes
    ----------
    box, voxel_size, field_shape
        Of all subtomograms.
    fields
        Of the splits; about 60 subtomograms each.
    few
        Fields of the train split that are the thousand labelled cubes.
    snr_fields
        Of each further test set.
    heavy, light, long, patient
        Cubes shown in all, to networks that are slow to train and to ours.
    epoch
        Live cubes of an epoch.
    imitated
        Fields for training that are imaged like real tomograms.
    """

    box: int = 32
    voxel_size: float = 12.0
    field_shape: tuple[int, int, int] = (48, 80, 80)
    fields: tuple[int, int, int] = (170, 10, 54)
    few: int = 17
    snr_fields: int = 12
    heavy: int = 20_000
    light: int = 20_000
    long: int = 100_000
    patient: int = 500_000
    epoch: int = 10_000
    imitated: int = 100
    seeds: tuple[int, ...] = (0, 1, 2)


CPU = Plan()
GPU = Plan(
    box=40, voxel_size=10.0, field_shape=(64, 112, 112), fields=(120, 10, 54), few=12,
    heavy=200_000, light=200_000, long=1_000_000, patient=5_000_000,
)  # fmt: skip
QUICK = Plan(fields=(12, 3, 4), few=4, snr_fields=2, heavy=700, light=1400, long=2800, patient=4200,
    epoch=700, imitated=4, seeds=(0,),
)  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """Where a run of the benchmark works, and with what."""

    plan: Plan
    folder: Path
    device: Device
    precision: Precision
    workers: int

    def simulation(self, **changes: object) -> SimulationRecipe:
        """The common recipe, with changes."""
        plan, real = self.plan, DATA.is_dir()
        sources = (str(DATA / "structures"), str(DATA / "maps" / "4v4r.mrc.gz"))
        train, validation, test = plan.fields
        recipe = SimulationRecipe(
            structures=sources if real else ("builtin",),
            include=REAL if real else BUILTIN,
            box=plan.box,
            voxel_size=plan.voxel_size,
            field_shape=plan.field_shape,
            fields={"train": train, "validation": validation, "test": test},
            occupancy=0.1,
            blur=0.69 * plan.voxel_size,
            jitter=plan.voxel_size,
            snr=(0.01, 0.1),
            microscope=Microscope(defocus_um=(3.0, 6.0)),
        )
        return recipe.model_copy(update=changes)

    def data(self) -> Dataset:
        """The dataset of all trainings; its test split is the headline's."""
        recipe = self.simulation()
        return simulate_dataset(
            recipe, load_structures(recipe), self.folder / "data", where=Workplace(self.workers)
        )

    def tests(self) -> dict[str, Dataset]:
        """Name → each test set, the headline's first."""
        fields = {"test": self.plan.snr_fields}
        sets = {f"snr_{snr:g}": self.simulation(snr=(snr, snr), fields=fields) for snr in SNRS}
        real = load_recipe("real").simulation
        names = ("snr", "snr_stage", "ctf_correction", "microscope", "tilts")
        imaged = {name: getattr(real, name) for name in names}
        sets["calibrated"] = self.simulation(**imaged, fields=fields)
        return {HEADLINE: self.data()} | {
            name: simulate_dataset(
                recipe, load_structures(recipe), self.folder / "tests" / name, splits=["test"],
                where=Workplace(self.workers),
            )
            for name, recipe in sets.items()
        }  # fmt: skip


def choose_bench(options: argparse.Namespace) -> Bench:
    """Plan and folder of the options that this and ``student_search`` share."""
    cuda = options.device != "cpu" and torch.cuda.is_available()
    plan = QUICK if options.quick else GPU if cuda else CPU
    work = options.work / ("quick" if options.quick else f"box-{plan.box}")
    work.mkdir(parents=True, exist_ok=True)
    return Bench(plan, work, "cuda" if cuda else "cpu", options.precision, options.workers)


def untrained_card(network: str, manifest: Manifest, box: int = BOX_OF_COST) -> ModelCard:
    """Card of a student that only the benchmark sees."""
    return ModelCard(
        role="student", task="classify", network=network, num_outputs=len(manifest.classes),
        classes=manifest.classes, box=box, voxel_size=manifest.voxel_size,
        ctf_correction=manifest.ctf_correction, tilt_range=manifest.tilt_range,
        snr_stage=manifest.snr_stage, snr=manifest.snr, noise_spectrum=manifest.noise_spectrum,
        occupancy=manifest.occupancy, jitter=manifest.jitter,
        dataset_digest=manifest.content_digest(), recipe_digest=manifest.recipe_digest,
        commit="none",
    )  # fmt: skip


def draw_front(points: Mapping[str, tuple[float, str]], figures: Mapping[str, float]) -> Figure:
    """Accuracy against time, with the Pareto front: those that none beats in both.

    Parameters
    ----------
    points
        Label → milliseconds a cube, and NAME of the figures ``accuracy_NAME`` with its ends.
    figures
        Of the benchmark.
    """
    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    axes = figure.subplots()
    best, front = -math.inf, []
    for label, (time, name) in sorted(points.items(), key=lambda point: point[1]):
        accuracy = figures[f"accuracy_{name}"]
        if accuracy > best:
            best = accuracy
            front.append((time, accuracy))
        ends = [[abs(figures[f"accuracy_{name}_{end}"] - accuracy)] for end in ("low", "high")]
        axes.errorbar(time, accuracy, ends, fmt="o", capsize=2, ms=4)
        axes.annotate(label, (time, accuracy), xytext=(5, 3), textcoords="offset points",
                      fontsize=8)  # fmt: skip
    axes.plot(*zip(*front, strict=True), "-", color="0.7", zorder=0)
    axes.set(xlabel=f"ms a cube of {BOX_OF_COST}³", ylabel="accuracy, test", xscale="log")
    axes.spines[["top", "right"]].set_visible(False)
    return figure
