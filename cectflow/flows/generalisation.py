"""Leave-structures-out: what a segmenter makes of structures that it never saw."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cectflow.dataset import BatchSource, Dataset, Selection
from cectflow.figures import draw_generalisation, draw_learning_curves
from cectflow.files import replacing
from cectflow.flows.simulation import load_structures
from cectflow.flows.training import Hardware
from cectflow.learning.fit import FitRecipe
from cectflow.learning.generalisation import Generalisation, compare_folds, make_folds
from cectflow.learning.objective import Segment
from cectflow.learning.scores import Evaluation
from cectflow.learning.training import fit_and_judge
from cectflow.manifest import JUNK_CLASS, MANIFEST_FILE
from cectflow.model_card import Score
from cectflow.recipe import Recipe
from cectflow.simulation.delivery import simulate_dataset
from cectflow.simulation.field import leave_out, prepare_specimen
from cectflow.simulation.live import open_live
from cectflow.simulation.structure import Structure
from cectflow.tracking.runs import Run, cectflow_commit, start_run

__all__ = ["evaluate_generalisation", "tabulate_generalisation"]

Report = Callable[[str], None]
RESULT_FILE = "generalisation.json"
FIGURE_FILE = "generalisation.png"


def evaluate_generalisation(
    recipe: Recipe, folder: Path, hardware: Hardware, *, report: Report = lambda _: None
) -> Generalisation:
    """Foreground IoU of each structure by a network that never saw it, over one that did.

    The recipe's segmenter is trained once with all structures and once without each group of
    homologous ones: none of the group's particles is in the training and validation fields, as a
    target or as a neighbour. All networks are judged on the same test fields, which hold all
    structures. Held equal for all of them: network, start weights and seed; cubes per epoch
    (where they are read from a dataset, the number that the smallest one has) and steps; optics,
    occupancy and noise amplitude, see :func:`~cectflow.simulation.field.leave_out`. Training does
    not stop early; each network is judged with the weights of its best epoch on validation
    fields like its own training's. Not equal, and no network's fault: without a group the
    others take its share of the cubes.

    Parameters
    ----------
    recipe
        With ``generalisation`` and ``segmenter``; with ``live`` every network trains on live
        data, else on a dataset of its own.
    folder
        For datasets, checkpoints, ``generalisation.json`` and its figure. That of a call which
        was broken off is taken up where it stands.
    hardware
        Devices, precision and processes that simulate.
    report
        Told what is going on.

    Raises
    ------
    ValueError
        If the recipe names no such fields, all structures are in one group, or no test cube is
        about one of them.
    FileExistsError
        If the folder is a dataset, or holds datasets of another recipe.
    """
    if (folder / MANIFEST_FILE).exists():
        msg = f"{folder} is a dataset itself: give another folder"
        raise FileExistsError(msg)
    splits = ("validation", "test") if recipe.live else ("train", "validation", "test")
    missing = [name for name in splits if name not in recipe.simulation.fields]
    if missing:
        msg = f"simulation.fields names no {' and no '.join(missing)}: add fields of it"
        raise ValueError(msg)
    structures = load_structures(recipe.simulation)
    folds = make_folds([s.name for s in structures], recipe.generalisation.groups)
    _tell_folds(recipe, folds, report)
    with start_run("generalisation", tags={"role": "generalisation"}) as run:
        run.log_config(recipe, "recipe")
        study = _Study.prepare(recipe, structures, folder, hardware, folds, report)
        test = study.everything.split("test")
        manifest = study.everything.manifest
        run.log_dataset(
            manifest.kind, manifest.content_digest(), str(study.everything.folder.resolve()),
            "test",
        )  # fmt: skip
        seen = study.train((), "all", report)
        unseen = {fold: study.train(fold, _name_of(fold), report) for fold in folds}
        control = study.train((), "control", report) if recipe.generalisation.control else None
        masses = {structure.name: structure.mass_kda for structure in structures}
        rows, ratio, repeated = compare_folds(test, seen, unseen, control, masses)
        result = Generalisation(
            network=study.fit_recipe.network,
            seed=study.fit_recipe.seed,
            classes=tuple(name for name in manifest.classes if name != JUNK_CLASS),
            folds=folds,
            train_cubes=study.train_cubes,
            epochs=study.fit_recipe.epochs,
            recipe_digest=recipe.digest(),
            dataset_digest=manifest.content_digest(),
            structures=rows,
            ratio=ratio,
            control=repeated,
        )
        _write(result, folder, run)
    return result


def tabulate_generalisation(
    result: Generalisation,
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows of the table that the terminal shows."""
    header = ("structure", "kDa", "test cubes", "IoU seen", "IoU unseen", "unseen / seen",
              "control", "best ball", "best threshold")  # fmt: skip
    rows: list[tuple[str, ...]] = [
        (
            row.name, f"{row.mass_kda:.0f}", str(row.num_test), f"{row.seen.value:.3f}",
            f"{row.unseen.value:.3f}", _in_words(row.ratio), _in_words(row.control),
            f"{row.ball:.3f}", f"{row.threshold:.3f}",
        )
        for row in result.structures
    ]  # fmt: skip
    means = np.mean(
        [(row.seen.value, row.unseen.value, row.ball, row.threshold) for row in result.structures],
        axis=0,
    )
    seen, unseen, ball, threshold = (f"{mean:.3f}" for mean in means)
    number = sum(row.num_test for row in result.structures)
    rows.append(
        ("all alike", "", str(number), seen, unseen, _in_words(result.ratio),
         _in_words(result.control), ball, threshold)
    )  # fmt: skip
    return header, rows


