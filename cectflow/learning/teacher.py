"""Teachers: what a student asks, one network or several, and the answers that are kept."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from cectflow.dataset import Batch, BatchSource
from cectflow.files import replacing
from cectflow.learning.augmentation import turned_batch
from cectflow.networks.embedding import embed
from cectflow.progress import track
from cectflow.runtime import Program

__all__ = ["KnownLogits", "LogitTable", "Teacher"]


class Teacher:
    """One network or several of one task, which answer together.

    The logits of an ensemble are the mean of its members': the geometric mean of their
    distributions, one of the two that Hinton, Vinyals and Dean 2015 (arXiv 1503.02531) name.

    Parameters
    ----------
    members
        Networks in evaluation mode, or programs of model folders; not part of a student's weights.
    """

    def __init__(self, *members: nn.Module | Program) -> None:
        self.members = members

    def __call__(self, cubes: Float[Tensor, "n 1 z y x"]) -> Float[Tensor, "n c *voxels"]:
        """Logits, without gradient."""
        with torch.no_grad():
            return torch.stack([member(cubes) for member in self.members]).mean(dim=0)

    def embed(
        self, cubes: Float[Tensor, "n 1 z y x"]
    ) -> tuple[Float[Tensor, "n c"], Float[Tensor, "n features"]]:
        """Logits, and the members' embeddings side by side, each of length 1: none outweighs."""
        with torch.no_grad():
            networks = [m.network if isinstance(m, Program) else m for m in self.members]
            logits, features = zip(*(embed(network, cubes) for network in networks), strict=True)
            together = torch.cat([F.normalize(f.flatten(1), dim=1) for f in features], dim=1)
            return torch.stack(logits).mean(dim=0), together


@dataclass(frozen=True, eq=False)
class LogitTable:
    """Logits of known views.

    Attributes
    ----------
    views
        In ascending order.
    logits
        Of each.
    """

    views: Int[Tensor, " view"]
    logits: Float[Tensor, "view class"]

    def __call__(self, views: Int[Tensor, " n"]) -> Float[Tensor, "n class"]:
        """Logits of these views."""
        return self.logits[torch.searchsorted(self.views, views)]


@dataclass(frozen=True, eq=False)
class KnownLogits:
    """A teacher's logits of every view of a few sources, computed at the first question.

    A turned cube is one of at most four views, so a training of many epochs would ask the teacher
    the same questions over and over. To another process it passes as the table of its answers, so
    that several ask but once.

    Attributes
    ----------
    teacher
        Cubes → logits ``(n, class)``.
    sources
        Each with the turns in which its cubes will be shown.
    batch_size, device
        How the teacher is asked; always in the same order, so that the answers are the same.
    store
        File (``.npz``) that keeps the answers for the next training; None: they are not kept. One
        of another teacher or of other data is replaced.
    identity
        Of the teacher and the data, written into the file and compared with it.
    """

    teacher: Teacher
    sources: Sequence[tuple[BatchSource, tuple[str, ...]]]
    batch_size: int
    device: torch.device
    store: Path | None = None
    identity: str = ""

    def __call__(self, views: Int[Tensor, " n"]) -> Float[Tensor, "n class"]:
        """Logits of these views, on the CPU."""
        return self._table(views)

    def __reduce__(self) -> tuple[type[LogitTable], tuple[Tensor, Tensor]]:
        return LogitTable, (self._table.views, self._table.logits)

    @cached_property
    def _table(self) -> LogitTable:
        """All views, and the logits of each."""
        known, logits = self._stored()
        passes = [(source, axis) for source, turns in self.sources for axis in turns]
        for source, axis in track(passes, total=len(passes), title="asking the teacher"):
            asked = [
                self._ask(turned_batch(batch, axis), known)
                for batch in source.batches(self.batch_size)
            ]
            found = [answer for answer in asked if answer is not None]
            if not found:
                continue
            new_views, new_logits = (torch.cat(parts) for parts in zip(*found, strict=True))
            order = torch.cat([known, new_views]).argsort()
            known = torch.cat([known, new_views])[order]
            logits = torch.cat([logits.reshape(-1, new_logits.shape[1]), new_logits])[order]
            self._keep(known, logits)
        return LogitTable(known, logits)

    def _ask(self, batch: Batch, known: Tensor) -> tuple[Tensor, Tensor] | None:
        """Views of a batch that are not known yet, and what the teacher says of them."""
        assert batch.views is not None
        new = ~torch.isin(batch.views, known)
        if not new.any():
            return None
        logits = self.teacher(batch.subtomograms[new].to(self.device)).float().cpu()
        return batch.views[new], logits

    def _stored(self) -> tuple[Tensor, Tensor]:
        """Answers that an earlier training kept; none if they are of something else."""
        if self.store is not None and self.store.is_file():
            with np.load(self.store, allow_pickle=False) as kept:
                if str(kept["identity"]) == self.identity:
                    return torch.from_numpy(kept["views"]), torch.from_numpy(kept["logits"])
        return torch.empty(0, dtype=torch.int64), torch.empty(0, 0)

    def _keep(self, known: Tensor, logits: Tensor) -> None:
        """Write the answers so far: whoever is interrupted asks for the rest only."""
        if self.store is None:
            return
        try:
            self.store.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.store, overwrite=True) as temporary, temporary.open("wb") as file:
                np.savez(
                    file, identity=np.array(self.identity), views=known.numpy(),
                    logits=logits.numpy(),
                )  # fmt: skip
        except OSError as error:  # others' data may not be written to
            warnings.warn(f"the teacher's answers are not kept: {error}", stacklevel=2)
