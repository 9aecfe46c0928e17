"""Procedural pictures with captions, drawn for pre-training the starter backbone.

The available medical images are mostly grey and come with twenty class names; a text tower trained on
those alone knows no colour, shape or texture word. These drawings give it some. They are plain
geometry on plain grounds: no shape is inside another, so nothing here looks like a cell.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (200, 40, 40),
    "orange": (235, 140, 40),
    "yellow": (235, 215, 60),
    "green": (50, 150, 70),
    "blue": (45, 80, 190),
    "purple": (120, 50, 150),
    "pink": (235, 140, 180),
    "brown": (120, 75, 40),
    "black": (25, 25, 25),
    "white": (240, 240, 240),
    "grey": (128, 128, 128),
}
SHAPES = ("disc", "square", "triangle", "star", "ring", "crescent", "cross", "stripe", "blob")
TEXTURES = ("plain", "striped", "dotted", "checkered", "mottled", "granular")
BORDERS = ("sharp", "blurred", "jagged")
GROUNDS = ("plain", "shaded", "noisy", "cloudy")
COUNTS = ("one", "two", "three", "four")
SIZES = ("small", "medium", "large")
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "texture": TEXTURES,
    "border": BORDERS,
    "ground_colour": tuple(COLOURS),
    "count": COUNTS,
    "size": SIZES,
}
PROMPTS: dict[str, str] = {
    "colour": "a {} shape",
    "shape": "a {}",
    "texture": "a {} texture",
    "border": "a shape with a {} border",
    "ground_colour": "a {} background",
    "count": "{} objects",
    "size": "a {} object",
}
_OVERSAMPLE = 2


@dataclass(frozen=True)
class Drawing:
    """One drawing: uint8 picture of shape (size, size, 3), its caption and its attribute numbers."""

    picture: np.ndarray
    caption: str
    labels: tuple[int, ...]


def _noise(rng: np.random.Generator, side: int, cells: int) -> np.ndarray:
    """Smooth noise in 0..1 of shape (side, side), `cells` bumps across."""
    grid = Image.fromarray((rng.random((cells, cells)) * 255).astype(np.uint8))
    return np.asarray(grid.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float32) / 255


def _jitter(rng: np.random.Generator, colour: str) -> np.ndarray:
    return np.clip(np.array(COLOURS[colour], np.float32) + rng.normal(0, 14, 3), 0, 255)


def _ground(rng: np.random.Generator, side: int, colour: str, kind: str) -> np.ndarray:
    base = np.broadcast_to(_jitter(rng, colour), (side, side, 3)).astype(np.float32)
    if kind == "shaded":
        ramp = np.linspace(0.7, 1.2, side, dtype=np.float32)
        base = base * (ramp[:, None, None] if rng.random() < 0.5 else ramp[None, :, None])
    elif kind == "noisy":
        base = base + rng.normal(0, 18, (side, side, 1)).astype(np.float32)
    elif kind == "cloudy":
        base = base + 70 * (_noise(rng, side, int(rng.integers(4, 12)))[..., None] - 0.5)
    return np.asarray(base, dtype=np.float32)


def _polygon(rng: np.random.Generator, shape: str, x: float, y: float, r: float) -> list[tuple[float, float]]:
    turn = rng.uniform(0, 2 * np.pi)
    if shape in {"square", "triangle"}:
        corners = 4 if shape == "square" else 3
        radii = np.full(corners, r)
    elif shape == "star":
        corners, radii = 10, np.where(np.arange(10) % 2 == 0, r, 0.45 * r)
    elif shape == "cross":
        corners, radii = 12, np.where(np.arange(12) % 3 == 0, 0.45 * r, r)
    else:  # blob: a low-frequency wobble of the radius
        corners = 60
        t = np.linspace(0, 2 * np.pi, corners, endpoint=False)
        radii = r * (1 + sum(rng.normal(0, 0.16) * np.cos(k * t + rng.uniform(0, 6)) for k in (2, 3, 4)))
    angles = turn + np.linspace(0, 2 * np.pi, corners, endpoint=False)
    return [(x + a * np.cos(t), y + a * np.sin(t)) for t, a in zip(angles, radii, strict=True)]


def _mask(rng: np.random.Generator, side: int, shape: str, x: float, y: float, r: float) -> Image.Image:
    mask = Image.new("L", (side, side), 0)
    pen = ImageDraw.Draw(mask)
    box = (x - r, y - r * rng.uniform(0.7, 1), x + r, y + r * rng.uniform(0.7, 1))
    if shape == "disc":
        pen.ellipse(box, fill=255)
    elif shape == "ring":
        pen.ellipse(box, outline=255, width=max(3, int(r / 4)))
    elif shape == "crescent":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=255)
        dx, dy = rng.uniform(0.4, 0.6, 2) * r * rng.choice([-1, 1], 2)
        pen.ellipse((x - r + dx, y - r + dy, x + r + dx, y + r + dy), fill=0)
    elif shape == "stripe":
        t = rng.uniform(0, np.pi)
        dx, dy = 1.3 * r * np.cos(t), 1.3 * r * np.sin(t)
        pen.line((x - dx, y - dy, x + dx, y + dy), fill=255, width=max(4, int(r / 3)))
    else:
        pen.polygon(_polygon(rng, shape, x, y, r), fill=255)
    return mask


def _texture(rng: np.random.Generator, side: int, kind: str) -> np.ndarray:
    """Brightness factor of shape (side, side, 1)."""
    yy, xx = np.mgrid[0:side, 0:side].astype(np.float32)
    period, t = rng.uniform(8, 22), rng.uniform(0, np.pi)
    along, across = xx * np.cos(t) + yy * np.sin(t), -xx * np.sin(t) + yy * np.cos(t)
    if kind == "striped":
        wave = np.sign(np.sin(2 * np.pi * along / period))
    elif kind == "dotted":
        wave = np.sign(np.sin(2 * np.pi * along / period) * np.sin(2 * np.pi * across / period) - 0.3)
    elif kind == "checkered":
        wave = np.sign(np.sin(np.pi * along / period)) * np.sign(np.sin(np.pi * across / period))
    elif kind == "mottled":
        wave = 3 * (_noise(rng, side, int(rng.integers(14, 30))) - 0.5)
    elif kind == "granular":
        wave = 2 * (_noise(rng, side, side // 3) > 0.62).astype(np.float32) - 1
    else:
        wave = np.zeros((side, side), np.float32)
    return (1 + 0.38 * wave)[..., None].astype(np.float32)


def plural_of(noun: str) -> str:
    """The plural of one of SHAPES."""
    return noun + ("es" if noun.endswith("s") else "s")


def _caption(rng: np.random.Generator, word: dict[str, str]) -> str:
    plural = "s" if word["count"] != "one" else ""
    parts = [
        word["count"],
        word["size"],
        word["texture"],
        word["colour"],
        plural_of(word["shape"]) if plural else word["shape"],
    ]
    said = " ".join(p for p in parts if p != "plain" and (p in (parts[3], parts[4]) or rng.random() < 0.75))
    if rng.random() < 0.6:
        said += f" with {word['border']} border{plural}"
    if rng.random() < 0.7:
        said += f" on a {word['ground_colour']} background"
    return f"a drawing of {said}"


def draw(rng: np.random.Generator, size: int = 128) -> Drawing:
    """Draw one picture of `size` by `size` pixels with its caption and attribute labels."""
    word = {name: str(rng.choice(values)) for name, values in ATTRIBUTES.items()}
    while word["ground_colour"] == word["colour"]:
        word["ground_colour"] = str(rng.choice(list(COLOURS)))
    side = size * _OVERSAMPLE
    canvas = _ground(rng, side, word["ground_colour"], str(rng.choice(GROUNDS)))
    count = COUNTS.index(word["count"]) + 1
    low, high = {"small": (0.07, 0.1), "medium": (0.13, 0.17), "large": (0.2, 0.25)}[word["size"]]
    cells = rng.permutation([(0.28, 0.28), (0.72, 0.28), (0.28, 0.72), (0.72, 0.72)])[:count]
    ink = _jitter(rng, word["colour"]) * _texture(rng, side, word["texture"])
    for cx, cy in cells if count > 1 else [(0.5, 0.5)]:
        x, y = (np.array([cx, cy]) + rng.uniform(-0.05, 0.05, 2)) * side
        mask = _mask(rng, side, word["shape"], x, y, rng.uniform(low, high) * side)
        if word["border"] == "blurred":
            mask = mask.filter(ImageFilter.GaussianBlur(side / 60))
        alpha = np.asarray(mask, np.float32) / 255
        if word["border"] == "jagged":
            shift = (6 * (_noise(rng, side, side // 6) - 0.5) * side / 60).astype(int)
            rows = np.clip(np.arange(side)[:, None] + shift, 0, side - 1)
            alpha = alpha[rows, np.clip(np.arange(side)[None, :] + shift.T, 0, side - 1)]
        canvas = canvas * (1 - alpha[..., None]) + ink * alpha[..., None]
    picture = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8)).resize((size, size))
    labels = tuple(ATTRIBUTES[name].index(word[name]) for name in ATTRIBUTES)
    return Drawing(np.asarray(picture), _caption(rng, word), labels)
