"""Distillation: the papers' classifiers and ours, what soft labels give, and what each costs."""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
from lightning_fabric import Fabric
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.classifiers import (
    BOX_OF_COST,
    HEADLINE,
    OURS,
    SOFT,
    Bench,
    choose_bench,
    draw_front,
    untrained_card,
)
from benchmarks.report import parse_options, write_report
from benchmarks.ribosomes import judge_ribosomes
from benchmarks.segmentation import DATA
from cectflow.config import Config
from cectflow.cost import count_macs, count_parameters, measure_throughputs
from cectflow.dataset import BatchSource, Dataset, Selection
from cectflow.export import export_network
from cectflow.files import replacing, sha256_of
from cectflow.flows.simulation import load_structures
from cectflow.flows.teachers import EMBEDDED_CUBES
from cectflow.learning.calibration import measure_trust
from cectflow.learning.figures import draw_calibration, draw_confusion, draw_embeddings
from cectflow.learning.fit import DivergedError, FitRecipe, open_fabric
from cectflow.learning.losses import DistillationLoss
from cectflow.learning.objective import Classify, Distill, Objective
from cectflow.learning.scores import bootstrap_score
from cectflow.learning.teacher import KnownLogits, Teacher
from cectflow.learning.training import evaluate_folder, fit_and_judge, make_network
from cectflow.learning.variants import make_variants
from cectflow.model_card import Variant
from cectflow.quantise import quantise
from cectflow.runtime import RuntimeName
from cectflow.simulation.field import prepare_specimen
from cectflow.simulation.live import open_live
from cectflow.timing import Candidate, list_candidates
from cectflow.turns import allowed_turns

PUBLISHED_TEACHER = FitRecipe(
    network="dsrf3d_v2", arguments={"dropout": 0.3}, epochs=1, batch_size=16, learning_rate=0.0005
)
NORMED_TEACHER = FitRecipe(
    network="dsrf3d_v2_bn", arguments={"dropout": 0.3}, epochs=1, batch_size=16, learning_rate=0.002
)
PUBLISHED_STUDENT = FitRecipe(
    network="student_1", epochs=1, batch_size=16, learning_rate=0.005, optimiser="sgd",
)  # fmt: skip
MSE = DistillationLoss(mse=1.0)
TEACHER = "dsrf3d_v2_bn"
STRONG = "dsrf3d_v2_bn_long"
"""The same with the students' budget."""
MICRO = "strided_micro"
PAIR = ("micro_long_labels", "micro_long_distilled")
SHIPPED, UNTAUGHT = "nano_patient_strong", "nano_patient_labels"
"""The most accurate of those that are fifty times as fast, and the same without a teacher."""
STUDENT = "strided_nano"
"""Network of both."""
RUNTIMES: tuple[RuntimeName, ...] = ("torch", "onnxruntime", "openvino")
VARIANTS: tuple[Variant, ...] = ("float32", "bfloat16", "int8")
FASTEST: RuntimeName = "openvino"
GPU_BATCH, GPU_REPEATS = 1024, 7
PARTS = ("costs", "trainings", "shipped", "real", "figures")


@dataclass(frozen=True)
class Arm:
    """One training: a network, what it sees, and what it learns.

    Attributes
    ----------
    fit
        But for epochs and seed.
    cubes
        ``1k`` or ``10k`` labelled cubes that come again and again, or ``live`` ones that do not.
    budget
        Cubes shown in all: ``heavy`` to the papers' networks, ``light`` to ours, ``long`` to ours
        in less time than ``heavy`` takes theirs, ``patient`` more, still in less time than ``long``
        takes theirs.
    soft
        How it is distilled; None: from labels alone.
    weight
        Of the soft term.
    seeds
        How many of the plan's.
    teachers
        Arms whose networks, first seed, teach it together.
    """

    fit: FitRecipe
    cubes: str = "10k"
    budget: str = "light"
    soft: DistillationLoss | None = None
    weight: float = 0.5
    seeds: int = 1
    teachers: tuple[str, ...] = field(default=(TEACHER,), repr=False)


