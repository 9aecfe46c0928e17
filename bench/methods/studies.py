"""Where methods are compared: the studies of real sites, and sets of one place divided into four sites."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from fedsigma.common.config.study import DataConfig, StudyConfig, load_study

__all__ = ["REAL", "SETS", "find_study"]

REAL = ("white-cells-four-labs", "dermoscopy-four-sites")
SETS: Mapping[str, tuple[str, ...]] = {
    "brain_mri": ("glioma", "meningioma", "no tumour", "pituitary tumour"),
    "chest_xray": ("normal chest X-ray", "pneumonia"),
    "covid_radiography": ("COVID-19 chest X-ray", "normal chest X-ray"),
    "ct_kidney": ("kidney cyst", "kidney stone", "kidney tumour", "normal kidney"),
    "knee_xray": (
        "healthy knee",
        "doubtful osteoarthritis",
        "minimal osteoarthritis",
        "moderate osteoarthritis",
        "severe osteoarthritis",
    ),
    "lung_histology": ("benign lung tissue", "lung adenocarcinoma", "lung squamous cell carcinoma"),
}
"""Classes by set. The starter was pre-trained on the training parts of all six, with these words."""
SITES, ALPHA = 4, 0.5
"""Into how many sites a set is divided, and how unevenly its classes (Dirichlet; small is uneven)."""


def find_study(name: str) -> StudyConfig:
    """A study by its name; a set is read from NAME.parquet in $FEDSIGMA_DATA, as the first study trains.

    Its augmentation is the one of CLIP-SVD's biomedical runs: the studies' own is for microscopes.
    """
    if name not in SETS:
        return load_study(name)
    base = load_study(REAL[0])
    source = Path(os.environ.get("FEDSIGMA_DATA") or ".").resolve() / f"{name}.parquet"
    return replace(
        base,
        name=name,
        classes=SETS[name],
        data=DataConfig(source=f"parquet:{source}", sites_by={"dirichlet": {"sites": SITES, "alpha": ALPHA}}),
        training=replace(base.training, augment="paper"),
    )
