"""fit: the one training loop, for segmenters, teachers and students alike."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision
from pydantic import Field
from torch import Tensor, nn

from cectflow.config import Config
from cectflow.dataset import BatchSource
from cectflow.execution import track
from cectflow.learning.augmentation import augment
from cectflow.learning.objective import Objective
from cectflow.turns import allowed_turns

__all__ = ["Device", "FitRecipe", "FitResult", "Log", "Precision", "fit", "open_fabric"]

Log = Callable[[Mapping[str, float], int], None]
Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]

CHECKPOINT_FILE = "last.pt"
BEST_FILE = "best.pt"
WARM_UP = 0.05
"""Fraction of all steps over which the learning rate rises linearly."""


class FitRecipe(Config):
    """How a network is trained."""

    network: str
    """Catalogue name."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Of the network, beyond outputs and box."""
    epochs: int = Field(gt=0)
    """Passes over the training split at most."""
    batch_size: int = Field(gt=0)
    learning_rate: float = Field(gt=0)
    """Peak of the schedule: linear warm-up over 5 % of the steps, then a cosine to zero."""
    optimiser: Literal["adam", "sgd"] = "adam"
    """``adam``: AdamW; ``sgd``: momentum 0.9, Nesterov (paper (b))."""
    weight_decay: float = Field(1e-4, ge=0)
    patience: int = Field(20, gt=0)
    """Epochs without a better validation score after which training stops."""
    augment: bool = True
    """Half turns that keep the missing wedge and the hand."""
    seed: int = Field(0, ge=0)


@dataclass
class FitResult:
    """What a training gave; the network holds the weights of the best epoch."""

    best_epoch: int
    best_score: float
    best_loss: float
    history: list[dict[str, float]] = field(default_factory=list)
    """One row per epoch: loss terms of training, scores of validation, learning rate, seconds."""


def open_fabric(device: Device = "auto", precision: Precision = "auto") -> Fabric:
    """Fabric for a device.

    Parameters
    ----------
    device
        ``auto`` is a GPU where there is one.
    precision
        ``auto`` is bfloat16 on a GPU that supports it, else float32.

    Raises
    ------
    ValueError
        If ``cuda`` is asked for and absent, or float16 is asked for on a CPU.
    """
    if device == "cuda" and not torch.cuda.is_available():
        msg = "device is 'cuda', but torch sees no CUDA device: use --device cpu or auto"
        raise ValueError(msg)
    accelerator = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    if precision == "auto":
        native = accelerator == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bfloat16" if native else "float32"
    if precision == "float16" and accelerator == "cpu":
        msg = "precision float16 needs a GPU: use float32 or bfloat16 on a CPU"
        raise ValueError(msg)
    if precision == "float32":
        return Fabric(accelerator=accelerator, devices=1, precision="32-true")
    name: Literal["bf16-mixed", "16-mixed"] = (
        "bf16-mixed" if precision == "bfloat16" else "16-mixed"
    )
    return Fabric(accelerator=accelerator, devices=1, plugins=_MixedInside(name, accelerator))


