"""Real ribosomes: a student that was shown unlabelled cubes, judged on another tomogram."""

from __future__ import annotations

from itertools import permutations, product
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import binomtest
from torch import nn

from benchmarks.classifiers import OURS, SOFT, Bench
from benchmarks.segmentation import DATA
from cectflow.dataset import BatchSource, Dataset
from cectflow.execution import Workplace
from cectflow.flows.calibration import CalibrationInput, calibrate_recipe
from cectflow.flows.simulation import load_structures
from cectflow.learning.fit import FitRecipe, fit, open_fabric
from cectflow.learning.objective import Classify, Distill, Objective
from cectflow.learning.teacher import Teacher
from cectflow.learning.training import make_network
from cectflow.learning.unlabelled import UnlabelledCubes, WithUnlabelled
from cectflow.particles import read_particles
from cectflow.prediction.mask import noise_like
from cectflow.recipe import load_recipe
from cectflow.simulation.delivery import simulate_dataset
from cectflow.spectrum import PowerSum, apply_gain
from cectflow.volume import read_stack

RIBOSOME = "4v4r"
REAL_SNR = (0.001, 0.1)
"""From what the real cubes have, about 0.002 (their calibration leaves 0.0013 to 0.037), to where
there is something to learn from the first."""
REAL_SHARE = 0.25
REAL_TEACHER = OURS.model_copy(update={"network": "strided_small", "epochs": 6})
REAL_STUDENT = OURS.model_copy(update={"epochs": 6})
SPECTRUM_CUBES = 200
"""Simulated ones of which the spectrum is that of the training data."""
NOISE_COPIES = 20
"""Copies of each real cube with random phases."""


def judge_ribosomes(bench: Bench) -> dict[str, float]:
    """How often cubes are called ribosomes: real ones, their noise, and other complexes.

    As they are, and filtered to the spectrum of the simulated ones as ``--match-spectrum`` does
    (``…_matched``), in both tomograms together and in each (``…_of_TOMOGRAM``), by networks of the
    first seed and of others (``…_seed_N``). Nothing where the real data are absent.
    """
    if not DATA.is_dir():
        return {}
    source = DATA / "real" / "ribosome_70s" / "ribosome_70s"
    stack, _ = read_stack(source.with_suffix(".mrcs"))
    tomograms = read_particles(source.with_suffix(".star")).rows["rlnTomoName"].astype(str)
    names = sorted(set(tomograms))
    # Protein is bright in the file.
    cubes = {name: -np.asarray(stack[tomograms == name], np.float32) for name in names}
    counts: dict[str, list[int]] = {}
    for learned, judged in permutations(names, 2):
        data = _simulate_like(bench, source, judged, bench.folder / "real" / learned)
        ribosome = data.manifest.classes.index(RIBOSOME)
        noise = np.stack(
            [noise_like(cube, seed) for cube in cubes[judged] for seed in range(NOISE_COPIES)]
        ).astype(np.float32)
        test = data.split("test")
        others = test.read(np.flatnonzero(test.class_ids != ribosome + 1)).subtomograms
        validation = data.split("validation")
        few = np.arange(min(SPECTRUM_CUBES, len(validation)))
        wanted = _power_of(validation.read(few).subtomograms).power
        for suffix in ("", "_matched"):
            gains = {
                name: _power_of(torch.from_numpy(own)).gain_to(wanted)
                for name, own in cubes.items()
            }
            real, copies, unlabelled = (
                apply_gain(own, gains[name]) if suffix else own
                for own, name in ((cubes[judged], judged), (noise, judged),
                                  (cubes[learned], learned))
            )  # fmt: skip
            shown = {
                "top1": (torch.from_numpy(real)[:, None], 1),
                "top3": (torch.from_numpy(real)[:, None], 3),
                "noise": (torch.from_numpy(copies)[:, None], 1),
                "others": (others, 1),
            }
            for seed in bench.plan.seeds:
                networks = _train_for(bench, data, unlabelled, learned, suffix, seed)
                for (who, network), (what, (given, rank)) in product(
                    networks.items(), shown.items()
                ):
                    best = _ask(network, given).topk(rank, dim=1).indices
                    key = f"real_{what}_{who}{suffix}"
                    first = (key, f"{key}_of_{judged.partition('.')[0]}")
                    for each in first if seed == bench.plan.seeds[0] else (f"{key}_seed_{seed}",):
                        tally = counts.setdefault(each, [0, 0])
                        tally[0] += int((best == ribosome).any(dim=1).sum())
                        tally[1] += len(given)
    figures: dict[str, float] = {}
    for key, (hits, number) in counts.items():
        ends = binomtest(hits, number).proportion_ci(method="wilson")
        figures |= {key: hits / number, f"{key}_low": ends.low, f"{key}_high": ends.high}
    return figures | {"real_top1": figures["real_top1_adapted_matched"]}