def _ours(
    network: str, cubes: str, *, soft: bool, seeds: int = 1, budget: str = "light",
    teachers: tuple[str, ...] = (TEACHER,),
) -> Arm:  # fmt: skip
    fit = OURS.model_copy(update={"network": network})
    return Arm(fit, cubes, budget, SOFT if soft else None, seeds=seeds, teachers=teachers)


def _taught(network: str, budget: str, *, seeds: int = 1) -> Arm:
    """One of ours, taught by :data:`STRONG`."""
    return _ours(network, "10k", soft=True, seeds=seeds, budget=budget, teachers=(STRONG,))


def _published(student: str, *, survives: bool = False) -> Arm:
    """One of the papers' students by their recipe, or by one in which its units survive.

    Under the papers' SGD validation stands still from the first 10 k cubes on, and the units of the
    last convolutions are dead: the teacher's logits are large (4.5, root mean square), and so are
    the first steps.
    """
    fit = PUBLISHED_STUDENT.model_copy(update={"network": student})
    if not survives:
        return Arm(fit, budget="heavy", soft=MSE, weight=1.0)
    fit = fit.model_copy(update={"optimiser": "adam", "learning_rate": 0.001})
    return Arm(fit, budget="long", soft=MSE, weight=1.0)


ARMS: dict[str, Arm] = {
    TEACHER: Arm(NORMED_TEACHER, budget="heavy"),
    STRONG: Arm(NORMED_TEACHER, budget="long"),
    "nano_patient_strong": _taught(STUDENT, "patient"),
    "nano_patient_labels": _ours(STUDENT, "10k", soft=False, budget="patient"),
    "micro_10k_labels": _ours(MICRO, "10k", soft=False, seeds=3),
    "micro_1k_labels": _ours(MICRO, "1k", soft=False, seeds=3),
    "micro_10k_distilled": _ours(MICRO, "10k", soft=True, seeds=3),
    "micro_1k_distilled": _ours(MICRO, "1k", soft=True, seeds=3),
    "nano_long_distilled": _ours(STUDENT, "10k", soft=True, budget="long"),
    "micro_long_distilled": _ours(MICRO, "10k", soft=True, budget="long"),
    "nano_long_labels": _ours(STUDENT, "10k", soft=False, seeds=3, budget="long"),
    "micro_long_labels": _ours(MICRO, "10k", soft=False, seeds=3, budget="long"),
    "nano_long_ensemble": _ours(STUDENT, "10k", soft=True, budget="long", teachers=PAIR),
    "student_1": _published("student_1"),
    "student_2": _published("student_2"),
    "student_3": _published("student_3"),
    "student_3_adam": _published("student_3", survives=True),
    "student_1_adam": _published("student_1", survives=True),
    "small_long_labels": _ours("strided_small", "10k", soft=False, budget="long"),
    "nano_long_small": _ours(
        STUDENT, "10k", soft=True, budget="long", teachers=("small_long_labels",)
    ),
    "small_long_distilled": _ours("strided_small", "10k", soft=True, budget="long"),
    "micro_live_labels": _ours(MICRO, "live", soft=False),
    "micro_live_distilled": _ours(MICRO, "live", soft=True),
    "dsrf3d_v2": Arm(PUBLISHED_TEACHER, budget="heavy"),
    "dsrf3d_v2_long": Arm(PUBLISHED_TEACHER, budget="long"),
    "nano_long_strong": _taught(STUDENT, "long", seeds=3),
    "micro_long_strong": _taught(MICRO, "long", seeds=3),
    "small_long_strong": _taught("strided_small", "long"),
    "micro_patient_strong": _taught(MICRO, "patient"),
    "micro_patient_labels": _ours(MICRO, "10k", soft=False, budget="patient"),
}
"""In the order in which they are trained: a run that is broken off has the figures that count."""


# --- trainings ------------------------------------------------------------------------------------


class Scored(Config):
    """What a training's network said of every test cube, and how it learned."""

    predicted: dict[str, tuple[int, ...]]
    """Name of the test set → class id of each cube."""
    curve: tuple[float, ...]
    """Validation accuracy after each epoch."""
    seconds: float
    """Of all epochs."""
    epochs: int