def fit(
    network: nn.Module,
    objective: Objective,
    train: BatchSource,
    validation: BatchSource,
    recipe: FitRecipe,
    *,
    fabric: Fabric,
    folder: Path,
    log: Log,
    provenance: Mapping[str, str] | None = None,
) -> FitResult:
    """Train a network in place and load its best weights.

    A checkpoint is written after every epoch; a second call with the same folder goes on from it
    and ends, on the same device and precision, with the weights of an uninterrupted training.

    Parameters
    ----------
    network
        Cubes → logits.
    objective
        What it learns.
    train, validation
        Validation chooses the epoch and stops the training; it never changes the weights.
    recipe
        How.
    fabric
        Device and precision.
    folder
        For ``last.pt`` and ``best.pt``.
    log
        Called once per epoch with metrics and the epoch, from 1; for those of the checkpoint at
        once, so that whoever listens has them all.
    provenance
        What else the weights come from, such as the teacher: name → identity.

    Raises
    ------
    ValueError
        If the folder's checkpoint is of another recipe, objective, dataset or provenance, or the
        loss is no longer finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    origin = {
        "recipe": recipe.digest(),
        "objective": repr(objective),
        "dataset": f"{train.manifest.content_digest()} {validation.manifest.content_digest()}",
        **(provenance or {}),
    }
    if isinstance(fabric.strategy.precision, _MixedInside) and fabric.device.type == "cpu":
        _refuse_small_grids(network, train.manifest.box)
    optimiser = _make_optimiser(network, recipe)
    wrapped, wrapped_optimiser = fabric.setup(network, optimiser)
    start, result = _resume(folder, network, optimiser, fabric, origin)
    setup = _Setup(wrapped, wrapped_optimiser, objective, recipe, fabric)

    for epoch, row in enumerate(result.history, start=1):
        log(row, epoch)

    def status() -> str:
        return f"({objective.monitor} {result.best_score:.3f} at epoch {result.best_epoch})"

    epochs = range(start + 1, recipe.epochs + 1)
    for epoch in track(epochs, total=len(epochs), title=f"fitting {recipe.network}", status=status):
        if epoch - result.best_epoch > recipe.patience:
            break
        began = time.monotonic()
        row = _train_epoch(setup, train, epoch)
        row |= _validate(wrapped, objective, validation, recipe.batch_size, fabric.device)
        row["learning_rate"] = optimiser.param_groups[0]["lr"]
        row["epoch_seconds"] = time.monotonic() - began
        result.history.append(row)
        score = row[f"validation_{objective.monitor}"]
        # A small validation split saturates: of equal scores the lower loss is the better epoch.
        rank = (score, -row["validation_loss"])
        if rank > (result.best_score, -result.best_loss):
            result.best_score, result.best_loss = score, row["validation_loss"]
            result.best_epoch = epoch
            _save({"network": network.state_dict()}, folder / BEST_FILE)
        _save(
            {
                "network": network.state_dict(),
                "optimiser": optimiser.state_dict(),
                "precision": fabric.strategy.precision.state_dict(),
                "epoch": epoch,
                "best_epoch": result.best_epoch,
                "best_score": result.best_score,
                "best_loss": result.best_loss,
                "history": result.history,
                "origin": origin,
            },
            folder / CHECKPOINT_FILE,
        )
        log(row, epoch)
    best = torch.load(folder / BEST_FILE, map_location=fabric.device, weights_only=True)
    network.load_state_dict(best["network"])
    return result


class _MixedInside(MixedPrecision):
    """Mixed precision within the network only: cubes reach it in float32.

    Fabric's own would round them first, and unnormalised cubes do not stand that: of a cube of
    mean 1000 and deviation 1 bfloat16, which has 8 bits, leaves steps of 4.
    """

    def convert_input(self, data: Any) -> Any:
        return data


def _refuse_small_grids(network: nn.Module, box: int) -> None:
    """Refuse to train a network in bfloat16 on a CPU where a kernel is wider than its grid.

    The gradients of such convolutions are wrong there by as much as their size, or not finite
    (torch 2.13 with oneDNN; 3³ kernels on 2³ voxels, 5³ on 4³); all others agree with float32 to
    0.3 %.
    """
    narrow: list[str] = []

    def look(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, nn.Conv3d)
        grid = tuple(inputs[0].shape[2:])
        if any(size < kernel for size, kernel in zip(grid, layer.kernel_size, strict=True)):
            narrow.append(f"{layer.kernel_size} on {grid} voxels")

    handles = [
        layer.register_forward_pre_hook(look)
        for layer in network.modules()
        if isinstance(layer, nn.Conv3d)
    ]
    mode = network.training
    with torch.no_grad():
        network.eval()(next(network.parameters()).new_zeros(1, 1, box, box, box))
    network.train(mode)
    for handle in handles:
        handle.remove()
    if narrow:
        msg = (
            f"in bfloat16 on a CPU torch computes wrong gradients of kernels wider than their "
            f"grid, here {narrow[0]}: use precision float32, or a larger box"
        )
        raise ValueError(msg)


@dataclass(frozen=True, eq=False)
class _Setup:
    """What every epoch of a fit shares."""

    network: nn.Module
    optimiser: torch.optim.Optimizer
    objective: Objective
    recipe: FitRecipe
    fabric: Fabric


def _train_epoch(setup: _Setup, train: BatchSource, epoch: int) -> dict[str, float]:
    """Mean of each term of the objective over one pass in which the weights learn."""
    recipe, device = setup.recipe, setup.fabric.device
    steps_per_epoch = math.ceil(len(train) / recipe.batch_size)
    turns = allowed_turns(train.manifest.tilt_range) if recipe.augment else ("identity",)
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + epoch)
    # Dropout draws from the global stream: seeded per epoch, so that a resumed run agrees.
    torch.manual_seed(recipe.seed * 1_000_003 + epoch)
    setup.network.train()
    totals: dict[str, Tensor] = {}
    for index, batch in enumerate(train.batches(recipe.batch_size, generator)):
        rate = _learning_rate(recipe, (epoch - 1) * steps_per_epoch + index, steps_per_epoch)
        for group in setup.optimiser.param_groups:
            group["lr"] = rate
        terms = setup.objective(setup.network, augment(batch, turns, generator).to(device))
        setup.optimiser.zero_grad()
        setup.fabric.backward(terms["loss"])
        setup.optimiser.step()
        for name, term in terms.items():
            if name != "output":
                # Kept on the device: reading it here would wait for the step to finish.
                totals[name] = totals.get(name, 0.0) + term.detach() * len(batch)
    row = {f"train_{name}": float(total) / len(train) for name, total in totals.items()}
    if not math.isfinite(row["train_loss"]):
        msg = (
            f"the loss of {recipe.network} is {row['train_loss']} in epoch {epoch}: "
            f"lower learning_rate ({recipe.learning_rate:g}) or use precision float32"
        )
        raise ValueError(msg)
    return row


def _make_optimiser(network: nn.Module, recipe: FitRecipe) -> torch.optim.Optimizer:
    parameters = network.parameters()
    if recipe.optimiser == "adam":
        return torch.optim.AdamW(
            parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay
        )
    return torch.optim.SGD(
        parameters,
        lr=recipe.learning_rate,
        momentum=0.9,
        nesterov=True,
        weight_decay=recipe.weight_decay,
    )


def _learning_rate(recipe: FitRecipe, step: int, steps_per_epoch: int) -> float:
    """Linear warm-up, then a cosine that reaches zero where the last epoch ends."""
    total = recipe.epochs * steps_per_epoch
    warm_up = max(1, round(WARM_UP * total))
    if step < warm_up:
        return recipe.learning_rate * (step + 1) / warm_up
    progress = (step - warm_up) / max(1, total - warm_up)
    return recipe.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))


def _validate(
    network: nn.Module,
    objective: Objective,
    source: BatchSource,
    batch_size: int,
    device: torch.device,
) -> dict[str, float]:
    network.eval()
    scores = objective.make_scores().to(device)
    loss = 0.0
    with torch.no_grad():
        for batch in source.batches(batch_size):
            moved = batch.to(device)
            terms = objective(network, moved)
            loss += float(terms["loss"]) * len(batch)
            scores.update(terms["output"], objective.truth(moved))
    row = {f"validation_{name}": float(value) for name, value in scores.compute().items()}
    return row | {"validation_loss": loss / len(source)}


def _resume(
    folder: Path,
    network: nn.Module,
    optimiser: torch.optim.Optimizer,
    fabric: Fabric,
    origin: Mapping[str, str],
) -> tuple[int, FitResult]:
    """Epochs already done, and their result; network and optimiser take up the checkpoint."""
    path = folder / CHECKPOINT_FILE
    if not path.is_file():
        return 0, FitResult(0, -math.inf, math.inf)
    state = torch.load(path, map_location="cpu", weights_only=True)
    found: dict[str, str] = state["origin"]
    others = [n for n in sorted(found.keys() | origin.keys()) if found.get(n) != origin.get(n)]
    if others:
        msg = (
            f"{path} is of another {' and '.join(others)}: give another folder, or remove it to "
            f"start anew"
        )
        raise ValueError(msg)
    network.load_state_dict(state["network"])
    optimiser.load_state_dict(state["optimiser"])
    if state["precision"]:  # of float16 only
        fabric.strategy.precision.load_state_dict(state["precision"])
    best = (state["best_epoch"], state["best_score"], state["best_loss"])
    return state["epoch"], FitResult(*best, state["history"])


def _save(state: dict[str, Any], path: Path) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    torch.save(state, temporary)
    temporary.replace(path)
