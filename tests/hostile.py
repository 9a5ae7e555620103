"""What damages binary headers: numbers that no program should trust, and where they are put."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from hypothesis import strategies as st

__all__ = ["FIELDS", "FLOATS", "INTEGERS", "overwritten"]

INTEGERS = st.one_of(
    st.sampled_from([
        0, 1, -1, 2, 3, 12, 16, 24, 127, 401, 2**15, 2**16, 2**24, 2**30, 2**31 - 1, -(2**31),
    ]),
    st.integers(-(2**31), 2**31 - 1),
)  # fmt: skip
FLOATS = st.one_of(
    st.sampled_from(
        [0.0, -1.0, 1.0, 12.0, 6.0, 1e-38, 3e38, float("nan"), float("inf"), -float("inf")]
    ),
    st.floats(width=32),
)
FIELDS = st.one_of(
    INTEGERS.map(lambda number: struct.pack("<i", number)),
    INTEGERS.map(lambda number: struct.pack(">i", number)),
    FLOATS.map(lambda number: struct.pack("<f", number)),
    st.binary(min_size=1, max_size=8),
)
"""Bytes of a header's field."""


def overwritten(content: bytes, patches: Sequence[tuple[int, bytes]], cut: int | None) -> bytes:
    """A file's content with fields of four bytes overwritten, counted from 0, and its end cut off.

    Sizes, mode, sampling and labels lie in multiples of four.
    """
    changed = bytearray(content)
    for field, patch in patches:
        changed[4 * field : 4 * field + len(patch)] = patch
    return bytes(changed[:cut])
