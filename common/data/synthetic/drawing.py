"""Drawing one synthetic white blood cell among red cells, as a stained smear looks under a microscope.

Nothing here is a real picture. Light is absorbed as in a stain (optical densities add up), so that
overlapping cells darken each other, and every outline is a signed distance field bent by smooth noise.

Shapes: a field is float32 (PIXELS, PIXELS); an optical density is (PIXELS, PIXELS, 3), red green blue.
Lengths are pixels of the finished picture unless a name ends in `_um` (micrometres).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from fedsigma.common.data.synthetic.fields import (
    PIXELS,
    Field,
    Place,
    Rng,
    Window,
    balls,
    cut,
    ellipse,
    grain,
    grid,
    inside,
    join,
    polar,
    rope,
    smooth_noise,
    window,
    wobble,
)
from fedsigma.common.utils.errors import InputError

__all__ = ["CELL_TYPES", "PIXELS", "Stain", "draw_smear"]

CELL_TYPES = ("neutrophil", "lymphocyte", "monocyte", "eosinophil")

# Optical density of a fully stained structure under white light: red, green, blue.
_AZURE = np.array([0.85, 1.30, 0.42], np.float32)  # nuclei: the purple of azure B on DNA
_BLUE = np.array([0.55, 0.33, 0.10], np.float32)  # basophilic cytoplasm: methylene blue
_EOSIN = np.array([0.10, 0.62, 0.55], np.float32)  # eosinophilic granules
_LILAC = np.array([0.22, 0.45, 0.20], np.float32)  # neutrophilic and azurophilic granules
_HAEM = np.array([0.13, 0.40, 0.40], np.float32)  # haemoglobin after eosin
_GREY = np.array([0.26, 0.42, 0.26], np.float32)  # red cells of an old or acid stain

_LARGEST_UM = {"neutrophil": 7.3, "lymphocyte": 7.0, "monocyte": 8.8, "eosinophil": 7.6}  # greatest radius


@dataclass(frozen=True, kw_only=True)
class Stain:
    """Stain and view of one picture, drawn from the ranges of its laboratory.

    Attributes:
        scale: Pixels per micrometre.
        light: Colour of the empty background, 0 to 1.
        nucleus: Strength of the stain of nuclei; 1 is textbook.
        cytoplasm: Strength of the stain of cytoplasm.
        eosin: Strength of eosin.
        red_cell: Strength of the stain of red cells.
        hue: From -1 (bluish nuclei) to 1 (reddish nuclei).
        granule_hue: From 0 (orange granules) to 1 (lilac granules), of every granulocyte.
        red_hue: From 0 (salmon red cells) to 1 (greyish red cells).
        crowding: Share of free positions with a red cell.
        neighbours: Probability of another white cell at the edge.
    """

    scale: float
    light: tuple[float, float, float]
    nucleus: float
    cytoplasm: float
    eosin: float
    red_cell: float
    hue: float
    granule_hue: float
    red_hue: float
    crowding: float
    neighbours: float


def draw_smear(cell: str, stain: Stain, rng: Rng) -> Field:
    """Draw one cell of type `cell` in the middle of a field of red cells.

    Returns:
        float32 (PIXELS, PIXELS, 3), transmitted light from 0 to 1, before the camera.

    Raises:
        ValueError: `cell` is not one of `CELL_TYPES`.
    """
    if cell not in CELL_TYPES:
        raise InputError(f"no drawing for {cell!r}; known cell types: {', '.join(CELL_TYPES)}")
    centre = (PIXELS - 1) / 2 + rng.normal(0, 5, 2)
    density, radius = _white_cell(cell, centre, stain, rng)
    white = [(centre, radius)]
    if rng.random() < stain.neighbours:
        _neighbour(density, white, stain, rng)
    density += _red_cells(white, stain, rng)
    density += _platelets(white, stain, rng)
    density += 0.015 * smooth_noise(rng, 5)[..., None] * np.array([0.5, 1, 0.7], np.float32)
    light = np.asarray(stain.light, np.float32)
    return np.clip(light * np.exp(-np.maximum(density, -0.06)), 0, 1)


# Nuclei: each returns a signed distance. `x`, `y` are already bent by noise; `r` is the cell's radius.


def _segmented(x: Field, y: Field, at: Place, r: float, lobes: int, size: float, rng: Rng) -> Field:
    """Lobes on an arc joined by threads: a neutrophil (three to five) or an eosinophil (two)."""
    turn = rng.uniform(0, 2 * np.pi)
    spread = {1: 0.0, 2: rng.uniform(2.0, 2.9)}.get(lobes, rng.uniform(3.4, 5.0))
    reach = r * (rng.uniform(0.42, 0.5) if lobes == 2 else rng.uniform(0.42, 0.56))
    spots = [
        polar(
            at,
            turn + spread * (i / max(lobes - 1, 1) - 0.5) + rng.normal(0, 0.1),
            reach * rng.uniform(0.85, 1.1),
        )
        for i in range(lobes)
    ]
    shape: Field | None = None
    for spot in spots:
        half = size * r * rng.uniform(0.85, 1.15)
        lobe = ellipse(x, y, spot, (half * rng.uniform(0.95, 1.3), half), rng.uniform(0, np.pi))
        shape = lobe if shape is None else join(shape, lobe, 0.05 * r)
    assert shape is not None
    for one, two in pairwise(spots):
        shape = join(shape, rope(x, y, one, two, r * rng.uniform(0.03, 0.13)), 0.09 * r)
    return shape


def _band(x: Field, y: Field, at: Place, r: float, thick: float, bend: float, rng: Rng) -> Field:
    """A bent sausage of half thickness `thick * r` over `bend` radians: horseshoe, kidney or band form."""
    turn, reach = rng.uniform(0, 2 * np.pi), r * (0.92 - thick) * rng.uniform(0.75, 0.95)
    middle = polar(at, turn + np.pi, 0.25 * reach)
    knots = [polar(middle, turn + bend * (t - 0.5), reach) for t in np.linspace(0, 1, 5)]
    shape: Field | None = None
    for one, two in pairwise(knots):
        part = rope(x, y, one, two, thick * r * rng.uniform(0.88, 1.12))
        shape = part if shape is None else join(shape, part, 0.15 * r)
    assert shape is not None
    return shape


def _round(x: Field, y: Field, at: Place, r: float, size: float, rng: Rng) -> Field:
    """A round nucleus, sometimes with a shallow notch: a lymphocyte's."""
    half, turn = size * r, rng.uniform(0, 2 * np.pi)
    spot = polar(at, turn, r * (1 - size) * rng.uniform(0.2, 0.9))
    shape = ellipse(x, y, spot, (half * rng.uniform(0.97, 1.06), half * rng.uniform(0.9, 1)), turn)
    if rng.random() < 0.3:
        notch = ellipse(x, y, polar(spot, rng.uniform(0, 6.28), half * 1.2), (half * 0.38, half * 0.38))
        shape = cut(shape, notch, 0.12 * r)
    return shape


