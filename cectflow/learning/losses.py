"""Losses: what is differentiated. Each is a mean over the batch."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["soft_dice_loss", "softened_kl", "voxel_cross_entropy"]


def voxel_cross_entropy(
    logits: Float[Tensor, "n c z y x"], labels: Int[Tensor, "n z y x"]
) -> Float[Tensor, ""]:
    """Cross entropy averaged over all voxels.

    Parameters
    ----------
    logits
        Unnormalised scores of c classes, 0 = background.
    labels
        Class of every voxel.
    """
    return F.cross_entropy(logits, labels)


def soft_dice_loss(
    logits: Float[Tensor, "n 2 z y x"], foreground: Int[Tensor, "n z y x"]
) -> Float[Tensor, ""]:
    """One minus the soft Dice of the foreground, averaged over cubes (Milletari et al. 2016).

    Parameters
    ----------
    logits
        Of background and foreground.
    foreground
        1 in the foreground, 0 elsewhere. A perfect, confident prediction has loss 0.
    """
    probability = logits.softmax(dim=1)[:, 1]
    truth = foreground.to(probability.dtype)
    axes = (1, 2, 3)
    overlap = (probability * truth).sum(dim=axes)
    size = probability.sum(dim=axes) + truth.sum(dim=axes)
    # One voxel in numerator and denominator: an empty truth with an empty prediction agrees.
    return (1.0 - (2.0 * overlap + 1.0) / (size + 1.0)).mean()


def softened_kl(
    logits: Float[Tensor, "n c *voxels"],
    teacher_logits: Float[Tensor, "n c *voxels"],
    temperature: float,
) -> Float[Tensor, ""]:
    """Kullback-Leibler divergence of the student from the teacher, both softened, times T².

    Hinton, Vinyals and Dean 2015 (arXiv 1503.02531), section 2; T² keeps the gradient's size.

    Parameters
    ----------
    logits, teacher_logits
        Of student and teacher. Equal logits have divergence 0.
    temperature
        T > 0 divides both.
    """
    student = F.log_softmax(logits / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits / temperature, dim=1)
    divergence = (teacher.exp() * (teacher - student)).sum(dim=1)
    return divergence.mean() * temperature**2
