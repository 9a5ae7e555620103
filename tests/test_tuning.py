"""Thresholds from validation fields: which picks are particles."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import make_card
from onnxruntime.capi.onnxruntime_pybind11_state import Fail
from torch import Tensor, nn

from cectflow.dataset import Dataset
from cectflow.export import export_network
from cectflow.flows import tuning
from cectflow.flows.simulation import load_structures
from cectflow.flows.tuning import tune_picking
from cectflow.manifest import Manifest
from cectflow.model_card import CARD_FILE, ModelCard
from cectflow.prediction.contract import InputOptions, LoadedNetwork, load_network
from cectflow.prediction.detection import near_faces
from cectflow.prediction.picks import PickRules
from cectflow.prediction.whole import WholeOptions, WholeOutputs, segment_whole
from cectflow.simulation.delivery import simulate_dataset
from cectflow.simulation.field import prepare_specimen, simulate_field
from cectflow.simulation.recipe import SimulationRecipe
from cectflow.volume import Volume
from cectflow.volume_writer import write_volume

RECIPE = SimulationRecipe(
    structures=("builtin",), include=("barrel", "shell"), box=24, voxel_size=15.0,
    field_shape=(48, 48, 48), fields={"validation": 2}, occupancy=0.05, blur=11.0, snr=(2.0, 2.0),
)  # fmt: skip
SPECKLE = 0.03


class DarkFinder(nn.Module):
    """Foreground where the mean over 3³ voxels is dark; optionally also in a grid of specks."""

    def __init__(self, *, specks: bool) -> None:
        super().__init__()
        self.specks = specks

    def forward(self, cubes: Tensor) -> Tensor:
        mean = nn.functional.avg_pool3d(cubes, 3, stride=1, padding=1)
        logit = -2.0 * (mean + 1.0)
        if self.specks:
            # Balls of a weak foreground where the smoothed noise is lightest: never in a particle.
            light = nn.functional.max_pool3d(mean, 9, stride=1, padding=4)
            speck = nn.functional.max_pool3d((mean >= light - 1e-6).float(), 3, stride=1, padding=1)
            logit = torch.where((speck > 0) & (logit < 0), torch.full_like(logit, SPECKLE), logit)
        return torch.cat([0.0 * mean, logit], dim=1)


def card(classes: tuple[str, ...]) -> ModelCard:
    return make_card(
        role="segmenter", task="semantic", network="strided_ed_small", num_outputs=2,
        classes=classes, labels=("particle",), box=RECIPE.box, voxel_size=RECIPE.voxel_size,
        normalisation="tomogram",
    )  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("tuning") / "data"
    return simulate_dataset(RECIPE, load_structures(RECIPE), folder, splits=["validation"])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model folder of a finder of dark places."""
    folder = tmp_path_factory.mktemp("models") / "plain"
    export_network(DarkFinder(specks=False), card(RECIPE.include), folder, stride=4)
    return folder


