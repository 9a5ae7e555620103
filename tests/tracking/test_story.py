"""The story of three versions, told through the command line against a live server."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from builders import make_card, write_dataset
from servers import Servers
from torch import Tensor, nn

from cectflow.cli import main
from cectflow.dataset import Dataset, open_dataset
from cectflow.export import export_network
from cectflow.recipe import load_recipe
from cectflow.tracking.lineage import DATASET_TAG
from cectflow.tracking.registry import register_model
from cectflow.tracking.runs import connect, start_run

NAME = "story-teacher"
COMMIT = "c" * 40
POLICY = """role: teacher
score: accuracy
rules:
  - {figure: accuracy, at_least: 0.6, why: Worse than that is of no use.}
  - {figure: parity, at_most: 0.001, why: The runtimes must agree.}
"""

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")]


class Darkness(nn.Module):
    """Tells large from small particles by the mean of a cube, given a threshold."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.tensor(threshold))

    def forward(self, cubes: Tensor) -> Tensor:
        darkness = 100 * (self.threshold - cubes.mean((1, 2, 3, 4)))
        return torch.stack([-darkness, darkness], dim=1)


def export_graded(data: Dataset, mistakes: int, folder: Path) -> None:
    """Model folder of a classifier that takes so many small particles for large ones."""
    (batch,) = data.split("test").batches(100)
    means = batch.subtomograms.mean((1, 2, 3, 4))
    small, large = (means[batch.class_ids == i].sort().values for i in (1, 2))
    edges = torch.cat([large[-1:], small])  # from dark to bright
    threshold = float((edges[mistakes] + edges[mistakes + 1]) / 2)
    card = make_card(
        dataset_digest=data.manifest.content_digest(),
        recipe_digest=load_recipe("tiny").digest(),
        commit=COMMIT,
    )
    export_network(Darkness(threshold), card, folder)


@dataclass
class Terminal:
    """Where commands are given, and what they last printed."""

    capsys: pytest.CaptureFixture[str]
    printed: str = ""

    def run(self, *arguments: str) -> int:
        with pytest.raises(SystemExit) as stop:
            main([*arguments])
        captured = self.capsys.readouterr()
        self.printed = captured.out + captured.err
        return int(stop.value.code or 0)


@pytest.fixture
def terminal(lab: Path, servers: Servers, capsys: pytest.CaptureFixture[str]) -> Terminal:
    """In a folder with policy and dataset, and a server that has versions 1 to 3, none promoted."""
    (lab / "policy.yaml").write_text(POLICY, encoding="utf-8")
    data = write_dataset(lab / "data")
    address = servers.get("server").address
    os.environ["MLFLOW_TRACKING_URI"] = address
    connect(address)
    with start_run("register") as run:
        run.log_config(load_recipe("tiny"), "recipe")
        for mistakes in (2, 3, 0):
            export_graded(data, mistakes, lab / f"model{mistakes}")
            tags = {DATASET_TAG: str(data.folder)}
            register_model(run, lab / f"model{mistakes}", name=NAME, tags=tags)
    return Terminal(capsys)


def test_promoted_refused_better_and_rolled_back(terminal: Terminal) -> None:
    def promote(number: int) -> int:
        return terminal.run("models", "promote", f"{NAME}/{number}", "--to", "production",
                            "--policy", "policy.yaml", "--dataset", "data")  # fmt: skip

    def stages() -> list[list[str]]:
        assert terminal.run("models", "list", NAME, "--json") == 0
        return [version["stages"] for version in json.loads(terminal.printed)]

    assert promote(1) == 0
    assert stages() == [["production"], [], []]

    assert promote(2) == 3
    assert "accuracy is 0.75, that of story-teacher v1 0.8333" in terminal.printed
    assert "A promotion must not make the stage worse." in terminal.printed
    assert stages() == [["production"], [], []]

    assert promote(3) == 0
    assert stages() == [["archived"], [], ["production"]]

    for number in (1, 2, 3):
        assert terminal.run("models", "lineage", f"{NAME}/{number}", "--json") == 0
        lineage = json.loads(terminal.printed)
        assert lineage["recipe"]["verified"]
        assert lineage["code"]["commit"] == COMMIT
        assert lineage["dataset"]["digest"] == open_dataset(Path("data")).manifest.content_digest()
        assert lineage["run"]["status"] == "FINISHED"
        assert lineage["verdicts"] == {"production": "refused" if number == 2 else "passed"}
        # The data were made by no simulation.
        assert all("sources of dataset" in each for each in lineage["missing"])

    assert terminal.run("models", "rollback", NAME, "--reason", "v3 misses the small ones") == 0
    assert f"{NAME} v1 is in production again" in terminal.printed
    assert stages() == [["production"], [], ["archived"]]

    assert terminal.run("models", "history", NAME, "--json") == 0
    told = [
        (each["action"], each["version"], each["previous"], each["outcome"], each["reason"])
        for each in json.loads(terminal.printed)
    ]
    assert told == [
        ("promote", "1", None, "done", ""),
        ("promote", "3", "1", "done", ""),
        ("rollback", "1", "3", "done", "v3 misses the small ones"),
    ]
    assert terminal.run("models", "rollback", NAME) == 2
    assert "production holds story-teacher v1, and no version held it before" in terminal.printed
    assert terminal.run("models", "archive", f"{NAME}/3", "--reason", "out of use") == 0
    assert terminal.run("models", "archive", f"{NAME}/2", "--reason", " ") == 2
    assert terminal.run("models", "history", NAME) == 0
    assert "out of use" in terminal.printed
    assert terminal.run("models", "doctor", NAME) == 0
