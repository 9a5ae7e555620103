"""SimulationRecipe: everything that simulated data depend on, but for the structures' content."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import Field, field_validator, model_validator

from cectflow.config import Config
from cectflow.manifest import SplitName
from cectflow.model_card import CtfCorrection
from cectflow.simulation.distractors import Distractors, Junk
from cectflow.simulation.microscope import Microscope, TiltScheme
from cectflow.simulation.optics import SnrStage

__all__ = ["SimulationRecipe"]

MIN_BLUR = 0.68
"""Voxels: below it a Gaussian is undersampled (design.md, section 4)."""
LEAST_INDEPENDENT_FIELD = 1.6
"""Edge of an independent field over the box: a shorter one lets the CTF's tails come in again."""
INDEPENDENT_FIELDS_PER_SHARD = 100


class SimulationRecipe(Config):
    """Everything that a simulated dataset depends on, but for the structures' content."""

    seed: int = Field(0, ge=0)
    structures: tuple[str, ...] = ("builtin",)
    """``builtin``, files and folders."""
    include: tuple[str, ...] = ()
    """Names of the structures to use, in class order; empty: all of them."""
    box: int = Field(ge=8)
    """Edge of a subtomogram in voxels."""
    voxel_size: float = Field(gt=0)
    """Å."""
    field_shape: tuple[int, int, int]
    """Voxels (z, y, x) of the periodic field from which subtomograms are cut."""
    fields: dict[SplitName, int]
    """Number of fields of each split; splits are made by field."""
    independent: bool = False
    """Each subtomogram has a crowded field of its own: its target is placed first, at the centre,
    and its neighbours around it. False: every particle of a field is a target."""
    fields_per_shard: int | None = Field(None, ge=1)
    """None: 1, or 100 where fields are independent."""
    targets_per_field: int | None = Field(None, ge=1)
    """At most this many subtomograms of a field; None: one for each particle."""
    occupancy: float = Field(gt=0, le=0.4)
    """Molecular volume (1.21 Å³/Da) over the volume of the field."""
    abundances: dict[str, float] = Field(default_factory=dict)
    """Class → relative number of particles; 1 where a class is not named."""
    keep_out: float = Field(0.0, ge=0)
    """Å that stay free between particles beyond what keeps them from overlapping."""
    distractors: Distractors = Distractors()
    """Membranes and gold beads; background in labels, and not part of the SNR."""
    junk: Junk | None = None
    """Adds the last class ``junk``; true: with the shares of :class:`Junk`."""
    blur: float = Field(gt=0)
    """Gaussian sigma in Å of the specimen's density."""
    bead_spacing: float = Field(10.0, gt=0)
    """Å: structures are coarse-grained to beads of this size; 7.5 is finer, and slower."""
    jitter: float = Field(0.0, ge=0)
    """Largest offset in Å of a target from the box centre along each axis; the half voxel by which
    cubes are cut to whole voxels comes on top."""
    label_volume: float = Field(1.5, gt=0)
    """Labelled volume over the molecular volume; 1.5 includes the hydration shell."""
    snr: tuple[float, float] | None
    """Lowest and highest SNR, drawn log-uniformly per field; null: noise-free."""
    snr_stage: SnrStage = "reconstruction"
    """Where that SNR is defined: :func:`~cectflow.simulation.optics.optics_of`."""
    ctf_correction: CtfCorrection = "none"
    microscope: Microscope = Microscope()
    tilts: TiltScheme = TiltScheme()
    num_optics: int | None = Field(None, ge=1)
    """Fields share this many draws of microscope and tilts; null: each field has its own."""

    @field_validator("junk", mode="before")
    @classmethod
    def _switch(cls, value: Any) -> Any:
        if isinstance(value, bool):
            return Junk() if value else None
        return value

    @model_validator(mode="after")
    def _check(self) -> SimulationRecipe:
        if self.snr is not None and not 0 < self.snr[0] <= self.snr[1]:
            msg = f"snr is {self.snr}: expected 0 < lowest <= highest, or null for noise-free"
            raise ValueError(msg)
        if self.blur / self.voxel_size < MIN_BLUR - 1e-9:  # 0.68 * 10 is not 6.8
            msg = (
                f"blur is {self.blur:g} Å: expected at least {MIN_BLUR} voxel, "
                f"{MIN_BLUR * self.voxel_size:.2f} Å at {self.voxel_size:g} Å per voxel"
            )
            raise ValueError(msg)
        if self.box > min(self.field_shape):
            msg = f"box {self.box} is larger than the field {self.field_shape}: enlarge the field"
            raise ValueError(msg)
        plain = self.ctf_correction == "none" and self.microscope.noise_spectrum == "white"
        if self.snr_stage == "aitom" and not plain:
            msg = (
                f"snr_stage aitom with ctf_correction {self.ctf_correction} and noise_spectrum "
                f"{self.microscope.noise_spectrum_name}: expected none and white, that "
                f"laboratory's recipe has no others; use snr_stage reconstruction or projection"
            )
            raise ValueError(msg)
        if not self.fields or any(count < 1 for count in self.fields.values()):
            msg = f"fields is {self.fields}: expected at least one field in each split named"
            raise ValueError(msg)
        self._check_scene()
        return self

    def _check_scene(self) -> None:
        if any(not 0 <= share < np.inf for share in self.abundances.values()):
            msg = f"abundances is {self.abundances}: expected finite numbers of 0 or more"
            raise ValueError(msg)
        edge = min(self.field_shape)
        if self.distractors.largest > edge * self.voxel_size:
            msg = (
                f"distractors reach {self.distractors.largest:.0f} Å across, the field only "
                f"{edge * self.voxel_size:.0f} Å: make them smaller or enlarge the field"
            )
            raise ValueError(msg)
        if self.independent and edge < LEAST_INDEPENDENT_FIELD * self.box - 1e-9:
            msg = (
                f"field_shape is {self.field_shape}: an independent field of a box of {self.box} "
                f"needs edges of at least {LEAST_INDEPENDENT_FIELD:g} times the box, "
                f"{int(np.ceil(LEAST_INDEPENDENT_FIELD * self.box - 1e-9))} voxels"
            )
            raise ValueError(msg)
        if self.independent and self.targets_per_field is not None:
            msg = "targets_per_field is given: an independent field has one target, leave it out"
            raise ValueError(msg)
        if self.junk is None:
            return
        present = self.distractors
        for kind, number in (
            ("membrane", present.vesicles + present.sheets),
            ("gold", present.gold),
        ):
            if getattr(self.junk, kind) and not number:
                msg = (
                    f"junk.{kind} is {getattr(self.junk, kind):g}, but distractors has none: "
                    f"give their number in distractors, or set junk.{kind} to 0"
                )
                raise ValueError(msg)

    @property
    def room(self) -> float:
        """Å that a structure may be across to fit the box wherever the jitter puts it."""
        return self.box * self.voxel_size - 2.0 * self.jitter

    def shards_of(self, split: SplitName) -> int:
        """Number of shards of a split."""
        return -(-self.fields.get(split, 0) // self._fields_per_shard)

    def fields_of(self, split: SplitName, shard: int) -> range:
        """Numbers of the fields that a shard of a split holds."""
        first = shard * self._fields_per_shard
        return range(first, min(first + self._fields_per_shard, self.fields.get(split, 0)))

    @property
    def _fields_per_shard(self) -> int:
        if self.fields_per_shard is not None:
            return self.fields_per_shard
        return INDEPENDENT_FIELDS_PER_SHARD if self.independent else 1
