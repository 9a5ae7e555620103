"""Every figure can be drawn and saved without a display, a warning or a global."""

from __future__ import annotations

import re
from io import BytesIO

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.image import imread

from cectflow.figures import (
    draw_field,
    draw_groups,
    draw_learning_curves,
    draw_slices,
)

GENERATOR = np.random.default_rng(0)
CUBES = GENERATOR.normal(size=(3, 12, 12, 12)).astype(np.float32)
MASKS = np.zeros(CUBES.shape, bool)
MASKS[:, 4:9, 3:8, 2:7] = True


def saved(figure: Figure) -> np.ndarray:
    """Pixels of the figure as PNG."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=50)
    buffer.seek(0)
    pixels: np.ndarray = imread(buffer, format="png")
    assert pixels[..., :3].std() > 0.01  # not blank
    return pixels


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def make_history(num: int, *names: str) -> list[dict[str, float]]:
    names = (*names, "learning_rate", "epoch_seconds")
    return [dict.fromkeys(names, 1 / (epoch + 1)) for epoch in range(num)]


@pytest.mark.parametrize("num", [1, 2, 40])
def test_learning_curves_show_losses_left_and_scores_right(num: int) -> None:
    names = ("train_loss", "train_soft", "validation_loss", "validation_foreground_iou")
    figure = draw_learning_curves(make_history(num, *names), "student: tiny")
    losses, scores = figure.axes
    left, right = (
        [line.get_label() for line in axes.lines if len(line.get_xdata()) == num]
        for axes in (losses, scores)
    )
    assert left == ["train loss", "train soft", "validation loss"]
    assert right == ["validation foreground IoU"]
    assert figure.get_suptitle() == "student: tiny"
    saved(figure)
    assert all(tick == round(tick) for tick in losses.get_xticks())


def test_a_single_epoch_is_seen() -> None:
    losses = draw_learning_curves(make_history(1, "train_loss"), "one").axes[0]
    assert losses.lines[0].get_marker() not in {"None", "", None}


def test_no_epoch_is_an_empty_figure_and_no_error() -> None:
    figure = draw_learning_curves([], "nothing yet")
    assert len(figure.axes) == 2
    saved(figure)


@pytest.mark.parametrize("labels", [MASKS, None], ids=["truth", "no-truth"])
@pytest.mark.parametrize("predicted", [MASKS, None], ids=["prediction", "no-prediction"])
def test_slices_have_two_panels_per_cube_and_a_legend_of_their_outlines(
    labels: np.ndarray | None, predicted: np.ndarray | None
) -> None:
    figure = draw_slices(CUBES, labels, predicted, voxel_size=10.0, titles=["a", "b", "c"])
    assert len(figure.axes) == 6
    assert [axes.get_title() for axes in figure.axes[:3]] == ["a", "b", "c"]
    given = [n for n, v in (("truth", labels), ("prediction", predicted)) if v is not None]
    found = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    assert found == given
    saved(figure)


def test_slices_go_through_the_centre_voxel() -> None:
    cube = np.zeros((1, 6, 7, 8), np.float32)
    cube[0, 3], cube[0, :, 3] = 1.0, 2.0
    top, bottom = draw_slices(cube, None, None, voxel_size=10.0, titles=[""]).axes
    np.testing.assert_array_equal(top.images[0].get_array(), cube[0, 3])
    np.testing.assert_array_equal(bottom.images[0].get_array(), cube[0, :, 3])


def test_outlines_lie_around_the_labels_of_the_same_slice() -> None:
    figure = draw_slices(CUBES[:1], MASKS[:1], None, voxel_size=10.0, titles=["a"])
    (contour,) = figure.axes[0].collections
    box = contour.get_paths()[0].get_extents()
    np.testing.assert_allclose([box.x0, box.x1, box.y0, box.y1], [1.5, 6.5, 2.5, 7.5])
    assert to_hex(contour.get_edgecolor()[0]) == "#ff7f0e"


def test_the_outline_of_what_a_face_cuts_is_closed_there() -> None:
    mask = np.zeros_like(CUBES[:1])
    mask[..., :4] = 1
    axes = draw_slices(CUBES[:1], mask, None, voxel_size=10.0, titles=["a"]).axes[0]
    edge = CUBES.shape[-1] - 0.5
    (contour,) = axes.collections
    box = contour.get_paths()[0].get_extents()
    np.testing.assert_allclose([box.x0, box.x1, box.y0, box.y1], [-0.5, 3.5, -0.5, edge])
    assert sorted(axes.get_xlim()) == [-0.5, edge]


@pytest.mark.parametrize("mask", [np.zeros_like(MASKS), np.ones_like(MASKS)], ids=["none", "all"])
def test_labels_without_a_border_draw_no_outline(mask: np.ndarray) -> None:
    saved(draw_slices(CUBES, mask, mask, voxel_size=10.0, titles=["a", "b", "c"]))


@pytest.mark.parametrize("value", [0.0, 7.0, -1e9, 1e-9])
def test_constant_cubes_are_drawn_without_a_warning(value: float) -> None:
    constant = np.full((1, 12, 12, 12), value, np.float32)
    figure = draw_slices(constant, None, None, voxel_size=10.0, titles=["constant"])
    low, high = figure.axes[0].images[0].get_clim()
    assert low < np.float32(value) < high
    saved(figure)


def test_a_rare_bright_voxel_is_seen_in_an_otherwise_constant_cube() -> None:
    cube = np.zeros((1, 16, 16, 16), np.float32)
    cube[0, 8, 8, 8] = 1.0
    figure = draw_slices(cube, None, None, voxel_size=10.0, titles=["a"])
    assert figure.axes[0].images[0].get_clim() == (0.0, 1.0)


def test_long_titles_are_set_smaller() -> None:
    names = ["ring", "26S_proteasome_double_capped", "c"]
    figure = draw_slices(CUBES, None, None, voxel_size=10.0, titles=names)
    short, long = (axes.title.get_fontsize() for axes in figure.axes[:2])
    assert long < short
    figure.draw_without_rendering()
    assert figure.axes[1].title.get_window_extent().width < 1.15 * figure.axes[1].bbox.width


@pytest.mark.parametrize("voxel_size", [0.8, 3.4, 10.0, 13.6, 27.0])
@pytest.mark.parametrize("num", [12, 32, 500])
def test_the_scale_bar_has_a_round_length_and_fits(voxel_size: float, num: int) -> None:
    cube = np.zeros((1, 2, 2, num), np.float32)
    cube[..., 0] = 1.0
    figure = draw_slices(cube, None, None, voxel_size=voxel_size, titles=["a"])
    (label,) = texts(figure)
    match = re.fullmatch(r"(\d*\.?\d+) nm", label)
    assert match is not None
    length = float(match.group(1))
    mantissa = length / 10 ** np.floor(np.log10(length))
    assert round(mantissa, 6) in {1.0, 2.0, 5.0}
    (bar,) = figure.axes[0].lines
    drawn = np.ptp(np.asarray(bar.get_xdata(), float))
    assert drawn * voxel_size / 10 == pytest.approx(length)
    assert 0.1 * num <= drawn <= 0.3 * num


def test_a_field_has_two_panels_per_volume_and_one_scale_bar() -> None:
    density = np.zeros((10, 16, 20), np.float32)
    density[5, 8, 3:9] = 1.0
    labels = np.zeros(density.shape, np.int16)
    labels[4:7, 6:10, 3:9] = 22
    panels = (("density", density, "grey"), ("labels", labels, "labels"))
    figure = draw_field(panels, voxel_size=13.0)
    assert len(figure.axes) == 4
    assert [axes.get_title() for axes in figure.axes[:2]] == ["density", "labels"]
    assert texts(figure) == ["5 nm"]
    saved(figure)


def test_twenty_labels_have_twenty_colours_and_zero_has_none() -> None:
    labels = np.tile(np.arange(21, dtype=np.int16), (3, 3, 1))
    figure = draw_field((("labels", labels, "labels"),), voxel_size=13.0)
    (image,) = figure.axes[0].images
    shown = image.get_array()
    assert shown[0].mask.tolist() == [True] + [False] * 20
    colours = image.cmap(image.norm(shown[0, 1:]))
    assert len(np.unique(colours, axis=0)) == 20


def test_no_global_state_is_touched() -> None:
    before = dict(mpl.rcParams)
    saved(draw_slices(CUBES, MASKS, MASKS, voxel_size=10.0, titles=["a", "b", "c"]))
    assert dict(mpl.rcParams) == before
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *_: pytest.fail("printed"))
        saved(draw_learning_curves(make_history(2, "train_loss"), "t"))


GROUPS = {
    "SNR": [("", 0.02, (0.4, 0.3, 0.5)), ("", 0.15, (0.7, 0.65, 0.72))],
    "mass (kDa)": [("rod", 150.0, (0.6, 0.5, 0.7))],
    "unknown here": [],
}


def test_groups_show_every_score_with_its_interval_and_the_trivial_method() -> None:
    figure = draw_groups(GROUPS, "foreground IoU", "on test", reference=0.25)
    by_label = {axes.get_xlabel(): axes for axes in figure.axes}
    assert list(by_label) == list(GROUPS)
    snr = by_label["SNR"]
    assert snr.get_xscale() == "log"
    bars = snr.containers[0].lines[2][0].get_segments()
    assert [tuple(bar[:, 1].round(6)) for bar in bars] == [(0.3, 0.5), (0.65, 0.72)]
    for axes in by_label.values():
        assert any(np.all(np.equal(line.get_ydata(), 0.25)) for line in axes.get_lines())
    assert [text.get_text() for text in by_label["mass (kDa)"].texts] == ["rod"]
    assert [text.get_text() for text in by_label["unknown here"].texts] == ["unknown"]
    saved(figure)


def test_groups_need_no_trivial_method() -> None:
    figure = draw_groups({"SNR": GROUPS["SNR"]}, "accuracy", "on test")
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["mean, 95 % over fields"]
