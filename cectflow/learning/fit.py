"""fit: the one training loop, for segmenters, teachers and students alike."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from pydantic import Field
from torch import Tensor, nn

from cectflow.config import Config
from cectflow.dataset import BatchSource
from cectflow.execution import count_cores
from cectflow.learning.objective import Objective
from cectflow.learning.precision import MixedInside, refuse_small_grids
from cectflow.learning.shares import HandOut, Part, Share, read_parts
from cectflow.progress import track
from cectflow.together import Parent, run_together
from cectflow.turns import allowed_turns

__all__ = [
    "Device",
    "DivergedError",
    "FitRecipe",
    "FitResult",
    "Log",
    "Precision",
    "fit",
    "open_fabric",
]

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
    """Cubes of a step, on each device."""
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


class DivergedError(ValueError):
    """The loss is no longer finite, or nothing of it reaches the network's first layer."""


@dataclass
class FitResult:
    """What a training gave; the network holds the weights of the best epoch."""

    best_epoch: int
    best_score: float
    best_loss: float
    history: list[dict[str, float]] = field(default_factory=list)
    """One row per epoch: loss terms of training, scores of validation, learning rate, seconds."""

    def add(self, row: dict[str, float], score: float) -> bool:
        """Append an epoch; whether it is the best one until now."""
        self.history.append(row)
        # A small validation split saturates: of equal scores the lower loss is the better epoch.
        better = (score, -row["validation_loss"]) > (self.best_score, -self.best_loss)
        if better:
            self.best_epoch = len(self.history)
            self.best_score, self.best_loss = score, row["validation_loss"]
        return better

    def is_over(self, recipe: FitRecipe) -> bool:
        """Whether all epochs are done, or too many since the best one."""
        done = len(self.history)
        return done >= recipe.epochs or done - self.best_epoch >= recipe.patience


def open_fabric(device: Device = "auto", precision: Precision = "auto", devices: int = 1) -> Fabric:
    """Fabric for a device, or for several that train together on one machine.

    Parameters
    ----------
    device
        ``auto`` is a GPU where there is one.
    precision
        ``auto`` is bfloat16 on a GPU that supports it, else float32.
    devices
        GPUs, each with a process of its own; on the CPU processes that share its cores.

    Raises
    ------
    ValueError
        If ``cuda`` is asked for and absent, float16 is asked for on a CPU, or there are not so
        many GPUs or cores.
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
    _refuse_too_many(devices, accelerator)
    # On one machine with processes of our own, whatever a cluster's variables say.
    plugins: list[Any] = [LightningEnvironment()]
    if precision != "float32":
        name: Literal["bf16-mixed", "16-mixed"] = (
            "bf16-mixed" if precision == "bfloat16" else "16-mixed"
        )
        plugins.append(MixedInside(name, accelerator))
    return Fabric(accelerator=accelerator, devices=devices, plugins=plugins)


def _refuse_too_many(devices: int, accelerator: str) -> None:
    if accelerator == "cuda":
        there, what = torch.cuda.device_count(), "GPUs that torch sees"
    else:
        there, what = count_cores(), "cores of this CPU"
    if not 1 <= devices <= there:
        msg = f"devices is {devices}: expected 1 to {there}, the {what}"
        raise ValueError(msg)


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

    With several devices each learns from its share of every batch, in a process of its own, under
    lightning-fabric's DDP: ``batch_size`` cubes each, so that a step is on that many times their
    number. Cubes, their order and their turns are those of one device with that batch, and so are
    gradients and scores, to rounding, where the loss is a mean over cubes and no layer looks at
    the batch. Objectives whose loss is a mean over something else (Dice of several labels, class
    weights) take it over each share. Batch norm is over the whole batch on GPUs, over each share
    on the CPU, where torch has none for several processes. A share of the last batch that would
    be empty is its first cube at weight 0.

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
        Device, precision, and number of devices.
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
        If the folder's checkpoint is of another recipe, objective, dataset, provenance or number
        of devices.
    DivergedError
        If the loss is no longer finite, or an epoch has brought the first layer no gradient.
    ChildProcessError
        If the process of a device died.
    """
    folder.mkdir(parents=True, exist_ok=True)
    origin = {
        "recipe": recipe.digest(),
        "objective": repr(objective),
        "dataset": f"{train.manifest.content_digest()} {validation.manifest.content_digest()}",
        **(provenance or {}),
    }
    if fabric.world_size > 1:
        origin["number of devices"] = str(fabric.world_size)
    if isinstance(fabric.strategy.precision, MixedInside) and fabric.device.type == "cpu":
        refuse_small_grids(network, train.manifest.box)
    result = _result_of(_read_checkpoint(folder, origin))
    for epoch, row in enumerate(result.history, start=1):
        log(row, epoch)

    def status() -> str:
        return f"({objective.monitor} {result.best_score:.3f} at epoch {result.best_epoch})"

    if not result.is_over(recipe):
        task = _Task(network, objective, len(train), validation, recipe, folder, origin)
        epochs = recipe.epochs - len(result.history)
        with closing(_learn_on_all(task, train, fabric)) as results:
            title = f"fitting {recipe.network}"
            for result in track(results, total=epochs, title=title, status=status):
                log(result.history[-1], len(result.history))
    best = torch.load(folder / BEST_FILE, map_location=fabric.device, weights_only=True)
    network.load_state_dict(best["network"])
    return result


