"""A sweep: which temperature, weight and learning rate suit a student, judged on validation."""

from __future__ import annotations

import math
import shlex
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cectflow.files import replacing
from cectflow.flows.distillation import Lesson, choose_lesson, open_lesson
from cectflow.flows.training import Hardware, open_live_data
from cectflow.flows.unlabelled import Unlabelled
from cectflow.learning.figures import draw_sweep
from cectflow.learning.fit import DivergedError, fit
from cectflow.learning.training import make_network
from cectflow.learning.unlabelled import WithUnlabelled
from cectflow.recipe import Recipe, StudentRecipe
from cectflow.tracking.runs import start_run
from cectflow.tracking.versions import role_name

if TYPE_CHECKING:  # an extra, and a second to import
    from optuna import Study, Trial

__all__ = ["Sweep", "SweepTrial", "sweep", "tabulate_sweep"]

JOURNAL_FILE = "sweep.jsonl"
BEST_FILE = "best.yaml"
LEARNING_RATES = (0.2, 5.0)
"""Times the recipe's."""
TEMPERATURES = (1.0, 10.0)
UNHURRIED = 4
"""Trials that are trained to the end before any is broken off for being worse than the median."""


@dataclass(frozen=True)
class SweepTrial:
    """One student of a sweep.

    Attributes
    ----------
    settings
        Name → value.
    score
        Of its best epoch, on validation; minus infinity where the loss diverged at once.
    finished
        False if it was broken off: its loss diverged, or it was worse than half of the others.
    """

    settings: Mapping[str, float]
    score: float
    finished: bool


@dataclass(frozen=True, eq=False)
class Sweep:
    """Outcome of a sweep.

    Attributes
    ----------
    trials
        The best first; one of them has the recipe's own settings.
    monitor
        Name of the score.
    recipe
        File of the complete recipe with the best settings.
    advice
        Options with which ``distill`` takes them up.
    """

    trials: tuple[SweepTrial, ...]
    monitor: str
    recipe: Path
    advice: str


def sweep(
    recipe: Recipe, folder: Path, hardware: Hardware, *,
    teacher: str, trials: int, student: str | None = None, method: str | None = None,
    unlabelled: Unlabelled | None = None, dataset: Path | None = None,
    allow_weak_teacher: bool = False, report: Callable[[str], None] = lambda _: None,
) -> Sweep:  # fmt: skip
    """Students of several settings, each a nested run: none registered, test never looked at.

    The first trial has the recipe's own settings, the others are proposed by Optuna's
    tree-structured Parzen estimator (Akiba et al. 2019, arXiv 1907.10902). A second call with the
    same folder and arguments goes on to as many trials.

    Parameters
    ----------
    recipe, folder, hardware, teacher, student, method, unlabelled, dataset, allow_weak_teacher
        As for :func:`~cectflow.flows.distillation.distill`.
    trials
        How many in all.
    report
        Told of each trial.

    Raises
    ------
    ValueError
        As ``distill``; if Optuna is not installed, the folder holds a sweep of something else, or
        the number is below 1.
    """
    if trials < 1:
        msg = f"trials is {trials}: expected 1 or more"
        raise ValueError(msg)
    _require_optuna()
    teachers, recipe, section = choose_lesson(
        recipe, teacher=teacher, student=student, method=method, dataset=dataset,
        allow_weak_teacher=allow_weak_teacher,
    )  # fmt: skip
    with start_run("sweep", tags={"role": "student"}) as run:
        run.log_config(recipe, "recipe")
        for version in teachers.versions:
            run.log_input_model(version)
        lesson = open_lesson(
            teachers, recipe, section, folder, hardware, dataset=dataset, unlabelled=unlabelled
        )
        lesson.log_unlabelled(run, unlabelled)
        study = _open_study(folder, recipe, section, lesson)
        _settle_interrupted(study)
        if not _is_known(study, own := _own_settings(section)):
            study.enqueue_trial(own)

        def objective(trial: Trial) -> float:
            return _try(trial, lesson, recipe, section, folder, hardware, report)

        study.optimize(objective, n_trials=max(0, trials - len(_ended(study))))
        found = sorted(map(_summary, _ended(study)), key=lambda t: (not t.finished, -t.score))
        if not found[0].finished:
            msg = f"none of {len(found)} trials finished: lower the recipe's learning_rate"
            raise ValueError(msg)
        best = _with_settings(section, study.best_trial.params)
        name = "student" if lesson.labels.task == "classify" else "student_segmenter"
        path = folder / BEST_FILE
        with replacing(path, overwrite=True) as temporary:
            content = recipe.model_copy(update={name: best}).to_yaml()
            temporary.write_text(content, encoding="utf-8")
        words = ["--teacher", teacher, "--recipe", str(path), "--dataset", str(lesson.data.folder)]
        advice = shlex.join([*words, *(() if unlabelled is None else unlabelled.arguments)])
        outcome = Sweep(tuple(found), lesson.labels.monitor, path, advice)
        run.log({f"best_validation_{outcome.monitor}": found[0].score, "trials": len(found)})
        run.log_files(path)
        finished = [trial for trial in found if trial.finished]
        figure = draw_sweep(
            [t.settings for t in finished], [t.score for t in finished], outcome.monitor
        )
        run.log_figure(figure, "figures/sweep.png")
    return outcome


