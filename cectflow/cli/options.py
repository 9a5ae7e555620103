"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Contrast = Literal["dark", "light"]
Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]
Stage = Literal["staging", "production"]
Runtime = Literal["auto", "torch", "onnxruntime", "openvino"]
Variant = Literal["float32", "bfloat16", "int8"]
Border = Literal["fill", "fail"]
CtfCorrection = Literal["none", "phase_flip", "premultiplied", "wiener"]

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
ClusterOption = Annotated[
    str | None,
    typer.Option(
        "--cluster", help="Many machines: a Dask scheduler's tcp://HOST:PORT, or a YAML file."
    ),
]
DeviceOption = Annotated[Device, typer.Option("--device", help="auto: a GPU where there is one.")]
DevicesOption = Annotated[
    int, typer.Option("--devices", help="GPUs, or processes on the CPU, that train together.")
]
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
    str | None,
    typer.Option("--subtomograms", help="Stack, folder, glob, dataset, or STAR with their names."),
]
TomogramsOption = Annotated[
    str | None,
    typer.Option("--tomogram", help="Volume, glob, .txt list, 'path/{name}.mrc', tomograms.star."),
]
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
MatchSpectrumOption = Annotated[
    bool,
    typer.Option(
        "--match-spectrum", help="Filter each tomogram to the training data's power spectrum."
    ),
]
CoordsOption = Annotated[
    float | None,
    typer.Option("--coords-voxel-size", help="Å per unit of coordinates of another binning."),
]
BatchOption = Annotated[int, typer.Option("--batch-size", min=1, help="Cubes at a time.")]
RuntimeOption = Annotated[
    Runtime,
    typer.Option(
        "--runtime",
        help="auto: torch on a GPU; else openvino for cubes, if installed, and onnxruntime.",
    ),
]
VariantOption = Annotated[
    Variant, typer.Option("--variant", help="Precision; the card says what each one loses.")
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace existing output.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def connect_for(model: str, tracking_uri: str | None) -> None:
    """Connect to the registry, which a model folder has no need of."""
    if not Path(model).is_dir():
        from cectflow.tracking.runs import connect

        connect(tracking_uri)