@dataclass(frozen=True, eq=False)
class _Task:
    """What is to be learned, by one process or by several."""

    network: nn.Module
    objective: Objective
    num_train: int
    validation: BatchSource
    recipe: FitRecipe
    folder: Path
    origin: Mapping[str, str]


def _learn_on_all(
    task: _Task, train: BatchSource, fabric: Fabric
) -> Generator[FitResult, None, None]:
    """Result after every epoch; several devices have processes of their own."""
    number = fabric.world_size
    read = partial(_read_epoch, train, task.recipe, task.recipe.batch_size * number)
    if number == 1:
        yield from _learn(task, fabric, partial(read, Share()))
        return
    # Live data have one maker; a folder is read by each process for itself.
    is_live = train.manifest.live_subtomograms is not None
    with tempfile.TemporaryDirectory() as meeting:
        job = _Job(
            task, fabric, None if is_live else read, Path(meeting) / "store",
            threads=max(1, torch.get_num_threads() // number),
        )  # fmt: skip
        yield from run_together(
            _learn_share,
            [replace(job, rank=rank) for rank in range(number)],
            answer=HandOut(partial(read, Share()), number),
            title=f"fitting {task.recipe.network} on {number} devices",
        )


@dataclass(frozen=True, eq=False)
class _Job:
    """What a process of a training on several devices is given."""

    task: _Task
    fabric: Fabric
    read: Callable[[Share, int], Iterator[Part]] | None
    """Share, epoch → parts; None: the parent is asked for them."""
    meeting: Path
    """File by which the processes find one another: unlike a port, nobody else can take it."""
    threads: int
    rank: int = 0


def _learn_share(job: _Job, parent: Parent) -> None:
    """Learn from a share of every batch; the first process tells the parent of every epoch."""
    fabric, task = job.fabric, job.task
    share = Share(job.rank, fabric.world_size)
    os.environ.update(LOCAL_RANK=str(job.rank), NODE_RANK="0")  # read by Fabric
    torch.set_num_threads(job.threads)
    on_gpu = fabric.device.type == "cuda"
    torch.distributed.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=job.meeting.as_uri(), rank=share.number, world_size=share.of,
        device_id=fabric.device if on_gpu else None,
    )  # fmt: skip
    fabric.launch()
    if on_gpu:
        convert: Callable[[nn.Module], nn.Module] = nn.SyncBatchNorm.convert_sync_batchnorm
        task = replace(task, network=convert(task.network))

    def ask(epoch: int) -> Iterator[Part]:
        while (part := parent.ask(epoch)) is not None:
            yield part

    for result in _learn(task, fabric, ask if job.read is None else partial(job.read, share)):
        if fabric.is_global_zero:
            parent.tell(result)
    torch.distributed.destroy_process_group()


def _learn(
    task: _Task, fabric: Fabric, read: Callable[[int], Iterator[Part]]
) -> Iterator[FitResult]:
    """Result after every epoch that the checkpoint does not have."""
    network, recipe, objective = task.network, task.recipe, task.objective
    optimiser = _make_optimiser(network, recipe)
    wrapped, wrapped_optimiser = fabric.setup(network, optimiser)
    result = _resume(task, optimiser, fabric)
    setup = _Setup(wrapped, wrapped_optimiser, task, fabric)
    while not result.is_over(recipe):
        epoch = len(result.history) + 1
        began = time.monotonic()
        row = _train_epoch(setup, read(epoch), epoch) | _validate(setup)
        row["learning_rate"] = optimiser.param_groups[0]["lr"]
        row["epoch_seconds"] = time.monotonic() - began
        is_best = result.add(row, row[f"validation_{objective.monitor}"])
        if fabric.is_global_zero:
            if is_best:
                _save({"network": network.state_dict()}, task.folder / BEST_FILE)
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
                    "origin": task.origin,
                },
                task.folder / CHECKPOINT_FILE,
            )
        yield result


@dataclass(frozen=True, eq=False)
class _Setup:
    """What every epoch of a fit shares."""

    network: nn.Module
    optimiser: torch.optim.Optimizer
    task: _Task
    fabric: Fabric


def _epoch_seed(recipe: FitRecipe, epoch: int) -> int:
    return recipe.seed * 1_000_003 + epoch


def _read_epoch(
    train: BatchSource, recipe: FitRecipe, batch_size: int, share: Share, epoch: int
) -> Iterator[Part]:
    """A share of one epoch's batches, shuffled and turned."""
    turns = allowed_turns(train.manifest.tilt_range) if recipe.augment else ("identity",)
    generator = torch.Generator().manual_seed(_epoch_seed(recipe, epoch))
    yield from read_parts(train, batch_size, share, turns, generator)


