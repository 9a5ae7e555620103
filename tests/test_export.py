"""An exported network is the network: any batch, any units, in both formats, all or nothing."""

from __future__ import annotations

import stat
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from builders import BOX, Exported, make_card
from torch import Tensor, nn

from cectflow.export import export_network, measure_parity
from cectflow.model_card import ModelCard
from cectflow.networks.normalisation import NormalisePerCube
from cectflow.networks.ours import StridedSegmenter
from cectflow.networks.padding import PadToStride
from cectflow.runtime import RUNTIMES, RuntimeName, load_runtime

pytest_plugins = ("exported",)


def make_input(num: int) -> np.ndarray:
    shape = (num, 1, BOX, BOX, BOX)
    return np.random.default_rng(num).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("num", [1, 3])
def test_the_exported_network_gives_the_networks_logits_for_any_batch(
    exported: Exported, runtime: RuntimeName, num: int
) -> None:
    # It was in training mode when it was exported: dropout would show here.
    cubes = make_input(num)
    with torch.no_grad():
        expected = exported.network.eval()(torch.from_numpy(cubes)).numpy()
    logits = load_runtime(exported.folder, runtime)(cubes)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_both_formats_agree_and_the_card_says_how_well(exported: Exported) -> None:
    card = ModelCard.from_folder(exported.folder)
    assert card == exported.card
    assert card.parity is not None
    assert card.parity < 1e-4
    assert measure_parity(exported.folder) == pytest.approx(card.parity, abs=1e-6)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_the_normalisation_is_part_of_the_graph(exported: Exported, runtime: RuntimeName) -> None:
    infer = load_runtime(exported.folder, runtime)
    cubes = make_input(2)
    np.testing.assert_allclose(infer(1e4 * cubes - 3e4), infer(cubes), atol=1e-3)
    np.testing.assert_allclose(infer(1e-9 * cubes), infer(cubes), atol=1e-3)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_constant_cube_gives_finite_logits(exported: Exported, runtime: RuntimeName) -> None:
    infer = load_runtime(exported.folder, runtime)
    cubes = np.zeros((2, 1, BOX, BOX, BOX), np.float32)
    cubes[1] = 1234.5
    assert np.isfinite(infer(cubes)).all()


def test_a_model_folder_holds_three_files_that_others_may_read(exported: Exported) -> None:
    names = sorted(path.name for path in exported.folder.iterdir())
    assert names == ["card.json", "model.onnx", "model.pt2"]
    assert stat.S_IMODE(exported.folder.stat().st_mode) == 0o755


def test_the_onnx_file_stands_alone_and_names_its_ends(exported: Exported) -> None:
    model = onnx.load(str(exported.folder / "model.onnx"), load_external_data=False)
    onnx.checker.check_model(model)
    assert [value.name for value in model.graph.input] == ["subtomograms"]
    assert [value.name for value in model.graph.output] == ["logits"]
    batch, *rest = (d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim)
    assert batch == 0  # open
    assert rest == [1, BOX, BOX, BOX]


@pytest.fixture(scope="module")
def any_shape(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A tiny segmenter with a sense of the centre, exported for volumes of any shape."""
    torch.manual_seed(0)
    network = NormalisePerCube(
        PadToStride(
            StridedSegmenter(2, BOX, stem=2, widths=(4, 6), depth=(1,), centred=True), stride=4
        )
    )
    folder = tmp_path_factory.mktemp("any_shape") / "model"
    card = make_card(role="segmenter", task="target")
    return Exported(folder, network, export_network(network, card, folder, stride=4))


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("shape", [(BOX, BOX, BOX), (8, 16, 20), (24, 12, 8)])
def test_an_exported_segmenter_takes_any_multiple_of_its_stride(
    any_shape: Exported, runtime: RuntimeName, shape: tuple[int, int, int]
) -> None:
    volumes = np.random.default_rng(1).normal(size=(1, 1, *shape)).astype(np.float32)
    with torch.no_grad():
        expected = any_shape.network.eval()(torch.from_numpy(volumes)).numpy()
    logits = load_runtime(any_shape.folder, runtime)(volumes)
    assert logits.shape == (1, 2, *shape)
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_parity_of_a_segmenter_holds_for_other_shapes_too(any_shape: Exported) -> None:
    assert any_shape.card.parity is not None
    assert any_shape.card.parity < 1e-4
    assert measure_parity(any_shape.folder, stride=4) == pytest.approx(
        any_shape.card.parity, abs=1e-6
    )


def test_an_existing_folder_is_refused_and_kept(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(
        FileExistsError, match="exists and is not empty: give another folder, or remove"
    ):
        export_network(nn.Conv3d(1, 2, 1), make_card(), folder)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


class Failing(nn.Module):
    """A network that cannot be run."""

    def forward(self, cubes: Tensor) -> Tensor:
        msg = "no such luck"
        raise RuntimeError(msg)


def test_a_failed_export_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no such luck"):
        export_network(Failing(), make_card(), tmp_path / "deep" / "model")
    assert list((tmp_path / "deep").iterdir()) == []


def test_logits_that_are_not_finite_are_refused(
    exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nan(folder: Path, name: str) -> object:
        return lambda cubes: np.full((len(cubes), 2), np.nan, np.float32)

    monkeypatch.setattr("cectflow.export.load_runtime", nan)
    with pytest.raises(ValueError, match=r"tiny gives logits that are not finite: train it anew"):
        measure_parity(exported.folder)
