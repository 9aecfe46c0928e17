"""The demonstration set: synthetic blood smears from four made-up laboratories. No picture in it is real."""

from __future__ import annotations

import io
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
from PIL import Image, ImageFilter

from fedsigma.common.data.records import DataError, PictureSource, Record
from fedsigma.common.data.sources.registry import register_source
from fedsigma.common.data.synthetic.drawing import CELL_TYPES, Stain, draw_smear
from fedsigma.common.data.synthetic.fields import Field, Rng

__all__ = ["LABORATORIES", "Laboratory", "draw_picture", "open_demo"]

Range = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Laboratory:
    """Stain, microscope, camera and patients of a made-up laboratory; pairs are ranges of a uniform draw.

    Attributes:
        scale: Pixels per micrometre.
        light: Colour of the background, 0 to 1.
        nucleus: Strength of the stain of nuclei.
        cytoplasm: Strength of the stain of cytoplasm.
        eosin: Strength of eosin.
        red_cell: Strength of the stain of red cells.
        hue: Hue of nuclei, from -1 (bluish) to 1 (reddish).
        crowding: Share of free positions with a red cell.
        balance: Gain of red, green and blue.
        blur: Standard deviation in pixels.
        noise: Standard deviation, of 255.
        quality: JPEG quality; 0 for no compression.
        shade: Unevenness of the light.
        mix: Relative frequency of each type in CELL_TYPES.
    """

    scale: Range
    light: tuple[float, float, float]
    nucleus: Range
    cytoplasm: Range
    eosin: Range
    red_cell: Range
    hue: Range
    crowding: Range
    balance: tuple[float, float, float]
    blur: Range
    noise: Range
    quality: int
    shade: float
    mix: tuple[float, float, float, float]


LABORATORIES = {
    "north": Laboratory(
        scale=(3.6, 4.3), light=(0.98, 0.93, 0.87), nucleus=(0.95, 1.35), cytoplasm=(0.7, 1.2),
        eosin=(0.6, 1.25), red_cell=(0.75, 1.05), hue=(-0.2, 0.5), crowding=(0.2, 0.85),
        balance=(1.0, 1.0, 1.0), blur=(0.3, 0.6), noise=(1.0, 3.0), quality=0, shade=0.05,
        mix=(1.5, 1.1, 0.7, 0.7),
    ),
    "east": Laboratory(
        scale=(4.4, 5.3), light=(0.84, 0.88, 0.91), nucleus=(0.55, 0.85), cytoplasm=(0.8, 1.5),
        eosin=(0.45, 0.95), red_cell=(0.45, 0.75), hue=(-1.0, -0.3), crowding=(0.1, 0.7),
        balance=(0.98, 1.0, 1.02), blur=(0.9, 1.7), noise=(2.0, 5.0), quality=55, shade=0.18,
        mix=(0.9, 0.8, 0.9, 1.4),
    ),
    "south": Laboratory(
        scale=(3.3, 4.0), light=(0.97, 0.91, 0.90), nucleus=(1.0, 1.5), cytoplasm=(0.5, 1.0),
        eosin=(0.8, 1.5), red_cell=(1.0, 1.5), hue=(0.2, 1.0), crowding=(0.3, 0.95),
        balance=(1.0, 0.97, 1.0), blur=(0.4, 0.8), noise=(3.0, 7.0), quality=80, shade=0.1,
        mix=(0.8, 1.5, 1.1, 0.6),
    ),
    "west": Laboratory(
        scale=(4.9, 6.0), light=(0.96, 0.93, 0.68), nucleus=(0.8, 1.3), cytoplasm=(0.5, 1.1),
        eosin=(0.6, 1.3), red_cell=(0.2, 0.5), hue=(0.1, 1.0), crowding=(0.1, 0.6),
        balance=(1.04, 1.0, 0.9), blur=(0.6, 1.2), noise=(1.5, 4.0), quality=70, shade=0.14,
        mix=(0.8, 0.7, 1.3, 1.2),
    ),
}  # fmt: skip


