"""Recipe: one complete, named configuration of the whole road, and the reading of it by name."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from cectflow.config import Config, find_named_file
from cectflow.learning.fit import FitRecipe
from cectflow.learning.losses import CROSS_ENTROPY, LOGITS_APART, DistillationLoss, SegmentationLoss
from cectflow.learning.task import SemanticLabels
from cectflow.simulation.recipe import SimulationRecipe

__all__ = [
    "GeneralisationRecipe",
    "LiveRecipe",
    "Recipe",
    "SegmenterRecipe",
    "StudentRecipe",
    "TomogramSegmenterRecipe",
    "load_recipe",
]


class SegmenterRecipe(Config):
    """How a segmenter is trained."""

    fit: FitRecipe
    loss: SegmentationLoss = CROSS_ENTROPY
    """Weighted sum, such as ``{cross_entropy: 1.0, dice: 1.0}``; by default paper (a)'s."""


class TomogramSegmenterRecipe(SegmenterRecipe):
    """How a segmenter of whole tomograms is trained: the task ``semantic``."""

    classes: tuple[str, ...] | None = None
    """Whose particles are labelled, the others are background; null: all."""
    merged: bool = True
    """One label for all of them, else one for each."""

    def labels(self, known: tuple[str, ...]) -> SemanticLabels:
        """Labels for a dataset of these classes.

        Raises
        ------
        ValueError
            If the dataset lacks one of the classes.
        """
        missing = [name for name in self.classes or () if name not in known]
        if missing:
            msg = (
                f"tomogram_segmenter.classes names {', '.join(missing)}: the dataset has "
                f"{', '.join(known)}"
            )
            raise ValueError(msg)
        return SemanticLabels.choose(known, self.classes, merged=self.merged)


class StudentRecipe(Config):
    """How a student is distilled, of a classifier or of a segmenter."""

    fit: FitRecipe
    soft: DistillationLoss = LOGITS_APART
    """How the student's logits are compared with the teacher's."""
    weight: float = Field(1.0, ge=0, le=1)
    """Of that against the labels."""
    unlabelled_share: float = Field(0.25, gt=0)
    """Cubes without labels that are shown for each labelled one, where some are given."""
    control: bool = True
    """Also train the same student from labels alone, for comparison."""
    variants: tuple[Literal["bfloat16", "int8"], ...] = ()
    """Siblings in lower precision, made and judged beside it; they need openvino."""


class LiveRecipe(Config):
    """Training on fields that are simulated as it goes on, none of them twice."""

    subtomograms_per_epoch: int = Field(gt=0)


class GeneralisationRecipe(Config):
    """How it is measured whether a segmenter generalises to structures that it never saw."""

    groups: tuple[tuple[str, ...], ...] = ()
    """Homologous structures, which are held out together; a structure in no group is a group of
    its own. Names that the simulation does not use are passed over: a list serves many recipes."""
    control: bool = True
    """Also train with all structures a second time, from another seed: how much two trainings
    differ that saw the same."""

    @model_validator(mode="after")
    def _check(self) -> GeneralisationRecipe:
        names = [name for group in self.groups for name in group]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            msg = f"generalisation.groups names {', '.join(twice)} twice: expected disjoint groups"
            raise ValueError(msg)
        return self


class Recipe(Config):
    """The whole road: what is simulated, and how segmenter, teacher and student are trained."""

    description: str
    simulation: SimulationRecipe
    live: LiveRecipe | None = None
    """Trainings take live data; the dataset's train split is not used, and may be left out of
    ``simulation.fields``. null: they take that split."""
    segmenter: SegmenterRecipe
    teacher: FitRecipe
    student: StudentRecipe
    tomogram_segmenter: TomogramSegmenterRecipe | None = None
    """null: none is trained."""
    student_segmenter: StudentRecipe | None = None
    """For a teacher that is a segmenter of either task; null: none is distilled."""
    generalisation: GeneralisationRecipe = GeneralisationRecipe()

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        missing = [name for name in ("validation", "test") if name not in self.simulation.fields]
        if self.live is not None and missing:
            msg = (
                f"live is given, but simulation.fields names no {' and no '.join(missing)}: live "
                f"data only train, add fields on which networks are validated and judged"
            )
            raise ValueError(msg)
        return self

    def with_seed(self, seed: int) -> Recipe:
        """The recipe with another seed for the simulation and for every training."""
        update = {"seed": seed}
        sections: dict[str, Config] = {
            "simulation": self.simulation.model_copy(update=update),
            "teacher": self.teacher.model_copy(update=update),
        }
        for name in ("segmenter", "student", "tomogram_segmenter", "student_segmenter"):
            section = getattr(self, name)
            if section is not None:
                fit = section.fit.model_copy(update=update)
                sections[name] = section.model_copy(update={"fit": fit})
        return self.model_copy(update=sections)


def load_recipe(name_or_path: str) -> Recipe:
    """Recipe of a name under which cectflow brings one, or of one's own YAML file.

    Raises
    ------
    ValueError
        If the name is unknown (the message lists the known ones), or the file is not valid.
    """
    return Recipe.from_yaml(find_named_file(name_or_path, "recipes"))
