"""Invented structures and a recipe of seconds for the tests of the simulation."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from cectflow.simulation.field import Specimen, prepare_specimen
from cectflow.simulation.recipe import SimulationRecipe
from cectflow.simulation.structure import Structure, StructureSource, load_structure

Phantom = Callable[[str], Structure]
MakeRecipe = Callable[..., SimulationRecipe]


@pytest.fixture(scope="session")
def phantom() -> Phantom:
    """Built-in structures by name, each made once."""
    return cache(lambda name: load_structure(StructureSource(name, None, "builtin")))


@pytest.fixture(scope="session")
def make_recipe() -> MakeRecipe:
    """Recipe of a 51 nm field with about 30 particles of 250 kDa, with changes."""

    def make(**changes: Any) -> SimulationRecipe:
        values: dict[str, Any] = {
            "box": 16,
            "voxel_size": 16.0,
            "field_shape": (32, 32, 32),
            "fields": {"train": 2, "test": 1},
            "occupancy": 0.1,
            "blur": 11.0,
            "snr": (1.0, 1.0),
        }
        return SimulationRecipe(**(values | changes))

    return make


@pytest.fixture(scope="session")
def specimen(phantom: Phantom, make_recipe: MakeRecipe) -> Specimen:
    """A specimen of three complexes of 167, 342 and 622 kDa."""
    return prepare_specimen(make_recipe(), [phantom(name) for name in ("rod", "ring", "barrel")])
