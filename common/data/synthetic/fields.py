"""Fields that synthetic pictures are drawn with: smooth noise, and signed distances to simple shapes.

A field is float32 of (PIXELS, PIXELS) or of a window of it; places are (x, y) in pixels; a signed distance is
negative inside its shape.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = [
    "PIXELS",
    "Field",
    "Place",
    "Rng",
    "Window",
    "balls",
    "cut",
    "ellipse",
    "grain",
    "grid",
    "inside",
    "join",
    "polar",
    "rope",
    "smooth_noise",
    "window",
    "wobble",
]

PIXELS = 128

Field = NDArray[np.float32]
Place = NDArray[np.float64]
Rng = np.random.Generator
Window = tuple[slice, slice]


@lru_cache(maxsize=1)
def grid() -> tuple[Field, Field]:
    """Column and row of every pixel."""
    y, x = np.mgrid[:PIXELS, :PIXELS].astype(np.float32)
    return x, y


@lru_cache(maxsize=64)
def _lowpass(sigma: float) -> Field:
    """Fourier response of a Gaussian blur of `sigma` pixels, (PIXELS, PIXELS // 2 + 1)."""
    fy = np.fft.fftfreq(PIXELS)[:, None]
    fx = np.fft.rfftfreq(PIXELS)[None, :]
    return np.exp(-2 * (np.pi * sigma) ** 2 * (fx**2 + fy**2)).astype(np.float32)


def grain(rng: Rng, sigma: float) -> Field:
    """Blurred white noise of unit variance; `sigma` pixels sets the size of its grains."""
    white = rng.standard_normal((PIXELS, PIXELS), dtype=np.float32)
    field = np.fft.irfft2(np.fft.rfft2(white) * _lowpass(round(sigma, 1)), s=(PIXELS, PIXELS))
    return np.asarray(field / field.std(), np.float32)


def smooth_noise(rng: Rng, cells: int) -> Field:
    """Smooth noise of about unit variance with `cells` bumps across the picture."""
    coarse = rng.standard_normal((cells + 1, cells + 1), dtype=np.float32)
    return np.asarray(Image.fromarray(coarse).resize((PIXELS, PIXELS), Image.Resampling.BICUBIC))


def inside(distance: Field, soft: float = 0.8) -> Field:
    """Signed distance (negative inside) to coverage from 0 to 1, with an edge about `soft` pixels wide."""
    return np.asarray(1 / (1 + np.exp(np.clip(distance / (0.45 * soft), -30, 30))))


def ellipse(x: Field, y: Field, at: Place, radii: tuple[float, float], turn: float = 0.0) -> Field:
    """Approximate signed distance to an ellipse with half axes `radii`, turned by `turn` radians."""
    cos, sin = math.cos(turn), math.sin(turn)
    dx, dy = x - np.float32(at[0]), y - np.float32(at[1])
    u, v = (cos * dx + sin * dy) / radii[0], (cos * dy - sin * dx) / radii[1]
    return ((np.sqrt(u * u + v * v) - 1) * min(radii)).astype(np.float32, copy=False)


def rope(x: Field, y: Field, start: Place, end: Place, thick: float) -> Field:
    """Signed distance to a segment of half thickness `thick`."""
    dx, dy = x - np.float32(start[0]), y - np.float32(start[1])
    across, down = (float(v) for v in end - start)
    along = np.clip((dx * across + dy * down) / max(across**2 + down**2, 1e-6), 0, 1)
    return (np.hypot(dx - along * across, dy - along * down) - thick).astype(np.float32, copy=False)


def join(a: Field, b: Field, blend: float) -> Field:
    """Smooth union of two signed distances."""
    mix = np.clip(0.5 + 0.5 * (b - a) / blend, 0, 1)
    return np.asarray(b + (a - b) * mix - blend * mix * (1 - mix))


def cut(a: Field, b: Field, blend: float) -> Field:
    """`a` without `b`, with a smooth rim."""
    return -join(-a, b, blend)


def wobble(x: Field, y: Field, at: Place, rng: Rng, amount: float, highest: int = 5) -> Field:
    """Relative change of a radius around `at` with the angle: harmonics of order 2 to `highest`."""
    dx, dy = x - np.float32(at[0]), y - np.float32(at[1])
    turn = (dx + 1j * dy) / np.maximum(np.hypot(dx, dy), 1e-3)
    total, power = np.zeros_like(dx), turn
    for order in range(2, highest + 1):
        power = power * turn
        wave = amount * rng.normal() / order * np.exp(2j * np.pi * rng.random())
        total += (power * np.complex64(wave)).real
    return total


def window(at: Place, reach: float) -> Window:
    """Rows and columns within `reach` pixels of a place, cut to the picture; empty if it is outside."""
    column, row = (slice(max(int(c - reach), 0), max(min(int(c + reach) + 2, PIXELS), 0)) for c in at)
    return row, column


def polar(at: Place, angle: float, reach: float) -> Place:
    """Place at distance `reach` from `at` in direction `angle` (radians)."""
    return np.asarray(at + reach * np.array([np.cos(angle), np.sin(angle)]))


def balls(radius: float, share: float, area: Window, rng: Rng) -> Field:
    """Small balls at random places in a window; depth from 0 to 1, greatest in their middle."""
    rows, columns = (part.stop - part.start for part in area)
    count = int(1.5 * share * rows * columns / (math.pi * radius**2)) + 1
    spots = rng.random((count, 1, 1, 2), dtype=np.float32) * np.array([columns, rows], np.float32)
    sizes = radius * (0.75 + 0.5 * rng.random((count, 1, 1), dtype=np.float32))
    reach = math.ceil(1.25 * radius)
    steps = np.arange(-reach, reach + 1)
    x = np.floor(spots[..., 0]).astype(np.int32) + steps[None, None, :]
    y = np.floor(spots[..., 1]).astype(np.int32) + steps[None, :, None]
    gap = np.hypot(x - spots[..., 0], y - spots[..., 1]).astype(np.float32) / sizes
    depth = inside((gap - 1) * radius) * (1 - 0.35 * gap)
    field = np.zeros((rows, columns), np.float32)
    np.maximum.at(field, (y % rows, x % columns), depth)
    return field
