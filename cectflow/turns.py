"""The turns that keep the missing wedge and the hand of the specimen: of arrays (z, y, x)."""

from __future__ import annotations

__all__ = ["HALF_TURNS", "allowed_turns"]

HALF_TURNS: dict[str, tuple[int, ...]] = {
    "identity": (),
    "x": (-3, -2),
    "y": (-3, -1),
    "z": (-2, -1),
}
"""Half turn about an axis → the array axes (z, y, x = -3, -2, -1) that it reverses."""


def allowed_turns(tilt_range: tuple[float, float]) -> tuple[str, ...]:
    """Names of the turns that keep the missing wedge: beam along z, tilt axis along y.

    Parameters
    ----------
    tilt_range
        Lowest and highest tilt in degrees. A symmetric range allows all four; an asymmetric one
        only the identity and the half turn about the tilt axis. Quarter turns move the wedge,
        mirrors change the hand: never allowed.
    """
    symmetric = abs(tilt_range[0] + tilt_range[1]) < 1e-6
    return tuple(HALF_TURNS) if symmetric else ("identity", "y")
