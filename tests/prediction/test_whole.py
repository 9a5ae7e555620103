"""Whole tomograms through a semantic segmenter: what is written, normalised, padded and refused."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import matplotlib.image
import mrcfile
import numpy as np
import pytest
import torch
from builders import make_card
from torch import Tensor, nn

from cectflow.cli import main
from cectflow.flows.segmentation import predict_segments
from cectflow.model_card import ModelCard, Picking
from cectflow.particles import read_particles
from cectflow.placement import coordinates_zyx
from cectflow.prediction.contract import InputOptions, LoadedNetwork
from cectflow.prediction.inputs import InputFiles
from cectflow.prediction.picks import PickRules
from cectflow.prediction.tomogram import WholeTomogram, open_tomogram, resample
from cectflow.prediction.whole import WholeOptions, WholeOutputs, WholeSegmentation, segment_whole
from cectflow.volume import Volume, read_volume
from cectflow.volume_writer import create_volume, write_volume

pytest_plugins = ("exported",)

VOXEL = 10.0
SHAPE = (24, 70, 46)
NAMES = ("ribosome", "proteasome")


def semantic_card(**changes: object) -> ModelCard:
    """Card of a semantic segmenter of two classes; the network's name gives stride and reach."""
    content = {
        "role": "segmenter", "task": "semantic", "network": "ssn3d_ed", "num_outputs": 3,
        "classes": NAMES, "labels": NAMES, "box": 16, "voxel_size": VOXEL,
        "normalisation": "tomogram",
    }  # fmt: skip
    return make_card(**content | changes)


class BallFinder(nn.Module):
    """Foreground where the mean over 3³ voxels is dark; label 1 if very dark, else 2."""

    def forward(self, cubes: Tensor) -> Tensor:
        mean = nn.functional.avg_pool3d(cubes, 3, stride=1, padding=1)
        return torch.cat([0.0 * mean, -4.0 * (mean + 4.0), -2.0 * (mean + 2.0)], dim=1)


def finder(card: ModelCard | None = None) -> LoadedNetwork:
    network = BallFinder()

    def infer(cubes: np.ndarray) -> np.ndarray:
        return network(torch.from_numpy(cubes)).numpy()

    return LoadedNetwork(card or semantic_card(), infer, "finder/1")


BALLS = (((11, 15, 14), -14.0), ((12, 50, 30), -4.0), ((12, 30, 36), -14.0))


def specimen(shape: tuple[int, int, int] = SHAPE, zoom: float = 1.0) -> np.ndarray:
    """Three dark balls of 50 Å radius in noise of mean 3 and deviation 2."""
    data = np.random.default_rng(0).normal(size=shape)
    for centre, depth in BALLS:
        squared = sum(
            ((g + 0.5) / zoom - 0.5 - c) ** 2
            for g, c in zip(np.indices(shape), centre, strict=True)
        )
        data[squared <= 25.0] += depth
    return (3.0 + 2.0 * data).astype(np.float32)


def store(path: Path, data: np.ndarray, voxel_size: float = VOXEL) -> Path:
    write_volume(path, Volume(data, voxel_size))
    return path


@pytest.fixture
def tomogram(tmp_path: Path) -> Path:
    return store(tmp_path / "t.mrc", specimen())


def silent(_: str) -> None:
    pass


def run(
    path: Path,
    name: str = "out",
    *,
    options: InputOptions | None = None,
    whole: WholeOptions | None = None,
    report: Callable[[str], None] = silent,
    network: LoadedNetwork | None = None,
) -> tuple[WholeSegmentation, WholeOutputs]:
    folder = path.parent
    outputs = WholeOutputs(*(folder / f"{name}{end}" for end in (".mrc", "_p.mrc", ".star")))
    outcome = segment_whole(
        network or finder(), path, outputs, options or InputOptions(), whole or WholeOptions(),
        report,
    )  # fmt: skip
    return outcome, outputs


def test_labels_probabilities_and_picks_of_a_tomogram(tomogram: Path) -> None:
    outcome, outputs = run(tomogram)
    labels, probabilities = read_volume(outputs.labels), read_volume(outputs.probabilities)
    assert labels.data.dtype == np.int8
    assert labels.shape == probabilities.shape == SHAPE
    assert labels.voxel_size == VOXEL
    np.testing.assert_array_equal(labels.data > 0, probabilities.data > 0.5)
    for (centre, depth), label in zip(BALLS, (1, 2, 1), strict=True):
        assert labels.data[centre] == label, depth
    table = read_particles(outputs.picks)
    found = coordinates_zyx(table, voxel_size=VOXEL, shape=SHAPE)
    order = np.argsort(found[:, 1])
    np.testing.assert_allclose(found[order], [BALLS[i][0] for i in (0, 2, 1)], atol=0.5)
    names = table.rows["cectflowClassName"].to_numpy()[order].tolist()
    assert names == ["ribosome", "ribosome", "proteasome"]
    assert table.rows["cectflowScore"].between(0.5, 1).all()
    assert set(table.rows["cectflowModel"]) == {"finder/1"}
    assert table.tomograms == ("t",)
    assert outcome.shares["ribosome"] == pytest.approx(np.mean(labels.data == 1))
    with mrcfile.open(outputs.labels, header_only=True) as file:
        assert any("finder/1" in line for line in file.get_labels())
    assert not [path for path in tomogram.parent.iterdir() if path.name.startswith(".")]


