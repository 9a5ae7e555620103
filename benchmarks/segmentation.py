"""Segmentation: the papers' networks and ours, structures never seen, and a whole tomogram."""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.report import parse_options, write_report
from cectflow.config import Config
from cectflow.cost import count_macs, count_parameters
from cectflow.dataset import Dataset
from cectflow.files import replacing
from cectflow.flows.generalisation import evaluate_generalisation
from cectflow.flows.picks import PickEvaluation, evaluate_picks
from cectflow.flows.simulation import load_structures, simulate_tomograms
from cectflow.flows.training import Hardware, train_tomogram_segmenter
from cectflow.learning.fit import FitRecipe, open_fabric
from cectflow.learning.losses import SegmentationLoss
from cectflow.learning.objective import Segment
from cectflow.learning.scores import baselines, bootstrap_score
from cectflow.learning.training import fit_and_judge, make_network
from cectflow.recipe import (
    GeneralisationRecipe,
    LiveRecipe,
    Recipe,
    SegmenterRecipe,
    TomogramSegmenterRecipe,
    load_recipe,
)
from cectflow.simulation.delivery import simulate_dataset
from cectflow.simulation.field import prepare_specimen
from cectflow.simulation.live import open_live
from cectflow.simulation.microscope import Microscope
from cectflow.simulation.recipe import SimulationRecipe
from cectflow.tracking.runs import connect
from cectflow.volume import read_volume

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
REAL = ("4v4r", "1oel", "1aon", "3j9i", "1bxn", "4v1w", "3cf3", "5a1a", "1wcm", "2cg9")
REAL_FOLDS = (
    ("1oel", "1aon"), ("4v4r", "2cg9"), ("3j9i", "5a1a"), ("1bxn", "3cf3"), ("4v1w", "1wcm"),
)  # fmt: skip
"""GroEL with and without GroES are homologous; the others are paired to save trainings, which
makes the test harder: two structures are unknown at a time."""
BUILTIN = ("barrel", "bowl", "rod", "horseshoe", "shell", "dumbbell", "discs", "ring")
BUILTIN_FOLDS = (("barrel", "ring"), ("bowl", "shell"), ("rod", "dumbbell"), ("horseshoe", "discs"))

PUBLISHED = FitRecipe(network="ssn3d", epochs=1, batch_size=16, learning_rate=0.001)
"""The papers' networks have no batch norm: they do not stand our learning rate. All `epochs` are
the plan's."""
OURS = FitRecipe(network="strided_ed_base", epochs=1, batch_size=16, learning_rate=0.005)
NETWORKS = {
    "ssn3d": PUBLISHED,
    "ssn3d_ed": PUBLISHED.model_copy(update={"network": "ssn3d_ed"}),
    "ours_base": OURS,
    "ours_base_uncentred": OURS.model_copy(update={"arguments": {"centred": False}}),
    "ours": OURS.model_copy(update={"network": "strided_ed_large"}),
}
"""Name in the figures → network and how it learns. Without the distance from the centre, as the
published networks are, ours shows what the rest of its anatomy is worth."""
COMPACT = OURS.model_copy(update={"network": "strided_ed_small"})
"""For whole tomograms."""
LOSS = SegmentationLoss(cross_entropy=1.0, dice=1.0)
"""The same for all: cross entropy alone, as in paper (a), starts slowly on small particles."""
HEADLINE = "snr_0.03"
SNRS = (0.1, 0.03, 0.01)
LARGE_KDA = 400.0
PICK_RADIUS = 80.0
"""Å: a pick within half of it is a hit; the complexes above 400 kDa have radii of 70 to 150 Å."""
WINDOWS = (88, 128, 288)
"""108, 18 and one of them in the tomogram that gives thresholds."""


