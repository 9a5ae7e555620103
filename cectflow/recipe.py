"""Recipe: one complete, named configuration of the whole road, and the reading of it by name."""

from __future__ import annotations

from pydantic import Field

from cectflow.config import Config, find_named_file
from cectflow.learning.fit import FitRecipe
from cectflow.learning.objective import DistillMethod
from cectflow.simulation.recipe import SimulationRecipe

__all__ = ["Recipe", "SegmenterRecipe", "StudentRecipe", "load_recipe"]


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


class Recipe(Config):
    """The whole road: what is simulated, and how segmenter, teacher and student are trained."""

    description: str
    simulation: SimulationRecipe
    segmenter: SegmenterRecipe
    teacher: FitRecipe
    student: StudentRecipe


def load_recipe(name_or_path: str) -> Recipe:
    """Recipe of a name under which cectflow brings one, or of one's own YAML file.

    Raises
    ------
    ValueError
        If the name is unknown (the message lists the known ones), or the file is not valid.
    """
    return Recipe.from_yaml(find_named_file(name_or_path, "recipes"))
