"""Unknown particles: what a classifier says of cubes that are about none of its classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from cectflow.dataset import Batch, BatchSource, Dataset, open_dataset
from cectflow.execution import Workplace
from cectflow.flows.promotion import judged_dataset
from cectflow.flows.simulation import load_structures, new_folder, recipe_of
from cectflow.learning.figures import draw_known_scores
from cectflow.learning.scores import Evaluation, evaluate
from cectflow.learning.training import (
    check_matches,
    evaluate_folder,
    evaluate_strangers,
    logits_of,
)
from cectflow.learning.unknown import StrangerKind, UnknownReport, judge_kind, judge_known
from cectflow.manifest import JUNK_CLASS, Manifest
from cectflow.model_card import ModelCard, Score, Trust, UnknownScore
from cectflow.prediction.mask import noise_like
from cectflow.simulation.delivery import simulate_dataset
from cectflow.simulation.distractors import Distractors, Junk
from cectflow.simulation.recipe import SimulationRecipe
from cectflow.simulation.structure import Structure, find_structures, load_structure
from cectflow.tracking.registry import resolve_model
from cectflow.tracking.runs import cectflow_commit, start_run
from cectflow.trust import score_known

__all__ = ["StrangerRequest", "evaluate_unknown", "tabulate_unknown"]

Report = Callable[[str], None]

JUNK_SHARE = 0.5
"""Cubes of junk for one of a particle; there may be fewer places."""
JUNK_MAKERS = {
    # Small ones, for which there is room among the particles of a crowded field.
    "membrane": Distractors(vesicles=1.0, vesicle_radius=(100.0, 200.0)),
    "gold": Distractors(gold=8.0),
    "empty": Distractors(),
}
"""Kind of junk → what a field holds for it, if its recipe has no distractors."""
KNOWN, NOISE = "known", "noise"


@dataclass(frozen=True)
class StrangerRequest:
    """Which cubes a classifier does not know.

    Attributes
    ----------
    against
        Dataset folders; their cubes of other classes count, each folder is a kind of its name.
        Empty: they are simulated.
    structures
        Where the other structures are, and those of the model; None: where its dataset says.
    out
        Folder for what is simulated; None: a new one.
    workers
        Processes that simulate.
    """

    against: tuple[Path, ...] = ()
    structures: str | None = None
    out: Path | None = None
    workers: int = 1


@dataclass(frozen=True, eq=False)
class _Noise:
    """Cubes with the amplitudes of others and random phases: no particle, but all else."""

    content: BatchSource

    @property
    def manifest(self) -> Manifest:
        return self.content.manifest

    def __len__(self) -> int:
        return len(self.content)

    def batches(self, batch_size: int, generator: torch.Generator | None = None) -> Iterator[Batch]:
        seed = 0
        for batch in self.content.batches(batch_size, generator):
            cubes = batch.subtomograms[:, 0].numpy()
            noise = np.stack([noise_like(cube, seed + i) for i, cube in enumerate(cubes)])
            seed += len(cubes)
            yield replace(batch, subtomograms=torch.from_numpy(noise.astype(np.float32))[:, None])


def evaluate_unknown(
    model: str, request: StrangerRequest, *, dataset: Path | None = None,
    report: Report = lambda _: None,
) -> UnknownReport:  # fmt: skip
    """How often a classifier calls cubes unknown that are, and that are not; logged as a run.

    Without folders of one's own, four kinds are simulated as the model's dataset was: other
    structures (``others``: all that fit its box, none of its own beside them), and the places of
    ``membrane``, ``gold`` and ``empty`` among its own (:class:`Junk`). ``noise`` are the known
    test cubes with random phases. Of a kind with several classes each is also judged by itself.

    Parameters
    ----------
    model
        Registered version or model folder of the task ``classify``.
    request
        The unknown.
    dataset
        Whose test split holds the known; by default the one that the model was trained on.
    report
        Told what is going on.

    Raises
    ------
    ValueError
        If the model is no classifier or its card has no threshold, or a dataset does not suit it.
    """
    folder, version = resolve_model(model)
    card = ModelCard.from_folder(folder)
    trust = _trust_of(model, card)
    data = judged_dataset(version, dataset)
    check_matches(card, data)
    given = _open_strangers(card, request.against)
    with start_run("unknown", tags={"role": card.role}) as run:
        if version is not None:
            run.log_input_model(version)
        strangers = given or _simulate(card, data.manifest, request, report)
        known = evaluate_folder(folder, data)
        result = judge_known(trust, known)
        kinds: list[StrangerKind] = []
        scores = {KNOWN: _scores(trust, known)}
        for other in strangers:
            manifest, name = other.manifest, other.folder.resolve().name
            digest = manifest.content_digest()
            run.log_dataset(manifest.kind, digest, str(other.folder.resolve()), "unknown")
            found = evaluate_strangers(folder, other)
            kinds += _judge(name, manifest.classes, trust, known, found)
            scores[name] = _scores(trust, found)
        noise = evaluate(logits_of(folder), _Noise(data.split("test")), card.task)
        kinds += _judge(NOISE, (), trust, known, noise)
        scores[NOISE] = _scores(trust, noise)
        result = result.model_copy(update={"kinds": tuple(kinds)})
        run.log(result.figures())
        run.log_json(result.model_dump(), "unknown.json")
        figure = draw_known_scores(
            scores, trust.unknown_threshold, f"{card.network}: {trust.unknown_score}"
        )
        run.log_figure(figure, "figures/unknown.png")
    return result


def tabulate_unknown(
    result: UnknownReport,
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows of the table that the terminal shows."""
    kinds: tuple[UnknownScore, ...] = get_args(UnknownScore)
    header = ("cubes", "number", "called unknown", *(f"AUROC {kind}" for kind in kinds))
    passed = result.true_positive_rate
    refused = Score(value=1 - passed.value, low=1 - passed.high, high=1 - passed.low)
    rows: list[tuple[str, ...]] = [
        (KNOWN, str(result.known_cubes), _in_words(refused), *("" for _ in kinds))
    ]
    rows += [
        (
            found.name, str(found.cubes), _in_words(found.unknown),
            *(_in_words(found.auroc[kind]) for kind in kinds),
        )
        for found in result.kinds
    ]  # fmt: skip
    return header, rows


