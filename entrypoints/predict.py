"""Entry point ``predict``: classes or outlines of particles, logged as a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

from cectflow.execution import Workplace
from cectflow.exit_codes import INCOMPLETE
from cectflow.flows.prediction_run import log_classes, log_segments
from cectflow.flows.simulation import new_folder
from cectflow.model_card import Variant
from cectflow.prediction.classify import BLOCK_SIZE
from cectflow.prediction.contract import InputOptions
from cectflow.prediction.inputs import PLACEHOLDER, InputFiles
from cectflow.prediction.outputs import ClassOutputs
from cectflow.prediction.source import Border
from cectflow.tracking.runs import connect, start_run
from entrypoints.door import Parameters, chosen, integer, number, tell, walk
from entrypoints.input_options import INPUT_PARAMETERS, read_input_options

OF_CLASSES = (
    "tomogram_table", "ctf_correction", "border", "mask_with", "table", "per_class", "summary",
    "block_size",
)  # fmt: skip
"""Parameters of the task ``classify`` alone."""
PARAMETERS = (
    "task", "model", "subtomograms", "tomogram", "particles", "coords_voxel_size", "out",
    *INPUT_PARAMETERS, "device", "runtime", "variant", "batch_size", "overwrite",
    "workers", "cluster", "incomplete", *OF_CLASSES,
)  # fmt: skip


def story(given: Parameters) -> int | None:
    """Predict, and log what came out.

    Some particles without a prediction are an exit code, for which MLflow (3.17) calls the run
    FAILED, unless they are accepted.
    """
    task = chosen(given, "task", ("classify", "segment"))
    corrections = ("", "none", "phase_flip", "premultiplied", "wiener")
    options = replace(
        read_input_options(given),
        runtime=chosen(given, "runtime", ("auto", "torch", "onnxruntime", "openvino")),
        variant=cast("Variant", chosen(given, "variant", ("float32", "bfloat16", "int8"))),
        batch_size=_positive(given, "batch_size", InputOptions().batch_size),
        overwrite=chosen(given, "overwrite", ("false", "true")) == "true",
        ctf_correction=chosen(given, "ctf_correction", corrections) or None,
    )
    files = InputFiles(
        given["subtomograms"],
        given["tomogram"],
        _path(given, "particles"),
        number(given, "coords_voxel_size"),
        cast("Border", chosen(given, "border", ("fill", "fail"))),
        _path(given, "tomogram_table"),
    )
    where = Workplace(_positive(given, "workers", 1), given["cluster"])
    fails = chosen(given, "incomplete", ("fail", "accept")) == "fail"
    predict = _classify if task == "classify" else _segment
    complete = predict(given, files, options, where)
    return INCOMPLETE if fails and not complete else None


def _classify(
    given: Parameters, files: InputFiles, options: InputOptions, where: Workplace
) -> bool:
    """Whether all particles were classified."""
    block_size = _positive(given, "block_size", BLOCK_SIZE)
    out = _out(given, "classify.star")
    outputs = ClassOutputs(
        out, _path(given, "table"), _path(given, "per_class"),
        _path(given, "summary") or out.with_name(f"{out.stem}_summary.png"),
    )  # fmt: skip
    connect()
    with start_run("predict_classify") as run:
        outcome = log_classes(
            run, given["model"] or "cectflow-student@production", files, outputs, options, tell,
            mask_with=given["mask_with"], where=where, block_size=block_size,
        )  # fmt: skip
    return not outcome.faults


def _segment(given: Parameters, files: InputFiles, options: InputOptions, where: Workplace) -> bool:
    """Whether all tomograms were segmented."""
    from cectflow.prediction.whole import WholeOutputs

    for name in OF_CLASSES:
        if given[name] not in {None, "fill" if name == "border" else None}:
            msg = f"{name} is {given[name]!r}: it is for the task classify"
            raise ValueError(msg)
    whole = files.tomogram is not None and files.particles is None
    many = whole and len(files.whole_tomograms()) > 1
    name = f"{PLACEHOLDER}.mrc" if many else f"segment.{'mrc' if files.tomogram else 'mrcs'}"
    out = _out(given, name)
    picks = None
    if whole:
        is_named = PLACEHOLDER in out.name
        picks = out.with_name("picks.star") if is_named else out.with_suffix(".star")
    role = "tomogram-segmenter" if whole else "segmenter"
    model = given["model"] or f"cectflow-{role}@production"
    connect()
    with start_run("predict_segment") as run:
        return log_segments(run, model, files, WholeOutputs(out, picks=picks), options, tell, where)


def _out(given: Parameters, name: str) -> Path:
    """The output that is asked for, or one in a new folder."""
    chosen_out = _path(given, "out")
    if chosen_out is not None:
        return chosen_out
    folder = new_folder("predict")
    folder.mkdir(parents=True)
    return folder / name


def _path(given: Parameters, name: str) -> Path | None:
    value = given[name]
    return Path(value) if value else None


def _positive(given: Parameters, name: str, default: int) -> int:
    """Number of a parameter, or the default.

    Raises
    ------
    ValueError
        If it is no whole number from 1 on.
    """
    value = integer(given, name)
    if value is None:
        return default
    if value < 1:
        msg = f"{name} is {value}: expected 1 or more"
        raise ValueError(msg)
    return value


if __name__ == "__main__":
    walk("predict", PARAMETERS, story)