def test_the_networks_own_threshold_holds_where_the_user_gives_none(tomogram: Path) -> None:
    scores = {
        round(float(score), 6)
        for score in read_particles(run(tomogram)[1].picks).rows["cectflowScore"]
    }
    worst, *rest = sorted(scores)
    tuned = Picking(
        min_score=(worst + rest[0]) / 2, radius=50.0, particles=8, precision=0.75, recall=0.5
    )
    network = finder(semantic_card(picking=tuned))
    told: list[str] = []

    def count(name: str, **rules: float) -> int:
        whole = WholeOptions(rules=PickRules(**rules))
        outcome, _ = run(tomogram, name, whole=whole, network=network, report=told.append)
        assert outcome.picks is not None
        return len(outcome.picks)

    assert count("own") == 2
    assert f"score of {tuned.min_score:.3f} and more" in told[-1]
    assert "precision of 0.75 and a recall of 0.50 in 8 particles" in told[-1]
    told.clear()
    assert count("all", min_score=0.0) == 3
    assert not any("score" in line for line in told)


def test_scale_offset_contrast_and_type_of_the_tomogram_do_not_show(tomogram: Path) -> None:
    _, expected = run(tomogram)
    data = specimen()
    light = store(tomogram.parent / "light.mrc", 500.0 - 3.0 * data)
    told: list[str] = []
    _, found = run(light, "light_out", options=InputOptions(contrast="light"), report=told.append)
    assert any("contrast: input is light, dark is expected: flipped" in line for line in told)
    for one, other in zip(found.paths[:2], expected.paths[:2], strict=True):
        np.testing.assert_allclose(read_volume(one).data, read_volume(other).data, atol=1e-4)
    bytes_ = store(tomogram.parent / "int8.mrc", np.round(4 * data).clip(-128, 127).astype(np.int8))
    _, found = run(bytes_, "int8_out")
    difference = read_volume(found.labels).data != read_volume(expected.labels).data
    assert difference.mean() < 0.01


@pytest.mark.parametrize("blend", [False, True])
@pytest.mark.parametrize("window", [60, 64])
def test_windows_and_turns_do_not_show(tomogram: Path, window: int, blend: bool) -> None:
    _, expected = run(tomogram)
    whole = WholeOptions(window=window, blend=blend, average_turns=True)
    _, found = run(tomogram, "windows", whole=whole)
    a, b = (read_volume(outputs.probabilities).data for outputs in (expected, found))
    # This network is the same under half turns, and looks one voxel far: at the borders of
    # blended windows, too, it is wrong in one voxel of a small weight only.
    np.testing.assert_allclose(b, a, atol=0.2 if blend else 1e-4)
    assert np.abs(b - a).mean() < 1e-3


