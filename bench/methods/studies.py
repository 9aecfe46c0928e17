"""The studies that methods are compared on besides the bundled ones: sets divided among sites."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from bench.runs import REAL_STUDIES
from fedsigma.common.config.study import DataConfig, StudyConfig, load_study

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
"""Classes by set. The starter was pre-trained on the training parts of all six, with these names."""
SITES, ALPHA = 4, 0.5
"""Number of sites of a set, and the Dirichlet distribution's alpha (small is uneven)."""


def find_study(name: str) -> StudyConfig:
    """Return a study by name; a set is NAME.parquet in $FEDSIGMA_DATA, with the first real study's recipe.

    Its augmentation is that of CLIP-SVD's biomedical runs, since the study's own is for microscopes.
    """
    if name not in SETS:
        return load_study(name)
    base = load_study(REAL_STUDIES[0])
    source = Path(os.environ.get("FEDSIGMA_DATA") or ".").resolve() / f"{name}.parquet"
    return replace(
        base,
        name=name,
        classes=SETS[name],
        data=DataConfig(source=f"parquet:{source}", sites_by={"dirichlet": {"sites": SITES, "alpha": ALPHA}}),
        training=replace(base.training, augment="paper"),
    )
