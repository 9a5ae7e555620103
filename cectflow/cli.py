"""``cectflow``: the doors of the house, for hands. Heavy imports happen inside the commands."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from cectflow import __version__
from cectflow.exit_codes import BAD_INPUT, REFUSED, is_foreseen

__all__ = ["main"]

Contrast = Literal["dark", "light"]
Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]
Stage = Literal["staging", "production"]

app = typer.Typer(
    name="cectflow",
    help="From atomic models to promoted networks and their predictions on cryo-ET data.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
structures_app = typer.Typer(help="Atomic models, density maps and phantoms.", no_args_is_help=True)
simulate_app = typer.Typer(help="Simulate crowded subtomograms.", no_args_is_help=True)
dataset_app = typer.Typer(help="Look at, check, import and export datasets.", no_args_is_help=True)
evaluate_app = typer.Typer(help="Judge networks on a test split.", no_args_is_help=True)
models_app = typer.Typer(help="Registered models and their stages.", no_args_is_help=True)
predict_app = typer.Typer(help="Predict with registered models.", no_args_is_help=True)
for name, sub in (
    ("structures", structures_app),
    ("simulate", simulate_app),
    ("dataset", dataset_app),
    ("evaluate", evaluate_app),
    ("models", models_app),
    ("predict", predict_app),
):
    app.add_typer(sub, name=name)

RecipeOption = Annotated[
    str, typer.Option("--recipe", help="Name (tiny, demo, real …) or path of a YAML file.")
]
StructuresOption = Annotated[
    str | None,
    typer.Option(
        "--structures", help="`builtin`, or comma-separated files and folders; default: recipe's."
    ),
]
SeedOption = Annotated[int | None, typer.Option("--seed", help="Replaces the recipe's.")]
WorkersOption = Annotated[int, typer.Option("--workers", min=1, help="Processes that simulate.")]
DeviceOption = Annotated[Device, typer.Option("--device", help="auto: a GPU where there is one.")]
PrecisionOption = Annotated[
    Precision, typer.Option("--precision", help="auto: bfloat16 on a GPU, else float32.")
]
TrackingOption = Annotated[
    str | None,
    typer.Option("--tracking-uri", help="MLflow store; default sqlite:///mlflow.db here."),
]
DatasetOption = Annotated[
    Path | None, typer.Option("--dataset", help="Dataset folder; default: simulate the recipe's.")
]
OutFolderOption = Annotated[
    Path | None, typer.Option("--out", help="Folder for files; default runs/<what>-<time>.")
]
ModelOption = Annotated[
    str,
    typer.Option("--model", help="NAME, NAME@stage, NAME/VERSION, models:/ URI, or a folder."),
]
SubtomogramsOption = Annotated[
    str | None, typer.Option("--subtomograms", help="MRC stack, folder or glob.")
]
TomogramOption = Annotated[Path | None, typer.Option("--tomogram", help="MRC volume.")]
ParticlesOption = Annotated[
    Path | None, typer.Option("--particles", help="Picks in it: STAR or CSV.")
]
VoxelSizeOption = Annotated[
    float | None, typer.Option("--voxel-size", help="Å; overrides the header.")
]
ContrastOption = Annotated[
    Contrast, typer.Option("--contrast", help="Of the input: dark or light protein.")
]
RescaleOption = Annotated[
    bool, typer.Option("--rescale", help="Resample and crop to the model's voxel size and box.")
]
CoordsOption = Annotated[
    float | None,
    typer.Option("--coords-voxel-size", help="Å per unit of coordinates of another binning."),
]
BatchOption = Annotated[int, typer.Option("--batch-size", min=1, help="Cubes at a time.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace existing output.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line: bad input becomes one clear line and exit code 2, Ctrl-C 130."""
    import logging
    import warnings

    # One line on stderr for what cectflow itself warns of; the libraries' chatter stays out.
    warnings.simplefilter("ignore")
    warnings.simplefilter("always", UserWarning)
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    logging.getLogger("alembic").setLevel(logging.WARNING)
    try:
        app(args=arguments, standalone_mode=True)
    except Exception as error:  # typer itself turns Ctrl-C into exit code 130
        if not is_foreseen(error):
            raise
        typer.secho(f"error: {error}", err=True, fg="red")
        sys.exit(BAD_INPUT)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(f"cectflow {__version__}")
        raise typer.Exit