@dataclass(frozen=True)
class Plan:
    """Sizes and budgets of one run of the benchmark.

    Attributes
    ----------
    box, voxel_size, field_shape
        Of the headline and the folds.
    epochs, cubes
        Of every training of the headline, and live cubes in each of its epochs.
    fold_epochs
        Of every training of the folds, of as many cubes each.
    folded
        Prefix of the figures → network of the folds, which cost many trainings.
    seeds
        Of the headline; the folds and the tomogram have the first.
    fields
        Of every test set; the folds have twice as many.
    tomogram_epochs
        Of the segmenter of tomograms.
    tomogram_shape, tuning_shape
        Voxels of 10 Å of the tomogram that is judged, and of the one that gives thresholds.
    """

    box: int = 24
    voxel_size: float = 16.0
    field_shape: tuple[int, int, int] = (48, 64, 64)
    epochs: int = 8
    cubes: int = 1280
    fold_epochs: int = 8
    folded: Mapping[str, str] = field(
        default_factory=lambda: {"": "ours_base", "uncentred_": "ours_base_uncentred"}
    )
    seeds: tuple[int, ...] = (0, 1, 2)
    fields: int = 10
    tomogram_epochs: int = 16
    tomogram_shape: tuple[int, int, int] = (200, 512, 512)
    tuning_shape: tuple[int, int, int] = (160, 288, 288)


CPU = Plan()
GPU = Plan(
    box=40, voxel_size=10.0, field_shape=(64, 112, 112), epochs=25, cubes=4000, fold_epochs=12,
    fields=16, tomogram_epochs=20,
)  # fmt: skip
QUICK = Plan(
    epochs=2, cubes=640, fold_epochs=1, folded={"": "ours_base"}, seeds=(0,), fields=2,
    tomogram_epochs=2,
    tomogram_shape=(80, 192, 192), tuning_shape=(80, 160, 160),
)  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """Where a run of the benchmark works, and with what.

    Attributes
    ----------
    plan
        See there.
    folder
        For data, checkpoints and finished parts.
    device, workers
        Of trainings; processes that simulate.
    """

    plan: Plan
    folder: Path
    hardware: Hardware

    @property
    def is_real(self) -> bool:
        """Whether the real structures are there."""
        return DATA.is_dir()

    def simulation(self, **changes: object) -> SimulationRecipe:
        """The common recipe, with changes."""
        plan = self.plan
        sources = (str(DATA / "structures"), str(DATA / "maps" / "4v4r.mrc.gz"))
        recipe = SimulationRecipe(
            structures=sources if self.is_real else ("builtin",),
            include=REAL if self.is_real else BUILTIN,
            box=plan.box,
            voxel_size=plan.voxel_size,
            field_shape=plan.field_shape,
            fields={"validation": 3, "test": plan.fields},
            occupancy=0.1,
            blur=0.69 * plan.voxel_size,
            jitter=plan.voxel_size,
            snr=(0.01, 0.1),
            microscope=Microscope(defocus_um=(3.0, 6.0)),
        )
        return recipe.model_copy(update=changes)

    def tests(self) -> dict[str, SimulationRecipe]:
        """Name → recipe of each test set."""
        sets = {f"snr_{snr:g}": self.simulation(snr=(snr, snr)) for snr in SNRS}
        return sets | {"calibrated": _imaged_as_real(self.simulation())}


def _imaged_as_real(simulation: SimulationRecipe) -> SimulationRecipe:
    """The recipe with noise, optics and tilts of the recipe ``real``."""
    real = load_recipe("real").simulation
    names = ("snr", "snr_stage", "ctf_correction", "microscope", "tilts")
    return simulation.model_copy(update={name: getattr(real, name) for name in names})


