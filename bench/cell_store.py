"""Measured cells in a text file: one JSON object a line, sorted, so that a review shows what was added.

A cell is one measurement, named by its settings. The files in `bench/results/` hold what has been measured;
copied to where a command keeps its cells, they let it resume from there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from filelock import FileLock

from fedsigma.common.config.study import StudyConfig
from fedsigma.common.training.classifier import supports_bfloat16
from fedsigma.common.utils.files import write_atomic

Figures = dict[str, Any]


class Keyed(Protocol):
    """A cell."""

    @property
    def key(self) -> str:
        """The cell's settings as a JSON object with sorted keys; equal for equal cells."""
        ...


class CellStore:
    """The cells of one file. Several processes may use it at a time.

    Args:
        path: The file; the first saved cell creates it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = FileLock(path.with_name(f".{path.name}.lock"))

    def find(self, cell: Keyed, recipe: str) -> Figures | None:
        """Return a cell's figures; None if it was not measured with this recipe.

        Cells that were saved without a recipe match every recipe.
        """
        figures = self._read().get(cell.key)
        return figures if figures and figures.get("recipe", recipe) == recipe else None

    def save(self, cell: Keyed, figures: Mapping[str, Any], recipe: str) -> None:
        """Save a cell's figures, its recipe and the precision of this machine, at once on disk."""
        native = supports_bfloat16(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        row = {**figures, "recipe": recipe, "precision": "bfloat16" if native else "float32"}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock:
            cells = sorted({**self._read(), cell.key: row}.items())
            lines = [f'{{"cell": {key}, "figures": {json.dumps(each)}}}\n' for key, each in cells]
            write_atomic(self._path, "".join(lines).encode())

    def _read(self) -> dict[str, Figures]:
        if not self._path.exists():
            return {}
        rows = map(json.loads, self._path.read_text(encoding="utf-8").splitlines())
        return {json.dumps(row["cell"], sort_keys=True): row["figures"] for row in rows}


def recipe_digest(*studies: StudyConfig) -> str:
    """Return a digest of what studies train: all settings but name, seed, baselines and location of images.

    Settings with default values are left out, so that cells stay valid when a setting is added or renamed.
    """
    digest = hashlib.sha256()
    default = asdict(StudyConfig(name="any", backbone="any", classes=("a", "b")))
    for study in studies:
        settings = asdict(replace(study, name="any", seed=default["seed"], data=None, baselines=()))
        del settings["baselines"]
        content = {"sites_by": study.data and study.data.sites_by, **_differences(settings, default)}
        digest.update(json.dumps(content, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def _differences(settings: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of nested settings that differ from the defaults."""
    content = {}
    for name, value in settings.items():
        if isinstance(value, dict) and isinstance(default.get(name), dict):
            value = _differences(value, default[name])
            if not value:
                continue
        elif value == default.get(name):
            continue
        content[name] = value
    return content
