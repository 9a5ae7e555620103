"""Entry point ``distill``: distil and register a student."""

from __future__ import annotations

from entrypoints.door import TRAINING_PARAMETERS, Parameters, chosen, tell, walk

PARAMETERS = (
    "teacher", "student", "method", "unlabelled", "contrast", "voxel_size", "rescale",
    "match_spectrum", "allow_weak_teacher", *TRAINING_PARAMETERS,
)  # fmt: skip


def story(given: Parameters) -> None:
    """Distil and register a student of a teacher."""
    from cectflow.flows.distillation import distill
    from cectflow.flows.unlabelled import find_unlabelled
    from cectflow.tracking.runs import connect
    from entrypoints.input_options import read_input_options
    from entrypoints.training_request import read_request

    request = read_request(given)
    recipe, folder = request.prepare("student", tell, with_students=False)
    connect()
    teacher = given["teacher"] or "cectflow-teacher@production"
    registered = distill(
        recipe, folder, request.hardware, teacher=teacher, student=given["student"] or None,
        method=given["method"] or None, dataset=request.dataset,
        unlabelled=find_unlabelled(given["unlabelled"], read_input_options(given), tell),
        allow_weak_teacher=chosen(given, "allow_weak_teacher", ("false", "true")) == "true",
    )  # fmt: skip
    print(f"{registered.version.label}: {registered.version.uri}")


if __name__ == "__main__":
    walk("distill", PARAMETERS, story)