def _train(bench: Bench, name: str, seed: int) -> Scored:
    """What one arm and seed gives; of a finished training where there is one."""
    arm, plan = ARMS[name], bench.plan
    data, tests = bench.data(), bench.tests()
    with _source(bench, data, arm) as train:
        epochs = max(1, round(getattr(plan, arm.budget) / len(train)))
        fit = arm.fit.model_copy(update={"epochs": epochs, "patience": epochs, "seed": seed})
        digests = [test.manifest.content_digest() for test in tests.values()]
        taught = {}
        if arm.soft is not None:
            taught = {"teacher": _digest_of(bench, arm.teachers)}
        content = f"{fit.digest()} {arm} {len(train)} {digests} {bench.device} {bench.precision}"
        content += "".join(taught.values())
        folder = bench.folder / "trainings" / f"{name}-{seed}"
        identity = hashlib.sha256(content.encode()).hexdigest()
        finished = folder / f"scores-{identity[:16]}.json"
        if not finished.is_file():
            print(f"training {name}, seed {seed}", flush=True)
            result, judged = fit_and_judge(
                _objective(bench, arm, data, train), train, data.split("validation"),
                {test: dataset.split("test") for test, dataset in tests.items()}, fit,
                fabric=open_fabric(bench.device, bench.precision), folder=folder,
                log=lambda metrics, step: print(step, metrics, flush=True), provenance=taught,
            )  # fmt: skip
            scored = Scored(
                predicted={
                    test: tuple(evaluation.predicted.tolist())
                    for test, evaluation in judged.items()
                    if evaluation.predicted is not None
                },
                curve=tuple(row["validation_accuracy"] for row in result.history),
                seconds=sum(row["epoch_seconds"] for row in result.history),
                epochs=epochs,
            )
            with replacing(finished) as temporary:
                temporary.write_text(scored.to_json(), encoding="utf-8")
    return Scored.from_json(finished.read_text(encoding="utf-8"), source=str(finished))


@contextmanager
def _source(bench: Bench, data: Dataset, arm: Arm) -> Iterator[BatchSource]:
    """What an arm is trained on."""
    train = data.split("train")
    if arm.cubes == "live":
        simulation = bench.simulation()
        specimen = prepare_specimen(simulation, load_structures(simulation))
        epoch = min(bench.plan.epoch, getattr(bench.plan, arm.budget))
        with open_live(specimen, data.manifest, epoch, workers=bench.workers) as live:
            yield live
    elif arm.cubes == "1k":
        yield Selection(train, np.flatnonzero(train.fields < bench.plan.few))
    else:
        yield train


def _objective(bench: Bench, arm: Arm, data: Dataset, train: BatchSource) -> Objective:
    labels = Classify(len(data.manifest.classes))
    if arm.soft is None:
        return labels
    fabric = open_fabric(bench.device, bench.precision)
    members = [_best_of(bench, name).to(fabric.device) for name in arm.teachers]
    teacher = Teacher(*(_InPrecision(member, fabric) for member in members))
    turns = allowed_turns(data.manifest.tilt_range)
    known = KnownLogits(
        teacher,
        (*(() if arm.cubes == "live" else ((train, turns),)),
         (data.split("validation"), ("identity",))),
        batch_size=32,
        device=fabric.device,
        store=bench.folder / ("-".join(("logits", *arm.teachers)) + ".npz"),
        identity=f"{_digest_of(bench, arm.teachers)} {data.manifest.content_digest()}",
    )  # fmt: skip
    return Distill(labels, teacher, known=known, soft=arm.soft, weight=arm.weight)


def _digest_of(bench: Bench, names: Sequence[str]) -> str:
    """Of the weights of arms, which are trained first where they are not there."""
    for name in names:
        _train(bench, name, bench.plan.seeds[0])
    return " ".join(sha256_of(_weights_of(bench, name)) for name in names)


def _weights_of(bench: Bench, name: str) -> Path:
    return bench.folder / "trainings" / f"{name}-{bench.plan.seeds[0]}" / "best.pt"


