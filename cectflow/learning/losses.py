"""Losses: what is differentiated. Each is a mean over the batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor

from cectflow.config import Config

__all__ = [
    "CROSS_ENTROPY",
    "LOGITS_APART",
    "DistillationLoss",
    "SegmentationLoss",
    "decoupled_kl",
    "focal_loss",
    "similarity_difference",
    "soft_tversky_loss",
    "softened_kl",
    "voxel_cross_entropy",
]

SMOOTHING = 0.5
"""Voxels added to numerator and denominator of the Tversky index: it bounds the gradient where a
particle has only a few. With equal weights it is the usual one voxel of soft Dice."""


class SegmentationLoss(Config):
    """Sum of losses, each with its weight: ``{cross_entropy: 1.0, dice: 1.0}``.

    Cross entropy alone is paper (a)'s. Dice and Tversky weigh a small particle like a large one,
    Tversky also misses against false alarms, and focal loss leaves easy voxels out of the count.
    """

    cross_entropy: float = Field(0.0, ge=0)
    """Weight; see :func:`voxel_cross_entropy`."""
    dice: float = Field(0.0, ge=0)
    """Weight; :func:`soft_tversky_loss` with 0.5 and 0.5."""
    tversky: float = Field(0.0, ge=0)
    """Weight; :func:`soft_tversky_loss`."""
    focal: float = Field(0.0, ge=0)
    """Weight; :func:`focal_loss`."""
    false_positives: float = Field(0.3, ge=0)
    """Weight of false positive voxels in ``tversky``; Salehi et al. 2017 found 0.3 best."""
    false_negatives: float = Field(0.7, ge=0)
    """Weight of false negative voxels in ``tversky``."""
    gamma: float = Field(2.0, ge=0)
    """Exponent of ``focal``; 0, or at least 1; Lin et al. 2017 found 2 best."""
    class_weights: tuple[float, ...] | None = None
    """Of background and every label, in ``cross_entropy`` and ``focal``; null: all alike."""

    @model_validator(mode="after")
    def _check(self) -> SegmentationLoss:
        if not any((self.cross_entropy, self.dice, self.tversky, self.focal)):
            msg = "a loss needs a weight above 0 for cross_entropy, dice, tversky or focal"
            raise ValueError(msg)
        if 0 < self.gamma < 1:
            # (1 - p)^gamma then has an infinite slope at p = 1.
            msg = f"gamma is {self.gamma:g}: expected 0, or at least 1"
            raise ValueError(msg)
        if self.tversky and not self.false_positives + self.false_negatives:
            msg = "false_positives and false_negatives are both 0: expected one above 0"
            raise ValueError(msg)
        if self.class_weights is not None and (
            min(self.class_weights, default=0.0) < 0 or not any(self.class_weights)
        ):
            msg = f"class_weights is {self.class_weights}: expected none below 0, and one above"
            raise ValueError(msg)
        return self

    def check_outputs(self, num_outputs: int) -> None:
        """Refuse class weights of another number than there are outputs.

        Raises
        ------
        ValueError
            Naming both numbers.
        """
        if self.class_weights is not None and len(self.class_weights) != num_outputs:
            msg = (
                f"loss.class_weights has {len(self.class_weights)} numbers, the network "
                f"{num_outputs} outputs: give one for the background and one for every label"
            )
            raise ValueError(msg)

    def measure(
        self, logits: Float[Tensor, "n c z y x"], labels: Int[Tensor, "n z y x"]
    ) -> dict[str, Tensor]:
        """Terms that have a weight, unweighted, and ``loss``, their weighted sum."""
        weights = None
        if self.class_weights is not None:
            weights = torch.tensor(self.class_weights, device=logits.device)
        terms: dict[str, Tensor] = {}
        if self.cross_entropy:
            terms["cross_entropy"] = voxel_cross_entropy(logits, labels, weights)
        if self.dice:
            terms["dice"] = soft_tversky_loss(logits, labels)
        if self.tversky:
            terms["tversky"] = soft_tversky_loss(
                logits, labels, self.false_positives, self.false_negatives
            )
        if self.focal:
            terms["focal"] = focal_loss(logits, labels, self.gamma, weights)
        total = torch.stack([getattr(self, name) * term for name, term in terms.items()]).sum()
        return {"loss": total} | (terms if len(terms) > 1 else {})


CROSS_ENTROPY = SegmentationLoss(cross_entropy=1.0)
"""Paper (a)'s loss."""