@dataclass(frozen=True, eq=False)
class _Study:
    """Everything the trainings share, and the data of each."""

    recipe: Recipe
    structures: tuple[Structure, ...]
    folder: Path
    hardware: Hardware
    datasets: Mapping[tuple[str, ...], Dataset]
    """Left-out structures → dataset; that of nothing left out also has the test split."""
    train_cubes: int
    fit_recipe: FitRecipe

    @classmethod
    def prepare(
        cls, recipe: Recipe, structures: tuple[Structure, ...], folder: Path, hardware: Hardware,
        folds: tuple[tuple[str, ...], ...], report: Report,
    ) -> _Study:  # fmt: skip
        """Simulate what is missing, and find the number of cubes that all can have."""
        datasets = {}
        for left_out in ((), *folds):
            name = _name_of(left_out)
            report(f"simulating the data {name}")
            datasets[left_out] = simulate_dataset(
                recipe.simulation, structures, folder / name / "dataset",
                where=hardware.workplace, commit=cectflow_commit(), left_out=left_out,
                splits=[
                    *(() if recipe.live else ("train",)), "validation",
                    *(() if left_out else ("test",)),
                ],
            )  # fmt: skip
        if recipe.live is not None:
            train_cubes = recipe.live.subtomograms_per_epoch
        else:
            train_cubes = min(data.manifest.count("train") for data in datasets.values())
        fit = recipe.segmenter.fit
        # Patience would give each network another number of steps.
        fit = fit.model_copy(update={"patience": fit.epochs})
        return cls(recipe, structures, folder, hardware, datasets, train_cubes, fit)

    @property
    def everything(self) -> Dataset:
        """The dataset that holds all structures."""
        return self.datasets[()]

    def train(self, left_out: tuple[str, ...], name: str, report: Report) -> Evaluation:
        """Scores on the test fields of a network trained without these structures."""
        report(f"training {self.fit_recipe.network}: {name}")
        began = time.monotonic()
        data, fit = self.datasets[left_out], self.fit_recipe
        if name == "control":
            fit = fit.model_copy(update={"seed": fit.seed + 1})
        manifest = data.manifest
        tags = {"role": "fold", "left_out": ",".join(left_out)}
        with start_run(name, tags=tags, nested=True) as run, self._source(left_out) as train:
            run.log_config(fit, "fit")
            run.log_dataset(
                manifest.kind, manifest.content_digest(), str(data.folder.resolve()), "training"
            )
            objective = Segment(self.recipe.segmenter.loss)
            result, scored = fit_and_judge(
                objective, train, data.split("validation"),
                {"test": self.everything.split("test")}, fit,
                fabric=self.hardware.open(),
                folder=self.folder / name / "checkpoints",
                log=run.log,
                provenance={"train_cubes": str(self.train_cubes)},
            )  # fmt: skip
            judged = scored["test"]
            score = judged.interval(objective.monitor)
            run.log({f"test_{objective.monitor}": score.value})
            run.log_figure(
                draw_learning_curves(result.history, f"{name}: {fit.network}"),
                "figures/learning_curves.png",
            )
        seconds = time.monotonic() - began
        report(f"  {objective.monitor} {score.value:.3f} on the test fields, {seconds:.0f} s")
        return judged

    @contextmanager
    def _source(self, left_out: tuple[str, ...]) -> Iterator[BatchSource]:
        """Training data of which every network has as many."""
        data = self.datasets[left_out]
        if self.recipe.live is None:
            # Fields are independent: the first ones are as good as any.
            yield Selection(data.split("train"), np.arange(self.train_cubes))
            return
        specimen = leave_out(prepare_specimen(self.recipe.simulation, self.structures), left_out)
        with open_live(
            specimen, data.manifest, self.train_cubes, workers=self.hardware.workers,
            name="segmenter",
        ) as source:  # fmt: skip
            yield source