def test_padding_is_found_left_out_and_never_a_particle(tomogram: Path) -> None:
    data = specimen()
    grid = np.indices(SHAPE)
    # As a tilted volume lies in its box: a wedge along x, and whole sections and rows.
    padded = (grid[2] < 8 + grid[1] // 8) | (grid[0] < 3) | (grid[1] >= 60)
    data[padded] = -50.0
    path = store(tomogram.parent / "padded.mrc", data)
    told: list[str] = []
    _, outputs = run(path, "padded_out", report=told.append)
    assert any(line.startswith(f"padding: {padded.mean():.1%}") for line in told)
    labels = read_volume(outputs.labels).data
    assert not labels[padded].any()
    _, expected = run(tomogram)
    centre = BALLS[2][0]
    assert labels[centre] == read_volume(expected.labels).data[centre]
    probabilities = [read_volume(o.probabilities).data for o in (outputs, expected)]
    inside = ~padded & (grid[2] > 20) & (grid[0] > 4) & (grid[1] < 58)
    np.testing.assert_allclose(probabilities[0][inside], probabilities[1][inside], atol=0.1)


def test_a_tomogram_smaller_than_the_network_needs_is_padded_and_cropped(tmp_path: Path) -> None:
    data = np.random.default_rng(0).normal(size=(3, 21, 6)).astype(np.float32)
    told: list[str] = []
    outcome, outputs = run(store(tmp_path / "small.mrc", data), report=told.append)
    assert read_volume(outputs.labels).shape == (3, 21, 6)
    assert any("1 window of 16x24x16 voxels" in line for line in told)
    assert outcome.picks is not None


def test_rescaling_finds_the_same_particles_on_the_files_own_grid(tmp_path: Path) -> None:
    coarse = tuple(round(length * 0.8) for length in SHAPE)
    path = store(tmp_path / "coarse.mrc", specimen(coarse, zoom=0.8), VOXEL / 0.8)
    with pytest.raises(ValueError, match=r"voxel size is 12.5 Å: expected 10 Å; give --rescale"):
        run(path)
    told: list[str] = []
    _, outputs = run(path, options=InputOptions(rescale=True), report=told.append)
    assert any("nothing finer than 25 Å exists" in line for line in told)
    labels, probabilities = read_volume(outputs.labels), read_volume(outputs.probabilities)
    assert labels.shape == coarse
    assert labels.voxel_size == VOXEL / 0.8
    np.testing.assert_array_equal(labels.data > 0, probabilities.data > 0.5)
    table = read_particles(outputs.picks)
    found = coordinates_zyx(table, voxel_size=VOXEL / 0.8, shape=coarse)
    found = found[np.argsort(found[:, 1])]
    expected = (np.array([BALLS[i][0] for i in (0, 2, 1)]) + 0.5) * 0.8 - 0.5
    np.testing.assert_allclose(found, expected, atol=0.6)
    assert set(table.rows["rlnPixelSize"]) == {VOXEL / 0.8}


def test_resampling_is_exact_for_slow_waves_and_drops_what_a_coarse_grid_cannot_hold(
    tmp_path: Path,
) -> None:
    def wave(length: int, voxel_size: float, period: float) -> np.ndarray:
        return np.cos(2 * np.pi * (np.arange(length) + 0.5) * voxel_size / period)

    shape = (20, 24, 30)
    # Periods that divide twice the edge: those of the cosine series.
    slow = np.multiply.outer(np.multiply.outer(wave(20, 10, 200), wave(24, 10, 160)),
                             wave(30, 10, 200))  # fmt: skip
    fast = np.broadcast_to(wave(30, 10, 25), shape)
    for voxel_size, new in ((16.0, (12, 15, 19)), (6.0, (33, 40, 50))):
        source = WholeTomogram(
            (slow + (fast if voxel_size > 10 else 0.0)).astype(np.float32), 10.0, 0.0, 1.0, 1.0,
            None, shape, 10.0, tmp_path / "t.mrc",
        )  # fmt: skip
        expected = np.multiply.outer(
            np.multiply.outer(wave(new[0], voxel_size, 200), wave(new[1], voxel_size, 160)),
            wave(new[2], voxel_size, 200),
        )
        found = resample(source, new, voxel_size, tmp_path)
        np.testing.assert_allclose(found, expected, atol=2e-5)


def test_memory_does_not_grow_with_the_tomogram(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Their bounds are above what a test can afford.
    monkeypatch.setattr("cectflow.prediction.tomogram.SAMPLE_VOXELS", 2**18)
    monkeypatch.setattr("cectflow.prediction.tomogram.SLAB_VOXELS", 2**18)

    def noisy(cubes: np.ndarray) -> np.ndarray:
        return np.concatenate([0 * cubes, 3 * cubes, 3 * cubes], axis=1)

    peaks = []
    whole = WholeOptions(window=64)
    for depth in (320, 640):
        data = np.random.default_rng(0).normal(size=(depth, 64, 64)).astype(np.float32)
        path = store(tmp_path / f"{depth}.mrc", data)
        del data
        tracemalloc.start()
        network = LoadedNetwork(semantic_card(), noisy, "noise")
        run(path, f"out{depth}", whole=whole, network=network)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.15 * peaks[0]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: data.__setitem__((3, 4, 5), np.nan), r"1 of .* not finite.*\(3, 4, 5\)"),
        (lambda data: data.__setitem__((20, 4, 5), np.inf), r"1 of .* not finite.*\(20, 4, 5\)"),
        (lambda data: data.fill(7.0), r"bad.mrc is constant \(every voxel is 7\)"),
        (lambda data: data.__setitem__(slice(None), np.eye(70, 46) > 0), "constant but for a few"),
    ],
)
def test_what_no_network_can_use_is_refused_by_name(
    tmp_path: Path, spoil: Callable[[np.ndarray], None], message: str
) -> None:
    data = specimen()
    spoil(data)
    path = tmp_path / "bad.mrc"
    with create_volume(path, SHAPE, VOXEL, np.float32) as stored:
        stored[...] = data
    with pytest.raises(ValueError, match=message):
        run(path)
    assert [p.name for p in tmp_path.iterdir()] == ["bad.mrc"]


