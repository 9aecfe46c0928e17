"""Drawing one synthetic white blood cell among red cells, as a stained smear looks under a microscope.

Nothing here is a real picture. Light is absorbed as in a stain (optical densities add up), so that
overlapping cells darken each other, and every outline is a signed distance field bent by smooth noise.

Shapes: a field is float32 (PIXELS, PIXELS); an optical density is (PIXELS, PIXELS, 3), red green blue.
Lengths are pixels of the finished picture unless a name ends in `_um` (micrometres).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["CELL_TYPES", "PIXELS", "Stain", "draw_smear"]

PIXELS = 128
CELL_TYPES = ("neutrophil", "lymphocyte", "monocyte", "eosinophil")

Field = NDArray[np.float32]
Rng = np.random.Generator
Window = tuple[slice, slice]

# Optical density of a fully stained structure under white light: red, green, blue.
_AZURE = np.array([0.85, 1.30, 0.42], np.float32)  # nuclei: the purple of azure B on DNA
_BLUE = np.array([0.55, 0.33, 0.10], np.float32)  # basophilic cytoplasm: methylene blue
_EOSIN = np.array([0.10, 0.62, 0.55], np.float32)  # eosinophilic granules
_LILAC = np.array([0.22, 0.45, 0.20], np.float32)  # neutrophilic and azurophilic granules
_HAEM = np.array([0.13, 0.40, 0.40], np.float32)  # haemoglobin after eosin

_LARGEST_UM = {"neutrophil": 7.3, "lymphocyte": 6.8, "monocyte": 8.8, "eosinophil": 7.6}  # greatest radius


@dataclass(frozen=True, kw_only=True)
class Stain:
    """How one slide is stained and seen; drawn anew for every picture within its laboratory's habits."""

    scale: float  # pixels per micrometre
    light: tuple[float, float, float]  # colour of the empty background, 0 to 1
    nucleus: float  # strength of each dye, 1 is textbook
    cytoplasm: float
    eosin: float
    red_cell: float
    hue: float  # from -1 (bluish nuclei) to 1 (reddish nuclei)
    granule_hue: float  # from 0 (granules orange) to 1 (granules lilac), of every granulocyte
    crowding: float  # share of the free places that hold a red cell


def draw_smear(cell: str, stain: Stain, rng: Rng) -> Field:
    """Draw one cell of type `cell` in the middle of a field of red cells.

    Returns:
        float32 (PIXELS, PIXELS, 3), transmitted light from 0 to 1, before the camera.

    Raises:
        ValueError: `cell` is not one of `CELL_TYPES`.

    """
    if cell not in CELL_TYPES:
        raise ValueError(f"no drawing for {cell!r}; known cell types: {', '.join(CELL_TYPES)}")
    centre = (PIXELS - 1) / 2 + rng.normal(0, 5, 2)
    density, radius = _white_cell(cell, centre, stain, rng)
    density += _red_cells(centre, radius, stain, rng)
    density += _platelets(centre, radius, stain, rng)
    density += 0.015 * _smooth_noise(rng, 5)[..., None] * np.array([0.5, 1, 0.7], np.float32)
    light = np.asarray(stain.light, np.float32)
    return np.clip(light * np.exp(-np.maximum(density, -0.06)), 0, 1)


# Fields


@lru_cache(maxsize=1)
def _grid() -> tuple[Field, Field]:
    y, x = np.mgrid[:PIXELS, :PIXELS].astype(np.float32)
    return x, y


@lru_cache(maxsize=64)
def _lowpass(sigma: float) -> Field:
    """Fourier response of a Gaussian blur of `sigma` pixels, (PIXELS, PIXELS // 2 + 1)."""
    fy = np.fft.fftfreq(PIXELS)[:, None]
    fx = np.fft.rfftfreq(PIXELS)[None, :]
    return np.exp(-2 * (np.pi * sigma) ** 2 * (fx**2 + fy**2)).astype(np.float32)


def _grain(rng: Rng, sigma: float) -> Field:
    """Blurred white noise of unit variance; `sigma` pixels sets the size of its grains."""
    white = rng.standard_normal((PIXELS, PIXELS), dtype=np.float32)
    field = np.fft.irfft2(np.fft.rfft2(white) * _lowpass(round(sigma, 1)), s=(PIXELS, PIXELS))
    return (field / field.std()).astype(np.float32)


def _smooth_noise(rng: Rng, cells: int) -> Field:
    """Smooth noise of about unit variance with `cells` bumps across the picture."""
    coarse = rng.standard_normal((cells + 1, cells + 1), dtype=np.float32)
    return np.asarray(Image.fromarray(coarse).resize((PIXELS, PIXELS), Image.Resampling.BICUBIC))