def _best_of(bench: Bench, name: str) -> nn.Module:
    """Network of an arm's best epoch, first seed, for evaluation."""
    classes = len(bench.data().manifest.classes)
    network = make_network(ARMS[name].fit, "classify", classes, bench.plan.box)
    network.load_state_dict(torch.load(_weights_of(bench, name), weights_only=True)["network"])
    return network.eval()


class _InPrecision(nn.Module):
    """A network that computes as fast as trainings do."""

    def __init__(self, network: nn.Module, fabric: Fabric) -> None:
        super().__init__()
        self.network = network
        self.fabric = fabric

    def forward(self, cubes: Tensor) -> Tensor:
        with self.fabric.autocast():
            logits: Tensor = self.network(cubes)
        return logits.float()


# --- figures --------------------------------------------------------------------------------------


def main() -> None:
    """Measure the parts asked for, and write all that the working folder has.

    Each training is a folder below ``--work``: a rerun goes on from its last epoch, and takes
    finished ones as they are. ``cubes_heavy``, ``cubes_light``, ``cubes_long`` and
    ``cubes_patient`` are the budgets: cubes shown in all to the papers' networks, and to ours.

    - ``accuracy_NAME``: on the test split, SNR 0.01 to 0.1, with its 95 % interval over fields
      (mean over seeds where there are several); ``…_snr_0.1`` …, ``…_calibrated``: of further
      test sets, the last imaged as the recipe ``real``, which no network was trained on.
      ``accuracy_teacher`` is the best of ``dsrf3d_v2`` and ``dsrf3d_v2_bn``, longer trainings too,
      ``accuracy_student`` that of the student of :data:`SHIPPED`, ``accuracy_labels_only`` the same
      without the teacher, ``accuracy_student_1`` the papers'; ``given_up_NAME``: its units died.
    - ``student_minus_teacher``: paired over fields.
    - ``distillation_gain`` (10 k labels), ``distillation_gain_1k``, ``distillation_gain_live``,
      ``distillation_gain_long`` (10 k labels, ``cubes_long``): distilled minus from labels alone,
      paired over fields, seeds averaged. The teacher is :data:`TEACHER`, but in ``…_long`` the
      ensemble :data:`PAIR`: beside the first, a weak one for a student that trains five times as
      long, stands ``…_long_weak``; ``…_nano_long_strong`` and so on are of
      students taught by :data:`STRONG`. ``minus_strong_NAME``: an arm compared with it, paired.
    - ``seed_sd_NAME``: standard deviation of the accuracy over seeds, which intervals over fields
      know nothing of.
    - ``per_s_NAME_RUNTIME_VARIANT``: cubes of 40³ per second, batches of 16, all by turns, on
      ``threads`` threads; ``speedup_NAME_RUNTIME`` over ``dsrf3d_v2`` in the same runtime, float32;
      ``speedup_cpu`` and ``speedup_student_1``: in openvino, the fastest; ``parameters_ratio``;
      ``low_precision_speedup``: of the student's better low precision over its float32 there.
    - ``bfloat16_difference``, ``int8_difference``: of the test accuracy to float32, paired;
      ``low_precision_accuracy_drop``: of the worse; ``…_agreement``: share of test cubes that both
      call the same. ``ece_before``, ``ece``: expected calibration
      error on the test split without and with the temperature of the validation split.
    - ``gpu_per_s``: of the student on a GPU, where there is one: torch, bfloat16, batches of 1024.
    - ``seconds_NAME``: of a training, on this machine.
    - ``real_top1_…``, ``real_top3_…``: share of real 70S ribosomes that are called so, by a
      ``teacher``, its ``student``, and a student ``adapted`` by the unlabelled cubes of the other
      tomogram; both ways, twenty cubes in all. ``real_noise_…`` and ``real_others_…``: the same
      of their copies with random phases, and of simulated other complexes: the controls, without
      which the first say nothing. ``…_matched``: the cubes filtered to the spectrum of the
      simulated ones, also those that ``adapted`` was shown. ``real_top1``: of ``adapted`` so.
      ``…_of_TOMOGRAM``: of one of the two; ``…_seed_N``: by networks of another seed. Wilson
      intervals.

    Beside the table: accuracy against time, both confusion matrices, the reliability diagram of
    the student, and where both networks put the same test cubes.
    """
    options = parse_options(main.__doc__ or "", _add_options)
    bench = choose_bench(options)
    parts: dict[str, Callable[[Bench], dict[str, float]]] = {
        "costs": _costs,
        "trainings": partial(_accuracies, arms=options.arms, seeds=options.seeds),
        "shipped": _shipped,
        "real": judge_ribosomes,
        "figures": partial(_draw, stem=options.json),
    }  # fmt: skip
    for name in (options.only,) if options.only else parts:
        figures = parts[name](bench)
        with replacing(bench.folder / f"{name}.json", overwrite=True) as temporary:
            temporary.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    plan = bench.plan
    found: dict[str, float | str] = {
        "structures": "real" if DATA.is_dir() else "builtin phantoms",
        "recipe": f"{plan.box}³ at {plan.voxel_size:g} Å, ±60°, occupancy 10 %, SNR 0.01 to 0.1",
        "precision": bench.precision,
    }
    for name in parts:
        if (bench.folder / f"{name}.json").is_file():
            found |= json.loads((bench.folder / f"{name}.json").read_text(encoding="utf-8"))
    write_report(options.json, found, quick=options.quick)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--work", type=Path, required=True, help="folder to work in and go on in")
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=tuple(ARMS),
                        help="trainings to run and to tell of")  # fmt: skip
    parser.add_argument("--seeds", type=int, help="of each training, at most")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto")
    parser.add_argument(
        "--precision", choices=("auto", "float32", "bfloat16"), default="auto",
        help="of the trainings; bfloat16 halves their time on CPUs that multiply in it",
    )  # fmt: skip
    parser.add_argument("--workers", type=int, default=1, help="processes that simulate")