def tabulate_sweep(outcome: Sweep) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows of a table of all trials, the best first."""
    names = tuple(outcome.trials[0].settings)
    header = (*names, f"{outcome.monitor}, validation")
    rows = [
        (
            *(f"{trial.settings[name]:.3g}" for name in names),
            f"{trial.score:.4f}" if trial.finished else f"{trial.score:.4f}, broken off",
        )
        for trial in outcome.trials
    ]
    return header, rows


def _require_optuna() -> None:
    try:
        import optuna
    except ModuleNotFoundError:
        msg = "a sweep needs Optuna, which is not installed: pip install 'cectflow[sweep]'"
        raise ValueError(msg) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def _open_study(folder: Path, recipe: Recipe, section: StudentRecipe, lesson: Lesson) -> Study:
    """The study of a folder; its journal is of lines of JSON."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    origin = {
        "recipe": recipe.digest(),
        "teacher": lesson.teachers.uri,
        "dataset": lesson.data.manifest.content_digest(),
        "unlabelled": "none" if lesson.unlabelled is None else lesson.unlabelled.digest,
    }
    folder.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(folder / JOURNAL_FILE))),
        study_name="sweep",
        direction="maximize",
        pruner=optuna.pruners.MedianPruner(n_startup_trials=UNHURRIED, n_warmup_steps=1),
        load_if_exists=True,
    )
    others = [key for key, value in origin.items() if study.user_attrs.get(key, value) != value]
    if others:
        msg = (
            f"{folder / JOURNAL_FILE} is of another {' and '.join(others)}: give another --out, or "
            f"remove it to start anew"
        )
        raise ValueError(msg)
    for key, value in origin.items():
        study.set_user_attr(key, value)
    # Its random numbers start anew with every call: another seed, or it proposes the same again.
    study.sampler = optuna.samplers.TPESampler(seed=section.fit.seed + len(study.trials))
    return study


def _settle_interrupted(study: Study) -> None:
    """Trials that were broken off are tried again, from the last checkpoint on."""
    from optuna.trial import TrialState

    for trial in study.get_trials(states=(TrialState.RUNNING, TrialState.FAIL)):
        if trial.state == TrialState.RUNNING:  # killed; Ctrl-C has told it
            study.tell(trial.number, state=TrialState.FAIL)
        again = {"again": trial.number}
        if again not in [other.user_attrs for other in study.trials]:
            study.enqueue_trial(trial.params, user_attrs=again)


