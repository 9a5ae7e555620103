"""Masked cubes keep the target and lose the neighbours; a masked classifier sees such cubes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cectflow.flows.prediction import predict_classes
from cectflow.model_card import ModelCard
from cectflow.particles import read_particles
from cectflow.prediction.contract import InputOptions, load_network
from cectflow.prediction.inputs import InputFiles
from cectflow.prediction.mask import EDGE, mask_neighbours, masked_with

CENTRE = 12


def make_cubes(num: int = 3) -> np.ndarray:
    """Coloured noise of a mean far from zero."""
    generator = np.random.default_rng(5)
    white = np.fft.rfftn(generator.normal(size=(num, 24, 24, 24)), axes=(1, 2, 3))
    white[:, 4:-4] = 0.0  # a slab of missing coefficients, like a wedge
    noise = np.fft.irfftn(white, s=(24, 24, 24), axes=(1, 2, 3))
    return (50.0 + 3.0 * noise).astype(np.float32)


def make_outlines(num: int = 3) -> np.ndarray:
    grid = np.indices((24, 24, 24)) - CENTRE
    ball = (grid**2).sum(axis=0) <= 5**2
    return np.broadcast_to(ball, (num, *ball.shape)).copy()


def test_the_target_is_kept_and_what_is_far_is_replaced() -> None:
    cubes, outlines = make_cubes(), make_outlines()
    masked = mask_neighbours(cubes, outlines)
    np.testing.assert_array_equal(masked[outlines], cubes[outlines])
    far = (((np.indices((24, 24, 24)) - CENTRE) ** 2).sum(axis=0) > (5 + EDGE + 1) ** 2)[None]
    far = np.broadcast_to(far, cubes.shape)
    correlation = np.corrcoef(masked[far], cubes[far])[0, 1]
    assert abs(correlation) < 0.15


def test_nothing_of_a_neighbour_is_left() -> None:
    cubes, outlines = make_cubes(1), make_outlines(1)
    cubes[0, 2:5, 2:5, 2:5] -= 100.0
    masked = mask_neighbours(cubes, outlines)
    assert masked.min() > cubes.min() + 50.0


def test_what_is_filled_in_has_the_mean_and_the_spectrum_of_the_cube() -> None:
    cubes = make_cubes()
    speck = np.zeros(cubes.shape, bool)
    speck[:, 0, 0, 0] = True
    masked = mask_neighbours(cubes, speck)
    assert masked.mean() == pytest.approx(50.0, abs=0.1)
    assert masked.std() == pytest.approx(cubes.std(), rel=0.05)
    power = np.abs(np.fft.rfftn(masked - 50.0, axes=(1, 2, 3))) ** 2
    assert power[:, 6:-6].sum() < 0.02 * power.sum()  # the slab is still missing


def test_a_cube_without_an_outline_is_left_alone() -> None:
    cubes, outlines = make_cubes(), make_outlines()
    outlines[1] = False
    masked = mask_neighbours(cubes, outlines)
    np.testing.assert_array_equal(masked[1], cubes[1])
    assert not np.array_equal(masked[0], cubes[0])


def test_a_cube_is_masked_alike_in_every_batch() -> None:
    cubes, outlines = make_cubes(), make_outlines()
    together = mask_neighbours(cubes, outlines)
    np.testing.assert_array_equal(mask_neighbours(cubes[2:], outlines[2:])[0], together[2])


def test_a_masked_classifier_judges_masked_cubes(
    classifier: Path, segmenter: Path, cubes: np.ndarray
) -> None:
    network = load_network(classifier, tasks=("classify",), label="student/1", device="cpu")
    outliner = load_network(segmenter, tasks=("target",), label="segmenter/2", device="cpu")
    both = masked_with(network, outliner)
    assert both.label == "student/1 masked with segmenter/2"
    logits = outliner.infer(cubes[:, None])
    by_hand = mask_neighbours(cubes, logits[:, 1] > logits[:, 0])
    np.testing.assert_array_equal(both.infer(cubes[:, None]), network.infer(by_hand[:, None]))


def test_a_segmenter_of_another_recipe_is_refused(classifier: Path, segmenter: Path) -> None:
    network = load_network(classifier, tasks=("classify",), label="student/1", device="cpu")
    outliner = load_network(segmenter, tasks=("target",), label="segmenter/2", device="cpu")
    card = outliner.card.model_copy(update={"voxel_size": 10.0})
    other = type(outliner)(card, outliner.infer, outliner.label)
    with pytest.raises(ValueError, match="segmenter/2 was trained with voxel size 10 Å, stud"):
        masked_with(network, other)


def test_the_table_names_both_networks(
    classifier: Path, segmenter: Path, stack: Path, tmp_path: Path
) -> None:
    out = tmp_path / "classes.star"
    files, options = InputFiles(subtomograms=str(stack)), InputOptions()
    predict_classes(str(classifier), files, out, options, lambda _: None, mask_with=str(segmenter))
    assert set(read_particles(out).rows["cectflowModel"]) == {"classifier masked with segmenter"}
    assert ModelCard.from_folder(classifier).task == "classify"
    with pytest.raises(ValueError, match="expected one of target"):
        predict_classes(
            str(classifier), files, tmp_path / "other.star", options, lambda _: None,
            mask_with=str(classifier),
        )  # fmt: skip