def _accuracies(bench: Bench, arms: Sequence[str], seeds: int | None) -> dict[str, float]:
    """Of arms on every test set, so many seeds of each at most, and the differences of arms."""
    plan, splits = bench.plan, {name: data.split("test") for name, data in bench.tests().items()}
    right: dict[str, dict[str, NDArray[np.float64]]] = {}
    figures = {
        "cubes_heavy": float(plan.heavy),
        "cubes_light": float(plan.light),
        "cubes_long": float(plan.long),
        "cubes_patient": float(plan.patient),
        "labels_10k": float(len(bench.data().split("train"))),
        "test_cubes": float(len(splits[HEADLINE])),
        "test_fields": float(len(np.unique(splits[HEADLINE].fields))),
    }
    for name in arms:
        arm = ARMS[name]
        try:
            runs = [_train(bench, name, seed) for seed in plan.seeds[: arm.seeds][:seeds]]
        except DivergedError as error:
            print(f"{name} was given up: {error}", flush=True)
            figures[f"given_up_{name}"] = 1.0
            continue
        figures |= {f"seeds_{name}": float(len(runs)), f"seconds_{name}": runs[0].seconds}
        right[name] = {
            test: np.mean([np.array(r.predicted[test]) == split.class_ids for r in runs], axis=0)
            for test, split in splits.items()
        }
        if len(runs) > 1:
            answers = np.array([run.predicted[HEADLINE] for run in runs])
            accuracies = (answers == splits[HEADLINE].class_ids).mean(axis=1)
            figures[f"seed_sd_{name}"] = float(accuracies.std(ddof=1))
        for test, split in splits.items():
            suffix = "" if test == HEADLINE else f"_{test}"
            figures |= _interval(f"accuracy_{name}{suffix}", right[name][test], split.fields)

    def difference(key: str, one: str, other: str) -> dict[str, float]:
        if one not in right or other not in right:
            return {}
        values = right[one][HEADLINE] - right[other][HEADLINE]
        return _interval(key, values, splits[HEADLINE].fields)

    teachers = [name for name in (TEACHER, STRONG, "dsrf3d_v2", "dsrf3d_v2_long") if name in right]
    teacher = max(teachers, key=lambda name: figures[f"accuracy_{name}"], default="none")
    roles = {"teacher": teacher, "student": SHIPPED, "labels_only": UNTAUGHT}
    for role, name in roles.items():
        if name in right:
            for end in ("", "_low", "_high"):
                figures[f"accuracy_{role}{end}"] = figures[f"accuracy_{name}{end}"]
    figures |= difference("student_minus_teacher", SHIPPED, teacher)
    figures |= difference("distillation_gain", "micro_10k_distilled", "micro_10k_labels")
    labels = "nano_long_labels"
    figures |= difference("distillation_gain_long", "nano_long_ensemble", labels)
    figures |= difference("distillation_gain_long_weak", "nano_long_distilled", labels)
    for name, budget in product(("nano", "micro"), ("long", "patient")):
        taught = f"{name}_{budget}_strong"
        figures |= difference(f"distillation_gain_{taught}", taught, f"{name}_{budget}_labels")
    for name in (each for each in right if each != STRONG):
        figures |= difference(f"minus_strong_{name}", name, STRONG)
    for cubes in ("1k", "live"):
        figures |= difference(
            f"distillation_gain_{cubes}", f"micro_{cubes}_distilled", f"micro_{cubes}_labels"
        )
    return figures