def main() -> None:
    """Measure the parts asked for, and write all that the working folder has.

    Each training is a folder below ``--work``: a rerun goes on from its last epoch, and takes
    finished ones as they are. Budgets are live cubes, none of which comes twice, the same for
    every network and the very same cubes for each seed.

    NAME is a published network, ``ours`` (at their cost), ``ours_base`` (at a fifth of it) or
    ``ours_base_uncentred`` (without the distance from the centre).

    - ``iou_NAME``: foreground IoU, mean over subtomograms and seeds, at SNR 0.03; ``_low`` and
      ``_high`` are the lowest and the highest seed. ``iou_NAME_snr_0.1`` …: at the others;
      ``…_calibrated``: imaged as the recipe ``real``, which no network was trained on.
      ``paper_iou_NAME``: paper (a)'s mean of foreground and background IoU.
    - ``ours_minus_ssn3d_ed``, ``ssn3d_ed_minus_ssn3d``: difference of the means over seeds at
      SNR 0.03, with its paired 95 % interval over fields.
    - ``iou_baseline``: the better of the best centred ball and the best threshold.
    - ``gmac_NAME``: of a cube of the run's box; ``gmac_40_NAME``: of 40³.
    - ``unseen_over_seen`` and the rest of ``cectflow evaluate generalisation``, for our base
      network, and ``uncentred_…`` without its distance from the centre; test fields have the SNR
      of the training, drawn from 0.01 to 0.1. ``control_over_seen`` holds for both.
    - ``tomogram_seconds``, ``tomogram_peak_gb``: ``cectflow predict segment`` with label map and
      picks by the compact segmenter, its start included; ``picks_f1_400kda``: complexes of
      400 kDa and more, class-agnostic, smaller ones neither hit nor miss, the threshold from
      another tomogram; ``tomogram_window_difference``: largest difference of probabilities
      between three window sizes. ``picks_f1_400kda_other``: of a tomogram that is imaged as the
      recipe ``real``, which has another spectrum; ``…_matched``: with ``--match-spectrum``.
    """
    options = parse_options(__doc__ or "", _add_options)
    cuda = options.device != "cpu" and torch.cuda.is_available()
    plan = QUICK if options.quick else GPU if cuda else CPU
    work = options.work / ("quick" if options.quick else f"box-{plan.box}")
    work.mkdir(parents=True, exist_ok=True)
    hardware = Hardware("cuda" if cuda else "cpu", options.precision, options.workers)
    bench = Bench(plan, work, hardware)
    parts: dict[str, Callable[[Bench], dict[str, float]]] = {
        "headline": _headline, "folds": _folds, "tomogram": _tomogram,
    }  # fmt: skip
    for name in (options.only,) if options.only else parts:
        figures = parts[name](bench) | {f"precision_{name}": options.precision}
        with replacing(work / f"{name}.json", overwrite=True) as temporary:
            temporary.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    found: dict[str, float | str] = {
        "structures": "real" if bench.is_real else "builtin phantoms",
        "recipe": f"{plan.box}³ at {plan.voxel_size:g} Å, ±60°, occupancy 10 %, SNR 0.01 to 0.1",
        "seeds": len(plan.seeds),
        "seeds_folds": 1,
    }
    for name in parts:
        if (work / f"{name}.json").is_file():
            found |= json.loads((work / f"{name}.json").read_text(encoding="utf-8"))
    write_report(options.json, found, quick=options.quick)
    if (work / "headline.json").is_file():
        _draw(bench, found).savefig(options.json.with_suffix(".png"), dpi=130)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--work", type=Path, required=True, help="folder to work in and go on in")
    parser.add_argument("--only", choices=("headline", "folds", "tomogram"))
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto")
    parser.add_argument(
        "--precision", choices=("auto", "float32", "bfloat16"), default="auto",
        help="of the trainings; bfloat16 halves their time on CPUs that multiply in it",
    )  # fmt: skip
    parser.add_argument("--workers", type=int, default=1, help="processes that simulate")


# --- headline -------------------------------------------------------------------------------------


class Scored(Config):
    """A training's scores of every test cube, by name of the test set, and its learning curve."""

    foreground: dict[str, tuple[float, ...]]
    paper: dict[str, tuple[float, ...]]
    """Mean of foreground and background IoU."""
    curve: tuple[float, ...]
    """Validation foreground IoU after each epoch."""