def _kidney(x: Field, y: Field, at: Place, r: float, rng: Rng) -> Field:
    """A large oval with one deep fold: a monocyte's nucleus seen flat."""
    turn, half = rng.uniform(0, 2 * np.pi), r * rng.uniform(0.6, 0.7)
    spot = polar(at, turn, r * rng.uniform(0.05, 0.2))
    shape = ellipse(x, y, spot, (half * 0.9, half * 1.12), turn)
    for _ in range(1 + (rng.random() < 0.3)):
        side = turn + np.pi + rng.normal(0, 0.35)
        fold = ellipse(
            x,
            y,
            polar(spot, side, half * rng.uniform(0.85, 1.05)),
            (half * rng.uniform(0.4, 0.65), half * 0.3),
            side,
        )
        shape = cut(shape, fold, 0.14 * r)
        turn += rng.uniform(1.6, 3.2)
    return shape


# Cells


@dataclass(frozen=True, kw_only=True)
class _Anatomy:
    """What one white cell is made of, before staining."""

    radius: float
    nucleus: Field  # signed distance
    density: float  # of the nucleus
    clumps_um: float  # size of the chromatin's clumps
    contrast: float  # between clumps
    blue: float  # basophilia of the cytoplasm
    pale: float  # acidophilia of the cytoplasm
    granule_um: float = 0.2
    granules: float = 0.0  # share of the cytoplasm that they cover
    strength: float = 0.0  # of the granules' stain
    orange: float = 0.0  # how far granules take eosin rather than azure
    vacuoles: int = 0
    uneven: float = 0.05  # how much the cell's edge wavers


