"""Backbones: CLIP models loaded by open_clip, by names that a study file can hold.

`load_backbone` accepts five kinds of name: `starter`, `ARCH/TAG`, `hf-hub:org/name`, `local-dir:PATH` and
`checkpoint:ARCH:PATH.safetensors`. Weights come from safetensors only; `convert` alone reads a torch file.
"""

from __future__ import annotations

from fedsigma.common.backbones.build import (
    Backbone,
    Preprocessing,
    assemble,
    build_meta_model,
    build_model,
)
from fedsigma.common.backbones.bundle import export_merged, load_folder, save_backbone
from fedsigma.common.backbones.download import convert, fetch
from fedsigma.common.backbones.load import load_backbone, load_meta_model, starter_folder
from fedsigma.common.backbones.spec import BackboneError, BackboneName, parse_name

__all__ = [
    "Backbone",
    "BackboneError",
    "BackboneName",
    "Preprocessing",
    "assemble",
    "build_meta_model",
    "build_model",
    "convert",
    "export_merged",
    "fetch",
    "load_backbone",
    "load_folder",
    "load_meta_model",
    "parse_name",
    "save_backbone",
    "starter_folder",
]
