"""The manifest of a dataset folder: what it holds, what was measured of it, where it came from.

``manifest.json`` has a record of every shard, with the digests of its files, and of every field.
The data themselves are read by :mod:`cectflow.dataset`.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from cectflow.config import Config
from cectflow.files import replacing
from cectflow.model_card import Contrast, CtfCorrection, Masking
from cectflow.volume import TRUTH_ENDINGS

__all__ = [
    "JUNK_CLASS",
    "MANIFEST_FILE",
    "SPLITS",
    "STACK_KINDS",
    "FieldRecord",
    "Manifest",
    "ShardRecord",
    "SplitName",
    "read_manifest",
]

SplitName = Literal["train", "validation", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")
JUNK_CLASS = "junk"
"""Last class of a dataset that has it: cubes about no particle, which need no target."""
MANIFEST_FILE = "manifest.json"
STACK_KINDS = ("", *TRUTH_ENDINGS)
"""What the names of a shard's stacks end in: its cubes, and what each of their voxels is."""


class FieldRecord(Config):
    """What was measured of one field, or of one tomogram of imported data."""

    field: str
    """Identifies the field within the dataset: targets of one field share neighbours and noise."""
    mean: float
    std: float
    median: float | None = None
    robust_std: float | None = None
    """1.4826 times the median absolute deviation; both None where they were not measured."""
    defocus_um: float | None = None
    drawn: dict[str, float] = Field(default_factory=dict)
    """Name → value of what microscope and tilts may give as a range."""
    requested_snr: float | None = None
    snr: float | None = None
    """Measured where ``snr_stage`` defines it, full band; None when noise-free or unknown."""
    snr_reconstruction: float | None = None
    """Measured in the reconstruction, full band."""
    snr_60: float | None = None
    """Measured in the reconstruction, low-passed to 60 Å."""
    noise_std: float | None = None
    """Measured standard deviation of the noise in the reconstruction; None as for ``snr``."""
    occupancy: float | None = None
    num_particles: int | None = None


class ShardRecord(Config):
    """One shard: how many subtomograms, of which fields, and the digests of its files."""

    name: str
    """``split/NNNNN``, a path without ending below the dataset folder."""
    count: int = Field(ge=0)
    fields: tuple[FieldRecord, ...]
    sha256: dict[str, str]
    """File name → digest."""


class Manifest(Config):
    """What a dataset folder holds and where it came from."""

    schema_version: Literal[1] = 1
    kind: Literal["simulated", "imported"]
    recipe: dict[str, Any] = Field(default_factory=dict)
    """The simulation's recipe, complete; of imported data the options of the import."""
    recipe_digest: str
    sources: dict[str, str] = Field(default_factory=dict)
    """Structure or file name → sha256."""
    commit: str = "unknown"
    classes: tuple[str, ...]
    """``class_id`` counts from 1 in this order."""
    left_out: tuple[str, ...] = ()
    """Classes of which the simulation placed no particle, though its recipe has them."""
    box: int = Field(ge=1)
    voxel_size: float = Field(gt=0)
    contrast: Contrast = "dark"
    ctf_correction: CtfCorrection = "none"
    tilt_range: tuple[float, float] = (-60.0, 60.0)
    snr_stage: str = "unknown"
    snr: tuple[float, float] | None = None
    noise_spectrum: str = "unknown"
    occupancy: float | None = None
    masses_kda: dict[str, float] = Field(default_factory=dict)
    """Class name → mass of the structure, of simulated data."""
    jitter: float = 0.0
    masking: Masking | None = None
    """Whose outlines took the neighbours out of the cubes; None: they are there."""
    masked_from: str | None = None
    """Content digest of the dataset whose cubes were masked."""
    has_voxel_labels: bool
    planned_shards: dict[str, int]
    """Split → number of shards when complete."""
    shards: dict[str, tuple[ShardRecord, ...]]
    """Split → finished shards, in the order of their names."""
    live_subtomograms: int | None = Field(None, ge=1)
    """Of a training's every epoch, where they are simulated as it goes on and lie in no shard."""

    @property
    def is_complete(self) -> bool:
        """Whether every planned shard is finished."""
        return all(
            len(self.shards.get(split, ())) == count for split, count in self.planned_shards.items()
        )

    def count(self, split: str) -> int:
        """Number of subtomograms of a split."""
        return sum(shard.count for shard in self.shards.get(split, ()))

    def field_records(self, split: str) -> tuple[FieldRecord, ...]:
        """Records of all fields of a split."""
        return tuple(field for shard in self.shards.get(split, ()) for field in shard.fields)

    def mean_snr_60(self, split: str = "train") -> float | None:
        """Mean measured SNR after a low-pass to 60 Å; None if no field states one."""
        measured = [f.snr_60 for f in self.field_records(split) if f.snr_60 is not None]
        return float(np.mean(measured)) if measured else None

    def content_digest(self) -> str:
        """Name of the data: sha256 over the digests of all shards, or the recipe of live data."""
        if self.live_subtomograms is not None:
            content = f"live/{self.recipe_digest}/{self.live_subtomograms}"
            return hashlib.sha256(content.encode()).hexdigest()
        lines = [
            f"{split}/{name} {digest}"
            for split in sorted(self.shards)
            for shard in self.shards[split]
            for name, digest in sorted(shard.sha256.items())
        ]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def facts(self) -> dict[str, Any]:
        """All but the shards, with the content digest and the number of subtomograms; for JSON."""
        facts: dict[str, Any] = self.model_dump(mode="json", exclude={"shards"})
        counts = {split: self.count(split) for split in self.shards}
        return facts | {"content_digest": self.content_digest(), "subtomograms": counts}

    def write(self, folder: Path) -> None:
        """Write ``manifest.json`` atomically."""
        with replacing(folder / MANIFEST_FILE, overwrite=True) as temporary:
            temporary.write_text(self.to_json(), encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """Manifest of a dataset folder, complete or not.

    Raises
    ------
    FileNotFoundError
        If the folder has no manifest.
    ValueError
        If the manifest is not valid.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file():
        msg = (
            f"{folder} is no dataset folder: it has no {MANIFEST_FILE}; "
            f"make one with `cectflow simulate dataset` or `cectflow dataset import`"
        )
        raise FileNotFoundError(msg)
    return Manifest.from_json(path.read_text(encoding="utf-8"), source=str(path))