# Dye uptake overlaps widely between the types on purpose: shape must tell them apart, not colour.
def _neutrophil(x: Field, y: Field, at: Place, um: float, rng: Rng) -> _Anatomy:
    r = rng.uniform(5.9, 7.3) * um
    if rng.random() < 0.12:
        nucleus = _band(x, y, at, r, rng.uniform(0.2, 0.25), rng.uniform(3.2, 4.4), rng)
    else:
        lobes = int(rng.choice([2, 3, 4, 5], p=[0.1, 0.42, 0.36, 0.12]))
        nucleus = _segmented(x, y, at, r, lobes, 0.31 - 0.025 * (lobes - 3), rng)
    return _Anatomy(
        radius=r, nucleus=nucleus, density=rng.uniform(0.85, 1.2), clumps_um=0.42, contrast=0.2,
        blue=rng.uniform(0, 0.45), pale=rng.uniform(0.05, 0.35), granule_um=0.2,
        granules=rng.uniform(0.4, 0.6), strength=rng.uniform(0.15, 0.45), orange=rng.uniform(0.1, 0.6),
    )  # fmt: skip


def _lymphocyte(x: Field, y: Field, at: Place, um: float, rng: Rng) -> _Anatomy:
    large = rng.random() < 0.4
    r = (rng.uniform(5.4, 7.0) if large else rng.uniform(4.2, 5.3)) * um
    nucleus = _round(x, y, at, r, rng.uniform(0.66, 0.8) if large else rng.uniform(0.78, 0.92), rng)
    few = 0.035 if large and rng.random() < 0.5 else 0.0
    return _Anatomy(
        radius=r, nucleus=nucleus, density=rng.uniform(0.85, 1.25), clumps_um=0.75, contrast=0.13,
        blue=rng.uniform(0.1, 0.75), pale=rng.uniform(0, 0.3), granule_um=0.3, granules=few, strength=0.6,
    )  # fmt: skip


def _monocyte(x: Field, y: Field, at: Place, um: float, rng: Rng) -> _Anatomy:
    r = rng.uniform(6.6, 8.8) * um
    if rng.random() < 0.45:
        nucleus = _band(x, y, at, r, rng.uniform(0.27, 0.36), rng.uniform(2.0, 3.4), rng)
    else:
        nucleus = _kidney(x, y, at, r, rng)
    return _Anatomy(
        radius=r, nucleus=nucleus, density=rng.uniform(0.7, 1.15), clumps_um=0.5, contrast=0.17,
        blue=rng.uniform(0.1, 0.7), pale=rng.uniform(0.05, 0.35), granule_um=0.16, granules=0.4,
        strength=rng.uniform(0.08, 0.35), orange=rng.uniform(0, 0.5), vacuoles=int(rng.integers(0, 9)),
        uneven=0.11,
    )  # fmt: skip


def _eosinophil(x: Field, y: Field, at: Place, um: float, rng: Rng) -> _Anatomy:
    r = rng.uniform(6.0, 7.6) * um
    lobes = int(rng.choice([1, 2, 3], p=[0.06, 0.8, 0.14]))
    nucleus = _segmented(x, y, at, r, lobes, {1: 0.5, 2: 0.37, 3: 0.3}[lobes], rng)
    return _Anatomy(
        radius=r, nucleus=nucleus, density=rng.uniform(0.8, 1.15), clumps_um=0.45, contrast=0.17,
        blue=rng.uniform(0, 0.4), pale=rng.uniform(0.05, 0.35), granule_um=0.42,
        granules=rng.uniform(0.4, 0.8), strength=rng.uniform(0.5, 1.05), orange=rng.uniform(0.6, 1.0),
    )  # fmt: skip