def _inside(distance: Field, soft: float = 0.8) -> Field:
    """Signed distance (negative inside) to coverage from 0 to 1, with an edge about `soft` pixels wide."""
    return 1 / (1 + np.exp(np.clip(distance / (0.45 * soft), -30, 30)))


def _ellipse(
    x: Field, y: Field, at: NDArray[np.float64], radii: tuple[float, float], turn: float = 0.0
) -> Field:
    """Approximate signed distance to an ellipse with half axes `radii`, turned by `turn` radians."""
    cos, sin = math.cos(turn), math.sin(turn)
    dx, dy = x - np.float32(at[0]), y - np.float32(at[1])
    u, v = (cos * dx + sin * dy) / radii[0], (cos * dy - sin * dx) / radii[1]
    return (np.sqrt(u * u + v * v) - 1) * min(radii)


def _rope(x: Field, y: Field, start: NDArray[np.float64], end: NDArray[np.float64], thick: float) -> Field:
    """Signed distance to a segment of half thickness `thick`."""
    dx, dy = x - np.float32(start[0]), y - np.float32(start[1])
    across, down = (float(v) for v in end - start)
    along = np.clip((dx * across + dy * down) / max(across**2 + down**2, 1e-6), 0, 1)
    return np.hypot(dx - along * across, dy - along * down) - thick


def _join(a: Field, b: Field, blend: float) -> Field:
    """Smooth union of two signed distances."""
    mix = np.clip(0.5 + 0.5 * (b - a) / blend, 0, 1)
    return b + (a - b) * mix - blend * mix * (1 - mix)


def _cut(a: Field, b: Field, blend: float) -> Field:
    """`a` without `b`, with a smooth rim."""
    return -_join(-a, b, blend)


def _wobble(x: Field, y: Field, at: NDArray[np.float64], rng: Rng, amount: float) -> Field:
    """Relative change of a radius around `at` with the angle: a few harmonics, `amount` in all."""
    dx, dy = x - np.float32(at[0]), y - np.float32(at[1])
    turn = (dx + 1j * dy) / np.maximum(np.hypot(dx, dy), 1e-3)
    total, power = np.zeros_like(dx), turn
    for order in (2, 3, 4, 5):
        power = power * turn
        wave = amount * rng.normal() / order * np.exp(2j * np.pi * rng.random())
        total += (power * np.complex64(wave)).real
    return total


def _window(at: NDArray[np.float64], reach: float) -> Window:
    """Rows and columns within `reach` pixels of a place, cut to the picture; empty if it is outside."""
    column, row = (slice(max(int(c - reach), 0), max(min(int(c + reach) + 2, PIXELS), 0)) for c in at)
    return row, column


def _polar(at: NDArray[np.float64], angle: float, reach: float) -> NDArray[np.float64]:
    return np.asarray(at + reach * np.array([np.cos(angle), np.sin(angle)]))


# Nuclei: each returns a signed distance. `x`, `y` are already bent by noise; `r` is the cell's radius.


def _segmented(
    x: Field, y: Field, at: NDArray[np.float64], r: float, lobes: int, size: float, rng: Rng
) -> Field:
    """Lobes on an arc joined by threads: a neutrophil (three to five) or an eosinophil (two)."""
    turn = rng.uniform(0, 2 * np.pi)
    spread = {1: 0.0, 2: rng.uniform(2.0, 2.9)}.get(lobes, rng.uniform(3.4, 5.0))
    reach = r * (rng.uniform(0.42, 0.5) if lobes == 2 else rng.uniform(0.42, 0.56))
    spots = [
        _polar(
            at,
            turn + spread * (i / max(lobes - 1, 1) - 0.5) + rng.normal(0, 0.1),
            reach * rng.uniform(0.85, 1.1),
        )
        for i in range(lobes)
    ]
    shape: Field | None = None
    for spot in spots:
        half = size * r * rng.uniform(0.85, 1.15)
        lobe = _ellipse(x, y, spot, (half * rng.uniform(0.95, 1.3), half), rng.uniform(0, np.pi))
        shape = lobe if shape is None else _join(shape, lobe, 0.05 * r)
    assert shape is not None
    for one, two in pairwise(spots):
        shape = _join(shape, _rope(x, y, one, two, r * rng.uniform(0.03, 0.13)), 0.09 * r)
    return shape


