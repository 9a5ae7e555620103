"""The whole road in one process: simulate, train, distil, promote, predict, and a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cectflow.dataset import Dataset
from cectflow.figures import draw_field, write_figure
from cectflow.flows.distillation import distill
from cectflow.flows.picks import evaluate_picks
from cectflow.flows.prediction import predict_classes
from cectflow.flows.promotion import Promotion, Target, promote
from cectflow.flows.segmentation import predict_segments
from cectflow.flows.simulation import (
    SimulatedTomogram,
    load_structures,
    simulate,
    write_tomogram,
)
from cectflow.flows.training import (
    Hardware,
    Registered,
    train_segmenter,
    train_teacher,
    train_tomogram_segmenter,
)
from cectflow.prediction.contract import InputOptions
from cectflow.prediction.inputs import InputFiles
from cectflow.prediction.whole import WholeOutputs
from cectflow.recipe import Recipe
from cectflow.runtime import check_variant
from cectflow.tracking.runs import start_run
from cectflow.tracking.versions import stage_holder
from cectflow.volume import read_volume

__all__ = ["RoadReport", "walk_road"]

Report = Callable[[str], None]
Rows = tuple[tuple[str, str], ...]


@dataclass(frozen=True, eq=False)
class RoadReport:
    """What came of the road.

    Attributes
    ----------
    figures
        Flat: name → number, as benchmarks write it.
    rows
        The closing table: what, and its value as text.
    promotions
        In order.
    """

    figures: dict[str, float]
    rows: Rows
    promotions: tuple[Promotion, ...]


def walk_road(
    recipe: Recipe,
    folder: Path,
    hardware: Hardware,
    *,
    stages: Sequence[Target],
    report: Report,
) -> RoadReport:
    """Structures to predictions with promoted networks, in nested runs of one run.

    Parameters
    ----------
    recipe
        Complete.
    folder
        Receives dataset, checkpoints, model folders and predictions. That of a road which was
        broken off is taken up where it stands: what was finished is kept, predictions are made
        anew.
    hardware
        Devices, precision and number of worker processes.
    stages
        To which each role is promoted in turn, as far as its policy lets it.
    report
        Told what is going on.

    Raises
    ------
    ValueError
        Before any work: a student's variant is asked for that nothing here computes.
    """
    for section in (recipe.student, recipe.student_segmenter):
        for variant in section.variants if section else ():
            check_variant(variant)
    with start_run("road") as run:
        run.log_config(recipe, "recipe")
        report("simulating the dataset")
        dataset = simulate(recipe, folder / "dataset", where=hardware.workplace, nested=True)
        data = dataset.folder
        report(f"training the segmenter {recipe.segmenter.fit.network}")
        segmenter = train_segmenter(recipe, folder, hardware, dataset=data, nested=True)
        report(f"training the teacher {recipe.teacher.network}")
        teacher = train_teacher(recipe, folder, hardware, dataset=data, nested=True)
        tomogram_segmenter = None
        if recipe.tomogram_segmenter is not None:
            report(f"training the tomogram segmenter {recipe.tomogram_segmenter.fit.network}")
            tomogram_segmenter = train_tomogram_segmenter(
                recipe, folder, hardware, dataset=data, nested=True
            )
        control = ", and its control from labels alone" if recipe.student.control else ""
        report(f"distilling the student {recipe.student.fit.network}{control}")
        # Of a weak teacher too: the policy of students knows those, and its verdict is told.
        student = distill(
            recipe, folder, hardware, teacher=teacher.version.uri, dataset=data,
            allow_weak_teacher=True, nested=True,
        )  # fmt: skip
        report("judging all of them on the test split")
        promotions = [
            promotion
            for registered in (segmenter, tomogram_segmenter, teacher, student)
            if registered is not None
            for promotion in promote(
                registered.version.uri,
                *_stages_ahead(registered, stages),
                dataset=data,
                nested=True,
            )
        ]
        for promotion in promotions:
            report(_tell(promotion))
        figures = _collect(segmenter, teacher, student, promotions)
        if tomogram_segmenter is not None:
            card = tomogram_segmenter.trained.card
            figures["tomogram_segmenter_fg_iou"] = card.scores["foreground_iou"].value
            figures["tomogram_segmenter_baseline_fg_iou"] = card.baselines["threshold"]
        tomogram = write_tomogram(recipe.simulation, folder / "predictions", overwrite=True)
        names = (student.version.name, segmenter.version.name)
        promoted = [name for name in names if stage_holder(name, stages[-1])]
        if len(promoted) == len(names):
            figures |= _predict(tomogram, names[0], names[1], stages[-1], report)
            run.log_files(folder / "predictions" / "field.png", "figures")
        else:
            report(f"no predictions: nothing of {', '.join(names)} holds {stages[-1]}")
        if tomogram_segmenter is not None:
            name = tomogram_segmenter.version.name
            if stage_holder(name, stages[-1]):
                extents = [s.extent for s in load_structures(recipe.simulation)]
                figures |= _find(tomogram, f"{name}@{stages[-1]}", extents, report)
                run.log_files(folder / "predictions" / "found.png", "figures")
            else:
                report(f"no search for particles: nothing of {name} holds {stages[-1]}")
        run.log(figures)
    rows = (
        *_describe_data(dataset),
        *_describe_networks(figures),
        *((p.version.label, ", ".join(p.version.stages) or "no stage") for p in promotions
          if p is _last_of(promotions, p.version.name)),
    )  # fmt: skip
    return RoadReport(figures, rows, tuple(promotions))


def _stages_ahead(registered: Registered, stages: Sequence[Target]) -> Sequence[Target]:
    """Stages without staging for a version that an earlier walk brought to production."""
    if "production" in registered.version.stages:
        return [stage for stage in stages if stage != "staging"] or stages
    return stages


def _collect(
    segmenter: Registered, teacher: Registered, student: Registered, promotions: list[Promotion]
) -> dict[str, float]:
    """The road's figures, flat: from the cards, and from the last time each was judged."""
    cards = (segmenter.trained.card, teacher.trained.card, student.trained.card)
    teacher_cost, student_cost = cards[1].cost, cards[2].cost
    assert teacher_cost is not None
    assert student_cost is not None
    judged = _last_of(promotions, student.version.name).figures
    return {
        "segmenter_fg_iou": cards[0].scores["foreground_iou"].value,
        "segmenter_iou": cards[0].scores["iou"].value,
        "segmenter_baseline_ball_iou": cards[0].baselines["ball"],
        "segmenter_baseline_threshold_iou": cards[0].baselines["threshold"],
        "segmenter_baseline_fg_iou": max(cards[0].baselines.values()),
        "teacher_accuracy": cards[1].scores["accuracy"].value,
        "teacher_accuracy_low": cards[1].scores["accuracy"].low,
        "teacher_accuracy_high": cards[1].scores["accuracy"].high,
        "student_accuracy": cards[2].scores["accuracy"].value,
        "student_labels_only_accuracy": student.figures.get("labels_only_accuracy", float("nan")),
        "retention": judged["retention"],
        "retention_low": judged["retention_low"],
        "retention_high": judged["retention_high"],
        "speedup_cpu": judged["speedup.cpu.onnxruntime"],
        "teacher_parameters": teacher_cost.parameters,
        "student_parameters": student_cost.parameters,
        "parameters_ratio": teacher_cost.parameters / student_cost.parameters,
        "teacher_macs": teacher_cost.macs,
        "student_macs": student_cost.macs,
    }