class DistillationLoss(Config):
    """Sum of what a student is to have in common with its teacher: ``{kl: 1.0, mse: 0.1}``."""

    mse: float = Field(0.0, ge=0)
    """Weight of the mean squared difference of the logits, paper (b)."""
    kl: float = Field(0.0, ge=0)
    """Weight; :func:`softened_kl`."""
    dkd: float = Field(0.0, ge=0)
    """Weight; :func:`decoupled_kl`."""
    hint: float = Field(0.0, ge=0)
    """Weight; :func:`similarity_difference`, of classifiers. Tung and Mori took 3000."""
    temperature: float = Field(2.0, gt=0)
    """Of ``kl`` and ``dkd``."""
    non_target: float = Field(1.0, ge=0)
    """Weight of the other classes in ``dkd``; Zhao et al. took 0.5 to 8."""

    @model_validator(mode="after")
    def _check(self) -> DistillationLoss:
        if not any((self.mse, self.kl, self.dkd, self.hint)):
            msg = "distillation needs a weight above 0 for mse, kl, dkd or hint"
            raise ValueError(msg)
        return self

    def only(self, method: str) -> DistillationLoss:
        """The loss with some of its terms, the others without weight.

        Parameters
        ----------
        method
            One of ``mse``, ``kl``, ``dkd`` and ``hint``, or several joined by ``+``, such as
            ``kl+hint``. A term keeps the weight it has; one that has none gets its usual one.

        Raises
        ------
        ValueError
            If it names another term.
        """
        chosen = method.split("+")
        if not set(chosen) <= USUAL_WEIGHTS.keys():
            known = ", ".join(USUAL_WEIGHTS)
            msg = f"method is {method!r}: expected one of {known}, or several joined by +"
            raise ValueError(msg)
        weights = {
            name: (getattr(self, name) or usual) if name in chosen else 0.0
            for name, usual in USUAL_WEIGHTS.items()
        }
        return self.model_copy(update=weights)

    def measure(
        self,
        logits: Float[Tensor, "n c *voxels"],
        teacher_logits: Float[Tensor, "n c *voxels"],
        truth: Int[Tensor, "n *voxels"],
    ) -> Float[Tensor, ""]:
        """Weighted sum of all but ``hint``, which is of embeddings.

        Parameters
        ----------
        logits, teacher_logits
            Of student and teacher, of cubes or of their voxels.
        truth
            True classes, counted like the logits; where it is negative nobody knows it, and the
            teacher's class takes its place.
        """
        total = logits.new_zeros(())
        if self.mse:
            total = total + self.mse * F.mse_loss(logits, teacher_logits)
        if self.kl:
            total = total + self.kl * softened_kl(logits, teacher_logits, self.temperature)
        if self.dkd:
            known = torch.where(truth < 0, teacher_logits.argmax(dim=1), truth)
            apart = decoupled_kl(logits, teacher_logits, known, self.temperature, self.non_target)
            total = total + self.dkd * apart
        return total


USUAL_WEIGHTS = {"mse": 1.0, "kl": 1.0, "dkd": 1.0, "hint": 3000.0}
"""Of the terms of :class:`DistillationLoss` where nobody says another; of hints it is Tung and
Mori's."""

LOGITS_APART = DistillationLoss(mse=1.0)
"""Paper (b)'s."""


def voxel_cross_entropy(
    logits: Float[Tensor, "n c z y x"],
    labels: Int[Tensor, "n z y x"],
    weights: Float[Tensor, " c"] | None = None,
) -> Float[Tensor, ""]:
    """Cross entropy averaged over all voxels.

    Parameters
    ----------
    logits
        Unnormalised scores of c labels, 0 = background.
    labels
        Label of every voxel.
    weights
        Of each label: the mean over voxels is weighted by those of the true labels.
    """
    return F.cross_entropy(logits, labels, weights)


def soft_tversky_loss(
    logits: Float[Tensor, "n c z y x"],
    labels: Int[Tensor, "n z y x"],
    false_positives: float = 0.5,
    false_negatives: float = 0.5,
) -> Float[Tensor, ""]:
    """One minus the soft Tversky index ``TP / (TP + a FP + b FN)`` of labels in cubes.

    Salehi, Erdogmus and Gholipour 2017 (arXiv 1706.05721), equation 3; with both weights 0.5 it
    is the soft Dice of Milletari, Navab and Ahmadi 2016 (arXiv 1606.04797), without the squares
    of its denominator. The mean is over cubes, and over the labels other than background that the
    truth of a cube has. A label that is absent there is left out of that cube, since an index
    of nothing is 0 for the smallest false alarm; cross entropy or focal loss must answer for
    those. Where no cube has any label the loss is 0, with a gradient of 0.

    Parameters
    ----------
    logits
        Unnormalised scores of c labels, 0 = background.
    labels
        Label of every voxel. A perfect, confident prediction has loss 0.
    false_positives, false_negatives
        The weights a and b.
    """
    probabilities = logits.softmax(dim=1)[:, 1:]
    truth = F.one_hot(labels.long(), logits.shape[1]).movedim(-1, 1)[:, 1:].to(probabilities.dtype)
    axes = (2, 3, 4)
    size = truth.sum(dim=axes)
    hits = (probabilities * truth).sum(dim=axes)
    alarms, misses = probabilities.sum(dim=axes) - hits, size - hits
    wrong = false_positives * alarms + false_negatives * misses
    index = (hits + SMOOTHING) / (hits + wrong + SMOOTHING)
    present = (size > 0).to(index.dtype)
    total: Tensor = ((1.0 - index) * present).sum() / present.sum().clamp(min=1.0)
    return total