def _tell_folds(recipe: Recipe, folds: tuple[tuple[str, ...], ...], report: Report) -> None:
    report(f"held out in turn: {'; '.join(' + '.join(fold) for fold in folds)}")
    used = {name for fold in folds for name in fold}
    passed_over = [n for group in recipe.generalisation.groups for n in group if n not in used]
    if passed_over:
        report(f"in groups, but not simulated: {', '.join(passed_over)}")


def _name_of(left_out: tuple[str, ...]) -> str:
    return "-".join(("without", *left_out)) if left_out else "all"


def _write(result: Generalisation, folder: Path, run: Run) -> None:
    """Log result and figure, and write them into the folder."""
    with replacing(folder / RESULT_FILE, overwrite=True) as temporary:
        temporary.write_text(result.to_json(), encoding="utf-8")
    overlaps = {
        "seen": _intervals([row.seen for row in result.structures]),
        "unseen": _intervals([row.unseen for row in result.structures]),
        **{
            f"best {name}": np.tile([getattr(row, name) for row in result.structures], (3, 1))
            for name in ("ball", "threshold")
        },
    }
    ratios = {"unseen over seen": _intervals([row.ratio for row in result.structures])}
    if result.control is not None:
        controls = [row.control for row in result.structures]
        ratios["seen again over seen"] = _intervals(controls)
    names = [f"{row.name}\n{row.mass_kda:.0f} kDa" for row in result.structures]
    title = f"{result.network}: structures that it never saw"
    figure = draw_generalisation(names, overlaps, ratios, title=title)
    figure.savefig(folder / FIGURE_FILE, dpi=130)
    run.log_figure(figure, f"figures/{FIGURE_FILE}")
    run.log_files(folder / RESULT_FILE)
    run.log(result.figures())


def _intervals(scores: list[Score | None] | list[Score]) -> NDArray[np.float64]:
    """Values, lower and upper ends; NaN where there is none."""
    nothing = (np.nan,) * 3
    return np.array([nothing if s is None else (s.value, s.low, s.high) for s in scores]).T


def _in_words(score: Score | None) -> str:
    return "-" if score is None else f"{score.value:.3f} ({score.low:.3f} to {score.high:.3f})"