def _trust_of(model: str, card: ModelCard) -> Trust:
    if card.task != "classify":
        msg = (
            f"{model} is a {card.role} for the task {card.task!r}: expected a classifier, such as "
            "cectflow-student@production"
        )
        raise ValueError(msg)
    if card.trust is None:
        msg = f"the card of {model} states no threshold for unknown: train it again"
        raise ValueError(msg)
    return card.trust


def _open_strangers(card: ModelCard, folders: Sequence[Path]) -> list[Dataset]:
    """Datasets of a user's own, each a kind of its own name."""
    opened = [open_dataset(folder) for folder in folders]
    names = [KNOWN, NOISE]
    for dataset in opened:
        check_matches(card, dataset, any_classes=True)
        name = dataset.folder.resolve().name
        if name in names:
            msg = f"--against {dataset.folder}: there is another {name!r}, rename the folder"
            raise ValueError(msg)
        names.append(name)
    return opened


def _simulate(
    card: ModelCard, manifest: Manifest, request: StrangerRequest, report: Report
) -> list[Dataset]:
    """Datasets of what the model does not know, with the optics and the crowding that it does."""
    if manifest.kind != "simulated" or card.masking is not None:
        msg = (
            "the model was judged on cubes that were imported or masked, so others like them "
            "cannot be simulated: give --against"
        )
        raise ValueError(msg)
    recipe = recipe_of(manifest)
    if request.structures is not None:
        paths = tuple(part.strip() for part in request.structures.split(","))
        recipe = recipe.model_copy(update={"structures": paths})
    own = [name for name in card.classes if name != JUNK_CLASS]
    recipe = recipe.model_copy(
        update={"include": tuple(own), "fields": {"test": recipe.fields["test"]}, "junk": None}
    )
    structures = load_structures(recipe)
    folder = request.out or new_folder("unknown")
    report(f"simulating the unknown in {folder}")

    def deliver(
        name: str, recipe: SimulationRecipe, structures: Sequence[Structure],
        left_out: Sequence[str] = (),
    ) -> Dataset:  # fmt: skip
        return simulate_dataset(
            recipe, structures, folder / name,
            where=Workplace(request.workers), commit=cectflow_commit(), left_out=left_out,
            splits=("test",),
        )  # fmt: skip

    found = []
    others = _other_structures(recipe, own)
    report(f"other structures: {', '.join(one.name for one in others) or 'none that fits the box'}")
    if others:
        # Left out, the model's own still set the noise: others stand out as they would beside them.
        everything = recipe.model_copy(update={"include": (*own, *(one.name for one in others))})
        found.append(deliver("others", everything, (*structures, *others), own))
    if JUNK_CLASS in card.classes:
        report("junk is a class of this model: membranes, gold and empty places are known to it")
        return found
    for kind, distractors in JUNK_MAKERS.items():
        shares = dict.fromkeys(JUNK_MAKERS, 0.0) | {kind: JUNK_SHARE}
        present = recipe.distractors
        update = {"junk": Junk(**shares), "distractors": _at_least(present, distractors)}
        data = deliver(kind, recipe.model_copy(update=update), structures)
        if (data.split("test").class_ids > len(own)).any():
            found.append(data)
        else:
            report(f"{kind}: no place for it in {recipe.fields['test']} fields")
    return found


def _at_least(present: Distractors, wanted: Distractors) -> Distractors:
    """A recipe's own distractors, with those wanted where it has none of the kind."""
    changes: dict[str, Any] = {}
    if wanted.vesicles and not (present.sheets or present.vesicles):
        changes |= {"vesicles": wanted.vesicles, "vesicle_radius": wanted.vesicle_radius}
    if wanted.gold and not present.gold:
        changes |= {"gold": wanted.gold}
    return present.model_copy(update=changes)


def _other_structures(recipe: SimulationRecipe, own: Sequence[str]) -> tuple[Structure, ...]:
    """Structures of the recipe's sources that the model does not have and that fit its box."""
    sources = find_structures(",".join(recipe.structures))
    loaded = (load_structure(source) for source in sources if source.name not in own)
    return tuple(structure for structure in loaded if structure.extent <= recipe.room)


def _judge(
    name: str, classes: Sequence[str], trust: Trust, known: Evaluation, found: Evaluation
) -> Iterator[StrangerKind]:
    """A kind as a whole, and each of its classes where it has several."""
    assert found.logits is not None
    yield judge_kind(name, trust, known, found.logits, found.fields)
    present = np.unique(found.class_ids) if classes else ()
    for number in present if len(present) > 1 else ():
        mine = found.class_ids == number
        yield judge_kind(
            f"{name}_{classes[number - 1]}", trust, known, found.logits[mine], found.fields[mine]
        )


def _scores(trust: Trust, found: Evaluation) -> NDArray[np.float64]:
    assert found.logits is not None
    return score_known(found.logits, trust.unknown_score, trust.typical)


def _in_words(score: Score) -> str:
    return f"{score.value:.3f} ({score.low:.3f} to {score.high:.3f})"
