"""``cectflow evaluate``: judge networks on a test split."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from cectflow.cli.options import (
    DeviceOption,
    DevicesOption,
    JsonOption,
    ModelOption,
    OutFolderOption,
    PrecisionOption,
    RecipeOption,
    SeedOption,
    StructuresOption,
    TrackingOption,
    Variant,
    WorkersOption,
)
from cectflow.cli.output import print_json, print_table

__all__ = ["app"]

Runtime = Literal["torch", "torch.compile", "onnxruntime", "openvino"]

app = typer.Typer(help="Judge networks on a test split.", no_args_is_help=True)

SCORES = {
    "foreground_iou": "foreground IoU",
    "iou": "mean of foreground and background IoU",
    "mean_iou": "mean IoU of the labels",
    "mean_dice": "mean Dice of the labels",
    "surface_distance": "surface distance (Å)",
    "hausdorff_95": "95 % Hausdorff distance (Å)",
    "missed": "share of targets missed",
}
"""What the table calls a score; ``--json`` has its name."""


@app.command("model")
def evaluate_model(
    model: ModelOption,
    dataset: Annotated[
        Path | None, typer.Option("--dataset", help="Folder; default: the one it was trained on.")
    ] = None,
    tracking_uri: TrackingOption = None,
    json: JsonOption = False,
) -> None:
    """Print a model's scores on a test split, by structure, occupancy and SNR, with intervals."""
    from cectflow.flows.promotion import evaluate_model as flow
    from cectflow.tracking.runs import connect

    connect(tracking_uri)
    report = flow(model, dataset)
    if json:
        scores = {name: score.model_dump() for name, score in report.scores.items()}
        groups = [vars(group) | {"score": group.score.model_dump()} for group in report.groups]
        print_json({"scores": scores, "baselines": report.baselines, "groups": groups})
        return
    rows = [
        (SCORES.get(k, k), f"{s.value:.4f}", f"{s.low:.4f} to {s.high:.4f}")
        for k, s in report.scores.items()
    ]
    rows += [(f"best {k}", f"{v:.4f}", "trivial") for k, v in report.baselines.items()]
    print_table(("score", "value", "95 % interval"), rows)
    what = "foreground IoU" if report.baselines else "accuracy"
    by_group = [
        (f"{g.by} {g.name}", str(g.number), f"{g.score.value:.4f}",
         f"{g.score.low:.4f} to {g.score.high:.4f}")
        for g in report.groups
    ]  # fmt: skip
    typer.echo()
    print_table((f"{what} by", "number", "value", "95 % interval"), by_group)