def _interval(key: str, values: NDArray[np.float64], fields: NDArray[np.int64]) -> dict[str, float]:
    score = bootstrap_score(values, fields)
    return {key: score.value, f"{key}_low": score.low, f"{key}_high": score.high}


def _costs(bench: Bench) -> dict[str, float]:
    """Sizes and rates at 40³; weights make no difference to them."""
    networks = ("dsrf3d_v2", "dsrf3d_v2_bn", "residual_teacher", "student_1", "student_2",
                "student_3", "strided_small", "strided_micro", "strided_nano")  # fmt: skip
    figures: dict[str, float] = {}
    candidates: list[Candidate] = []
    manifest = bench.data().manifest
    noise = np.random.default_rng(0).normal(size=(16, 1, *[BOX_OF_COST] * 3)).astype(np.float32)
    for name in networks:
        recipe = OURS.model_copy(update={"network": name})
        network = make_network(recipe, "classify", len(manifest.classes), BOX_OF_COST)
        folder = bench.folder / "costs" / name
        if not folder.is_dir():
            export_network(network, untrained_card(name, manifest), folder)
            quantise(folder, noise)
        candidates += list_candidates(folder, RUNTIMES, VARIANTS)
        figures[f"parameters_{name}"] = float(count_parameters(network))
        figures[f"mmac_{name}"] = count_macs(network, BOX_OF_COST) / 1e6
    rates = measure_throughputs(candidates)
    for candidate, rate in zip(candidates, rates, strict=True):
        how = f"{candidate.folder.name}_{candidate.runtime}_{candidate.variant}"
        figures[f"per_s_{how}"] = rate
    for runtime in RUNTIMES:
        base = figures[f"per_s_dsrf3d_v2_{runtime}_float32"]
        for name in networks:
            rate = figures[f"per_s_{name}_{runtime}_float32"]
            figures[f"speedup_{name}_{runtime}"] = rate / base
    best = f"per_s_{STUDENT}_{FASTEST}"
    low = max(figures.get(f"{best}_{variant}", 0.0) for variant in VARIANTS[1:])
    if bench.device == "cuda":
        figures["gpu_per_s"] = _gpu_rate(len(manifest.classes))
    return figures | {
        "threads": float(torch.get_num_threads()),
        "speedup_cpu": figures[f"speedup_{STUDENT}_{FASTEST}"],
        "speedup_student_1": figures[f"speedup_student_1_{FASTEST}"],
        "low_precision_speedup": low / figures[f"{best}_float32"],
        "parameters_ratio": figures["parameters_dsrf3d_v2"] / figures[f"parameters_{STUDENT}"],
    }


