"""Backbones: CLIP models loaded by open_clip, from names that a study file can hold.

`load_backbone` knows five kinds of name: `starter`, `ARCH/TAG`, `hf-hub:org/name`, `local-dir:PATH` and
`checkpoint:ARCH:PATH.safetensors`. Weights come from safetensors only; `convert` alone reads a torch file.
"""

from __future__ import annotations

from fedsigma.common.backbones.build import (
    Backbone,
    Preprocessing,
    assemble,
    build_model,
    count_model,
)
from fedsigma.common.backbones.bundle import export_merged, open_folder, save_backbone
from fedsigma.common.backbones.download import convert, fetch
from fedsigma.common.backbones.load import count_backbone, load_backbone, starter_folder
from fedsigma.common.backbones.spec import BackboneError, BackboneName, parse_name

__all__ = [
    "Backbone",
    "BackboneError",
    "BackboneName",
    "Preprocessing",
    "assemble",
    "build_model",
    "convert",
    "count_backbone",
    "count_model",
    "export_merged",
    "fetch",
    "load_backbone",
    "open_folder",
    "parse_name",
    "save_backbone",
    "starter_folder",
]
