"""ModelCard: what a network expects of its input and what is known of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, model_validator

import cectflow
from cectflow.config import Config

__all__ = [
    "Contrast",
    "Cost",
    "CtfCorrection",
    "Masking",
    "ModelCard",
    "Picking",
    "Role",
    "Score",
    "Task",
    "Timing",
    "Trust",
    "TypicalLogits",
    "UnknownScore",
    "Variant",
    "VariantFigures",
    "refuse_newer_schema",
]

Role = Literal["segmenter", "teacher", "student"]
Task = Literal["classify", "target", "semantic"]
Contrast = Literal["dark", "light"]
CtfCorrection = Literal["none", "phase_flip", "premultiplied", "wiener"]
UnknownScore = Literal["distance", "energy", "max_logit"]
Variant = Literal["float32", "bfloat16", "int8"]
"""Arithmetic of a network behind its normalisation, which is float32 in all of them."""

CARD_FILE = "card.json"
CARD_SCHEMA = 1
"""Newest ``schema_version`` that is read, and the one that is written."""


class Score(Config):
    """A figure measured on the test split, with its 95 % interval from a bootstrap over fields."""

    value: float
    low: float
    high: float


class Timing(Config):
    """How fast one runtime is with batches of one size, after a warm-up."""

    runtime: str
    variant: Variant = "float32"
    device: str
    threads: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    calls: int = Field(ge=1)
    latency_ms: float = Field(gt=0)
    """Median of a call with one batch."""
    latency_ms_low: float = Field(gt=0)
    """Lower quartile."""
    latency_ms_high: float = Field(gt=0)
    """Upper quartile."""
    subtomograms_per_s: float = Field(gt=0)
    """At the median."""
    peak_memory_mb: float | None = None
    """Of a process that does nothing else, interpreter and libraries included; None: not
    measured."""


class Cost(Config):
    """What one subtomogram costs; the latency holds for the named device and threads only."""

    parameters: int = Field(ge=0)
    macs: int = Field(ge=0)
    """Multiply-accumulate operations of one subtomogram."""
    subtomograms_per_s: float = Field(gt=0)
    batch_size: int = Field(ge=1)
    device: str
    threads: int = Field(ge=1)
    weights_bytes: dict[str, int] = Field(default_factory=dict)
    """File of the model folder → its size."""
    timings: tuple[Timing, ...] = ()


class VariantFigures(Config):
    """What a sibling in lower precision loses and gains, measured against its float32 network."""

    score: Score
    """Accuracy, or foreground IoU, on the test split."""
    difference: Score
    """The variant's score less that of float32 on the same subtomograms, paired over fields."""
    parity: float
    """Largest absolute difference between its logits and those of float32."""
    agreement: float | None = Field(None, ge=0, le=1)
    """Of classifiers, the share of test subtomograms that it and float32 call the same."""
    speedup: float = Field(gt=0)
    """Subtomograms per second over those of float32 in the same runtime, by turns."""
    runtime: str
    threads: int = Field(ge=1)


class Masking(Config):
    """Whose outlines took the neighbours out of cubes."""

    segmenter: str
    """As outputs call it, such as ``cectflow-segmenter/3``."""
    card_digest: str
    """Of its card, scores included: no two trainings share it."""


class Picking(Config):
    """Which picks of a semantic segmenter are particles, measured on its validation fields."""

    min_score: float = Field(ge=0, le=1)
    """Of the worst pick that is kept: where F1, whatever the classes, is highest."""
    radius: float = Field(gt=0)
    """Å, of the smallest class's structure: a pick within half of it is a hit."""
    particles: int = Field(ge=1)
    """True ones in those fields, but for those that a face may cut."""
    precision: float
    recall: float


class TypicalLogits(Config):
    """Where the logits of a classifier's validation cubes lie."""

    centres: tuple[tuple[float, ...], ...]
    """Mean logits over the cubes of each class that has some."""
    spread: tuple[float, ...]
    """Standard deviation of each logit about them."""


class Trust(Config):
    """How sure a classifier may be of its classes: from its validation cubes, judged on test."""

    temperature: float = Field(gt=0)
    """Of the softmax that gives calibrated probabilities."""
    ece_before: float = Field(ge=0, le=1)
    """Expected calibration error on the test split without the temperature."""
    ece_after: float = Field(ge=0, le=1)
    """And with it."""
    typical: TypicalLogits
    unknown_score: UnknownScore
    """What of the logits is compared with the threshold: :func:`cectflow.trust.score_known`."""
    unknown_threshold: float
    """Below it a cube is ``unknown``: 95 % of the validation cubes are not."""
    true_positive_rate: Score
    """Share of the test cubes, all of them of known classes, that are not ``unknown``."""
    validation_cubes: int = Field(ge=1)