def _train_epoch(setup: _Setup, parts: Iterator[Part], epoch: int) -> dict[str, float]:
    """Mean of each term of the objective over one pass in which the weights learn."""
    fabric, task, recipe = setup.fabric, setup.task, setup.task.recipe
    number = fabric.world_size
    steps_per_epoch = math.ceil(task.num_train / (recipe.batch_size * number))
    # Dropout draws from the global stream: seeded per epoch, so that a resumed run agrees, and
    # for each process anew.
    torch.manual_seed(_epoch_seed(recipe, epoch) + (fabric.global_rank << 40))
    setup.network.train()
    totals: dict[str, Tensor] = {}
    first = next(each for each in setup.network.parameters() if each.requires_grad)
    learns = torch.zeros((), dtype=torch.bool, device=fabric.device)
    seen = 0  # cubes without labels come on top of those that an epoch has
    for index, part in enumerate(parts):
        seen += part.whole
        rate = _learning_rate(recipe, (epoch - 1) * steps_per_epoch + index, steps_per_epoch)
        for group in setup.optimiser.param_groups:
            group["lr"] = rate
        terms = task.objective(setup.network, part.batch.to(fabric.device))
        setup.optimiser.zero_grad()
        # DDP takes the mean over processes; that over cubes weighs each by what it has of them.
        fabric.backward(terms["loss"] * (part.count * number / part.whole))
        if first.grad is not None:
            learns |= first.grad.any()
        setup.optimiser.step()
        for name, term in terms.items():
            if name != "output":
                # Kept on the device: reading it here would wait for the step to finish.
                totals[name] = totals.get(name, 0.0) + term.detach() * part.count
    row = {f"train_{name}": _mean(fabric, total, seen) for name, total in totals.items()}
    if not math.isfinite(row["train_loss"]):
        msg = (
            f"the loss of {recipe.network} is {row['train_loss']} in epoch {epoch}: "
            f"lower learning_rate ({recipe.learning_rate:g}) or use precision float32"
        )
        raise DivergedError(msg)
    if not learns and row["train_loss"] > 0:
        # Not small, but 0 in every step: all units of some layer are negative for every cube.
        msg = (
            f"the first layer of {recipe.network} has had no gradient in all of epoch {epoch} "
            f"(loss {row['train_loss']:.3g}): units behind it are dead, and it answers every cube "
            f"alike for good; lower learning_rate ({recipe.learning_rate:g}), take the optimiser "
            f"adam, or a network with batch norm"
        )
        raise DivergedError(msg)
    return row


def _mean(fabric: Fabric, total: Tensor, number: int) -> float:
    """Mean over cubes from each process's sum over its own."""
    summed = fabric.all_reduce(total, reduce_op="sum")
    assert isinstance(summed, Tensor)
    return float(summed) / number


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


def _validate(setup: _Setup) -> dict[str, float]:
    task, fabric = setup.task, setup.fabric
    share = Share(fabric.global_rank, fabric.world_size)
    setup.network.eval()
    scores = task.objective.make_scores().to(fabric.device)
    loss = torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        for part in read_parts(task.validation, task.recipe.batch_size * share.of, share):
            moved = part.batch.to(fabric.device)
            terms = task.objective(setup.network, moved)
            loss += float(terms["loss"]) * part.count
            if part.count:
                scores.update(terms["output"], task.objective.truth(moved))
    # The scores sum up over processes by themselves.
    row = {f"validation_{name}": float(value) for name, value in scores.compute().items()}
    return row | {"validation_loss": _mean(fabric, loss.to(fabric.device), len(task.validation))}


def _read_checkpoint(folder: Path, origin: Mapping[str, str]) -> dict[str, Any] | None:
    """What the last epoch left; None where there is none.

    Raises
    ------
    ValueError
        If it is of another origin.
    """
    path = folder / CHECKPOINT_FILE
    if not path.is_file():
        return None
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    found: dict[str, str] = state["origin"]
    # What an older checkpoint does not know of was not there.
    names = sorted(found.keys() | origin.keys())
    others = [n for n in names if found.get(n, "none") != origin.get(n, "none")]
    if others:
        msg = (
            f"{path} is of another {' and '.join(others)}: give another folder, or remove it to "
            f"start anew"
        )
        raise ValueError(msg)
    return state


def _result_of(state: dict[str, Any] | None) -> FitResult:
    """Of the epochs of a checkpoint."""
    if state is None:
        return FitResult(0, -math.inf, math.inf)
    best = (state["best_epoch"], state["best_score"], state["best_loss"])
    return FitResult(*best, state["history"])


def _resume(task: _Task, optimiser: torch.optim.Optimizer, fabric: Fabric) -> FitResult:
    """Result of the epochs already done; network and optimiser take up the checkpoint."""
    state = _read_checkpoint(task.folder, task.origin)
    if state is not None:
        task.network.load_state_dict(state["network"])
        optimiser.load_state_dict(state["optimiser"])
        if state["precision"]:  # of float16 only
            fabric.strategy.precision.load_state_dict(state["precision"])
    return _result_of(state)


def _save(state: dict[str, Any], path: Path) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    torch.save(state, temporary)
    temporary.replace(path)
