"""Live data follow the protocol, never repeat a field, and leave no process behind."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Executor, Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from functools import partial
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cectflow.dataset import Batch, BatchSource, Dataset
from cectflow.execution import single_thread
from cectflow.learning.fit import FitRecipe, FitResult, fit, open_fabric
from cectflow.learning.objective import Classify
from cectflow.manifest import JUNK_CLASS, SPLITS, Manifest
from cectflow.networks.normalisation import NormalisePerCube
from cectflow.recipe import Recipe, load_recipe
from cectflow.simulation import live
from cectflow.simulation.delivery import simulate_dataset
from cectflow.simulation.field import Specimen, prepare_specimen, simulate_field
from cectflow.simulation.live import FIELDS_PER_BLOCK, LiveSource, field_maker, open_live
from cectflow.simulation.recipe import SimulationRecipe
from cectflow.simulation.structure import Structure

AHEAD = 5
BATCH = 16


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with single_thread():
        yield


@pytest.fixture(scope="module")
def structures(phantom: Callable[[str], Structure]) -> list[Structure]:
    return [phantom(name) for name in ("rod", "ring", "barrel")]


@pytest.fixture(scope="module")
def recipe(make_recipe: Callable[..., SimulationRecipe]) -> SimulationRecipe:
    """Five of a field's particles are targets, so that fields are counted easily."""
    return make_recipe(fields={"validation": 1, "test": 1}, targets_per_field=5, jitter=16.0)


@pytest.fixture(scope="module")
def specimen(recipe: SimulationRecipe, structures: list[Structure]) -> Specimen:
    return prepare_specimen(recipe, structures)


@pytest.fixture(scope="module")
def dataset(
    recipe: SimulationRecipe,
    structures: list[Structure],
    tmp_path_factory: pytest.TempPathFactory,
) -> Dataset:
    """The folder that validates and judges; it has no train split."""
    return simulate_dataset(recipe, structures, tmp_path_factory.mktemp("live") / "data")