def _band(
    x: Field, y: Field, at: NDArray[np.float64], r: float, thick: float, bend: float, rng: Rng
) -> Field:
    """A bent sausage of half thickness `thick * r` over `bend` radians: horseshoe, kidney or band form."""
    turn, reach = rng.uniform(0, 2 * np.pi), r * (0.92 - thick) * rng.uniform(0.75, 0.95)
    middle = _polar(at, turn + np.pi, 0.25 * reach)
    knots = [_polar(middle, turn + bend * (t - 0.5), reach) for t in np.linspace(0, 1, 5)]
    shape: Field | None = None
    for one, two in pairwise(knots):
        part = _rope(x, y, one, two, thick * r * rng.uniform(0.88, 1.12))
        shape = part if shape is None else _join(shape, part, 0.15 * r)
    assert shape is not None
    return shape


def _round(x: Field, y: Field, at: NDArray[np.float64], r: float, size: float, rng: Rng) -> Field:
    """A round nucleus, sometimes with a shallow notch: a lymphocyte's."""
    half, turn = size * r, rng.uniform(0, 2 * np.pi)
    spot = _polar(at, turn, r * (1 - size) * rng.uniform(0.2, 0.9))
    shape = _ellipse(x, y, spot, (half * rng.uniform(0.97, 1.06), half * rng.uniform(0.9, 1)), turn)
    if rng.random() < 0.3:
        notch = _ellipse(x, y, _polar(spot, rng.uniform(0, 6.28), half * 1.2), (half * 0.38, half * 0.38))
        shape = _cut(shape, notch, 0.12 * r)
    return shape


def _kidney(x: Field, y: Field, at: NDArray[np.float64], r: float, rng: Rng) -> Field:
    """A large oval with one deep fold: a monocyte's nucleus seen flat."""
    turn, half = rng.uniform(0, 2 * np.pi), r * rng.uniform(0.6, 0.7)
    spot = _polar(at, turn, r * rng.uniform(0.05, 0.2))
    shape = _ellipse(x, y, spot, (half * 0.9, half * 1.12), turn)
    for _ in range(1 + (rng.random() < 0.3)):
        side = turn + np.pi + rng.normal(0, 0.35)
        fold = _ellipse(
            x,
            y,
            _polar(spot, side, half * rng.uniform(0.85, 1.05)),
            (half * rng.uniform(0.4, 0.65), half * 0.3),
            side,
        )
        shape = _cut(shape, fold, 0.14 * r)
        turn += rng.uniform(1.6, 3.2)
    return shape


# Cells


@dataclass(frozen=True)
class _Anatomy:
    """What one white cell is made of, before staining."""

    radius: float
    nucleus: Field  # signed distance
    outline: float  # how uneven the cell's edge is
    chromatin: tuple[float, float]  # size of its clumps in micrometres, contrast
    density: float  # of the nucleus
    blue: float  # basophilia of the cytoplasm
    pale: float  # acidophilia of the cytoplasm
    granules: tuple[float, float, float]  # size in micrometres, share of the cytoplasm, strength
    orange: float  # how far granules take eosin rather than azure
    vacuoles: int


def _anatomy(cell: str, x: Field, y: Field, at: NDArray[np.float64], um: float, rng: Rng) -> _Anatomy:
    """Choose the parts of a cell of type `cell`; `um` is pixels per micrometre."""
    if cell == "neutrophil":
        r = rng.uniform(5.9, 7.3) * um
        if rng.random() < 0.12:
            nucleus = _band(x, y, at, r, rng.uniform(0.2, 0.25), rng.uniform(3.2, 4.4), rng)
        else:
            lobes = int(rng.choice([2, 3, 4, 5], p=[0.1, 0.42, 0.36, 0.12]))
            nucleus = _segmented(x, y, at, r, lobes, 0.31 - 0.025 * (lobes - 3), rng)
        return _Anatomy(r, nucleus, 0.05, (0.42, 0.2), 1.12, 0.06, 0.2, (0.2, 0.5, 0.22), 0.3, 0)
    if cell == "lymphocyte":
        large = rng.random() < 0.35
        r = (rng.uniform(5.4, 6.8) if large else rng.uniform(4.1, 5.3)) * um
        nucleus = _round(x, y, at, r, rng.uniform(0.68, 0.8) if large else rng.uniform(0.8, 0.92), rng)
        few = 0.035 if large and rng.random() < 0.5 else 0.0
        return _Anatomy(
            r, nucleus, 0.05, (0.75, 0.13), 1.15, rng.uniform(0.35, 0.8), 0.05, (0.3, few, 0.6), 0.0, 0
        )
    if cell == "monocyte":
        r = rng.uniform(6.8, 8.8) * um
        if rng.random() < 0.45:
            nucleus = _band(x, y, at, r, rng.uniform(0.29, 0.36), rng.uniform(2.0, 3.4), rng)
        else:
            nucleus = _kidney(x, y, at, r, rng)
        vacuoles = int(rng.integers(0, 9))
        return _Anatomy(
            r,
            nucleus,
            0.11,
            (0.5, 0.17),
            0.82,
            rng.uniform(0.35, 0.75),
            0.12,
            (0.16, 0.4, 0.14),
            0.1,
            vacuoles,
        )
    r = rng.uniform(6.0, 7.6) * um
    lobes = int(rng.choice([1, 2, 3], p=[0.06, 0.8, 0.14]))
    nucleus = _segmented(x, y, at, r, lobes, {1: 0.5, 2: 0.37, 3: 0.3}[lobes], rng)
    return _Anatomy(
        r, nucleus, 0.05, (0.45, 0.17), 0.98, 0.1, 0.22, (0.42, rng.uniform(0.5, 0.8), 1.0), 0.9, 0
    )


