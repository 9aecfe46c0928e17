"""A finished run on the starter backbone, made without training."""

from __future__ import annotations

from pathlib import Path

import torch

from fedsigma.common.backbones import load_backbone
from fedsigma.common.config.sigma import SigmaConfig
from fedsigma.common.registry.shift_file import save_shift
from fedsigma.common.sigma import SigmaModel

CLASSES = ("neutrophil", "lymphocyte", "monocyte")


def make_run(folder: Path) -> Path:
    """Write a shift of random values for the study `s`, after round 2."""
    sigma = SigmaModel.adapt(load_backbone("starter").model, SigmaConfig())
    save_shift(
        folder / "sigma.safetensors",
        0.05 * torch.randn(sigma.layout.size, generator=torch.Generator().manual_seed(0)),
        layout_json=sigma.layout.to_json(),
        fingerprint_json=sigma.fingerprint.to_json(),
        study_yaml=f"name: s\nbackbone: starter\nclasses: [{', '.join(CLASSES)}]\n",
        round=2,
    )
    return folder