class InProcessExecutor(Executor):
    """Runs each call at once."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


class CountingExecutor(Executor):
    """Calls when the result is asked for, and counts who waits; fails if told to."""

    def __init__(self) -> None:
        self.streams: list[tuple[str, int]] = []
        self.in_flight = self.most_in_flight = self.cancelled = 0

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        counter = self
        self.streams.append((args[-2], args[-1]))
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)

        class Waiting(Future[Any]):
            def result(self, timeout: float | None = None) -> Any:
                counter.in_flight -= 1
                return fn(*args, **kwargs)

            def cancel(self) -> bool:
                counter.in_flight -= 1
                counter.cancelled += 1
                return super().cancel()

        return Waiting()


def make_source(
    specimen: Specimen, dataset: Dataset, number: int, executor: Executor | None = None,
    name: str = "training",
) -> LiveSource:  # fmt: skip
    submit = submitting(specimen, executor)
    return LiveSource(specimen, dataset.manifest, number, submit, ahead=AHEAD, name=name)


def submitting(
    specimen: Specimen, executor: Executor | None = None
) -> Callable[[str, int], Future[Any]]:
    return partial((executor or InProcessExecutor()).submit, field_maker(specimen))


def pass_over(source: LiveSource) -> Generator[Batch, None, None]:
    yield from source.batches(5, seeded(0))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def parts(batch: Batch) -> tuple[Tensor, ...]:
    assert batch.voxel_labels is not None
    assert batch.instances is not None
    assert batch.statistics is not None
    return (
        batch.subtomograms, batch.voxel_labels, batch.instances, batch.class_ids, batch.fields,
        batch.statistics,
    )  # fmt: skip


def same(first: list[Batch], second: list[Batch]) -> bool:
    """Byte for byte."""
    return len(first) == len(second) and all(
        a.dtype == b.dtype and torch.equal(a, b)
        for one, other in zip(first, second, strict=True)
        for a, b in zip(parts(one), parts(other), strict=True)
    )


def cubes_of(batches: list[Batch]) -> set[bytes]:
    """The content of each cube."""
    return {cube.numpy().tobytes() for batch in batches for cube in batch.subtomograms}


def test_fields_that_are_imaged_beside_the_training_are_the_same(
    specimen: Specimen, dataset: Dataset
) -> None:
    """As on a GPU: processes render, the training's own process images and cuts."""
    render = partial(CountingExecutor().submit, live._render, specimen)
    here = LiveSource(specimen, dataset.manifest, 12, render, ahead=AHEAD)
    here._images_here = True
    there = make_source(specimen, dataset, 12)
    for one, other in zip(pass_over(here), pass_over(there), strict=True):
        for name in ("subtomograms", "voxel_labels", "instances", "class_ids", "fields"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
    rendered = live._render(specimen, "live-training-in-order", 0)
    assert len(rendered.field.owners) == 0, "what has become labels does not travel"


def test_batches_are_those_of_a_split(specimen: Specimen, dataset: Dataset) -> None:
    source = make_source(specimen, dataset, 40)
    assert isinstance(source, BatchSource)
    split = dataset.split("validation")
    expected = next(iter(split.batches(5)))
    for batch in source.batches(BATCH, seeded(1)):
        for given, of_split in zip(parts(batch), parts(expected), strict=True):
            assert given.dtype == of_split.dtype
            assert given.shape[1:] == of_split.shape[1:]
        assert batch.views is None
        assert batch.voxel_labels is not None
        assert batch.instances is not None
        assert ((batch.voxel_labels == 0) == (batch.instances == 0)).all()
        for labels, instances, class_id in zip(
            batch.voxel_labels, batch.instances, batch.class_ids, strict=True
        ):
            assert set(labels[instances == 1].tolist()) == {int(class_id)}
    shown = torch.cat([batch.subtomograms for batch in source.batches(BATCH, seeded(1))])
    of_folder = torch.cat([batch.subtomograms for batch in split.batches(BATCH)])
    assert float(shown.std()) == pytest.approx(float(of_folder.std()), rel=0.2)


@pytest.mark.parametrize(
    ("number", "batch_size", "sizes"),
    [(1, 4, [1]), (16, 16, [16]), (33, 16, [16, 16, 1]), (7, 50, [7])],
)
def test_a_pass_has_the_exact_length(
    specimen: Specimen, dataset: Dataset, number: int, batch_size: int, sizes: list[int]
) -> None:
    source = make_source(specimen, dataset, number)
    assert len(source) == number
    for generator in (seeded(0), None):
        assert [len(batch) for batch in source.batches(batch_size, generator)] == sizes


def test_no_field_is_ever_repeated(specimen: Specimen, dataset: Dataset) -> None:
    executor = CountingExecutor()
    source = make_source(specimen, dataset, 12, executor)
    student = make_source(specimen, dataset, 12, executor, name="student")
    used_twice = seeded(3)
    passes = [
        list(this.batches(4, generator))
        for this, generator in (
            (source, seeded(1)), (source, seeded(2)), (source, used_twice), (source, used_twice),
            (source, None), (student, seeded(1)),
        )
    ]  # fmt: skip
    assert len(set(executor.streams)) == len(executor.streams)
    assert not {stream for stream, _ in executor.streams} & set(SPLITS)
    folder = [batch for name in ("validation", "test") for batch in dataset.split(name).batches(9)]
    seen = [cubes_of(batches) for batches in (*passes, folder)]
    assert all(len(cubes) == 12 for cubes in seen[:-1])
    assert len(set.union(*seen)) == sum(len(cubes) for cubes in seen)


def test_the_tomograms_of_equal_numbers_differ_between_passes_and_splits(
    specimen: Specimen,
) -> None:
    streams = ("train", "validation", "live-training-1-2", "live-training-2-2", "live-student-1-2")
    fields = [simulate_field(specimen, stream, 0) for stream in streams]
    assert len({field.scene.positions_zyx.tobytes() for field in fields}) == len(streams)
    assert len({field.tomogram.numpy().tobytes() for field in fields}) == len(streams)


def test_a_pass_is_the_same_again_and_whatever_the_consumer_draws(
    specimen: Specimen, dataset: Dataset
) -> None:
    source = make_source(specimen, dataset, 30)
    first = list(source.batches(BATCH, seeded(5)))
    generator = seeded(5)
    second = []
    for batch in source.batches(BATCH, generator):
        torch.randint(4, (9,), generator=generator)
        second.append(batch)
    assert same(first, second)
    assert same(*(list(source.batches(BATCH)) for _ in range(2)))


def test_cubes_are_shuffled_within_a_few_fields(specimen: Specimen, dataset: Dataset) -> None:
    source = make_source(specimen, dataset, 10 * FIELDS_PER_BLOCK)
    shuffled = torch.cat([batch.fields for batch in source.batches(5, seeded(0))])
    blocks = (shuffled // FIELDS_PER_BLOCK).tolist()
    assert blocks == sorted(blocks)
    half = len(blocks) // 2
    assert shuffled[:half].tolist() != sorted(shuffled[:half].tolist())
    assert len(set(shuffled[:5].tolist())) > 1
    in_order = torch.cat([batch.fields for batch in source.batches(5)]).tolist()
    assert in_order == sorted(in_order)


def test_the_number_of_fields_in_flight_is_bounded(specimen: Specimen, dataset: Dataset) -> None:
    executor = CountingExecutor()
    source = make_source(specimen, dataset, 100, executor)
    for _ in source.batches(BATCH, seeded(0)):
        assert executor.in_flight <= AHEAD
    assert executor.most_in_flight == AHEAD
    # 20 fields of 5 are just enough, and no more are begun.
    assert [index for _, index in executor.streams] == list(range(20))
    assert (executor.in_flight, executor.cancelled) == (0, 0)


def test_a_pass_that_is_left_early_forgets_what_waits(specimen: Specimen, dataset: Dataset) -> None:
    executor = CountingExecutor()
    # As a generator is left by a loop that ends early, or by an exception in it.
    with closing(pass_over(make_source(specimen, dataset, 1000, executor))) as batches:
        next(batches)
        assert executor.in_flight > 0
    assert executor.in_flight == 0
    assert executor.cancelled > 0


class LossIsNanError(Exception):
    """Any failure of the consumer."""


@pytest.mark.parametrize(
    ("workers", "failure"), [(1, KeyboardInterrupt), (2, LossIsNanError)], ids=["ctrl-c", "failure"]
)
def test_processes_give_the_same_batches_and_end_with_the_consumer(
    specimen: Specimen, dataset: Dataset, workers: int, failure: type[BaseException]
) -> None:
    in_process = make_source(specimen, dataset, 30)
    alone = [list(in_process.batches(BATCH, seeded(epoch))) for epoch in (1, 2)]

    def consume() -> None:
        with open_live(specimen, dataset.manifest, 30, workers=workers) as source:
            for epoch, expected in enumerate(alone, start=1):
                assert same(list(source.batches(BATCH, seeded(epoch))), expected)
            assert len(active_children()) == workers
            for _ in source.batches(5, seeded(3)):  # more fields are on their way
                raise failure

    with pytest.raises(failure):
        consume()
    assert not active_children()


def die(*_: object) -> None:
    msg = "as the pool says when a process is gone"
    raise BrokenProcessPool(msg)


def test_a_process_that_dies_is_named(
    specimen: Specimen, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "_simulate", die)
    source = make_source(specimen, dataset, 10)
    with pytest.raises(
        ChildProcessError, match=r"has died.*fewer --workers.*goes on from the last"
    ):
        next(iter(source.batches(5, seeded(0))))


def test_a_recipe_that_gives_nothing_ends_with_an_error(
    specimen: Specimen, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = live._simulate(specimen, "live-nothing", 0)
    nothing = one.take(torch.arange(0).numpy())
    monkeypatch.setattr(live, "_simulate", lambda *_: nothing)
    with pytest.raises(ValueError, match="100 fields in a row gave no subtomogram"):
        list(make_source(specimen, dataset, 10).batches(5, seeded(0)))


def test_what_does_not_fit_is_refused(specimen: Specimen, dataset: Dataset) -> None:
    other = dataset.manifest.model_copy(update={"recipe_digest": "f" * 64})
    with pytest.raises(ValueError, match=r"dataset is of the recipe ffffffffffff….*this very"):
        LiveSource(specimen, other, 10, submitting(specimen), ahead=1)
    with pytest.raises(ValueError, match="subtomograms_per_epoch is 0"):
        make_source(specimen, dataset, 0)
    with (
        pytest.raises(ValueError, match="workers is 0"),
        open_live(specimen, dataset.manifest, 10, workers=0),
    ):
        pass


def test_a_recipe_with_live_data_needs_validation_and_test() -> None:
    content = load_recipe("tiny").model_dump(mode="json")
    content["live"] = {"subtomograms_per_epoch": 100}
    content["simulation"]["fields"] = {"validation": 1, "test": 1}
    recipe = Recipe.from_json(Recipe.model_construct(**content).model_dump_json(warnings=False))
    assert recipe.live is not None
    content["simulation"]["fields"] = {"train": 8, "test": 1}
    with pytest.raises(ValueError, match=r"fields names no validation: live data only train"):
        Recipe.from_json(Recipe.model_construct(**content).model_dump_json(warnings=False))


def test_the_manifest_names_the_recipe_and_the_length(specimen: Specimen, dataset: Dataset) -> None:
    manifests = [make_source(specimen, dataset, number).manifest for number in (10, 11, 10)]
    digests = [manifest.content_digest() for manifest in manifests]
    assert digests[0] == digests[2]
    other = manifests[0].model_copy(update={"recipe_digest": "f" * 64})
    assert len({*digests, other.content_digest(), dataset.manifest.content_digest()}) == 4
    assert manifests[0].tilt_range == dataset.manifest.tilt_range
    assert Manifest.from_json(manifests[0].to_json()) == manifests[0]


class Probe(nn.Module):
    """A linear classifier."""

    def __init__(self, box: int, num_classes: int) -> None:
        super().__init__()
        self.score = nn.Linear(box**3, num_classes)

    def forward(self, cubes: Tensor) -> Tensor:
        logits: Tensor = self.score(cubes.flatten(1))
        return logits


class StoppedError(Exception):
    """Raised in the middle of an epoch."""


def train(
    source: LiveSource, dataset: Dataset, folder: Path, *, stop_in: int | None = None
) -> tuple[nn.Module, FitResult]:
    torch.manual_seed(0)
    network = NormalisePerCube(Probe(dataset.manifest.box, len(dataset.manifest.classes)))
    objective = Classify(len(dataset.manifest.classes))
    steps = 0

    class Stopping(Classify):
        def __call__(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
            nonlocal steps
            steps += network.training
            if steps == stop_in:
                raise StoppedError
            return super().__call__(network, batch)

        def __repr__(self) -> str:
            return repr(objective)

    result = fit(
        network,
        Stopping(objective.num_classes),
        source,
        dataset.split("validation"),
        FitRecipe(network="probe", epochs=3, batch_size=BATCH, learning_rate=0.01),
        fabric=open_fabric("cpu", "float32"),
        folder=folder,
        log=lambda row, epoch: None,
    )
    return network, result


def test_a_resumed_training_is_the_uninterrupted_one(
    specimen: Specimen, dataset: Dataset, tmp_path: Path
) -> None:
    source = make_source(specimen, dataset, 40)
    network, result = train(source, dataset, tmp_path / "whole")
    with pytest.raises(StoppedError):
        train(source, dataset, tmp_path / "broken", stop_in=5)  # in the second epoch
    resumed, again = train(make_source(specimen, dataset, 40), dataset, tmp_path / "broken")
    for name, value in network.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    losses = [[row["train_loss"] for row in each.history] for each in (result, again)]
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 3
    with pytest.raises(ValueError, match="is of another dataset"):
        train(make_source(specimen, dataset, 41), dataset, tmp_path / "broken")


def test_junk_comes_live_too(
    make_recipe: Callable[..., SimulationRecipe], structures: list[Structure], dataset: Dataset
) -> None:
    recipe = make_recipe(
        targets_per_field=5, distractors={"gold": 2}, junk={"membrane": 0.0, "gold": 0.4}
    )
    specimen = prepare_specimen(recipe, structures)
    manifest = dataset.manifest.model_copy(update={"recipe_digest": specimen.recipe_digest})
    source = LiveSource(specimen, manifest, 40, submitting(specimen), ahead=2)
    assert specimen.classes[-1] == JUNK_CLASS
    seen = torch.cat([batch.class_ids for batch in source.batches(BATCH, seeded(0))])
    assert 0 < int((seen == len(specimen.classes)).sum()) < 20
