"""``cectflow predict``: predict with registered models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cectflow.cli.options import (
    BatchOption,
    Border,
    ClusterOption,
    ContrastOption,
    CoordsOption,
    CtfCorrection,
    DeviceOption,
    MatchSpectrumOption,
    ModelOption,
    OverwriteOption,
    ParticlesOption,
    RescaleOption,
    RuntimeOption,
    SubtomogramsOption,
    TomogramsOption,
    TrackingOption,
    VariantOption,
    VoxelSizeOption,
    connect_for,
)
from cectflow.cli.output import print_table
from cectflow.exit_codes import INCOMPLETE

if TYPE_CHECKING:
    from cectflow.prediction.whole import WholeOptions

__all__ = ["app"]

app = typer.Typer(help="Predict with registered models.", no_args_is_help=True)

RULE_OPTIONS = {
    "probability": "--threshold",
    "min_volume": "--min-volume",
    "max_volume": "--max-volume",
    "radius": "--nms-radius",
    "min_score": "--min-score",
}
"""Option that sets each field of the pick rules."""


@app.command("classify")
def predict_classify(
    model: ModelOption,
    out: Annotated[Path, typer.Option("--out", help="STAR file.")],
    subtomograms: SubtomogramsOption = None,
    tomogram: TomogramsOption = None,
    particles: ParticlesOption = None,
    tomogram_table: Annotated[
        Path | None,
        typer.Option("--tomogram-table", help="RELION's tomograms.star: sizes and binning."),
    ] = None,
    coords_voxel_size: CoordsOption = None,
    voxel_size: VoxelSizeOption = None,
    contrast: ContrastOption = "dark",
    ctf_correction: Annotated[
        CtfCorrection | None,
        typer.Option("--ctf-correction", help="Of the input; warns if the model's is another."),
    ] = None,
    rescale: RescaleOption = False,
    match_spectrum: MatchSpectrumOption = False,
    border: Annotated[
        Border,
        typer.Option("--border", help="Cubes over a face: fill with their mean, or fail."),
    ] = "fill",
    mask_with: Annotated[
        str | None,
        typer.Option("--mask-with", help="Target segmenter that takes out the neighbours first."),
    ] = None,
    table: Annotated[
        Path | None,
        typer.Option("--table", help="Parquet or CSV with every class's probability."),
    ] = None,
    per_class: Annotated[
        Path | None, typer.Option("--per-class", help="Folder with a STAR file for each class.")
    ] = None,
    summary: Annotated[
        Path | None, typer.Option("--summary", help="PNG of counts, probabilities and examples.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done.")] = False,
    workers: Annotated[
        int, typer.Option("--workers", min=1, help="Processes that read and predict.")
    ] = 1,
    cluster: ClusterOption = None,
    block_size: Annotated[
        int,
        typer.Option("--block-size", min=1, help="Particles recorded together; a kill loses one."),
    ] = 1024,
    device: DeviceOption = "auto",
    batch_size: BatchOption = 64,
    overwrite: OverwriteOption = False,
    runtime: RuntimeOption = "auto",
    variant: VariantOption = "float32",
    tracking_uri: TrackingOption = None,
) -> None:
    """Name the structure of each subtomogram, or of each pick in one or many tomograms.

    What was broken off goes on from its last block when the same command is given again. Exit code
    4: some particles could not be predicted; a list beside the output says why.
    """
    from cectflow.execution import Workplace
    from cectflow.flows.prediction import plan_classes, predict_classes
    from cectflow.prediction.contract import InputOptions
    from cectflow.prediction.inputs import InputFiles
    from cectflow.prediction.outputs import ClassOutputs, summarise

    files = InputFiles(subtomograms, tomogram, particles, coords_voxel_size, border, tomogram_table)
    options = InputOptions(
        voxel_size, contrast, rescale, device, batch_size, overwrite, runtime, variant,
        ctf_correction, match_spectrum,
    )  # fmt: skip
    outputs = ClassOutputs(out, table, per_class, summary)
    where = Workplace(workers, cluster)
    for name in (model, mask_with or model):
        connect_for(name, tracking_uri)
    if dry_run:
        plan_classes(
            model, files, outputs, options, typer.echo, mask_with=mask_with, where=where,
            block_size=block_size,
        )  # fmt: skip
        return
    outcome = predict_classes(
        model, files, outputs, options, typer.echo, mask_with=mask_with, where=where,
        block_size=block_size,
    )  # fmt: skip
    print_table(
        ("class", "particles", "probability", "entropy"),
        [(name, str(count), f"{p:.3f}", f"{h:.3f}") for name, count, p, h in summarise(outcome)],
    )
    if outcome.faults:
        raise typer.Exit(INCOMPLETE)


@app.command("segment")
def predict_segment(
    model: ModelOption,
    out: Annotated[
        Path,
        typer.Option("--out", help="Label map (.mrc; of many 'folder/{name}.mrc') or stack."),
    ],
    probabilities: Annotated[
        Path | None, typer.Option("--probabilities", help="Also write the foreground's.")
    ] = None,
    picks: Annotated[
        Path | None,
        typer.Option("--picks", help="STAR file of the particles found; of many one, or '{name}'."),
    ] = None,
    figure: Annotated[
        Path | None, typer.Option("--figure", help="PNG of central slices with labels and picks.")
    ] = None,
    window: Annotated[
        int | None,
        typer.Option("--window", min=1, help="Largest edge in voxels; default: by memory."),
    ] = None,
    blend: Annotated[
        bool, typer.Option("--blend", help="Average overlapping windows; not exact.")
    ] = False,
    average_turns: Annotated[
        bool,
        typer.Option("--average-turns", help="Average over the half turns that keep the wedge."),
    ] = False,
    threshold: Annotated[
        float | None, typer.Option("--threshold", help="Probability of the foreground.")
    ] = None,
    min_volume: Annotated[
        float | None, typer.Option("--min-volume", help="Å³ of the smallest particle.")
    ] = None,
    max_volume: Annotated[
        float | None, typer.Option("--max-volume", help="Å³ of the largest particle.")
    ] = None,
    nms_radius: Annotated[
        float | None, typer.Option("--nms-radius", help="Å: no two picks are closer.")
    ] = None,
    min_score: Annotated[
        float | None,
        typer.Option("--min-score", help="Of the worst pick that is kept; default: the model's."),
    ] = None,
    subtomograms: SubtomogramsOption = None,
    tomogram: TomogramsOption = None,
    particles: ParticlesOption = None,
    coords_voxel_size: CoordsOption = None,
    voxel_size: VoxelSizeOption = None,
    contrast: ContrastOption = "dark",
    rescale: RescaleOption = False,
    match_spectrum: MatchSpectrumOption = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done.")] = False,
    workers: Annotated[
        int, typer.Option("--workers", min=1, help="Tomograms at a time, each by a process.")
    ] = 1,
    cluster: ClusterOption = None,
    device: DeviceOption = "auto",
    batch_size: BatchOption = 64,
    overwrite: OverwriteOption = False,
    runtime: RuntimeOption = "auto",
    variant: VariantOption = "float32",
    tracking_uri: TrackingOption = None,
) -> None:
    """Label whole tomograms and pick their particles, or outline particles at known positions.

    A semantic segmenter takes --tomogram alone, one or many; a target segmenter takes
    --subtomograms, or --tomogram with --particles. The options from --picks to --min-score are for
    the former. Exit code 4: some of many tomograms could not be segmented; a list says why.
    """
    from cectflow.execution import Workplace
    from cectflow.flows.segmentation import predict_segments
    from cectflow.prediction.contract import InputOptions
    from cectflow.prediction.inputs import InputFiles
    from cectflow.prediction.many import ManySegmentation
    from cectflow.prediction.whole import WholeOutputs

    files = InputFiles(subtomograms, tomogram, particles, coords_voxel_size)
    options = InputOptions(
        voxel_size,
        contrast,
        rescale,
        device,
        batch_size,
        overwrite,
        runtime,
        variant,
        match_spectrum=match_spectrum,
    )
    whole = _whole_options(
        {"window": window, "blend": blend, "average_turns": average_turns},
        {
            "probability": threshold,
            "min_volume": min_volume,
            "max_volume": max_volume,
            "radius": nms_radius,
            "min_score": min_score,
        },
    )
    connect_for(model, tracking_uri)
    outcome = predict_segments(
        model, files, WholeOutputs(out, probabilities, picks, figure), options, typer.echo,
        whole=whole, where=Workplace(workers, cluster), dry_run=dry_run,
    )  # fmt: skip
    if isinstance(outcome, ManySegmentation) and outcome.faults:
        raise typer.Exit(INCOMPLETE)


def _whole_options(run: dict[str, Any], rules: dict[str, float | None]) -> WholeOptions | None:
    """Options of whole tomograms; None where none was given."""
    from pydantic import ValidationError

    from cectflow.prediction.picks import PickRules
    from cectflow.prediction.whole import WholeOptions

    given = {name: value for name, value in rules.items() if value is not None}
    if not given and not any(run.values()):
        return None
    try:
        return WholeOptions(**run, rules=PickRules(**given))
    except ValidationError as error:
        fault = error.errors()[0]
        option = RULE_OPTIONS[str(fault["loc"][0])]
        msg = f"{option} is {fault['input']:g}: {fault['msg'].replace('Input should', 'it must')}"
        raise ValueError(msg) from None
