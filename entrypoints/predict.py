"""Entry point ``predict``: classes or outlines of particles, logged as a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

from cectflow.flows.prediction import predict_classes, predict_segments
from cectflow.flows.simulation import new_folder
from cectflow.model_card import Variant
from cectflow.prediction.inputs import InputFiles
from cectflow.tracking.runs import connect, start_run
from entrypoints.door import Parameters, chosen, walk
from entrypoints.input_options import INPUT_PARAMETERS, read_input_options

PARAMETERS = (
    "task", "model", "subtomograms", "tomogram", "particles", "out", *INPUT_PARAMETERS, "device",
    "runtime", "variant", "mask_with",
)  # fmt: skip


def story(given: Parameters) -> None:
    """Predict, and log what came out."""
    task = chosen(given, "task", ("classify", "segment"))
    options = replace(
        read_input_options(given),
        runtime=chosen(given, "runtime", ("auto", "torch", "onnxruntime", "openvino")),
        variant=cast("Variant", chosen(given, "variant", ("float32", "bfloat16", "int8"))),
    )
    files = InputFiles(
        given["subtomograms"],
        Path(given["tomogram"]) if given["tomogram"] else None,
        Path(given["particles"]) if given["particles"] else None,
    )
    suffix = "star" if task == "classify" else ("mrc" if files.tomogram else "mrcs")
    out = Path(given["out"]) if given["out"] else new_folder("predict") / f"{task}.{suffix}"
    if not given["out"]:
        out.parent.mkdir(parents=True)
    connect()
    with start_run(f"predict_{task}") as run:
        if task == "classify":
            model = given["model"] or "cectflow-student@production"
            mask_with = given["mask_with"]
            outcome = predict_classes(model, files, out, options, print, mask_with=mask_with)
            run.log({f"count/{name}": count for name, count in outcome.counts.items()})
            run.log({"particles": len(outcome.table), "probability": outcome.mean_probability})
            if outcome.num_unknown is not None:
                run.log({"unknown": outcome.num_unknown})
        else:
            whole = files.tomogram is not None and files.particles is None
            name = "tomogram-segmenter" if whole else "segmenter"
            picks = out.with_suffix(".star") if whole else None
            model = given["model"] or f"cectflow-{name}@production"
            segmented = predict_segments(model, files, out, None, options, print, picks=picks)
            run.log(segmented.figures)
            if picks is not None:
                run.log_files(picks)
        run.log_files(out)


if __name__ == "__main__":
    walk("predict", PARAMETERS, story)
