"""Rasters: spheres and sheets marked and rendered on periodic grids, compiled by Numba.

A sphere is given by its centre ``z y x``. Sheets are the places ``s``, ``z y x`` in units of the
field's edges, where ``normal · s - offset - Σ a cos(2π m · s + phase)`` is an integer; `normal` and
``m`` are integers, so that sheets go on over the faces, and a row of `waves` is ``a, m_z, m_y, m_x,
phase``. `cell`, `edges`, radii, `half` and `reach` are in Å. A `table` holds a density every
:data:`TABLE_STEP` of the distance from a sphere's centre, or from the middle of a sheet.
"""

from __future__ import annotations

from typing import no_type_check

import numba
import numpy as np
from numpy.typing import NDArray

__all__ = ["TABLE_STEP", "mark_sheet", "mark_sphere", "render_sheet", "render_sphere"]

TABLE_STEP = 0.5
"""Å between the entries of a tabulated profile."""


@numba.njit(cache=True)
@no_type_check  # pytest's jaxtyping hook would wrap what numba has to compile
def mark_sphere(
    centre: NDArray[np.float64],
    cell: NDArray[np.float64],
    inner: float,
    outer: float,
    taken: NDArray[np.bool_],
    write: bool,
) -> bool:
    """Whether the cells between two radii, all in Å, are free; they are taken where `write`."""
    first = np.floor((centre - outer) / cell).astype(np.int64)
    last = np.ceil((centre + outer) / cell).astype(np.int64)
    for i in range(first[0], last[0] + 1):
        for j in range(first[1], last[1] + 1):
            flat = (i * cell[0] - centre[0]) ** 2 + (j * cell[1] - centre[1]) ** 2
            for k in range(first[2], last[2] + 1):
                radius = np.sqrt(flat + (k * cell[2] - centre[2]) ** 2)
                if inner < radius < outer:
                    z, y, x = i % taken.shape[0], j % taken.shape[1], k % taken.shape[2]
                    if write:
                        taken[z, y, x] = True
                    elif taken[z, y, x]:
                        return False
    return True


@numba.njit(cache=True)
@no_type_check  # pytest's jaxtyping hook would wrap what numba has to compile
def _sheet_distance(
    s: NDArray[np.float64],
    normal: NDArray[np.float64],
    offset: float,
    waves: NDArray[np.float64],
    edges: NDArray[np.float64],
) -> float:
    """Distance in Å from the nearest sheet, to first order in the value over the gradient."""
    value = normal[0] * s[0] + normal[1] * s[1] + normal[2] * s[2] - offset
    slope_z, slope_y, slope_x = normal[0], normal[1], normal[2]
    for w in range(waves.shape[0]):
        m_z, m_y, m_x = waves[w, 1], waves[w, 2], waves[w, 3]
        phase = 2 * np.pi * (m_z * s[0] + m_y * s[1] + m_x * s[2]) + waves[w, 4]
        value -= waves[w, 0] * np.cos(phase)
        change = waves[w, 0] * 2 * np.pi * np.sin(phase)
        slope_z += change * m_z
        slope_y += change * m_y
        slope_x += change * m_x
    value -= np.round(value)
    gradient = np.sqrt(
        (slope_z / edges[0]) ** 2 + (slope_y / edges[1]) ** 2 + (slope_x / edges[2]) ** 2
    )
    return abs(value) / gradient


@numba.njit(cache=True)
@no_type_check  # pytest's jaxtyping hook would wrap what numba has to compile
def mark_sheet(
    normal: NDArray[np.float64],
    offset: float,
    waves: NDArray[np.float64],
    cell: NDArray[np.float64],
    half: float,
    taken: NDArray[np.bool_],
    write: bool,
) -> bool:
    """Whether the cells within `half` Å of sheets are free; they are taken where `write`."""
    depth, height, width = taken.shape
    edges = np.array([depth * cell[0], height * cell[1], width * cell[2]])
    s = np.zeros(3)
    for z in range(depth):
        s[0] = z / depth
        for y in range(height):
            s[1] = y / height
            for x in range(width):
                s[2] = x / width
                if _sheet_distance(s, normal, offset, waves, edges) < half:
                    if write:
                        taken[z, y, x] = True
                    elif taken[z, y, x]:
                        return False
    return True


@numba.njit(cache=True)
@no_type_check  # pytest's jaxtyping hook would wrap what numba has to compile
def _look_up(table: NDArray[np.float64], distance: float) -> float:
    place = distance / TABLE_STEP
    index = min(int(place), table.size - 2)
    return table[index] + (place - index) * (table[index + 1] - table[index])


@numba.njit(cache=True)
@no_type_check  # pytest's jaxtyping hook would wrap what numba has to compile
def render_sphere(
    centre: NDArray[np.float64],
    voxel_size: float,
    table: NDArray[np.float64],
    reach: float,
    inner: float,
    outer: float,
    kind: int,
    density: NDArray[np.float32],
    kinds: NDArray[np.int8],
) -> None:
    """Add a sphere whose centre is given in voxels; its matter lies between two radii in Å."""
    depth, height, width = density.shape
    first = np.floor(centre - reach / voxel_size).astype(np.int64)
    last = np.ceil(centre + reach / voxel_size).astype(np.int64)
    nearest = inner - (reach - outer)
    for i in range(first[0], last[0] + 1):
        for j in range(first[1], last[1] + 1):
            flat = (i - centre[0]) ** 2 + (j - centre[1]) ** 2
            for k in range(first[2], last[2] + 1):
                radius = voxel_size * np.sqrt(flat + (k - centre[2]) ** 2)
                if nearest < radius < reach:
                    z, y, x = i % depth, j % height, k % width
                    density[z, y, x] += np.float32(_look_up(table, radius))
                    if inner <= radius <= outer:
                        kinds[z, y, x] = kind


@numba.njit(cache=True)
@no_type_check  # pytest's jaxtyping hook would wrap what numba has to compile
def render_sheet(
    normal: NDArray[np.float64],
    offset: float,
    waves: NDArray[np.float64],
    edges: NDArray[np.float64],
    table: NDArray[np.float64],
    reach: float,
    half: float,
    kind: int,
    density: NDArray[np.float32],
    kinds: NDArray[np.int8],
) -> None:
    """Add sheets; their matter is within `half` Å of the middle, their profile within `reach`."""
    depth, height, width = density.shape
    s = np.zeros(3)
    for z in range(depth):
        s[0] = z / depth
        for y in range(height):
            s[1] = y / height
            for x in range(width):
                s[2] = x / width
                distance = _sheet_distance(s, normal, offset, waves, edges)
                if distance < reach:
                    density[z, y, x] += np.float32(_look_up(table, distance))
                    if distance <= half:
                        kinds[z, y, x] = kind