class ModelCard(Config):
    """The contract between a network and the data it is shown; prediction enforces it."""

    added_later: ClassVar[frozenset[str]] = frozenset({"spectrum"})
    schema_version: Literal[1] = 1
    role: Role
    task: Task
    network: str
    """Catalogue name."""
    num_outputs: int = Field(ge=2)
    """Channels of the logits: classes of a classifier; background and labels of a segmenter."""
    classes: tuple[str, ...]
    """Class names; ``class_id`` counts from 1: 0 is background in voxel labels. Of a semantic
    segmenter those whose particles it labels; all other particles are background to it."""
    labels: tuple[str, ...] = ()
    """Names of a semantic segmenter's outputs from 1 on: its classes, or one for all of them."""
    box: int = Field(ge=1)
    """Edge of the cube in voxels."""
    voxel_size: float = Field(gt=0)
    """In angstrom."""
    contrast: Contrast = "dark"
    """Of the input that the network expects; ``dark``: protein darker than its surroundings."""
    normalisation: Literal["cube", "tomogram"] = "cube"
    """``cube``: zero mean, unit variance per cube, computed inside the exported graph.
    ``tomogram`` (semantic segmenters): whoever runs the network shows it
    ``(value - median) / robust standard deviation`` of the whole tomogram, constant padding
    excluded (:func:`cectflow.subtomogram.robust_statistics`)."""
    ctf_correction: CtfCorrection
    tilt_range: tuple[float, float]
    """Lowest and highest tilt in degrees."""
    tilt_axis: Literal["y"] = "y"
    snr_stage: str
    snr: tuple[float, float] | None
    """Requested full-band range of the training data; None: noise-free or unknown."""
    snr_60: float | None = None
    """Mean measured SNR of the training fields, low-passed to 60 angstrom; None: noise-free."""
    noise_spectrum: str
    spectrum: tuple[float, ...] | None = None
    """Mean power per shell of the validation cubes, each at zero mean and unit variance
    (:class:`cectflow.spectrum.PowerSum`); None: unknown."""
    occupancy: float | None
    """Requested fraction of the field's volume; None: unknown."""
    jitter: float
    """Largest offset of the target from the box centre along each axis, in angstrom."""
    masking: Masking | None = None
    """Of the cubes that a classifier was trained on; None: they had their neighbours."""
    dataset_digest: str
    """Of the dataset folder on which the network was trained, validated and judged."""
    live_digest: str | None = None
    """Of the live data on which it was trained instead; None: on the folder's train split."""
    unlabelled_digest: str | None = None
    """Of the cubes without labels that a student was shown beside them; None: of none."""
    recipe_digest: str
    commit: str
    """Of cectflow; ``unknown`` outside a git checkout."""
    epochs: int = 0
    """After which the weights were taken: the best epoch."""
    scores: dict[str, Score] = Field(default_factory=dict)
    baselines: dict[str, float] = Field(default_factory=dict)
    """Scores of trivial methods on the same test split."""
    picking: Picking | None = None
    """Of a semantic segmenter; None: not measured."""
    trust: Trust | None = None
    """Of a classifier; None: its probabilities are not calibrated, and nothing is ``unknown``."""
    cost: Cost | None = None
    parity: float | None = None
    """Largest absolute difference between the logits of model.pt2 and of model.onnx."""
    variants: dict[Variant, VariantFigures] = Field(default_factory=dict)
    """Siblings in lower precision, which prediction uses only if asked to."""
    teacher: str | None = None
    """URI of the teacher's version, for students; of an ensemble all, joined by commas."""

    @model_validator(mode="after")
    def _check_spectrum(self) -> ModelCard:
        if self.spectrum is not None:
            from cectflow.spectrum import num_shells  # NumPy, which a card does without

            expected = num_shells(self.box)
            if len(self.spectrum) != expected:
                msg = (
                    f"spectrum has {len(self.spectrum)} shells: a box of {self.box} has {expected}"
                )
                raise ValueError(msg)
            if not all(0 <= power < math.inf for power in self.spectrum) or not any(self.spectrum):
                msg = (
                    "spectrum holds the power per shell: expected finite numbers from 0, not all 0"
                )
                raise ValueError(msg)
        return self

    @classmethod
    def from_folder(cls, folder: Path) -> ModelCard:
        """Card of a model folder.

        Raises
        ------
        FileNotFoundError
            If the folder holds no card.
        ValueError
            If the card is not valid, or of a newer schema than this cectflow knows.
        """
        path = folder / CARD_FILE
        if not path.is_file():
            msg = f"{folder} holds no {CARD_FILE}: expected a model folder (pt2, onnx, card.json)"
            raise FileNotFoundError(msg)
        text = path.read_text(encoding="utf-8")
        refuse_newer_schema(text, path, CARD_SCHEMA, "card")
        return cls.from_json(text, source=str(path))


def refuse_newer_schema(text: str, path: Path, known: int, kind: str) -> None:
    """Refuse a JSON file of a newer schema before its fields are read, which may be others.

    Raises
    ------
    ValueError
        With the schema given and the newest that is known.
    """
    try:
        content = json.loads(text)
    except ValueError:
        return  # for whoever reads the fields to describe
    given = content.get("schema_version") if isinstance(content, dict) else None
    if isinstance(given, int) and given > known:
        msg = (
            f"{path} is a {kind} of schema {given}, cectflow {cectflow.__version__} knows schemas "
            f"up to {known}: install the cectflow that wrote it (pip install --upgrade cectflow), "
            f"or ask for an older version of the model"
        )
        raise ValueError(msg)