def _headline(bench: Bench) -> dict[str, float]:
    plan = bench.plan
    tests = _simulate_tests(bench)
    scored: dict[str, list[Scored]] = {name: [] for name in NETWORKS}
    for seed in plan.seeds:  # a run that is broken off leaves whole comparisons behind
        for name, runs in scored.items():
            runs.append(_train(bench, name, seed, tests))
    figures: dict[str, float] = {"cubes": plan.epochs * plan.cubes}
    for name, runs in scored.items():
        for test in tests:
            suffix = "" if test == HEADLINE else f"_{test}"
            figures |= _over_seeds(f"iou_{name}{suffix}", [run.foreground[test] for run in runs])
        figures |= _over_seeds(f"paper_iou_{name}", [run.paper[HEADLINE] for run in runs])
        figures |= _costs(name, plan.box)
    means = {
        name: np.mean([run.foreground[HEADLINE] for run in runs], axis=0)
        for name, runs in scored.items()
    }
    fields = tests[HEADLINE].split("test").fields
    for one, other in (("ours", "ssn3d_ed"), ("ssn3d_ed", "ssn3d")):
        score = bootstrap_score(means[one] - means[other], fields)
        key = f"{one}_minus_{other}"
        figures |= {key: score.value, f"{key}_low": score.low, f"{key}_high": score.high}
    for test, data in tests.items():
        suffix = "" if test == HEADLINE else f"_{test}"
        trivial = baselines(data.split("test"), "target", None)
        figures |= {f"iou_{kind}{suffix}": value for kind, value in trivial.items()}
        figures[f"iou_baseline{suffix}"] = max(trivial.values())
        measured = data.manifest.mean_snr_60("test")
        if measured is not None:
            figures[f"snr_60{suffix}"] = measured
    return figures


def _simulate_tests(bench: Bench) -> dict[str, Dataset]:
    structures = load_structures(bench.simulation())
    return {
        name: simulate_dataset(
            recipe, structures, bench.folder / "tests" / name, splits=["test"],
            where=bench.hardware.workplace,
        )
        for name, recipe in bench.tests().items()
    }  # fmt: skip


def _train(bench: Bench, name: str, seed: int, tests: Mapping[str, Dataset]) -> Scored:
    """Scores of one network and seed, of a finished training where there is one."""
    plan, simulation = bench.plan, bench.simulation()
    fit = _fit_recipe(NETWORKS[name], plan.epochs, seed)
    folder = bench.folder / "headline" / f"{name}-{seed}"
    digests = [data.manifest.content_digest() for data in tests.values()]
    hardware = bench.hardware
    content = (
        f"{fit.digest()} {simulation.digest()} {plan.cubes} {LOSS.digest()} {digests} "
        f"{hardware.device} {hardware.precision}"
    )
    identity = hashlib.sha256(content.encode()).hexdigest()
    finished = folder / f"scores-{identity[:16]}.json"
    if not finished.is_file():
        print(f"training {fit.network}, seed {seed}", flush=True)
        specimen = prepare_specimen(simulation, load_structures(simulation))
        data = simulate_dataset(
            simulation, load_structures(simulation), bench.folder / "validation",
            splits=["validation"],
        )  # fmt: skip
        with open_live(specimen, data.manifest, plan.cubes, workers=hardware.workers) as live:
            result, judged = fit_and_judge(
                Segment(LOSS), live, data.split("validation"),
                {test: dataset.split("test") for test, dataset in tests.items()}, fit,
                fabric=open_fabric(hardware.device, hardware.precision),
                folder=folder, log=lambda metrics, step: None,
            )  # fmt: skip
        scored = Scored(
            foreground={
                test: tuple(evaluation.scores["foreground_iou"].tolist())
                for test, evaluation in judged.items()
            },
            paper={
                test: tuple(evaluation.scores["iou"].tolist())
                for test, evaluation in judged.items()
            },
            curve=tuple(row["validation_foreground_iou"] for row in result.history),
        )
        with replacing(finished) as temporary:
            temporary.write_text(scored.to_json(), encoding="utf-8")
    return Scored.from_json(finished.read_text(encoding="utf-8"), source=str(finished))


def _fit_recipe(network: FitRecipe, epochs: int, seed: int) -> FitRecipe:
    # Nobody stops early: the budget is the same for all.
    return network.model_copy(update={"epochs": epochs, "patience": epochs, "seed": seed})


def _over_seeds(name: str, runs: Sequence[Sequence[float]]) -> dict[str, float]:
    means = [float(np.mean(run)) for run in runs]
    return {name: float(np.mean(means)), f"{name}_low": min(means), f"{name}_high": max(means)}