@register_source("demo")
def open_demo(
    *, seed: int = 1, train: int = 20, test: int = 20, laboratories: Sequence[str] = tuple(LABORATORIES)
) -> PictureSource:
    """Open the synthetic demonstration set; each picture is drawn when it is decoded.

    Args:
        seed: Seed of the pictures.
        train: Mean number of training pictures of each class and laboratory.
        test: Mean number of test pictures of each class and laboratory.
        laboratories: Laboratories to include.

    Raises:
        DataError: A number is below its minimum, or a laboratory is unknown.
    """
    for name, value, minimum in (("seed", seed, 0), ("train", train, 1), ("test", test, 1)):
        if not isinstance(value, int) or value < minimum:
            raise DataError(
                f"the option {name} of the demonstration set is {value!r}, expected at least {minimum}"
            )
    if unknown := [name for name in laboratories if name not in LABORATORIES]:
        raise DataError(f"the option laboratories names '{unknown[0]}', known are {', '.join(LABORATORIES)}")
    records = []
    for site, laboratory in LABORATORIES.items():
        if site not in laboratories:
            continue
        for label, share in zip(CELL_TYPES, laboratory.mix, strict=True):
            for split, mean in (("train", train), ("test", test)):
                for number in range(max(1, round(mean * share))):
                    key = f"{site}/{split}/{label}/{number:04d}"
                    records.append(Record(key=key, label=label, site=site, group=key, split=split))
    cache: OrderedDict[str, Image.Image] = OrderedDict()

    def read(key: str) -> Image.Image:
        if key not in cache:
            cache[key] = draw_picture(key, seed=seed)
            while len(cache) > 1024:  # 50 MB
                cache.popitem(last=False)
        return cache[key]

    return PictureSource(records, read)


def draw_picture(key: str, *, seed: int) -> Image.Image:
    """Draw the synthetic picture `LABORATORY/SPLIT/CELL/NUMBER`, deterministically."""
    site, split, cell, number = PurePosixPath(key).parts
    laboratory = LABORATORIES[site]
    entropy = [list(LABORATORIES).index(site), int(split == "test"), CELL_TYPES.index(cell), int(number)]
    rng = np.random.default_rng([seed, *entropy])
    light = draw_smear(cell, _stain(laboratory, rng), rng)
    return _photograph(light, laboratory, rng)


def _stain(laboratory: Laboratory, rng: Rng) -> Stain:
    """Draw one slide's stain. Strength and hue vary as much within a laboratory as between cell types."""
    tint = rng.normal(0, 0.02, 3)
    red, green, blue = np.clip(np.array(laboratory.light) + tint, 0, 1)
    return Stain(
        scale=rng.uniform(*laboratory.scale),
        light=(float(red), float(green), float(blue)),
        nucleus=rng.uniform(*laboratory.nucleus),
        cytoplasm=rng.uniform(*laboratory.cytoplasm),
        eosin=rng.uniform(*laboratory.eosin),
        red_cell=rng.uniform(*laboratory.red_cell),
        hue=rng.uniform(*laboratory.hue),
        granule_hue=rng.uniform(0, 1),
        red_hue=rng.uniform(0, 1),
        crowding=rng.uniform(*laboratory.crowding),
        neighbours=0.35,
    )


def _photograph(light: Field, laboratory: Laboratory, rng: Rng) -> Image.Image:
    """Camera: uneven light, white balance, exposure, blur, noise and compression."""
    height, width = light.shape[:2]
    x = np.linspace(-1, 1, width, dtype=np.float32)[None, :]
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    angle, slope = rng.uniform(0, 2 * np.pi), laboratory.shade * rng.uniform(-0.5, 0.5)
    field = 1 - laboratory.shade * rng.uniform(0, 1) * 0.3 * (x**2 + y**2)
    field += slope * (math.cos(angle) * x + math.sin(angle) * y)
    gain = np.array(laboratory.balance) * rng.uniform(0.82, 1.06) * rng.normal(1, 0.035, 3)
    gain = gain.astype(np.float32)
    exposed = light * field[..., None] * gain
    picture = Image.fromarray((np.clip(exposed, 0, 1) * 255).astype(np.uint8))
    picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(*laboratory.blur)))
    grain = rng.standard_normal(light.shape, dtype=np.float32) * rng.uniform(*laboratory.noise)
    picture = Image.fromarray(np.clip(np.asarray(picture) + grain, 0, 255).astype(np.uint8))
    if laboratory.quality:
        stream = io.BytesIO()
        picture.save(stream, "JPEG", quality=laboratory.quality)
        picture = Image.open(stream).convert("RGB")
    return picture