def _is_known(study: Study, settings: Mapping[str, float]) -> bool:
    """Whether a trial of these settings has ended, or waits."""
    from optuna.trial import TrialState

    waiting = study.get_trials(states=(TrialState.WAITING,))
    fixed = [trial.system_attrs.get("fixed_params") for trial in waiting]
    return settings in [*fixed, *(trial.params for trial in _ended(study))]


def _ended(study: Study) -> list[Any]:
    from optuna.trial import TrialState

    return study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED))


def _summary(trial: Any) -> SweepTrial:
    scores = trial.intermediate_values.values()
    finished = trial.state.name == "COMPLETE"
    score = trial.value if finished else max(scores, default=-math.inf)
    return SweepTrial(trial.params, score, finished)


def _own_settings(section: StudentRecipe) -> dict[str, float]:
    """Of the recipe, as far as they are searched for."""
    settings = {"learning_rate": section.fit.learning_rate, "weight": section.weight}
    if section.soft.kl or section.soft.dkd:  # nothing else has a temperature
        settings["temperature"] = section.soft.temperature
    return settings


def _with_settings(section: StudentRecipe, settings: Mapping[str, float]) -> StudentRecipe:
    fit_recipe = section.fit.model_copy(update={"learning_rate": settings["learning_rate"]})
    soft = section.soft
    if "temperature" in settings:
        soft = soft.model_copy(update={"temperature": settings["temperature"]})
    return section.model_copy(
        update={"fit": fit_recipe, "soft": soft, "weight": settings["weight"]}
    )


def _try(
    trial: Trial, lesson: Lesson, recipe: Recipe, section: StudentRecipe, folder: Path,
    hardware: Hardware, report: Callable[[str], None],
) -> float:  # fmt: skip
    """Validation score of the best epoch of one student."""
    import optuna

    rate = section.fit.learning_rate
    low, high = (factor * rate for factor in LEARNING_RATES)
    settings = {
        "learning_rate": trial.suggest_float("learning_rate", low, high, log=True),
        "weight": trial.suggest_float("weight", 0.0, 1.0),
    }
    if "temperature" in (own := _own_settings(section)):
        reach = max(TEMPERATURES[1], own["temperature"])
        least = min(TEMPERATURES[0], own["temperature"])
        settings["temperature"] = trial.suggest_float("temperature", least, reach, log=True)
    chosen = _with_settings(section, settings)
    name = ", ".join(f"{key} {value:.3g}" for key, value in settings.items())
    labels, data = lesson.labels, lesson.data
    monitor = f"validation_{labels.monitor}"
    checkpoints = folder / "trials" / chosen.digest()[:16]
    ended = ""
    with (
        start_run(f"trial {trial.number}", tags={"role": "trial"}, nested=True) as run,
        open_live_data(recipe, data, hardware, role_name("student", labels.task)) as live,
    ):
        run.log(settings)

        def log(metrics: Mapping[str, float], step: int) -> None:
            run.log(metrics, step)
            trial.report(metrics[monitor], step)
            if step < chosen.fit.epochs and trial.should_prune():
                raise optuna.TrialPruned

        train = data.split("train") if live is None else live
        if lesson.unlabelled is not None:
            train = WithUnlabelled(train, lesson.unlabelled)
        try:
            result = fit(
                make_network(chosen.fit, labels.task, labels.num_outputs, data.manifest.box),
                lesson.objective(chosen), train, data.split("validation"), chosen.fit,
                fabric=hardware.open(), folder=checkpoints, log=log,
            )  # fmt: skip
            run.log({"best_" + monitor: result.best_score})
            ended = f"{labels.monitor} {result.best_score:.4f} at epoch {result.best_epoch}"
        except optuna.TrialPruned:
            ended = "broken off, worse than half of the others"
            run.set_tags({"ended": ended})
        except DivergedError as error:
            ended = f"broken off, {error}"
            run.set_tags({"ended": ended})
    shutil.rmtree(checkpoints)
    report(f"{name}: {ended}")
    if ended.startswith("broken off"):
        raise optuna.TrialPruned
    return result.best_score