def _gpu_rate(num_classes: int) -> float:
    """Cubes of 40³ per second that the student takes on a GPU in bfloat16, already there."""
    recipe = OURS.model_copy(update={"network": STUDENT})
    network = make_network(recipe, "classify", num_classes, BOX_OF_COST).cuda().eval()
    cubes = torch.randn(GPU_BATCH, 1, *[BOX_OF_COST] * 3, device="cuda")
    rates = []
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
        for _ in range(GPU_REPEATS + 1):  # the first is the warm-up
            torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(10):
                network(cubes)
            torch.cuda.synchronize()
            rates.append(10 * GPU_BATCH / (time.perf_counter() - began))
    return float(np.median(rates[1:]))


def _shipped(bench: Bench) -> dict[str, float]:
    """The student as it is exported: its lower precisions on the test split, and its ECE."""
    data, name = bench.data(), SHIPPED
    arm, folder = ARMS[name], bench.folder / "shipped"
    _train(bench, name, bench.plan.seeds[0])
    network = _best_of(bench, name)
    shutil.rmtree(folder, ignore_errors=True)
    card = untrained_card(arm.fit.network, data.manifest, box=bench.plan.box)
    export_network(network, card, folder)
    figures: dict[str, float] = {}
    costed = list_candidates(bench.folder / "costs" / STUDENT, (FASTEST,), VARIANTS[1:])
    lower = [candidate.variant for candidate in costed]
    for variant, found in make_variants(folder, data, lower).items():
        figures |= {
            f"{variant}_difference": found.difference.value,
            f"{variant}_difference_low": found.difference.low,
            f"{variant}_difference_high": found.difference.high,
            f"{variant}_parity": found.parity,
            f"{variant}_agreement": float(found.agreement or 0.0),
        }
    trust = measure_trust(
        evaluate_folder(folder, data, "validation"), evaluate_folder(folder, data)
    )
    drop = -min(figures[f"{variant}_difference"] for variant in lower)
    return figures | {
        "low_precision_accuracy_drop": drop,
        "ece_before": trust.ece_before,
        "ece": trust.ece_after,
        "temperature": trust.temperature,
    }


def _draw(bench: Bench, stem: Path) -> dict[str, float]:
    """Pictures of the trainings and costs that the working folder has."""
    figures: dict[str, float] = {}
    for part in ("costs", "trainings", "shipped"):
        path = bench.folder / f"{part}.json"
        if not path.is_file():
            msg = f"{path} is missing: run --only {part} first"
            raise FileNotFoundError(msg)
        figures |= json.loads(path.read_text(encoding="utf-8"))

    def save(figure: Figure, name: str) -> None:
        figure.savefig(stem.with_name(f"{stem.stem}{name}.png"), dpi=110)

    shown = [name for name in ARMS if f"accuracy_{name}" in figures]
    points = {
        name: (1e3 / figures[f"per_s_{ARMS[name].fit.network}_{FASTEST}_float32"], name)
        for name in shown
    }
    save(draw_front(points, figures), "")
    data, seed = bench.data(), bench.plan.seeds[0]
    split = data.split("test")
    answers = {
        title: np.array(_train(bench, name, seed).predicted[HEADLINE])
        for title, name in ((f"teacher {TEACHER}", STRONG), (f"student {STUDENT}", SHIPPED))
    }
    save(draw_confusion(split.class_ids, answers, data.manifest.classes), "_confusion")
    few = np.unique(np.linspace(0, len(split) - 1, EMBEDDED_CUBES).astype(np.int64))
    cubes = torch.split(split.read(few).subtomograms, 32)
    panels = {}
    for title, name in zip(answers, (STRONG, SHIPPED), strict=True):
        network = Teacher(_best_of(bench, name))
        panels[title] = torch.cat([network.embed(part)[1] for part in cubes]).numpy()
    figure = draw_embeddings(panels, split.class_ids[few], data.manifest.classes)
    save(figure, "_embeddings")
    evaluation = evaluate_folder(bench.folder / "shipped", data)
    assert evaluation.logits is not None
    figure = draw_calibration(
        evaluation.logits, split.class_ids, figures["temperature"], f"{STUDENT} on test"
    )
    save(figure, "_reliability")
    return {}


if __name__ == "__main__":
    main()
