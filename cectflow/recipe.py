"""Recipe: one complete, named configuration of the whole road, and the reading of it by name."""

from __future__ import annotations

from pydantic import Field, model_validator

from cectflow.config import Config, find_named_file
from cectflow.learning.fit import FitRecipe
from cectflow.learning.objective import DistillMethod
from cectflow.simulation.recipe import SimulationRecipe

__all__ = ["LiveRecipe", "Recipe", "SegmenterRecipe", "StudentRecipe", "load_recipe"]


class SegmenterRecipe(Config):
    """How a segmenter is trained."""

    fit: FitRecipe
    dice_weight: float = Field(0.0, ge=0)
    """Of the soft Dice loss beside the cross entropy; 0 is paper (a)'s."""


class StudentRecipe(Config):
    """How a student is distilled."""

    fit: FitRecipe
    method: DistillMethod = "mse"
    """``mse``: squared difference of the logits, paper (b); ``kl``: softened divergence."""
    weight: float = Field(1.0, ge=0, le=1)
    """Of the teacher's logits against the labels."""
    temperature: float = Field(2.0, gt=0)
    """Of ``kl``."""
    control: bool = True
    """Also train the same student from labels alone, for comparison."""


class LiveRecipe(Config):
    """Training on fields that are simulated as it goes on, none of them twice."""

    subtomograms_per_epoch: int = Field(gt=0)


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


def load_recipe(name_or_path: str) -> Recipe:
    """Recipe of a name under which cectflow brings one, or of one's own YAML file.

    Raises
    ------
    ValueError
        If the name is unknown (the message lists the known ones), or the file is not valid.
    """
    return Recipe.from_yaml(find_named_file(name_or_path, "recipes"))