def _predict(
    written: SimulatedTomogram, student: str, segmenter: str, stage: str, report: Report
) -> dict[str, float]:
    """Predictions of the promoted versions on a tomogram of their own, beside the truth."""
    folder = written.tomogram.parent
    options = InputOptions(overwrite=True)
    files = InputFiles(tomogram=written.tomogram, particles=written.particles)
    outcome = predict_classes(f"{student}@{stage}", files, folder / "classes.star", options, report)
    predict_segments(
        f"{segmenter}@{stage}", files,
        WholeOutputs(folder / "labels.mrc", folder / "probabilities.mrc"), options, report,
    )  # fmt: skip
    rows = outcome.table.rows
    number = {name: i for i, name in enumerate(written.class_names, 1)}
    found = np.array([0, *(number.get(name, 0) for name in rows["cectflowClassName"])])
    outlined = read_volume(folder / "labels.mrc")
    panels = (
        ("density", written.truth.density, "grey"),
        ("tomogram", written.truth.data, "grey"),
        ("truth: class of each particle", written.truth.classes, "labels"),
        ("predicted outline and class", found[outlined.data], "labels"),
    )
    figure = draw_field(panels, voxel_size=outlined.voxel_size)
    write_figure(figure, folder / "field.png", overwrite=True)
    hits = rows["cectflowClassName"] == rows["cectflowTrueClass"]
    return {"tomogram_accuracy": float(hits.mean())}


