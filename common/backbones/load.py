"""Loading a backbone by its name."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import open_clip
from torch import nn

from fedsigma.common.backbones.build import (
    Backbone,
    Preprocessing,
    assemble,
    build_meta_model,
    build_model,
    check_model_cfg,
    get_image_size,
    load_weights_file,
)
from fedsigma.common.backbones.bundle import MANIFEST, WEIGHTS, load_folder, read_config, sha256
from fedsigma.common.backbones.download import (
    BackboneSettings,
    assemble_backbone,
    download,
    explain_download_errors,
    resolve_settings,
)
from fedsigma.common.backbones.spec import BackboneError, BackboneName, parse_name
from fedsigma.common.backbones.tokenizer import load_tokenizer


def load_backbone(name: str, *, weights: bool = True) -> Backbone:
    """Load a backbone by name: float32, in eval mode, frozen.

    Args:
        name: a name that `parse_name` accepts.
        weights: False builds the architecture with random weights; the name may then be a bare ARCH.

    Raises:
        BackboneError: it is unknown, incomplete, changed, or not on this machine.
    """
    parsed = parse_name(name)
    if parsed.kind == "starter":
        return load_folder(starter_folder(), name="starter", weights=weights)
    if parsed.kind == "folder":
        return load_folder(parsed.path, name=parsed.text, weights=weights)
    if not weights:
        return _architecture(parsed)
    if parsed.kind == "checkpoint":
        if not parsed.path.is_file():
            raise BackboneError(f"{parsed.text}: there is no file {parsed.path.absolute()}")
        settings = resolve_settings(parsed)
        model = build_model(settings.model_cfg, parsed.text)
        load_weights_file(model, parsed.path, parsed.text)
        return assemble_backbone(parsed.text, settings, model, sha256(parsed.path))
    return download(parsed)[0]


def _architecture(parsed: BackboneName) -> Backbone:
    settings = resolve_settings(parsed) if parsed.tag or parsed.kind == "hub" else _any_settings(parsed)
    cfg, model = settings.model_cfg, build_model(settings.model_cfg, parsed.text)
    return assemble(
        parsed.text,
        model,
        lambda texts: load_tokenizer(cfg, model, settings.text_source, parsed.text)(texts),
        Preprocessing.from_dict(
            {"size": get_image_size(model, parsed.text), **settings.preprocess}, parsed.text
        ),
        cfg,
        architecture=parsed.architecture,
    )


def _any_settings(parsed: BackboneName) -> BackboneSettings:
    """The architecture with some tag's preprocessing, which is irrelevant without weights."""
    try:
        return resolve_settings(parsed)
    except BackboneError:
        tags = open_clip.list_pretrained_tags_by_model(parsed.architecture)
        stand_in = f"{parsed.architecture}/{tags[0]}" if tags else "ViT-B-16/openai"
        cfg = check_model_cfg(open_clip.get_model_config(parsed.architecture), parsed.text)
        return replace(
            resolve_settings(parse_name(stand_in)),
            model_cfg=cfg,
            text_source=str(cfg["text_cfg"].get("hf_tokenizer_name")),
            architecture=parsed.architecture,
        )


def load_meta_model(name: str) -> nn.Module:
    """Build the model of a backbone without its weights, for counting.

    Raises:
        BackboneError: it is unknown, or its configuration is not on this machine.
    """
    parsed = parse_name(name)
    if parsed.kind in ("starter", "folder"):
        folder = starter_folder() if parsed.kind == "starter" else parsed.path
        return build_meta_model(read_config(folder, parsed.text)[0], parsed.text)
    if parsed.kind == "hub":
        cfg = resolve_settings(parsed).model_cfg
    else:
        cfg = check_model_cfg(open_clip.get_model_config(parsed.architecture), parsed.text)
    with explain_download_errors(parsed.text):
        return build_meta_model(cfg, parsed.text)


def starter_folder() -> Path:
    """The folder of the bundled starter: beside this module, or in the installed package.

    Flower's app bundle, from which a run's code may come, has no weights; the installed package has them.

    Raises:
        BackboneError: it is not installed.
    """
    beside = Path(__file__).resolve().parent / "starter"
    roots = [Path(entry or ".", prefix) for entry in sys.path for prefix in ("fedsigma", "")]
    for folder in (beside, *(root / "common" / "backbones" / "starter" for root in roots)):
        if (folder / MANIFEST).is_file() and (folder / WEIGHTS).is_file():
            return folder
    raise BackboneError(
        f"the starter backbone is not installed (searched {beside} and the installed packages): "
        "install the fedsigma wheel, or run `python -m tools.starter.package` in a checkout"
    )