def test_anisotropic_voxels_are_refused_with_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "flat.mrc"
    with mrcfile.new(path) as file:
        file.set_data(specimen())
        file.voxel_size = (10.0, 10.0, 12.0)
    with pytest.raises(ValueError, match=r"differs along the axes.*--voxel-size"):
        run(path)
    run(path, options=InputOptions(voxel_size=10.0))


def test_a_window_that_is_all_halo_is_refused(tomogram: Path) -> None:
    with pytest.raises(ValueError, match="a window of 32 voxels is too small"):
        run(tomogram, whole=WholeOptions(window=32))
    with pytest.raises(ValueError, match="a window of 4 voxels is too small: 8 on each side"):
        run(tomogram, whole=WholeOptions(window=4, blend=True))


def test_the_threshold_decides_labels_and_picks_alike(tomogram: Path) -> None:
    whole = WholeOptions(rules=PickRules(probability=0.995))
    outcome, outputs = run(tomogram, whole=whole)
    labels = read_volume(outputs.labels).data > 0
    np.testing.assert_array_equal(labels, read_volume(outputs.probabilities).data > 0.995)
    assert outcome.picks is not None
    assert len(outcome.picks) == 2


def test_the_command_writes_maps_picks_and_a_picture(
    tomogram: Path,
    semantic: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tomogram.parent)
    arguments = [
        "predict", "segment", "--model", str(semantic), "--tomogram", "t.mrc", "--out", "l.mrc",
        "--probabilities", "p.mrc", "--picks", "p.star", "--figure", "f.png", "--device", "cpu",
        "--threshold", "0.6", "--min-volume", "1000",
    ]  # fmt: skip
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    out = capsys.readouterr().out
    assert not stop.value.code, out
    assert "1 window of 24x72x48 voxels" in out
    np.testing.assert_array_equal(
        read_volume(Path("l.mrc")).data > 0, read_volume(Path("p.mrc")).data > 0.6
    )
    assert f"{len(read_particles(Path('p.star')))} particles" in out
    assert matplotlib.image.imread("f.png").std() > 0.1
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "--overwrite" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--overwrite", "--min-score", "1.5"])
    assert stop.value.code == 2
    assert "error: --min-score is 1.5: it must be less than" in capsys.readouterr().err
    without_picks = [word for word in arguments if word not in ("--picks", "p.star")]
    with pytest.raises(SystemExit) as stop:
        main([*without_picks, "--overwrite"])
    assert stop.value.code == 2
    assert "choose among picks, which are not asked for: give" in capsys.readouterr().err


def test_a_semantic_segmenter_takes_whole_tomograms_alone(
    semantic: Path, tomogram: Path, picks: Path, stack: Path
) -> None:
    out = tomogram.parent / "o.mrc"
    for files in (InputFiles(tomogram=tomogram, particles=picks), InputFiles(str(stack))):
        with pytest.raises(ValueError, match=r"give --tomogram alone.*cectflow-segmenter"):
            predict_segments(str(semantic), files, WholeOutputs(out), InputOptions(), silent)
    assert not out.exists()


def test_the_real_tomogram_is_refused_and_runs_rescaled_with_a_warning(
    shared_data: Path, tmp_path: Path
) -> None:
    path = shared_data / "real" / "rec3D.rec"
    outputs = WholeOutputs(tmp_path / "l.mrc", tmp_path / "p.mrc", tmp_path / "p.star")
    told: list[str] = []

    def predict(options: InputOptions) -> None:
        segment_whole(finder(), path, outputs, options, WholeOptions(), told.append)

    refused = pytest.raises(ValueError, match=r"voxel size is 23.2 Å: expected 10 Å; give --resc")
    with pytest.warns(UserWarning, match="read although"), refused:
        predict(InputOptions())
    with pytest.warns(UserWarning, match="read although"):
        predict(InputOptions(rescale=True))
    assert any("nothing finer than 46 Å exists in this tomogram" in line for line in told)
    assert any("78x64x32 voxels (z, y, x) at 23.2 Å" in line for line in told)
    assert read_volume(outputs.labels).shape == (78, 64, 32)


def test_statistics_are_those_of_the_whole_tomogram(tomogram: Path, tmp_path: Path) -> None:
    opened = open_tomogram(tomogram, semantic_card(), InputOptions(), tmp_path, silent)
    block = opened.read((slice(0, 24), slice(0, 80), slice(0, 46)))
    assert np.median(block[:, :70]) == pytest.approx(0.0, abs=1e-4)
    assert not block[:, 70:].any()
    assert opened.deviation == pytest.approx(2.0, rel=0.03)
