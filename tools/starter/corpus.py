"""The pre-training corpus in memory, and batched augmentation on tensors."""

from __future__ import annotations

import io
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from tools.starter.shapes import Drawing, draw

SIDE = 128
# Knee and brain pictures are the hardest to tell apart, so they are shown more often.
SOURCE_WEIGHT = {"knee_xray": 1.7, "brain_mri": 1.4, "lung_histology": 0.9, "ct_kidney": 0.7}
TEMPLATES = (
    "{label}",
    "a photo of a {label}.",
    "{label}, {hint}",
    "a {hint} showing {label}",
    "an image of {label}",
)


@dataclass(frozen=True)
class Corpus:
    """Pictures uint8 (n, 3, SIDE, SIDE) with a class number each; classes are (source, label, hint)."""

    pictures: Tensor
    classes: Tensor
    names: list[tuple[str, str, str]]

    def sources(self) -> dict[str, list[int]]:
        """Class numbers of each source."""
        found: dict[str, list[int]] = {}
        for number, (source, _, _) in enumerate(self.names):
            found.setdefault(source, []).append(number)
        return found


def _square(raw: bytes) -> np.ndarray:
    picture = Image.open(io.BytesIO(raw)).convert("RGB")
    short = min(picture.size)
    left, top = (picture.width - short) // 2, (picture.height - short) // 2
    square = picture.crop((left, top, left + short, top + short))
    return np.asarray(square.resize((SIDE, SIDE), Image.Resampling.BICUBIC)).transpose(2, 0, 1)


def load(folder: Path, split: str) -> Corpus:
    """Read every parquet file of `folder`; rows of the given split only.

    Raises:
        FileNotFoundError: no parquet file in the folder.
    """
    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise FileNotFoundError(f"no parquet file in {folder}: expected the pre-training sets there")
    pictures, classes, names = [], [], []
    for file in files:
        rows = [r for r in pq.read_table(file).to_pylist() if r["split"] == split]
        number = {}
        for label, hint in sorted({(r["label"], r["caption_hint"]) for r in rows}):
            number[label] = len(names)
            names.append((file.stem, label, hint))
        pictures += [_square(r["image"]["bytes"]) for r in rows]
        classes += [number[r["label"]] for r in rows]
    return Corpus(torch.from_numpy(np.stack(pictures)), torch.tensor(classes), names)


def _draw_many(seed: int, count: int) -> list[Drawing]:
    rng = np.random.default_rng(seed)
    return [draw(rng, SIDE) for _ in range(count)]


@dataclass(frozen=True)
class Drawings:
    """Procedural pictures uint8 (n, 3, SIDE, SIDE), captions, attribute labels (n, attributes)."""

    pictures: Tensor
    captions: list[str]
    labels: Tensor


def drawings(count: int, seed: int = 0, workers: int = 2) -> Drawings:
    """Draw `count` pictures; the same seed gives the same pictures whatever the workers."""
    part = 250
    with ProcessPoolExecutor(workers) as pool:
        parts = list(pool.map(_draw_many, range(seed, seed + count // part), [part] * (count // part)))
    flat = [d for p in parts for d in p]
    pictures = torch.from_numpy(np.stack([d.picture for d in flat])).permute(0, 3, 1, 2).contiguous()
    return Drawings(pictures, [d.caption for d in flat], torch.tensor([d.labels for d in flat]))


def sampling_weights(corpus: Corpus) -> Tensor:
    """One weight a picture: sources by SOURCE_WEIGHT, classes evened out by the square root of size."""
    counts = torch.bincount(corpus.classes, minlength=len(corpus.names)).double()
    weight = torch.tensor([SOURCE_WEIGHT.get(s, 0.8) for s, _, _ in corpus.names], dtype=torch.float64)
    return (weight / counts.sqrt())[corpus.classes]


def augment(
    pictures: Tensor, pixels: int, generator: torch.Generator, *, crop: tuple[float, float], colour: float
) -> Tensor:
    """Random crop, flip, rotation, contrast and false colour of a batch.

    Args:
        pictures: uint8 (n, 3, SIDE, SIDE).
        pixels: side of the result.
        generator: source of the randomness.
        crop: range of the kept area.
        colour: share of pictures whose channels are mixed at random; grey pictures then teach colour
            invariance, which stains and cameras of other laboratories need.

    Returns:
        float32 (n, 3, pixels, pixels) in 0..1.
    """
    n = pictures.shape[0]

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    scale = uniform(*crop).sqrt()
    aspect = uniform(-0.15, 0.15).exp()
    sx, sy = (scale * aspect).clamp(max=1), (scale / aspect).clamp(max=1)
    turn = uniform(-0.26, 0.26)
    flip = torch.where(torch.rand(n, generator=generator) < 0.5, -1.0, 1.0)
    dx, dy = uniform(-1, 1) * (1 - sx), uniform(-1, 1) * (1 - sy)
    cos, sin = turn.cos(), turn.sin()
    rows = [torch.stack([flip * sx * cos, -sy * sin, dx], 1), torch.stack([flip * sx * sin, sy * cos, dy], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), [n, 3, pixels, pixels], align_corners=False)
    out = F.grid_sample(pictures.float() / 255, grid, padding_mode="reflection", align_corners=False)
    mean = out.mean((1, 2, 3), keepdim=True)
    out = (out - mean) * uniform(0.65, 1.35, 1, 1, 1) + mean + uniform(-0.15, 0.15, 1, 1, 1)
    mix = torch.eye(3) + 0.35 * torch.randn(n, 3, 3, generator=generator)
    mix = mix / mix.sum(2, keepdim=True).clamp(min=0.5)
    tint = 0.18 * torch.randn(n, 3, 1, 1, generator=generator)
    mixed = torch.einsum("nij,njhw->nihw", mix, out) + tint
    chosen = (torch.rand(n, generator=generator) < colour)[:, None, None, None]
    out = torch.where(chosen, mixed, out)
    noise = (torch.rand(n, 1, 1, 1, generator=generator) < 0.2) * 0.04
    return (out + noise * torch.randn(out.shape, generator=generator)).clamp(0, 1)