def _find(
    written: SimulatedTomogram, model: str, extents: Sequence[float], report: Report
) -> dict[str, float]:
    """Particles found in the tomogram without its table, beside the table; uncut ones count."""
    folder = written.tomogram.parent
    predict_segments(
        model, InputFiles(tomogram=written.tomogram),
        WholeOutputs(
            folder / "found.mrc", picks=folder / "found.star", figure=folder / "found.png"
        ),
        InputOptions(overwrite=True), report,
    )  # fmt: skip
    judged = evaluate_picks(
        written.particles,
        folder / "found.star",
        min(extents) / 2,
        border=max(extents) / 2,
        tomogram=written.tomogram,
    ).agreements["any"]
    return {
        "picks_precision": judged.precision, "picks_recall": judged.recall, "picks_f1": judged.f1,
    }  # fmt: skip


def _describe_data(dataset: Dataset) -> Rows:
    manifest = dataset.manifest
    measured = manifest.field_records("test")
    snr = [record.snr for record in measured if record.snr is not None]
    snr_60 = manifest.mean_snr_60("test")
    occupancy = float(np.mean([record.occupancy or 0.0 for record in measured]))
    return (
        ("SNR in the reconstruction", f"{np.mean(snr):.2f} (measured)" if snr else "noise-free"),
        ("SNR low-passed to 60 Å", f"{snr_60:.2g} (measured)" if snr_60 else "noise-free"),
        ("classes", f"{len(manifest.classes)}: {', '.join(manifest.classes)}"),
        ("box", f"{manifest.box}³ at {manifest.voxel_size:g} Å"),
        ("occupancy", f"{occupancy:.1%} of the volume"),
        ("subtomograms", ", ".join(f"{manifest.count(s)} {s}" for s in manifest.planned_shards)),
    )


def _describe_networks(figures: dict[str, float]) -> Rows:
    ball, threshold = (figures[f"segmenter_baseline_{n}_iou"] for n in ("ball", "threshold"))
    return (
        ("segmenter, foreground IoU", f"{figures['segmenter_fg_iou']:.3f}"),
        ("  best centred ball / best threshold", f"{ball:.3f} / {threshold:.3f}"),
        *(
            [
                (
                    "tomogram segmenter, foreground IoU / best threshold",
                    f"{figures['tomogram_segmenter_fg_iou']:.3f} / "
                    f"{figures['tomogram_segmenter_baseline_fg_iou']:.3f}",
                )
            ]
            if "tomogram_segmenter_fg_iou" in figures
            else []
        ),
        (
            "teacher accuracy",
            f"{figures['teacher_accuracy']:.3f} ({figures['teacher_accuracy_low']:.3f} to "
            f"{figures['teacher_accuracy_high']:.3f})",
        ),
        ("student accuracy", f"{figures['student_accuracy']:.3f}"),
        ("  the same from labels alone", f"{figures['student_labels_only_accuracy']:.3f}"),
        (
            "student over teacher",
            f"{figures['retention']:.3f} ({figures['retention_low']:.3f} to "
            f"{figures['retention_high']:.3f})",
        ),
        (
            "parameters, teacher / student",
            f"{figures['teacher_parameters']:,.0f} / {figures['student_parameters']:,.0f} "
            f"({figures['parameters_ratio']:.0f}×)",
        ),
        (
            "million MACs, teacher / student",
            f"{figures['teacher_macs'] / 1e6:,.0f} / {figures['student_macs'] / 1e6:,.1f} "
            f"({figures['teacher_macs'] / figures['student_macs']:.0f}×)",
        ),
        ("measured speed-up on this CPU", f"{figures['speedup_cpu']:.1f}×"),
        *(
            [("accuracy on the predicted tomogram", f"{figures['tomogram_accuracy']:.3f}")]
            if "tomogram_accuracy" in figures
            else []
        ),
        *(
            [
                (
                    "particles found in it: precision, recall",
                    f"{figures['picks_precision']:.3f}, {figures['picks_recall']:.3f}",
                )
            ]
            if "picks_f1" in figures
            else []
        ),
    )


def _last_of(promotions: Sequence[Promotion], name: str) -> Promotion:
    return [promotion for promotion in promotions if promotion.version.name == name][-1]


def _tell(promotion: Promotion) -> str:
    label, stage = promotion.version.label, promotion.stage
    if promotion.verdict.passed:
        return f"{label} promoted to {stage}" + (f" ({promotion.note})" if promotion.note else "")
    return f"{label} not promoted to {stage}: {promotion.verdict.refusal}"