@pytest.fixture(scope="module")
def specked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model folder of a finder that also marks specks."""
    folder = tmp_path_factory.mktemp("models") / "specked"
    export_network(DarkFinder(specks=True), card(RECIPE.include), folder, stride=4)
    return folder


def with_classes(model: Path, folder: Path, *classes: str) -> Path:
    """The same network under another card."""
    shutil.copytree(model, folder)
    (folder / CARD_FILE).write_text(card(classes).to_json())
    return folder


def count_picks(model: Path, folder: Path) -> int:
    """Of the first validation field, whatever their score."""
    specimen = prepare_specimen(RECIPE, load_structures(RECIPE))
    field = simulate_field(specimen, "validation", 0)
    write_volume(folder / "field.mrc", Volume(field.tomogram.numpy(), RECIPE.voxel_size))
    network = load_network(model, tasks=("semantic",), label="finder", device="cpu")
    found = segment_whole(
        network, folder / "field.mrc",
        WholeOutputs(folder / "labels.mrc", picks=folder / "picks.star"), InputOptions(),
        WholeOptions(rules=PickRules(min_score=0.0)), lambda _: None,
    )  # fmt: skip
    assert found.picks is not None
    return len(found.picks)


def test_the_threshold_tells_particles_from_specks(
    data: Dataset, plain: Path, specked: Path, tmp_path: Path
) -> None:
    found = [tune_picking(model, data.manifest) for model in (plain, specked)]
    counts = []
    for model in (plain, specked):
        (tmp_path / model.name).mkdir()
        counts.append(count_picks(model, tmp_path / model.name))
    particles, all_of_it = counts
    assert all_of_it > 1.5 * particles, "there are specks to be told from particles"
    for picking in found:
        assert picking is not None
        assert picking.precision > 0.8
        assert picking.recall > 0.8
    without, among_specks = found
    assert without is not None
    assert among_specks is not None
    # A speck's score is its probability, 1 / (1 + exp(-SPECKLE)); no particle is as faint.
    assert among_specks.min_score > 1 / (1 + np.exp(-SPECKLE)) + 1e-3
    structures = load_structures(RECIPE)
    assert without.radius == min(structure.extent for structure in structures) / 2
    border = max(structure.extent for structure in structures) / 2 / RECIPE.voxel_size
    specimen = prepare_specimen(RECIPE, structures)
    inside = sum(
        np.count_nonzero(~near_faces(scene.positions_zyx, RECIPE.field_shape, border))
        for scene in (simulate_field(specimen, "validation", i).scene for i in range(2))
    )
    assert without.particles == inside > 5


def test_classes_of_the_card_are_sought_and_all_others_false(
    data: Dataset, plain: Path, tmp_path: Path
) -> None:
    both = tune_picking(plain, data.manifest)
    one = tune_picking(with_classes(plain, tmp_path / "one", "shell"), data.manifest)
    assert both is not None
    assert one is not None
    assert one.particles < both.particles
    assert one.precision < both.precision
    # A class that the fields lack is passed over.
    more = with_classes(plain, tmp_path / "more", "shell", "ring")
    assert tune_picking(more, data.manifest) == one


def test_structures_that_have_moved_are_found_where_the_training_has_them(
    data: Dataset, plain: Path
) -> None:
    recipe = data.manifest.recipe | {"structures": ["/nowhere/structures"]}
    manifest = manifest_with(data, recipe=recipe)
    assert tune_picking(plain, manifest, ("builtin",)) == tune_picking(plain, data.manifest)


def manifest_with(data: Dataset, **changes: object) -> Manifest:
    return data.manifest.model_copy(update=changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kind": "imported"}, "the data were not simulated"),
        ({"recipe_digest": "0" * 64}, "the dataset is of other structures"),
    ],
)
def test_without_the_fields_there_is_no_threshold(
    data: Dataset, plain: Path, changes: dict[str, object], reason: str
) -> None:
    with pytest.warns(UserWarning, match=f"no threshold for picks .*{reason}"):
        assert tune_picking(plain, manifest_with(data, **changes)) is None


def test_structures_that_are_gone_end_no_training(data: Dataset, plain: Path) -> None:
    recipe = data.manifest.recipe | {"structures": ["/nowhere/structures"]}
    manifest = manifest_with(data, recipe=recipe)
    with pytest.warns(UserWarning, match=r"no threshold for picks .*/nowhere/structures"):
        assert tune_picking(plain, manifest) is None


def test_a_runtime_that_fails_ends_no_training_and_a_mistake_of_ours_does(
    data: Dataset, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_with(error: Exception) -> None:
        def load(*_: object, **__: object) -> LoadedNetwork:
            raise error

        monkeypatch.setattr(tuning, "load_network", load)

    fail_with(Fail("no memory"))
    with pytest.warns(UserWarning, match=r"no threshold for picks .*no memory"):
        assert tune_picking(plain, data.manifest) is None
    fail_with(KeyError("mistake"))
    with pytest.raises(KeyError, match="mistake"):
        tune_picking(plain, data.manifest)