def _costs(name: str, box: int) -> dict[str, float]:
    network = make_network(_fit_recipe(NETWORKS[name], 1, 0), "target", 2, box)
    larger = make_network(_fit_recipe(NETWORKS[name], 1, 0), "target", 2, 40)
    return {
        f"gmac_{name}": count_macs(network, box) / 1e9,
        f"gmac_40_{name}": count_macs(larger, 40) / 1e9,
        f"parameters_{name}": float(count_parameters(network)),
    }


def _draw(bench: Bench, figures: Mapping[str, float | str]) -> Figure:
    """Learning curves with the spread over seeds (left), IoU against SNR (right)."""
    plan, tests = bench.plan, _simulate_tests(bench)
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    cubes = plan.cubes * np.arange(1, plan.epochs + 1)
    for number, name in enumerate(NETWORKS):
        curves = np.array([_train(bench, name, seed, tests).curve for seed in plan.seeds])
        left.plot(cubes, curves.mean(axis=0), ".-", color=f"C{number}", label=name)
        left.fill_between(cubes, curves.min(axis=0), curves.max(axis=0), alpha=0.2, lw=0,
                          color=f"C{number}")  # fmt: skip
        _draw_against_snr(right, figures, f"iou_{name}", name, f"C{number}")
    for kind, colour in (("ball", "0.3"), ("threshold", "0.6")):
        _draw_against_snr(right, figures, f"iou_{kind}", f"best {kind}", colour)
    left.set(xlabel="live cubes", ylabel="foreground IoU, validation", ylim=(0, None))
    right.set(xlabel="SNR", ylabel="foreground IoU, test", ylim=(0, None), xscale="log")
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_against_snr(
    axes: Axes, figures: Mapping[str, float | str], key: str, label: str, colour: str
) -> None:
    keys = [key if f"snr_{snr:g}" == HEADLINE else f"{key}_snr_{snr:g}" for snr in SNRS]
    values = [float(figures[k]) for k in keys]
    ends = [
        [abs(float(figures.get(f"{k}_{end}", figures[k])) - float(figures[k])) for k in keys]
        for end in ("low", "high")
    ]
    axes.errorbar(SNRS, values, ends, fmt=".-", color=colour, label=label, capsize=2)


# --- folds ----------------------------------------------------------------------------------------


def _folds(bench: Bench) -> dict[str, float]:
    plan = bench.plan
    connect(f"sqlite:///{bench.folder.resolve()}/mlflow.db")
    figures = {"fold_cubes": float(plan.fold_epochs * plan.cubes)}
    for prefix, name in plan.folded.items():
        recipe = _recipe_of(
            bench,
            bench.simulation(fields={"validation": 3, "test": 2 * plan.fields}),
            live=LiveRecipe(subtomograms_per_epoch=plan.cubes),
            segmenter=SegmenterRecipe(
                fit=_fit_recipe(NETWORKS[name], plan.fold_epochs, plan.seeds[0]), loss=LOSS
            ),
            generalisation=GeneralisationRecipe(
                groups=REAL_FOLDS if bench.is_real else BUILTIN_FOLDS, control=not prefix
            ),
        )
        result = evaluate_generalisation(
            recipe, bench.folder / f"{prefix}folds", bench.hardware,
            report=lambda line: print(line, flush=True),
        )  # fmt: skip
        found = result.figures()
        del found["train_cubes"]
        figures |= {f"{prefix}{key}": value for key, value in found.items()}
    return figures


def _recipe_of(bench: Bench, simulation: SimulationRecipe, **sections: object) -> Recipe:
    """A complete recipe; of its classifiers nothing is used."""
    recipe = load_recipe("real" if bench.is_real else "demo")
    return recipe.model_copy(update={"simulation": simulation, **sections})


# --- whole tomogram -------------------------------------------------------------------------------