def _white_cell(cell: str, at: NDArray[np.float64], stain: Stain, rng: Rng) -> tuple[Field, float]:
    """Draw the white cell at `at`; returns its optical density and its radius."""
    # Only a window around the cell is drawn, for speed.
    reach = 1.25 * _LARGEST_UM[cell] * stain.scale
    window = _window(at, reach)
    x, y = (grid[window] for grid in _grid())
    bend = 0.2 * stain.scale
    bx, by = (axis + bend * _smooth_noise(rng, 9)[window] for axis in (x, y))
    made = _anatomy(cell, bx, by, at, stain.scale, rng)
    r = made.radius
    squeeze = rng.uniform(0.9, 1.0)
    edge = _ellipse(bx, by, at, (r, r * squeeze), rng.uniform(0, np.pi))
    edge = edge - r * _wobble(x, y, at, rng, made.outline)
    nucleus_at = np.maximum(made.nucleus, edge + 0.035 * r)  # a nucleus never leaves its cell
    body, nucleus = _inside(edge), _inside(nucleus_at)
    plasm = body * (1 - nucleus)

    purple = _AZURE + stain.hue * np.array([-0.22, 0.06, 0.1], np.float32)
    clump, contrast = made.chromatin
    chromatin = 1 + contrast * np.clip(_grain(rng, clump * stain.scale)[window], -2, 2)
    rim = 1 + 0.1 * np.exp(-((nucleus_at / (0.35 * stain.scale)) ** 2))  # chromatin lies along the membrane
    density = (stain.nucleus * made.density * nucleus * chromatin * rim)[..., None] * purple
    cloud = 1 + 0.14 * _smooth_noise(rng, 9)[window]
    blue = stain.cytoplasm * made.blue * cloud * (1 + 0.25 * _inside(-edge - 0.08 * r))
    density += (plasm * blue)[..., None] * _BLUE
    density += (plasm * stain.eosin * made.pale * cloud)[..., None] * _EOSIN
    density += (plasm * 0.1)[..., None] * _LILAC
    for _ in range(made.vacuoles):
        spot = _polar(at, rng.uniform(0, 6.28), r * rng.uniform(0.35, 0.9))
        size = stain.scale * rng.uniform(0.25, 0.6)
        density *= (
            1 - 0.75 * (_inside(_ellipse(x, y, spot, (size, size)), 1.2) * (1 - 0.8 * nucleus))[..., None]
        )
    density += _granules(made, window, plasm, nucleus, stain, rng)
    whole = np.zeros((PIXELS, PIXELS, 3), np.float32)
    whole[window] = density
    return whole, r


def _granules(
    made: _Anatomy, window: Window, plasm: Field, nucleus: Field, stain: Stain, rng: Rng
) -> Field | float:
    """Optical density of the granules: fine ones as grain, coarse ones as small balls."""
    size_um, share, strength = made.granules
    if share == 0:
        return 0.0
    coarse = size_um > 0.3
    if coarse:
        dots = _balls(size_um * stain.scale, share, rng)[window]
    else:
        field = _grain(rng, max(size_um * stain.scale, 0.6))[window]
        level = float(np.quantile(field[::3, ::3], 1 - share))
        dots = 1 / (1 + np.exp(-np.clip((field - level) * 5, -30, 30)))
    lilac = stain.granule_hue
    orange = (1 - 0.45 * lilac) * _EOSIN + 0.5 * lilac * _LILAC
    pale = 0.6 * (1 - lilac) * _EOSIN + lilac * _LILAC
    colour = made.orange * orange + (1 - made.orange) * pale
    where = plasm + (0.15 if coarse else 0.03) * nucleus  # a few lie over the nucleus
    return (where * dots * strength * stain.eosin)[..., None] * colour