@structures_app.command("list")
def structures_list(
    path: Annotated[str, typer.Argument(help="`builtin`, or comma-separated files and folders.")],
    json: JsonOption = False,
) -> None:
    """Print name, kind, mass of the assembly, extent and operators of structures."""
    from dataclasses import asdict

    from cectflow.simulation.structure import find_structures, summarise_structure

    summaries = [summarise_structure(source) for source in find_structures(path)]
    if json:
        _print_json([asdict(summary) for summary in summaries])
        return
    rows = [
        (s.name, s.kind, f"{s.mass_kda:.0f}", f"{s.extent:.0f}", str(s.num_operators))
        for s in summaries
    ]
    _print_table(("name", "kind", "mass (kDa)", "extent (Å)", "operators"), rows)


@structures_app.command("fetch")
def structures_fetch(
    ids: Annotated[list[str], typer.Argument(help="PDB ids, such as 1KP8 3J9I.")],
    out: Annotated[Path, typer.Option("--out", help="Folder; digests.json is kept in it.")],
    base_url: Annotated[
        str, typer.Option("--base-url", help="Archive that serves ID.cif.gz.")
    ] = "https://files.rcsb.org/download",
    overwrite: OverwriteOption = False,
) -> None:
    """Download mmCIF files from the PDB archive; their digests are recorded."""
    from cectflow.simulation.download import fetch_structures

    for path in fetch_structures(ids, out, base_url=base_url, overwrite=overwrite):
        typer.echo(str(path))


@simulate_app.command("dataset")
def simulate_dataset(
    out: Annotated[Path, typer.Option("--out", help="Dataset folder.")],
    recipe: RecipeOption = "demo",
    structures: StructuresOption = None,
    seed: SeedOption = None,
    workers: WorkersOption = 1,
    tracking_uri: TrackingOption = None,
) -> None:
    """Simulate a recipe's dataset; a second call completes what is missing."""
    from cectflow.flows.simulation import choose_recipe, simulate
    from cectflow.tracking.runs import connect

    chosen = choose_recipe(recipe, structures=structures, seed=seed)
    connect(tracking_uri)
    dataset = simulate(chosen, out, workers=workers)
    counts = {split: dataset.manifest.count(split) for split in dataset.manifest.planned_shards}
    typer.echo(f"{out}: {', '.join(f'{n} {split}' for split, n in counts.items())} subtomograms")