_TYPES = {
    "neutrophil": _neutrophil,
    "lymphocyte": _lymphocyte,
    "monocyte": _monocyte,
    "eosinophil": _eosinophil,
}


def _white_cell(cell: str, at: Place, stain: Stain, rng: Rng) -> tuple[Field, float]:
    """Draw the white cell at `at`; returns its optical density and its radius."""
    # Only a window around the cell is drawn, for speed.
    reach = 1.25 * _LARGEST_UM[cell] * stain.scale
    area = window(at, reach)
    x, y = (grid[area] for grid in grid())
    bend = 0.2 * stain.scale
    bx, by = (axis + bend * smooth_noise(rng, 9)[area] for axis in (x, y))
    made = _TYPES[cell](bx, by, at, stain.scale, rng)
    r = made.radius
    squeeze = rng.uniform(0.9, 1.0)
    edge = ellipse(bx, by, at, (r, r * squeeze), rng.uniform(0, np.pi))
    edge = edge - r * wobble(x, y, at, rng, made.uneven)
    nucleus_at = np.maximum(made.nucleus, edge + 0.035 * r)  # a nucleus never leaves its cell
    body, nucleus = inside(edge), inside(nucleus_at)
    plasm = body * (1 - nucleus)

    purple = _AZURE + stain.hue * np.array([-0.22, 0.06, 0.1], np.float32)
    chromatin = 1 + made.contrast * np.clip(grain(rng, made.clumps_um * stain.scale)[area], -2, 2)
    rim = 1 + 0.1 * np.exp(-((nucleus_at / (0.35 * stain.scale)) ** 2))  # chromatin lies along the membrane
    density = (stain.nucleus * made.density * nucleus * chromatin * rim)[..., None] * purple
    cloud = 1 + 0.14 * smooth_noise(rng, 9)[area]
    blue = stain.cytoplasm * made.blue * cloud * (1 + 0.25 * inside(-edge - 0.08 * r))
    density += (plasm * blue)[..., None] * _BLUE
    density += (plasm * stain.eosin * made.pale * cloud)[..., None] * _EOSIN
    density += (plasm * 0.1)[..., None] * _LILAC
    for _ in range(made.vacuoles):
        spot = polar(at, rng.uniform(0, 6.28), r * rng.uniform(0.35, 0.9))
        size = stain.scale * rng.uniform(0.25, 0.6)
        density *= (
            1 - 0.75 * (inside(ellipse(x, y, spot, (size, size)), 1.2) * (1 - 0.8 * nucleus))[..., None]
        )
    density += _granules(made, area, plasm, nucleus, stain, rng)
    whole = np.zeros((PIXELS, PIXELS, 3), np.float32)
    whole[area] = density
    return whole, r


def _granules(
    made: _Anatomy, area: Window, plasm: Field, nucleus: Field, stain: Stain, rng: Rng
) -> Field | float:
    """Optical density of the granules: fine ones as grain, coarse ones as small balls."""
    size_um, share, strength = made.granule_um, made.granules, made.strength
    if share == 0:
        return 0.0
    coarse = size_um > 0.3
    if coarse:
        dots = balls(size_um * stain.scale, share, area, rng)
    else:
        field = grain(rng, max(size_um * stain.scale, 0.6))[area]
        level = float(np.quantile(field[::3, ::3], 1 - share))
        dots = 1 / (1 + np.exp(-np.clip((field - level) * 5, -30, 30)))
    lilac = stain.granule_hue
    orange = (1 - 0.45 * lilac) * _EOSIN + 0.5 * lilac * _LILAC
    pale = 0.6 * (1 - lilac) * _EOSIN + lilac * _LILAC
    colour = made.orange * orange + (1 - made.orange) * pale
    where = plasm + (0.15 if coarse else 0.03) * nucleus  # a few lie over the nucleus
    return np.asarray((where * dots * strength * stain.eosin)[..., None] * colour, np.float32)


