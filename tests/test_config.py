"""Configurations refuse what they do not know, and come back from YAML and JSON as they were."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from pydantic import Field, ValidationError

from cectflow.config import Config, find_named_file, list_named_files


class Part(Config):
    size: float = Field(1.0, gt=0)


class Whole(Config):
    name: str
    count: int = 3
    rates: tuple[float, ...] = (0.5, 1e-5)
    part: Part = Part()
    note: str | None = None
    spare: tuple[Part, ...] | None = None


def write(folder: Path, text: str) -> Path:
    path = folder / "whole.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_configuration_survives_yaml_and_json(tmp_path: Path) -> None:
    whole = Whole(name="äpfel", count=7, rates=(1e-7, 2.0), part=Part(size=0.1), note="1e-3")
    assert Whole.from_yaml(write(tmp_path, whole.to_yaml())) == whole
    assert Whole.from_json(whole.to_json()) == whole


def test_figures_that_are_not_finite_survive_too(tmp_path: Path) -> None:
    whole = Whole(name="a", rates=(math.nan, math.inf))
    for again in (
        Whole.from_json(whole.to_json()),
        Whole.from_yaml(write(tmp_path, whole.to_yaml())),
    ):
        assert math.isnan(again.rates[0])
        assert again.rates[1] == math.inf


def test_unknown_keys_are_all_listed_with_the_known_ones(tmp_path: Path) -> None:
    path = write(tmp_path, "name: a\ncolour: red\npart: {sise: 2.0}\nspare: [{}, {sice: 1}]\n")
    with pytest.raises(ValueError, match=r"whole\.yaml is no valid Whole") as caught:
        Whole.from_yaml(path)
    message = str(caught.value)
    assert "Whole: part.sise: no such key (given 2.0), expected one of size; " in message
    assert "; spare.1.sice: no such key (given 1), expected one of size; " in message
    known = "name, count, rates, part, note, spare"
    assert message.endswith(f"; colour: no such key (given 'red'), expected one of {known}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: 3", r"name: Input should be a valid string \(given 3\)"),
        ("name: a\ncount: '3'", r"count: Input should be a valid integer \(given '3'\)"),
        ("name: a\ncount: 3.5", r"count: .*\(given 3.5\)"),
        ("name: a\nrates: [1.0, b]", r"rates\.1: Input should be a valid number \(given 'b'\)"),
        ("name: a\npart: {size: 0}", r"part\.size: Input should be greater than 0"),
        ("name: 2026-01-31\ncount: 2026-01-31", r"count: .*\(given '2026-01-31'\)"),
        ("count: 3", r"name: Field required"),
        ("", r"file: Input should be an object"),
        ("- name", r"file: Input should be an object"),
        ("{name: a", r"whole.yaml is not YAML"),
    ],
)
def test_a_wrong_file_is_refused_with_the_place_and_what_stands_there(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Whole.from_yaml(write(tmp_path, text))


def test_a_file_that_is_no_text_is_not_yaml(tmp_path: Path) -> None:
    (tmp_path / "whole.yaml").write_bytes(b"name: \xff")
    with pytest.raises(ValueError, match=r"whole\.yaml is not YAML"):
        Whole.from_yaml(tmp_path / "whole.yaml")


def test_broken_json_is_not_repeated_in_the_message() -> None:
    with pytest.raises(ValueError, match="Invalid JSON") as caught:
        Whole.from_json('{"name": ' + "1, " * 1000)
    assert len(str(caught.value)) < 200


def test_numbers_may_be_written_like_1e_minus_3_but_pdb_entries_stay_names(tmp_path: Path) -> None:
    whole = Whole.from_yaml(write(tmp_path, "name: 1e10\nrates: [1e-3, -2e+1, 3.E-2, 1]\n"))
    assert whole.name == "1e10"
    assert whole.rates == (0.001, -20.0, 0.03, 1.0)


def test_the_digest_depends_on_values_and_not_on_the_order_of_keys(tmp_path: Path) -> None:
    one = Whole.from_yaml(write(tmp_path, "name: a\ncount: 4\npart: {size: 2.0}\n"))
    other = Whole.from_yaml(write(tmp_path, "part: {size: 2.0}\ncount: 4\nname: a\n"))
    assert one.digest() == other.digest()
    assert one.digest() != one.model_copy(update={"count": 5}).digest()
    assert len(one.digest()) == 64


def test_a_configuration_cannot_be_changed() -> None:
    whole = Whole(name="a")
    with pytest.raises(ValidationError, match="frozen"):
        whole.count = 4  # type: ignore[misc]


def test_named_files_are_found_by_name_and_by_path(tmp_path: Path) -> None:
    assert "tiny" in list_named_files("recipes")
    assert find_named_file("tiny", "recipes").is_file()
    path = write(tmp_path, "name: a")
    assert find_named_file(str(path), "recipes") == path
    known = ", ".join(list_named_files("policies"))
    with pytest.raises(ValueError, match=f"unknown policy 'stduent'.*one of {known}"):
        find_named_file("stduent", "policies")
    with pytest.raises(ValueError, match=r"unknown recipe .*missing.yaml"):
        find_named_file(str(tmp_path / "missing.yaml"), "recipes")