@simulate_app.command("calibrate")
def simulate_calibrate(
    stack: Annotated[
        str, typer.Option("--from", help="Real subtomograms: MRC stack, folder, glob.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Recipe to write (.yaml); a .png beside it.")],
    recipe: RecipeOption = "real",
    particles: Annotated[
        Path | None, typer.Option("--particles", help="STAR or CSV: which cubes, which tomograms.")
    ] = None,
    structures: StructuresOption = None,
    mask_radius: Annotated[
        float | None, typer.Option("--mask-radius", help="Å: leave out the particle within it.")
    ] = None,
    snr: Annotated[
        float | None, typer.Option("--snr", help="Of the reconstruction; default: an interval.")
    ] = None,
    contrast: Annotated[
        Contrast | None, typer.Option("--contrast", help="Of the cubes; checked if given.")
    ] = None,
    keep_defocus: Annotated[
        bool, typer.Option("--keep-defocus", help="Do not estimate the defocus range.")
    ] = False,
    hold_out: Annotated[
        str | None, typer.Option("--hold-out", help="Tomogram that judges and does not calibrate.")
    ] = None,
    voxel_size: VoxelSizeOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Write noise spectrum, tilt range and SNR of real subtomograms into a recipe."""
    from cectflow.flows.calibration import CalibrationInput, calibrate_recipe
    from cectflow.flows.simulation import choose_recipe

    given = CalibrationInput(
        stack, particles, voxel_size, mask_radius, snr, contrast, keep_defocus, hold_out
    )
    chosen = choose_recipe(recipe, structures=structures)
    calibrate_recipe(chosen, given, out, overwrite=overwrite, tell=typer.echo)


@simulate_app.command("tomograms")
def simulate_tomograms(
    out: Annotated[Path, typer.Option("--out", help="Folder; each tomogram has one in it.")],
    recipe: RecipeOption = "demo",
    count: Annotated[int, typer.Option("--count", min=1, help="How many there shall be.")] = 1,
    shape: Annotated[
        tuple[int, int, int] | None,
        typer.Option("--shape", min=1, help="Voxels along z, y and x; default: recipe's field."),
    ] = None,
    tilt_series: Annotated[
        bool,
        typer.Option("--tilt-series", help="Record the projections too, and back-project those."),
    ] = False,
    structures: StructuresOption = None,
    seed: SeedOption = None,
    workers: WorkersOption = 1,
    tracking_uri: TrackingOption = None,
) -> None:
    """Simulate whole tomograms with particles and label maps; a second call completes them."""
    from cectflow.flows.simulation import choose_recipe
    from cectflow.flows.simulation import simulate_tomograms as flow
    from cectflow.tracking.runs import connect

    chosen = choose_recipe(recipe, structures=structures, seed=seed).simulation
    connect(tracking_uri)
    folders = flow(chosen, out, count=count, shape=shape, tilt_series=tilt_series, workers=workers)
    for folder in folders:
        typer.echo(str(folder / "tomogram.mrc"))


@dataset_app.command("info")
def dataset_info(folder: Path, json: JsonOption = False) -> None:
    """Print what a dataset holds and what was measured of it."""
    from cectflow.exchange import describe_dataset

    facts = describe_dataset(folder)
    if json:
        _print_json(facts)
    else:
        _print_table(("", ""), [(key, str(value)) for key, value in facts.items()])


@dataset_app.command("check")
def dataset_check(folder: Path) -> None:
    """Verify digests, shapes, labels, and that no field is in two splits; exit 3 on faults."""
    from cectflow.dataset import check_dataset

    faults = check_dataset(folder)
    for fault in faults:
        typer.echo(fault)
    if faults:
        raise typer.Exit(REFUSED)
    typer.echo(f"{folder}: sound")


@dataset_app.command("import")
def dataset_import(
    out: Annotated[Path, typer.Option("--out", help="Dataset folder to make.")],
    subtomograms: Annotated[str, typer.Option("--subtomograms", help="MRC stack, folder, glob.")],
    labels: Annotated[
        Path, typer.Option("--labels", help="STAR or CSV with one row per cube, in order.")
    ],
    class_column: Annotated[
        str, typer.Option("--class-column", help="Column of class names or numbers.")
    ] = "class",
    classes: Annotated[
        str | None,
        typer.Option("--classes", help="Comma-separated names in class order; default: sorted."),
    ] = None,
    split: Annotated[
        Literal["train", "validation", "test", "by-tomogram"],
        typer.Option("--split", help="One split for all, or 80/10/10 by whole tomograms."),
    ] = "by-tomogram",
    voxel_labels: Annotated[
        Path | None,
        typer.Option("--voxel-labels", help="Stack in which 1 marks each cube's target."),
    ] = None,
    voxel_size: VoxelSizeOption = None,
    contrast: ContrastOption = "dark",
    ctf_correction: Annotated[
        Literal["none", "phase_flip", "premultiplied", "wiener"],
        typer.Option("--ctf-correction", help="That the cubes have had."),
    ] = "none",
) -> None:
    """Bring one's own subtomograms with known classes into a dataset folder."""
    from cectflow.importing import ImportOptions, import_subtomograms
    from cectflow.tracking.runs import cectflow_commit

    options = ImportOptions(
        class_column=class_column,
        classes=tuple(classes.split(",")) if classes else None,
        split=split,
        voxel_size=voxel_size,
        contrast=contrast,
        ctf_correction=ctf_correction,
    )
    dataset = import_subtomograms(
        subtomograms, labels, out, options, voxel_labels=voxel_labels, commit=cectflow_commit()
    )
    counts = {split: dataset.manifest.count(split) for split in dataset.manifest.planned_shards}
    typer.echo(f"{out}: {', '.join(f'{n} {name}' for name, n in counts.items())} subtomograms")


@dataset_app.command("export")
def dataset_export(
    folder: Path,
    out: Annotated[Path, typer.Option("--out", help="Folder to make.")],
    split: Annotated[Literal["train", "validation", "test"], typer.Option("--split")] = "test",
) -> None:
    """Write one protein-white float32 .mrc per particle and a particles.star, for RELION."""
    from cectflow.exchange import export_relion

    typer.echo(str(export_relion(folder, out, split)))


@app.command("train")
def train(
    role: Annotated[Literal["segmenter", "teacher"], typer.Argument(help="What to train.")],
    recipe: RecipeOption = "demo",
    structures: StructuresOption = None,
    dataset: DatasetOption = None,
    out: OutFolderOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    seed: SeedOption = None,
    workers: WorkersOption = 1,
    tracking_uri: TrackingOption = None,
) -> None:
    """Train and register a segmenter or a teacher classifier."""
    from cectflow.flows.training import (
        Hardware,
        TrainingRequest,
        train_segmenter,
        train_teacher,
    )
    from cectflow.tracking.runs import connect

    hardware = Hardware(device, precision, workers)
    request = TrainingRequest(recipe, structures, dataset, out, seed, hardware)
    chosen, folder = request.prepare(role)
    connect(tracking_uri)
    flow = train_segmenter if role == "segmenter" else train_teacher
    _tell_registered(flow(chosen, folder, hardware, dataset=dataset))


@app.command("distill")
def distill(
    teacher: Annotated[
        str, typer.Option("--teacher", help="Registered teacher, or a model folder.")
    ] = "cectflow-teacher@production",
    recipe: RecipeOption = "demo",
    structures: StructuresOption = None,
    dataset: DatasetOption = None,
    out: OutFolderOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    seed: SeedOption = None,
    workers: WorkersOption = 1,
    tracking_uri: TrackingOption = None,
) -> None:
    """Distil and register a student of a teacher, beside the same student from labels alone."""
    from cectflow.flows import training
    from cectflow.tracking.runs import connect

    hardware = training.Hardware(device, precision, workers)
    request = training.TrainingRequest(recipe, structures, dataset, out, seed, hardware)
    chosen, folder = request.prepare("student")
    connect(tracking_uri)
    registered = training.distill(chosen, folder, hardware, teacher=teacher, dataset=dataset)
    _tell_registered(registered)


@evaluate_app.command("model")
def evaluate_model(
    model: ModelOption,
    dataset: Annotated[
        Path | None, typer.Option("--dataset", help="Folder; default: the one it was trained on.")
    ] = None,
    tracking_uri: TrackingOption = None,
    json: JsonOption = False,
) -> None:
    """Print the scores of a model on a dataset's test split, with 95 % intervals over fields."""
    from cectflow.flows.promotion import evaluate_model as flow
    from cectflow.tracking.runs import connect

    connect(tracking_uri)
    scores = flow(model, dataset)
    if json:
        _print_json({name: score.model_dump() for name, score in scores.items()})
        return
    rows = [(k, f"{s.value:.4f}", f"{s.low:.4f} to {s.high:.4f}") for k, s in scores.items()]
    _print_table(("score", "value", "95 % interval"), rows)


@models_app.command("list")
def models_list(
    name: Annotated[str | None, typer.Argument(help="Registered name; default: all.")] = None,
    tracking_uri: TrackingOption = None,
    json: JsonOption = False,
) -> None:
    """Print registered versions with their stages."""
    from cectflow.tracking.runs import connect
    from cectflow.tracking.versions import list_versions

    connect(tracking_uri)
    versions = list_versions(name)
    if json:
        facts = [
            {"name": v.name, "version": v.version, "stages": v.stages, "created": v.created}
            for v in versions
        ]
        _print_json(facts)
        return
    rows = [
        (v.name, v.version, ", ".join(v.stages), v.tags.get("network", ""), v.created)
        for v in versions
    ]
    _print_table(("name", "version", "stages", "network", "created"), rows)


@models_app.command("show")
def models_show(
    model: Annotated[str, typer.Argument(help="NAME, NAME@stage or NAME/VERSION.")],
    tracking_uri: TrackingOption = None,
    json: JsonOption = False,
) -> None:
    """Print a version's card, verdicts and history."""
    from cectflow.model_card import ModelCard
    from cectflow.tracking.promotion import history
    from cectflow.tracking.registry import resolve_model
    from cectflow.tracking.runs import connect

    connect(tracking_uri)
    folder, version = resolve_model(model)
    card = ModelCard.from_folder(folder).model_dump(mode="json")
    facts: dict[str, Any] = {"folder": str(folder), "card": card}
    if version is not None:
        verdicts = {k: v for k, v in version.tags.items() if k.startswith("verdict.")}
        facts |= {"version": version.label, "stages": version.stages, "verdicts": verdicts,
                  "history": history(version.name)}  # fmt: skip
    if json:
        _print_json(facts)
        return
    rows = [(key, str(value)) for key, value in facts.items() if key not in {"card", "history"}]
    rows += [(key, str(value)) for key, value in card.items()]
    rows += [(f"{c['time']} {c['action']}", f"version {c['version']} {c['stage']} {c['reason']}")
             for c in facts.get("history", ())]  # fmt: skip
    _print_table(("", ""), rows)


@models_app.command("promote")
def models_promote(
    model: Annotated[str, typer.Argument(help="NAME (newest version) or NAME/VERSION.")],
    to: Annotated[Stage, typer.Option("--to", help="Stage.")] = "staging",
    policy: Annotated[
        str | None, typer.Option("--policy", help="Name or YAML file; default: the role's.")
    ] = None,
    dataset: Annotated[
        Path | None, typer.Option("--dataset", help="Folder; default: the one it was trained on.")
    ] = None,
    tracking_uri: TrackingOption = None,
) -> None:
    """Promote a version if its role's policy says that it has earned it; exit 3 if refused."""
    from cectflow.flows.promotion import promote
    from cectflow.tracking.runs import connect

    connect(tracking_uri)
    (promotion,) = promote(model, to, policy=policy, dataset=dataset)
    _print_table(("figure", "value", "rule", "outcome"), promotion.verdict.table())
    if promotion.note:
        typer.echo(promotion.note)
    if not promotion.verdict.passed:
        typer.echo(f"{promotion.version.label}: {promotion.verdict.refusal}")
        raise typer.Exit(REFUSED)
    typer.echo(f"{promotion.version.label} is in {', '.join(promotion.version.stages)}")


@models_app.command("rollback")
def models_rollback(
    name: Annotated[str, typer.Argument(help="Registered name.")],
    stage: Annotated[Stage, typer.Option("--stage")] = "production",
    tracking_uri: TrackingOption = None,
) -> None:
    """Give a stage back to the version that held it before."""
    from cectflow.tracking.promotion import rollback
    from cectflow.tracking.runs import connect

    connect(tracking_uri)
    typer.echo(f"{rollback(name, stage).label} is in {stage} again")


@predict_app.command("classify")
def predict_classify(
    model: ModelOption,
    out: Annotated[Path, typer.Option("--out", help="STAR file.")],
    subtomograms: SubtomogramsOption = None,
    tomogram: TomogramOption = None,
    particles: ParticlesOption = None,
    coords_voxel_size: CoordsOption = None,
    voxel_size: VoxelSizeOption = None,
    contrast: ContrastOption = "dark",
    rescale: RescaleOption = False,
    device: DeviceOption = "auto",
    batch_size: BatchOption = 64,
    overwrite: OverwriteOption = False,
    tracking_uri: TrackingOption = None,
) -> None:
    """Name the structure of each subtomogram, or of each pick in a tomogram."""
    from cectflow.flows.prediction import predict_classes
    from cectflow.prediction.contract import InputOptions
    from cectflow.prediction.source import InputFiles

    files = InputFiles(subtomograms, tomogram, particles, coords_voxel_size)
    options = InputOptions(voxel_size, contrast, rescale, device, batch_size, overwrite)
    _connect_for(model, tracking_uri)
    predict_classes(model, files, out, options, typer.echo)


@predict_app.command("segment")
def predict_segment(
    model: ModelOption,
    out: Annotated[Path, typer.Option("--out", help="Label map (.mrc) or label stack (.mrcs).")],
    probabilities: Annotated[
        Path | None, typer.Option("--probabilities", help="Also write the foreground's.")
    ] = None,
    subtomograms: SubtomogramsOption = None,
    tomogram: TomogramOption = None,
    particles: ParticlesOption = None,
    coords_voxel_size: CoordsOption = None,
    voxel_size: VoxelSizeOption = None,
    contrast: ContrastOption = "dark",
    rescale: RescaleOption = False,
    device: DeviceOption = "auto",
    batch_size: BatchOption = 64,
    overwrite: OverwriteOption = False,
    tracking_uri: TrackingOption = None,
) -> None:
    """Outline the particle at the centre of each subtomogram, or at each pick of a tomogram."""
    from cectflow.flows.prediction import predict_segments
    from cectflow.prediction.contract import InputOptions
    from cectflow.prediction.source import InputFiles

    files = InputFiles(subtomograms, tomogram, particles, coords_voxel_size)
    options = InputOptions(voxel_size, contrast, rescale, device, batch_size, overwrite)
    _connect_for(model, tracking_uri)
    predict_segments(model, files, out, probabilities, options, typer.echo)


@app.command("doctor")
def doctor(tracking_uri: TrackingOption = None, json: JsonOption = False) -> None:
    """Print versions, devices, the tracking store and write permission; exit 3 on a fault."""
    from cectflow.flows.doctor import examine

    findings = examine(tracking_uri)
    if json:
        _print_json([finding._asdict() for finding in findings])
    else:
        rows = [(f.what, f.found, "ok" if f.sound else "FAULT") for f in findings]
        _print_table(("what", "found", ""), rows)
    if not all(finding.sound for finding in findings):
        raise typer.Exit(REFUSED)


def _connect_for(model: str, tracking_uri: str | None) -> None:
    """Connect to the registry, which a model folder has no need of."""
    if not Path(model).is_dir():
        from cectflow.tracking.runs import connect

        connect(tracking_uri)


def _tell_registered(registered: Any) -> None:
    card, version = registered.trained.card, registered.version
    scores = ", ".join(
        f"{name} {score.value:.3f} ({score.low:.3f} to {score.high:.3f})"
        for name, score in card.scores.items()
    )
    figures = ", ".join(f"{name} {value:.3f}" for name, value in registered.figures.items())
    typer.echo(f"{version.label}: {scores}" + (f"; {figures}" if figures else ""))
    typer.echo(f"promote it with: cectflow models promote {version.name}/{version.version}")


def _print_json(content: object) -> None:
    import json

    typer.echo(json.dumps(content, indent=2, default=str))


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=any(header), box=None, pad_edge=False)
    for title in header:
        table.add_column(title, overflow="fold")  # a digest is of no use with an ellipsis
    for row in rows:
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:
        # Pipes and log files have no width: a table there must not be cut to 80 columns.
        console = Console(width=240)
    console.print(table, markup=False)
