"""What ``models show`` prints of a card: every field that is known, for people."""

from __future__ import annotations

import pytest
from builders import make_card, make_trust
from test_model_card import full_card

from cectflow.cli.card import UNKNOWN, card_rows
from cectflow.cli.output import print_table
from cectflow.model_card import ModelCard, Picking
from cectflow.spectrum import num_shells


def test_what_decides_is_readable() -> None:
    card = make_card(
        picking=Picking(min_score=0.8232, radius=67.47, particles=28, precision=1.0, recall=0.96),
        trust=make_trust(),
        spectrum=(0.0, *[2.5] * (num_shells(12) - 2), 0.25),
    )
    rows = dict(card_rows(card))
    assert rows["classes"] == ", ".join(card.classes)
    assert rows["voxel_size"] == "10 Å"
    assert rows["tilt_range"] == "-60 to 60 °"
    assert rows["snr"] == "0.05 to 0.1"
    assert rows["spectrum"] == "power of 11 shells, 0.25 to 2.5 (white noise has 1)"
    assert rows["picking"].startswith("scores from 0.823: precision 1.00, recall 0.96 (28 ")
    assert "unknown below a distance of -4, where 0.95 (0.93 to 0.97) of known" in rows["trust"]
    rows = dict(card_rows(full_card()))
    assert rows["scores accuracy"] == "0.9 (0.85 to 0.94)"
    assert rows["cost"] == "10 parameters, 2e-05 M multiplications"
    assert rows["cost speed"] == "3.5 per second in batches of 4 (cpu, threads: 1)"
    assert rows["snr"] == "noise-free or unknown"
    assert rows["spectrum"].startswith("unknown")
    assert rows["variants int8"] == (
        "0.9 (0.85 to 0.94), +0 to float32; logits differ by 0.1 at most; 2 times as fast "
        "(openvino, threads: 1)"
    )


def test_a_name_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("class",), [("[red]",), (":smile:",)])
    assert capsys.readouterr().out.split() == ["class", "[red]", ":smile:"]


@pytest.mark.parametrize("card", [make_card(), full_card()], ids=["bare", "full"])
def test_no_field_is_lost_and_nothing_is_a_repr(card: ModelCard) -> None:
    named = {name.partition(" ")[0] for name, _ in card_rows(card)}
    known = {name for name in type(card).model_fields if getattr(card, name) not in (None, (), {})}
    assert named == known | set(UNKNOWN)
    assert not any(mark in text for _, text in card_rows(card) for mark in "{[=")