def _power_of(cubes: torch.Tensor) -> PowerSum:
    total = PowerSum(cubes.shape[-1])
    total.add(cubes.numpy())
    return total


def _ask(network: nn.Module, cubes: torch.Tensor) -> torch.Tensor:
    device = next(network.parameters()).device
    with torch.inference_mode():
        return torch.cat([network(part.to(device)).cpu() for part in torch.split(cubes, 64)])


def _simulate_like(bench: Bench, source: Path, held_out: str, folder: Path) -> Dataset:
    """Dataset of ten complexes, imaged like the cubes of the tomograms that are not held out."""
    recipe = load_recipe("real")
    common = bench.simulation()
    simulation = recipe.simulation.model_copy(
        update={
            "structures": common.structures, "include": common.include,
            "fields": {"train": bench.plan.imitated, "validation": 4, "test": 8},
        }
    )  # fmt: skip
    path = folder / "recipe.yaml"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        given = CalibrationInput(
            str(source.with_suffix(".mrcs")), source.with_suffix(".star"), contrast="light",
            hold_out=held_out,
        )  # fmt: skip
        calibrate_recipe(recipe.model_copy(update={"simulation": simulation}), given, path)
    fitted = load_recipe(str(path)).simulation.model_copy(update={"snr": REAL_SNR})
    where = Workplace(bench.workers)
    return simulate_dataset(fitted, load_structures(fitted), folder / "data", where=where)


def _train_for(
    bench: Bench, data: Dataset, unlabelled: NDArray[np.float32], name: str, suffix: str, seed: int
) -> dict[str, nn.Module]:
    """Teacher, student, and the student that was shown real cubes as well."""
    labels = Classify(len(data.manifest.classes))
    fabric = open_fabric(bench.device, bench.precision)
    train, validation = data.split("train"), data.split("validation")
    real = UnlabelledCubes(torch.from_numpy(unlabelled)[:, None], data.manifest, REAL_SHARE)

    def trained(
        who: str, fit_recipe: FitRecipe, objective: Objective, seen: BatchSource
    ) -> nn.Module:
        fit_recipe = fit_recipe.model_copy(update={"seed": seed})
        folder = (
            bench.folder / "real" / name / (who if seed == bench.plan.seeds[0] else f"{who}-{seed}")
        )
        network = make_network(fit_recipe, "classify", labels.num_outputs, data.manifest.box)
        fit(network, objective, seen, validation, fit_recipe, fabric=fabric, folder=folder,
            log=lambda metrics, step: print(who, step, metrics["validation_accuracy"]))  # fmt: skip
        return network.to(fabric.device).eval()

    teacher = trained("teacher", REAL_TEACHER, labels, train)
    asked = Teacher(teacher)
    soft = Distill(labels, asked, soft=SOFT, weight=0.5)
    return {
        "teacher": teacher,
        "student": trained("student", REAL_STUDENT, soft, train),
        "adapted": trained(f"adapted{suffix}", REAL_STUDENT, soft, WithUnlabelled(train, real)),
    }