def focal_loss(
    logits: Float[Tensor, "n c z y x"],
    labels: Int[Tensor, "n z y x"],
    gamma: float,
    weights: Float[Tensor, " c"] | None = None,
) -> Float[Tensor, ""]:
    """Cross entropy of each voxel times ``(1 - p)^gamma``, p the probability of its true label.

    Lin et al. 2017 (arXiv 1708.02002), equation 5, for several labels. The mean is that of
    :func:`voxel_cross_entropy`, so that both are equal for gamma 0.

    Parameters
    ----------
    logits, labels, weights
        As there.
    gamma
        0, or at least 1: the larger, the less a voxel counts that is right already.
    """
    entropy = F.cross_entropy(logits, labels, reduction="none")
    each = -torch.expm1(-entropy)  # 1 - p, exact near p = 1
    factors = torch.ones_like(entropy) if weights is None else weights[labels.long()]
    total: Tensor = (factors * each**gamma * entropy).sum() / factors.sum()
    return total


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
        Of student and teacher, of cubes or of their voxels. Equal logits have divergence 0.
    temperature
        T > 0 divides both.
    """
    student = F.log_softmax(logits / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits / temperature, dim=1)
    divergence = (teacher.exp() * (teacher - student)).sum(dim=1)
    return divergence.mean() * temperature**2


def decoupled_kl(
    logits: Float[Tensor, "n c *voxels"],
    teacher_logits: Float[Tensor, "n c *voxels"],
    truth: Int[Tensor, "n *voxels"],
    temperature: float,
    non_target: float,
) -> Float[Tensor, ""]:
    """Divergence about the true class, and among the others, weighed apart, times T².

    Zhao et al. 2022 (arXiv 2203.08679), equation 7 with alpha = 1: the divergence of
    :func:`softened_kl` is ``target + (1 - p) * others``, where p is the teacher's probability of
    the true class. A sure teacher thus hides what it knows of the others; here that part keeps a
    weight of its own.

    Parameters
    ----------
    logits, teacher_logits
        Of student and teacher, of cubes or of their voxels.
    truth
        True classes, counted like the logits.
    temperature
        T > 0 divides both.
    non_target
        Weight of what is among the other classes, beta.
    """
    student = F.log_softmax(logits / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits / temperature, dim=1)
    place = truth.unsqueeze(1)
    is_target = torch.zeros_like(student, dtype=torch.bool).scatter(1, place, True)

    def split(logs: Tensor) -> tuple[Tensor, Tensor]:
        """Logarithms of the probability of the true class, and of all others together."""
        others = logs.masked_fill(is_target, -torch.inf).logsumexp(dim=1, keepdim=True)
        return logs.gather(1, place), others

    (student_true, student_others), (teacher_true, teacher_others) = split(student), split(teacher)
    target = teacher_true.exp() * (teacher_true - student_true)
    target = target + teacher_others.exp() * (teacher_others - student_others)
    # The true class leaves before the exponential: its odds may overflow, and what is masked after
    # it would still put NaN into the gradient.
    teacher = (teacher - teacher_others).masked_fill(is_target, -torch.inf)
    difference = (teacher - (student - student_others)).masked_fill(is_target, 0.0)
    others = (teacher.exp() * difference).sum(dim=1, keepdim=True)
    divergence = target + non_target * others
    return divergence.mean() * temperature**2


def similarity_difference(
    embedding: Float[Tensor, "n features"], teacher_embedding: Float[Tensor, "n others"]
) -> Float[Tensor, ""]:
    """How differently student and teacher find the cubes of a batch alike.

    Tung and Mori 2019 (arXiv 1907.09682), equation 4: the mean squared difference of the two
    matrices of inner products between the embeddings of a batch, their rows scaled to length 1.
    Here the embeddings are of length 1 too, so that every cube, and in an ensemble every teacher,
    counts alike. Student and teacher need not have as many features, so nothing has to be learned
    that maps one to the other, as in FitNets (Romero et al. 2015, arXiv 1412.6550).

    Parameters
    ----------
    embedding, teacher_embedding
        Of the same cubes.
    """
    units = (F.normalize(e.float(), dim=1) for e in (embedding, teacher_embedding))
    alike, teacher_alike = (F.normalize(unit @ unit.T, dim=1) for unit in units)
    return F.mse_loss(alike, teacher_alike)
