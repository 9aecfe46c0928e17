"""Files of the form in which MedMNIST publishes its sets."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def npz(folder: Path, name: str, size: int, *, classes: int, colours: bool = True, **changes: object) -> Path:
    """Write a file as MedMNIST publishes it: pictures and labels of three parts; shades tell them apart."""
    arrays: dict[str, object] = {}
    for place, (split, count) in enumerate((("train", 12), ("val", 6), ("test", 9))):
        shape = (count, size, size, 3) if colours else (count, size, size)
        pictures = np.zeros(shape, np.uint8)
        pictures += (np.arange(count, dtype=np.uint8) + 50 * place).reshape(-1, *[1] * (len(shape) - 1))
        arrays[f"{split}_images"] = pictures
        arrays[f"{split}_labels"] = (np.arange(count) % classes).astype(np.uint8)[:, None]
    file = folder / (f"{name}.npz" if size == 28 else f"{name}_{size}.npz")
    np.savez_compressed(file, **(arrays | changes))  # type: ignore[arg-type]
    return file
