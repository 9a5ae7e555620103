"""The recipe of the road: what it refuses, and what a seed changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from builders import make_card

from cectflow.flows.distillation import distill
from cectflow.flows.training import Hardware, TrainingRequest, train_tomogram_segmenter
from cectflow.learning.fit import FitRecipe
from cectflow.model_card import CARD_FILE
from cectflow.recipe import Recipe, TomogramSegmenterRecipe, load_recipe

FIT = FitRecipe(network="strided_ed_small", epochs=1, batch_size=1, learning_rate=0.1)


def test_a_seed_reaches_the_simulation_and_every_training() -> None:
    recipe = load_recipe("tiny")
    seeded = recipe.with_seed(7)
    assert recipe.tomogram_segmenter is not None
    assert recipe.student_segmenter is not None
    content = seeded.model_dump()
    places = [content["simulation"], content["teacher"]]
    places += [
        content[name]["fit"]
        for name in ("segmenter", "student", "tomogram_segmenter", "student_segmenter")
    ]
    assert [place["seed"] for place in places] == [7] * 6
    assert seeded.with_seed(0) == recipe
    assert load_recipe("real").with_seed(3).tomogram_segmenter is None


def test_the_labels_of_a_recipe_are_of_the_classes_it_lists() -> None:
    known = ("a", "b", "c")
    assert TomogramSegmenterRecipe(fit=FIT).labels(known).of_class == (0, 1, 1, 1)
    chosen = TomogramSegmenterRecipe(fit=FIT, classes=("c", "a"), merged=False)
    assert chosen.labels(known).of_class == (0, 2, 0, 1)
    with pytest.raises(ValueError, match=r"classes names d, e: the dataset has a, b, c"):
        TomogramSegmenterRecipe(fit=FIT, classes=("a", "d", "e")).labels(known)


def test_losses_are_declared_with_their_weights(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    text = load_recipe("tiny").to_yaml()
    path.write_text(text)
    assert Recipe.from_yaml(path) == load_recipe("tiny")
    path.write_text(text.replace("dice: 1.0", "dise: 1.0"))
    with pytest.raises(ValueError, match=r"segmenter\.loss\.dise: no such key"):
        Recipe.from_yaml(path)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"student": "ssn3d_ed"}, "expected one that can classify"),
        ({"student": "student_1"}, r"16³; student_1 needs at least 27³"),
        ({"student": "resnet"}, "unknown network 'resnet'"),
        ({"method": "l2"}, "method is 'l2': expected one of mse, kl, dkd, hint, or"),
    ],
)
def test_a_student_that_does_not_suit_is_refused_before_any_work(
    tmp_path: Path, chosen: dict[str, str], message: str
) -> None:
    card = make_card(role="teacher", task="classify", network="dsrf3d_v2_bn", box=16)
    (tmp_path / CARD_FILE).write_text(card.to_json())
    with pytest.raises(ValueError, match=message):
        distill(load_recipe("tiny"), tmp_path / "out", Hardware(), teacher=str(tmp_path), **chosen)
    assert not (tmp_path / "out").exists()


def test_a_recipe_without_the_section_is_refused_before_any_work(tmp_path: Path) -> None:
    recipe = load_recipe("real")
    with pytest.raises(ValueError, match="no section tomogram_segmenter: add one, such as"):
        train_tomogram_segmenter(recipe, tmp_path / "out", Hardware())
    card = make_card(role="segmenter", task="target", network="strided_ed_small")
    (tmp_path / CARD_FILE).write_text(card.to_json())
    with pytest.raises(ValueError, match="the recipe has no section student_segmenter: add one"):
        distill(recipe, tmp_path / "out", Hardware(), teacher=str(tmp_path))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("network", "arguments", "message"),
    [
        ("strided_micro", {}, "expected one that can segment"),
        ("strided_ed_small", {"centred": True}, "no particle is at the centre: leave it out"),
        ("strided_ed_small", {"depth": 9}, "has no argument depth: expected centred"),
    ],
)
def test_a_network_that_cannot_segment_tomograms_is_refused_before_any_work(
    network: str, arguments: dict[str, Any], message: str, tmp_path: Path
) -> None:
    fit = FIT.model_copy(update={"network": network, "arguments": arguments})
    section = TomogramSegmenterRecipe(fit=fit)
    recipe = load_recipe("tiny").model_copy(update={"tomogram_segmenter": section})
    path = tmp_path / "mine.yaml"
    path.write_text(recipe.to_yaml())
    with pytest.raises(ValueError, match=message):
        TrainingRequest(recipe=str(path)).prepare("tomogram-segmenter", print)
