"""Eight cubes to learn from, and one thread to learn with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from builders import MemorySource, make_cubes, make_manifest

from cectflow.execution import single_thread


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    with single_thread():
        yield


@pytest.fixture(scope="session")
def eight() -> MemorySource:
    """Eight labelled cubes of two classes, in three fields."""
    return MemorySource(make_cubes(8), make_manifest())


@pytest.fixture(scope="session")
def unlabelled(eight: MemorySource) -> MemorySource:
    """The same cubes without voxel labels."""
    batch = make_cubes(8)
    bare = type(batch)(batch.subtomograms, None, None, batch.class_ids, batch.fields)
    return MemorySource(bare, make_manifest(has_voxel_labels=False))