def _neighbour(density: Field, taken: list[tuple[Place, float]], stain: Stain, rng: Rng) -> None:
    """Add a second white cell of any type whose middle lies beyond the edge, if there is room."""
    (at, radius), cell = taken[0], CELL_TYPES[rng.integers(len(CELL_TYPES))]
    along, side = rng.uniform(0, PIXELS), int(rng.integers(4))
    out = rng.uniform(0, 2.5) * stain.scale
    place = np.array([along, -out if side < 2 else PIXELS + out])[:: 1 if side % 2 else -1]
    if math.hypot(*(place - at)) < radius + 1.1 * _LARGEST_UM[cell] * stain.scale:
        return
    other, size = _white_cell(cell, place, stain, rng)
    density += other
    taken.append((place, size))


def _red_cells(white: list[tuple[Place, float]], stain: Stain, rng: Rng) -> Field:
    """Draw red cells, discs with a pale centre on a jittered hexagonal lattice, beside the white cells.

    `white` holds the place and radius of each white cell.
    """
    density = np.zeros((PIXELS, PIXELS), np.float32)
    r = 3.55 * stain.scale
    step = 2.06 * r
    offset = rng.uniform(0, step, 2)
    pallor, spots = rng.uniform(0.35, 0.85), []
    for row in range(-1, int(PIXELS / (step * 0.87)) + 2):
        for column in range(-1, int(PIXELS / step) + 2):
            spot = np.array([(column + 0.5 * (row % 2)) * step, row * step * 0.87]) + offset - step / 2
            spot = spot + rng.normal(0, 0.16 * r, 2)
            if rng.random() < stain.crowding:
                spots.append(spot)
    for spot in spots:
        size = r * rng.uniform(0.88, 1.1)
        place: Place | None = spot
        for at, radius in white:
            place = None if place is None else _push(place, size, at, radius)
        if place is not None:
            _add_red_cell(density, place, size, pallor, rng)
    haem = (1 - 0.6 * stain.red_hue) * _HAEM + 0.6 * stain.red_hue * _GREY
    return np.asarray(density[..., None] * (haem * stain.red_cell), np.float32)


def _push(spot: Place, size: float, at: Place, radius: float) -> Place | None:
    """Move a red cell out of a white cell's way; None if it would lie under it."""
    away = spot - at
    gap, need = math.hypot(*away), radius + 0.93 * size
    if gap < 0.55 * need:
        return None
    return spot if gap >= need else at + away / gap * need


def _add_red_cell(density: Field, spot: Place, size: float, pallor: float, rng: Rng) -> None:
    """Add one red cell to `density` in place, touching only the pixels around it."""
    area = window(spot, size * 1.2 + 2)
    x, y = (grid[area] for grid in grid())
    if not x.size:
        return
    turn, squeeze = rng.uniform(0, np.pi), rng.uniform(0.82, 1.0)
    edge = ellipse(x, y, spot, (size, size * squeeze), turn) - size * wobble(x, y, spot, rng, 0.03, highest=3)
    hollow = spot + rng.normal(0, 0.08 * size, 2)
    away = (
        ellipse(x, y, hollow, (size, size * squeeze), turn) / (size * squeeze) + 1
    )  # 0 in the middle, 1 at the rim
    depth = np.exp(-(away**2) / 0.2)
    thick = inside(edge, 1.0) * (1 - pallor * rng.uniform(0.7, 1.15) * depth)
    density[area] += thick * rng.uniform(0.85, 1.15)


def _platelets(white: list[tuple[Place, float]], stain: Stain, rng: Rng) -> Field:
    """A few small purple platelets between the cells."""
    total = np.zeros((PIXELS, PIXELS), np.float32)
    x, y = grid()
    for _ in range(rng.poisson(1.3)):
        spot = rng.uniform(0, PIXELS, 2)
        size = stain.scale * rng.uniform(0.6, 1.3)
        if all(math.hypot(*(spot - at)) > radius + size for at, radius in white):
            area = window(spot, 2 * size + 3)
            shape = ellipse(x[area], y[area], spot, (size, size * rng.uniform(0.7, 1)), rng.uniform(0, 3))
            total[area] += inside(shape, 1.6)
    if not total.any():
        return total[..., None]
    speckle = 0.75 + 0.35 * np.clip(grain(rng, 0.25 * stain.scale), -1.5, 1.5)
    return np.asarray((total * speckle * 0.5 * stain.nucleus)[..., None] * _AZURE, np.float32)
