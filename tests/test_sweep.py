"""A sweep tries settings on validation, goes on where it was broken off, and names the best."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from builders import Exported, write_dataset
from stores import pristine_mlflow, working_folder

from cectflow.flows.sweep import Sweep, sweep, tabulate_sweep
from cectflow.flows.training import Hardware
from cectflow.learning.fit import DivergedError, FitRecipe, FitResult, fit
from cectflow.learning.losses import DistillationLoss
from cectflow.recipe import Recipe, StudentRecipe, load_recipe

pytest_plugins = ("exported",)

STUDENT = StudentRecipe(
    fit=FitRecipe(network="strided_nano", epochs=2, batch_size=8, learning_rate=0.002),
    soft=DistillationLoss(kl=1.0, temperature=3.0),
    weight=0.25,
)
OWN = {"learning_rate": 0.002, "weight": 0.25, "temperature": 3.0}


def make_recipe(**changes: object) -> Recipe:
    student = STUDENT.model_copy(update=changes)
    return load_recipe("tiny").model_copy(update={"student": student})


@pytest.fixture
def bench(tmp_path: Path, exported: Exported, empty_store: Path) -> Any:
    """Callable that sweeps in a store of its own."""
    write_dataset(tmp_path / "data")

    def run(trials: int, **changes: Any) -> Sweep:
        given = {"recipe": make_recipe(), "report": lambda _: None} | changes
        return sweep(
            given["recipe"], tmp_path / "out", Hardware("cpu"), teacher=str(exported.folder),
            trials=trials, dataset=tmp_path / "data", allow_weak_teacher=True,
            report=given["report"],
        )  # fmt: skip

    with pristine_mlflow(), working_folder(tmp_path):
        from cectflow.tracking.runs import connect

        shutil.copy(empty_store, tmp_path / "store.db")
        connect(f"sqlite:///{tmp_path}/store.db")
        yield run


def runs_of(tmp_path: Path) -> list[Any]:
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/store.db")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return list(client.search_runs(experiments))


def names_of_runs(tmp_path: Path) -> list[str]:
    return sorted(run.info.run_name for run in runs_of(tmp_path))


def statuses(tmp_path: Path) -> set[str]:
    return {run.info.status for run in runs_of(tmp_path)}


def test_an_interrupted_sweep_goes_on_to_as_many_trials(bench: Any, tmp_path: Path) -> None:
    told: list[str] = []

    def stop_at_the_second(line: str) -> None:
        told.append(line)
        if len(told) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench(3, report=stop_at_the_second)
    assert told[0].startswith("learning_rate 0.002, weight 0.25, temperature 3: accuracy")
    assert not (tmp_path / "out/best.yaml").exists()

    outcome = bench(3)
    assert len(outcome.trials) == 3
    assert OWN in [trial.settings for trial in outcome.trials]
    scores = [trial.score for trial in outcome.trials]
    assert scores == sorted(scores, reverse=True)
    best = load_recipe(str(outcome.recipe)).student
    assert best.soft.temperature == outcome.trials[0].settings["temperature"]
    assert best.fit.learning_rate == outcome.trials[0].settings["learning_rate"]
    assert best.weight == outcome.trials[0].settings["weight"]
    assert best.fit.network == "strided_nano"
    assert not list((tmp_path / "out/trials").iterdir()), "weights of finished trials are left"
    header, rows = tabulate_sweep(outcome)
    assert header == ("learning_rate", "weight", "temperature", "accuracy, validation")
    assert len(rows) == 3

    before = names_of_runs(tmp_path)
    assert [trial.settings for trial in bench(3).trials] == [t.settings for t in outcome.trials]
    assert names_of_runs(tmp_path) == sorted([*before, "sweep"]), "a finished trial ran again"


def test_ctrl_c_within_an_epoch_loses_no_settings_and_no_epoch(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    epochs: list[int] = []

    def stopped(*given: Any, log: Any, **named: Any) -> FitResult:
        def note(row: Any, epoch: int) -> None:
            log(row, epoch)
            epochs.append(epoch)
            if len(epochs) == 1:
                raise KeyboardInterrupt

        return fit(*given, log=note, **named)

    monkeypatch.setattr("cectflow.flows.sweep.fit", stopped)
    with pytest.raises(KeyboardInterrupt):
        bench(2)
    outcome = bench(2)
    assert OWN in [trial.settings for trial in outcome.trials]
    # The first epoch is told again, from the checkpoint, and not trained again.
    assert epochs == [1, 1, 2, 1, 2]
    more = bench(4)
    settings = [tuple(trial.settings.values()) for trial in more.trials]
    assert len(set(settings)) == 4, "the same settings were tried twice"


def test_a_student_that_diverges_ends_its_trial_and_not_the_sweep(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[int] = []

    def diverging(*given: Any, **named: Any) -> FitResult:
        calls.append(1)
        if len(calls) == 2:
            named["folder"].mkdir(parents=True)
            msg = "the loss is nan"
            raise DivergedError(msg)
        return fit(*given, **named)

    monkeypatch.setattr("cectflow.flows.sweep.fit", diverging)
    told: list[str] = []
    outcome = bench(3, report=told.append)
    assert [trial.finished for trial in outcome.trials] == [True, True, False]
    assert told[1].endswith("broken off, the loss is nan")
    assert statuses(tmp_path) == {"FINISHED"}


def test_a_folder_of_another_sweep_is_refused(bench: Any) -> None:
    bench(1)
    with pytest.raises(ValueError, match=r"sweep.jsonl is of another recipe: give another --out"):
        bench(1, recipe=make_recipe(weight=0.5))


def test_what_has_no_temperature_is_not_searched_for_one(bench: Any) -> None:
    outcome = bench(1, recipe=make_recipe(soft=DistillationLoss(mse=1.0)))
    assert outcome.trials[0].settings == {"learning_rate": 0.002, "weight": 0.25}


def test_no_trials_are_refused(bench: Any) -> None:
    with pytest.raises(ValueError, match="trials is 0: expected 1 or more"):
        bench(0)