def _balls(radius: float, share: float, rng: Rng) -> Field:
    """Small balls at random places all over the picture; depth from 0 to 1, greatest in their middle."""
    count = int(1.5 * share * PIXELS**2 / (np.pi * radius**2))
    spots = rng.uniform(0, PIXELS, (count, 1, 1, 2)).astype(np.float32)
    sizes = radius * rng.uniform(0.75, 1.25, (count, 1, 1)).astype(np.float32)
    reach = math.ceil(1.25 * radius) + 1
    steps = np.arange(-reach, reach + 1)
    columns = np.floor(spots[..., 0]).astype(np.int64) + steps[None, None, :]
    rows = np.floor(spots[..., 1]).astype(np.int64) + steps[None, :, None]
    gap = np.hypot(columns - spots[..., 0], rows - spots[..., 1]) / sizes
    depth = _inside((gap - 1) * radius) * (1 - 0.35 * gap)
    field = np.zeros((PIXELS, PIXELS), np.float32)
    np.maximum.at(field, (rows % PIXELS, columns % PIXELS), depth.astype(np.float32))
    return field


def _red_cells(at: NDArray[np.float64], radius: float, stain: Stain, rng: Rng) -> Field:
    """Red cells around the white cell: discs with a pale centre, jittered on a hexagonal lattice."""
    density = np.zeros((PIXELS, PIXELS), np.float32)
    r = 3.55 * stain.scale
    step = 2.06 * r
    offset = rng.uniform(0, step, 2)
    pallor, taken = rng.uniform(0.35, 0.85), []
    for row in range(-1, int(PIXELS / (step * 0.87)) + 2):
        for column in range(-1, int(PIXELS / step) + 2):
            spot = np.array([(column + 0.5 * (row % 2)) * step, row * step * 0.87]) + offset - step / 2
            spot = spot + rng.normal(0, 0.16 * r, 2)
            if rng.random() < stain.crowding:
                taken.append(spot)
    for spot in taken:
        size = r * rng.uniform(0.88, 1.1)
        away = spot - at
        gap = float(np.hypot(*away))
        need = radius + 0.93 * size
        if gap < 0.55 * need:
            continue
        if gap < need:  # pushed aside by the white cell
            spot = at + away / gap * need
        _add_red_cell(density, spot, size, pallor, rng)
    return density[..., None] * (_HAEM * np.float32(stain.red_cell))


def _add_red_cell(density: Field, spot: NDArray[np.float64], size: float, pallor: float, rng: Rng) -> None:
    """Add one red cell to `density` in place, touching only the pixels around it."""
    window = _window(spot, size * 1.2 + 2)
    x, y = (grid[window] for grid in _grid())
    if not x.size:
        return
    turn, squeeze = rng.uniform(0, np.pi), rng.uniform(0.82, 1.0)
    edge = _ellipse(x, y, spot, (size, size * squeeze), turn) - size * _wobble(x, y, spot, rng, 0.03)
    hollow = spot + rng.normal(0, 0.08 * size, 2)
    away = (
        _ellipse(x, y, hollow, (size, size * squeeze), turn) / (size * squeeze) + 1
    )  # 0 in the middle, 1 at the rim
    depth = np.exp(-(away**2) / 0.2)
    thick = _inside(edge, 1.0) * (1 - pallor * rng.uniform(0.7, 1.15) * depth)
    density[window] += thick * rng.uniform(0.85, 1.15)


def _platelets(at: NDArray[np.float64], radius: float, stain: Stain, rng: Rng) -> Field:
    """A few small purple platelets between the cells."""
    total = np.zeros((PIXELS, PIXELS), np.float32)
    x, y = _grid()
    for _ in range(rng.poisson(1.3)):
        spot = rng.uniform(0, PIXELS, 2)
        size = stain.scale * rng.uniform(0.6, 1.3)
        if math.hypot(*(spot - at)) > radius + size:
            window = _window(spot, 2 * size + 3)
            shape = _ellipse(
                x[window], y[window], spot, (size, size * rng.uniform(0.7, 1)), rng.uniform(0, 3)
            )
            total[window] += _inside(shape, 1.6)
    if not total.any():
        return total[..., None]
    speckle = 0.75 + 0.35 * np.clip(_grain(rng, 0.25 * stain.scale), -1.5, 1.5)
    return (total * speckle * 0.5 * stain.nucleus)[..., None] * _AZURE
