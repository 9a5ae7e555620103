"""Thresholds that a network needs beside its weights, measured on validation fields."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cectflow.execution import single_thread
from cectflow.flows.simulation import load_structures, recipe_of
from cectflow.manifest import Manifest
from cectflow.model_card import Picking
from cectflow.prediction.contract import InputOptions, LoadedNetwork, load_network
from cectflow.prediction.detection import Found, best_threshold, near_faces
from cectflow.prediction.picks import PickRules
from cectflow.prediction.whole import WholeOptions, WholeOutputs, segment_whole
from cectflow.simulation.field import Specimen, leave_out, prepare_specimen, simulate_field
from cectflow.volume import Volume
from cectflow.volume_writer import write_volume

__all__ = ["tune_picking"]


ENOUGH = 500
"""Particles away from the faces after which no more validation fields are searched: the standard
error of precision and recall is then below 0.02."""


def tune_picking(
    folder: Path, manifest: Manifest, structures: Sequence[str] = ()
) -> Picking | None:
    """Score from which on picks of a semantic segmenter are kept, of the validation fields.

    The fields from which the validation cubes were cut are made again and searched whole, as a
    user's tomogram is, until enough particles were sought. The score is the one at which F1 is
    highest, whatever the classes; particles that a face may cut are neither hit nor missed.

    Parameters
    ----------
    folder
        Model folder.
    manifest
        Of the dataset on which the network was validated.
    structures
        Where its structures are, if not where the manifest says.

    Returns
    -------
    Picking or None
        None, with a warning, where the fields cannot be made again (imported data, structures
        that are no longer there or have changed), the network cannot run over them, or nothing is
        found in them.
    """
    try:
        return _tune(folder, _make_ready(manifest, structures))
    except Exception as error:
        # A trained network is of use without it, too. onnxruntime's errors, such as for want of
        # memory, have no base but Exception and are known by their module.
        expected = isinstance(error, OSError | ValueError | RuntimeError | MemoryError)
        if not expected and not type(error).__module__.startswith("onnxruntime."):
            raise
        message = f"no threshold for picks from the validation fields: {error}"
        warnings.warn(message, stacklevel=2)
        return None


def _make_ready(manifest: Manifest, elsewhere: Sequence[str]) -> tuple[Specimen, list[float]]:
    """Specimen of the dataset's fields, and the largest extent in Å of each of its structures."""
    recipe = recipe_of(manifest)
    try:
        structures = load_structures(recipe)
    except (OSError, ValueError):
        if not elsewhere:
            raise
        structures = load_structures(recipe.model_copy(update={"structures": tuple(elsewhere)}))
    specimen = leave_out(prepare_specimen(recipe, structures), manifest.left_out)
    if specimen.recipe_digest != manifest.recipe_digest:
        msg = "the dataset is of other structures, or of an earlier cectflow: simulate it again"
        raise ValueError(msg)
    return specimen, [structure.extent for structure in structures]


def _tune(folder: Path, ready: tuple[Specimen, list[float]]) -> Picking:
    specimen, extents = ready
    network = load_network(folder, tasks=("semantic",), label=folder.name, device="cpu")
    sought = [
        number
        for number, name in enumerate(specimen.classes, start=1)
        if name in network.card.classes and name not in specimen.left_out
    ]
    # The junk class, the last one, has no structure.
    lengths = [extents[number - 1] for number in sought if number <= len(extents)]
    if not lengths:
        msg = f"the fields hold no {', '.join(network.card.classes)}"
        raise ValueError(msg)
    radius, border = min(lengths) / 2, max(lengths) / 2
    pairs: list[tuple[Found, Found]] = []
    # Beside the model: a system's temporary folder may be in memory.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".cectflow-") as temporary:
        for index in range(specimen.recipe.fields["validation"]):
            pairs.append(_search(network, specimen, index, sought, border, Path(temporary)))
            if sum(np.count_nonzero(~truth.ignoring(())) for truth, _ in pairs) >= ENOUGH:
                break
    min_score, agreement = best_threshold(pairs, radius)
    if not agreement.hits:
        msg = f"none of {agreement.particles} particles was found"
        raise ValueError(msg)
    return Picking(
        min_score=min_score, radius=radius, particles=agreement.particles,
        precision=agreement.precision, recall=agreement.recall,
    )  # fmt: skip


def _search(
    network: LoadedNetwork, specimen: Specimen, index: int, sought: Sequence[int], border: float,
    folder: Path,
) -> tuple[Found, Found]:  # fmt: skip
    """True particles of a validation field, and all that the network finds in it."""
    with single_thread():  # as it was made
        field = simulate_field(specimen, "validation", index)
    voxel_size = specimen.recipe.voxel_size
    tomogram = folder / "field.mrc"
    write_volume(tomogram, Volume(field.tomogram.numpy(), voxel_size), overwrite=True)
    segmented = segment_whole(
        network, tomogram, WholeOutputs(folder / "labels.mrc", picks=folder / "picks.star"),
        InputOptions(overwrite=True), WholeOptions(rules=PickRules(min_score=0.0)), lambda _: None,
    )  # fmt: skip
    assert segmented.picks is not None
    rows = segmented.picks.rows
    true_zyx = field.scene.positions_zyx[np.isin(field.scene.class_ids, sought)]
    picked_zyx = rows[[f"rlnCoordinate{axis}" for axis in "ZYX"]].to_numpy(np.float64)
    shape, width = specimen.recipe.field_shape, border / voxel_size
    return (
        Found(
            true_zyx * voxel_size, ("particle",) * len(true_zyx),
            apart=near_faces(true_zyx, shape, width),
        ),
        Found(
            picked_zyx * voxel_size, ("particle",) * len(rows),
            rows["cectflowScore"].to_numpy(np.float64), near_faces(picked_zyx, shape, width),
        ),
    )  # fmt: skip
