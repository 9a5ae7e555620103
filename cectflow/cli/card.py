"""A model's card in words, for people; programs read ``--json``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from cectflow.model_card import Cost, ModelCard, Picking, Score, Trust, VariantFigures

__all__ = ["card_rows"]

UNITS = {"voxel_size": "Å", "jitter": "Å", "box": "voxels", "tilt_range": "°"}
UNKNOWN = {
    "snr": "noise-free or unknown",
    "spectrum": "unknown: --match-spectrum cannot be used",
    "occupancy": "unknown",
}
"""What decides whether a model fits the data: said where the card does not know it, too."""


def card_rows(card: ModelCard) -> list[tuple[str, str]]:
    """Name and value of what the card states, in its order; long lists and fits summed up.

    Parameters
    ----------
    card
        Of any model; what it does not have is left out, or said to be unknown.
    """
    rows: list[tuple[str, str]] = []
    for name in type(card).model_fields:
        value = getattr(card, name)
        if value is None and name in UNKNOWN:
            rows.append((name, UNKNOWN[name]))
        if value is None or value in ((), {}):
            continue
        describe = DESCRIBED.get(name)
        rows += [(name, _plain(name, value))] if describe is None else describe(value)
    return rows


def _plain(name: str, value: Any) -> str:
    if isinstance(value, tuple):
        is_range = len(value) == 2 and all(isinstance(part, float) for part in value)
        text = (" to " if is_range else ", ").join(_number(part) for part in value)
    else:
        text = _number(value)
    return f"{text} {UNITS[name]}" if name in UNITS else text


def _number(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _interval(score: Score) -> str:
    return f"{score.value:.3g} ({score.low:.3g} to {score.high:.3g})"


def _describe_spectrum(power: tuple[float, ...]) -> Iterator[tuple[str, str]]:
    low, high = min(power[1:]), max(power[1:])
    yield "spectrum", f"power of {len(power)} shells, {low:.3g} to {high:.3g} (white noise has 1)"


def _describe_scores(scores: dict[str, Score]) -> Iterator[tuple[str, str]]:
    for name, score in scores.items():
        yield f"scores {name}", _interval(score)


def _describe_baselines(baselines: dict[str, float]) -> Iterator[tuple[str, str]]:
    for name, value in baselines.items():
        yield f"baselines {name}", f"{value:.3g}"


def _describe_picking(picking: Picking) -> Iterator[tuple[str, str]]:
    yield (
        "picking",
        f"scores from {picking.min_score:.3f}: precision {picking.precision:.2f}, recall "
        f"{picking.recall:.2f} ({picking.particles} validation particles of radius "
        f"{picking.radius:.0f} Å)",
    )


def _describe_trust(trust: Trust) -> Iterator[tuple[str, str]]:
    yield (
        "trust",
        f"temperature {trust.temperature:.3g}: calibration error {trust.ece_before:.3g}, then "
        f"{trust.ece_after:.3g}; unknown below a {trust.unknown_score} of "
        f"{trust.unknown_threshold:.4g}, where {_interval(trust.true_positive_rate)} of known "
        f"classes are not ({trust.validation_cubes} validation cubes)",
    )


def _describe_cost(cost: Cost) -> Iterator[tuple[str, str]]:
    yield "cost", f"{cost.parameters:,} parameters, {cost.macs / 1e6:.4g} M multiplications"
    for name, size in cost.weights_bytes.items():
        yield f"cost {name}", f"{size / 1e6:.3g} MB"
    if not cost.timings:  # of a card that was written before there were some
        yield (
            "cost speed",
            f"{cost.subtomograms_per_s:.4g} per second in batches of {cost.batch_size} "
            f"({cost.device}, threads: {cost.threads})",
        )
    for timing in cost.timings:
        memory = "" if timing.peak_memory_mb is None else f", {timing.peak_memory_mb:.0f} MB"
        yield (
            f"cost {timing.runtime} {timing.variant}",
            f"{timing.subtomograms_per_s:.4g} per second, {timing.latency_ms:.3g} ms "
            f"({timing.latency_ms_low:.3g} to {timing.latency_ms_high:.3g}) a batch of "
            f"{timing.batch_size} ({timing.device}, threads: {timing.threads}{memory})",
        )


def _describe_variants(variants: dict[str, VariantFigures]) -> Iterator[tuple[str, str]]:
    for name, found in variants.items():
        same = "" if found.agreement is None else f", the same answer for {found.agreement:.1%}"
        yield (
            f"variants {name}",
            f"{_interval(found.score)}, {found.difference.value:+.3g} to float32{same}; logits "
            f"differ by {found.parity:.3g} at most; {found.speedup:.3g} times as fast "
            f"({found.runtime}, threads: {found.threads})",
        )


DESCRIBED: dict[str, Callable[[Any], Iterator[tuple[str, str]]]] = {
    "spectrum": _describe_spectrum,
    "scores": _describe_scores,
    "baselines": _describe_baselines,
    "picking": _describe_picking,
    "trust": _describe_trust,
    "cost": _describe_cost,
    "variants": _describe_variants,
}
"""Fields that are more than a value."""
