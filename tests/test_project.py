"""The project's own files agree with one another."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from cectflow.config import list_named_files
from cectflow.networks import list_networks, network_info
from cectflow.recipe import load_recipe
from cectflow.tracking.policy import load_policy
from cectflow.tracking.versions import ROLE_NAMES

ROOT = Path(__file__).resolve().parents[1]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(lines: list[str]) -> dict[str, Version]:
    pairs = [line.split("==") for line in lines if "==" in line and not line.startswith("#")]
    return {canonical(name.strip()): Version(version.strip()) for name, version in pairs}


@pytest.fixture(scope="module")
def project() -> dict[str, dict[str, Requirement]]:
    content = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = {"run": content["dependencies"], **content["optional-dependencies"]}
    return {
        group: {canonical(Requirement(text).name): Requirement(text) for text in texts}
        for group, texts in groups.items()
    }


def test_conda_lists_what_entry_points_need_and_never_the_project() -> None:
    content = yaml.safe_load((ROOT / "conda.yaml").read_text())
    lines = next(entry["pip"] for entry in content["dependencies"] if isinstance(entry, dict))
    assert not [line for line in lines if line.startswith((".", "-e"))]
    content = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = content["optional-dependencies"]
    needed = [*content["dependencies"], *extras["sweep"], *extras["openvino"]]
    assert set(pins(lines)) == {canonical(Requirement(text).name) for text in needed}


def test_conda_and_constraints_pin_the_same_versions() -> None:
    content = yaml.safe_load((ROOT / "conda.yaml").read_text())
    lines = next(entry["pip"] for entry in content["dependencies"] if isinstance(entry, dict))
    constraints = pins((ROOT / "constraints.txt").read_text().splitlines())
    for name, version in pins(lines).items():
        assert constraints[name] == version, name


def test_every_pin_lies_in_the_range_that_pyproject_states(
    project: dict[str, dict[str, Requirement]],
) -> None:
    constraints = pins((ROOT / "constraints.txt").read_text().splitlines())
    requirements = {name: text for group in project.values() for name, text in group.items()}
    assert set(constraints) == set(requirements)
    for name, requirement in requirements.items():
        assert constraints[name] in requirement.specifier, name


def test_what_an_extra_brings_is_tested(project: dict[str, dict[str, Requirement]]) -> None:
    # What servers need beyond the tests' own is for `make test-servers`.
    for group in project.keys() - {"run", "dev", "servers"}:
        assert project[group].items() <= project["dev"].items(), group


def test_entry_points_name_modules_that_exist() -> None:
    entry_points = yaml.safe_load((ROOT / "MLproject").read_text())["entry_points"]
    assert set(entry_points) == {
        "main", "simulate", "train_segmenter", "train_teacher", "distill", "evaluate", "promote",
        "predict", "generalisation", "sweep",
    }  # fmt: skip
    for name, entry in entry_points.items():
        assert f"python -m entrypoints.{name} " in entry["command"]
        assert (ROOT / "entrypoints" / f"{name}.py").is_file()
        for parameter in entry["parameters"]:
            assert "{" + parameter + "}" in entry["command"], f"{name}: {parameter} is not passed"
            assert entry["parameters"][parameter]["type"] == "string"


@pytest.mark.parametrize("name", list_named_files("recipes"))
def test_every_recipe_is_valid_and_names_networks_of_the_right_task(name: str) -> None:
    recipe = load_recipe(name)
    box = recipe.simulation.box
    for fit, task in (
        (recipe.segmenter.fit, "segment"),
        (recipe.teacher, "classify"),
        (recipe.student.fit, "classify"),
        *((s.fit, "segment") for s in (recipe.tomogram_segmenter, recipe.student_segmenter) if s),
    ):
        assert fit.network in list_networks(task)
        assert box >= network_info(fit.network).min_box


@pytest.mark.parametrize("name", list_named_files("policies"))
def test_every_policy_is_of_its_role(name: str) -> None:
    roles = {called: key.partition("/")[0] for key, called in ROLE_NAMES.items()}
    assert load_policy(name).role == roles[name]


def test_readme_names_every_network() -> None:
    text = (ROOT / "README.md").read_text()
    for name in list_networks():
        assert f"`{name}`" in text, name