@app.command("cost")
def evaluate_cost(
    model: ModelOption,
    runtime: Annotated[
        Runtime | None, typer.Option("--runtime", help="Default: all but torch.compile.")
    ] = None,
    variant: Annotated[
        Variant | None, typer.Option("--variant", help="Default: all that the model has.")
    ] = None,
    batch_size: Annotated[
        list[int] | None,
        typer.Option("--batch-size", min=1, help="May be repeated; default: 1, 8 and 64."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Of every runtime; default: torch's.")
    ] = None,
    seconds: Annotated[
        float, typer.Option("--seconds", min=0, help="For each timing; at least five calls.")
    ] = 2.0,
    tracking_uri: TrackingOption = None,
    json: JsonOption = False,
) -> None:
    """Print latency, throughput and peak memory by runtime, variant and batch on this CPU."""
    from cectflow.flows.cost import evaluate_cost as flow
    from cectflow.runtime import RUNTIMES
    from cectflow.tracking.runs import connect

    connect(tracking_uri)
    cost = flow(
        model,
        runtimes=(runtime,) if runtime else RUNTIMES,
        variants=(variant,) if variant else ("float32", "bfloat16", "int8"),
        batch_sizes=batch_size or (1, 8, 64),
        threads=threads,
        seconds=seconds,
        report=lambda line: typer.echo(line, err=True),
    )
    if json:
        print_json(cost.model_dump(mode="json"))
        return
    facts = [("parameters", f"{cost.parameters:,}"), ("GMAC", f"{cost.macs / 1e9:.3g}")]
    facts += [(name, f"{size / 1e6:.2f} MB") for name, size in cost.weights_bytes.items()]
    print_table(("", ""), facts)
    header = ("runtime", "variant", "threads", "batch", "latency (ms)", "quartiles",
              "subtomograms/s", "peak memory (MB)")  # fmt: skip
    rows = [
        (t.runtime, t.variant, str(t.threads), str(t.batch_size), f"{t.latency_ms:.2f}",
         f"{t.latency_ms_low:.2f} to {t.latency_ms_high:.2f}", f"{t.subtomograms_per_s:.1f}",
         "" if t.peak_memory_mb is None else f"{t.peak_memory_mb:.0f}")
        for t in cost.timings
    ]  # fmt: skip
    print_table(header, rows)


@app.command("picks")
def evaluate_picks(
    truth: Annotated[Path, typer.Option("--truth", help="STAR or CSV of the true particles.")],
    picks: Annotated[Path, typer.Option("--picks", help="STAR or CSV of picks.")],
    radius: Annotated[
        float, typer.Option("--radius", help="Of a particle in Å; within half of it is a hit.")
    ],
    ignore: Annotated[
        list[str] | None,
        typer.Option("--ignore", help="Class that is neither hit nor missed; may be repeated."),
    ] = None,
    border: Annotated[
        float, typer.Option("--border", min=0, help="Å from the faces in which nothing counts.")
    ] = 0.0,
    tomogram: Annotated[
        Path | None, typer.Option("--tomogram", help="MRC volume that both files are about.")
    ] = None,
    voxel_size: Annotated[
        float | None,
        typer.Option("--voxel-size", help="Å that both files count in, if neither says so."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Compare picks with true particles one to one: precision, recall, F1 and CZII's F4."""
    from cectflow.flows.picks import evaluate_picks as flow

    outcome = flow(
        truth,
        picks,
        radius,
        ignore=ignore or (),
        border=border,
        tomogram=tomogram,
        voxel_size=voxel_size,
    )
    figures = {name: found.figures() for name, found in outcome.agreements.items()}
    if json:
        content: dict[str, object] = {"classes": figures}
        if outcome.threshold is not None:
            content["best_min_score"] = dict(zip(("score", "f1"), outcome.threshold, strict=True))
        print_json(content)
        return
    header = (
        "class",
        "particles",
        "picks",
        "hits",
        "duplicates",
        "precision",
        "recall",
        "F1",
        "F4",
    )
    rows = [
        (
            name,
            *(str(value) if isinstance(value, int) else f"{value:.3f}" for value in row.values()),
        )
        for name, row in figures.items()
    ]
    print_table(header, rows)
    if outcome.threshold is not None:
        score, f1 = outcome.threshold
        typer.echo(
            f"highest F1 of these picks, {f1:.3f}, with --min-score {score:.3f} (take it from "
            "tomograms picked with --min-score 0, and not from those you judge)"
        )


@app.command("generalisation")
def evaluate_generalisation(
    recipe: RecipeOption = "demo",
    structures: StructuresOption = None,
    out: OutFolderOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    seed: SeedOption = None,
    workers: WorkersOption = 1,
    devices: DevicesOption = 1,
    tracking_uri: TrackingOption = None,
    json: JsonOption = False,
) -> None:
    """Train the segmenter without each group of structures, and compare on what it never saw.

    The groups are in the recipe. The same command with the same --out goes on where it was broken
    off.
    """
    from cectflow.flows import generalisation
    from cectflow.flows.training import Hardware, TrainingRequest
    from cectflow.tracking.runs import connect

    def report(line: str) -> None:
        typer.echo(line, err=True)

    hardware = Hardware(device, precision, workers, devices)
    request = TrainingRequest(recipe, structures, None, out, seed, hardware)
    chosen, folder = request.prepare("generalisation", report)
    connect(tracking_uri)
    result = generalisation.evaluate_generalisation(chosen, folder, hardware, report=report)
    if json:
        print_json(result.model_dump())
        return
    print_table(*generalisation.tabulate_generalisation(result))
    typer.echo(f"{folder}: generalisation.json, generalisation.png")


@app.command("unknown")
def evaluate_unknown(
    model: ModelOption,
    dataset: Annotated[
        Path | None,
        typer.Option("--dataset", help="Of the known; default: the one it was trained on."),
    ] = None,
    against: Annotated[
        list[Path] | None,
        typer.Option("--against", help="Dataset of the unknown, may be repeated; else simulated."),
    ] = None,
    structures: StructuresOption = None,
    out: OutFolderOption = None,
    workers: WorkersOption = 1,
    tracking_uri: TrackingOption = None,
    json: JsonOption = False,
) -> None:
    """Show a classifier other structures, membranes, gold, empty places and noise.

    How many of them does it call unknown, and how many of the known?
    """
    from cectflow.flows import unknown
    from cectflow.tracking.runs import connect

    def report(line: str) -> None:
        typer.echo(line, err=True)

    request = unknown.StrangerRequest(tuple(against or ()), structures, out, workers)
    connect(tracking_uri)
    result = unknown.evaluate_unknown(model, request, dataset=dataset, report=report)
    if json:
        print_json(result.model_dump())
        return
    print_table(*unknown.tabulate_unknown(result))
    passed = result.accuracy_of_passed
    told = "nothing passes" if passed is None else f"{passed.value:.3f}"
    typer.echo(f"accuracy {result.accuracy.value:.3f}, of what is not called unknown {told}")