def _tomogram(bench: Bench) -> dict[str, float]:
    plan, folder = bench.plan, bench.folder / "tomogram"
    simulation = bench.simulation(
        box=32, voxel_size=10.0, field_shape=(64, 96, 96), blur=6.9, jitter=10.0, occupancy=0.05,
        snr=(0.05, 0.2),
    )  # fmt: skip
    recipe = _recipe_of(
        bench, simulation,
        live=LiveRecipe(subtomograms_per_epoch=plan.cubes),
        tomogram_segmenter=TomogramSegmenterRecipe(
            fit=_fit_recipe(COMPACT, plan.tomogram_epochs, plan.seeds[0]), loss=LOSS
        ),
    )  # fmt: skip
    connect(f"sqlite:///{bench.folder.resolve()}/mlflow.db")
    registered = train_tomogram_segmenter(recipe, folder, bench.hardware)
    model = registered.trained.folder
    judged = simulation.model_copy(update={"snr": (0.1, 0.1)})
    tuning, test, other = (
        simulate_tomograms(imaged, folder / name, count=1, shape=shape)[0]
        for name, imaged, shape in (
            ("tuning", judged, plan.tuning_shape), ("test", judged, plan.tomogram_shape),
            ("other", _imaged_as_real(simulation), plan.tuning_shape),
        )
    )  # fmt: skip
    small = [s.name for s in load_structures(simulation) if s.mass_kda < LARGE_KDA]

    def judge(tomogram: Path, picks: str) -> PickEvaluation:
        return evaluate_picks(
            tomogram / "particles.star", tomogram / f"{picks}.star", PICK_RADIUS, ignore=small,
            tomogram=tomogram / "tomogram.mrc",
        )  # fmt: skip

    _segment(model, tuning, "picks", "--min-score", "0")
    tuned = judge(tuning, "picks")
    assert tuned.threshold is not None
    least = tuned.threshold[0]
    kept = ("--min-score", f"{least:.4f}")
    seconds, peak = _segment(model, test, "picks", *kept)
    found = judge(test, "picks").agreements["any"]
    spectra: dict[str, float] = {}
    for key, tomogram, options in (
        ("matched", test, ("--match-spectrum",)), ("other", other, ()),
        ("other_matched", other, ("--match-spectrum",)),
    ):  # fmt: skip
        _segment(model, tomogram, key, *kept, *options)
        spectra[f"picks_f1_400kda_{key}"] = judge(tomogram, key).agreements["any"].f1
    card = registered.trained.card
    return {
        "tomogram_seconds": seconds,
        "tomogram_peak_gb": peak,
        "tomogram_megavoxels": float(np.prod(plan.tomogram_shape)) / 1e6,
        "tomogram_window_difference": _window_difference(model, tuning),
        "tomogram_particles_400kda": float(found.particles),
        "tomogram_iou": card.scores["foreground_iou"].value,
        "tomogram_iou_baseline": max(card.baselines.values()),
        "tomogram_cubes": float(plan.tomogram_epochs * plan.cubes),
        "picks_f1_400kda": found.f1,
        **spectra,
        "picks_precision_400kda": found.precision,
        "picks_recall_400kda": found.recall,
        "picks_f4_400kda": found.f4,
        "picks_duplicates": float(found.duplicates),
        "picks_min_score": least,
    }


def _segment(model: Path, tomogram: Path, name: str, *arguments: str) -> tuple[float, float]:
    """Seconds and peak resident memory in GB of ``cectflow predict segment``, as a user runs it."""
    note = tomogram / f"{name}.peak"
    command = [
        sys.executable, "-m", "benchmarks.memory", str(note), "predict", "segment",
        "--model", str(model),
        "--tomogram", str(tomogram / "tomogram.mrc"), "--out", str(tomogram / f"{name}.mrc"),
        "--picks", str(tomogram / f"{name}.star"), "--device", "cpu", "--overwrite", *arguments,
    ]  # fmt: skip
    began = time.monotonic()
    subprocess.run(command, check=True)
    return time.monotonic() - began, float(note.read_text(encoding="ascii"))


def _window_difference(model: Path, tomogram: Path) -> float:
    """Largest difference of the foreground's probability between window sizes."""
    written = []
    for edge in WINDOWS:
        path = tomogram / f"window-{edge}.probabilities.mrc"
        _segment(model, tomogram, f"window-{edge}", "--window", str(edge), "--probabilities",
                 str(path))  # fmt: skip
        written.append(read_volume(path).data)
    return float(max(np.abs(volume - written[0]).max() for volume in written[1:]))


if __name__ == "__main__":
    main()
