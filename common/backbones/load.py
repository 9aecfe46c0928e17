"""`load_backbone`: from a name to a model ready for use."""

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
    describe_tags,
    download,
    explain_download_errors,
    resolve_settings,
)
from fedsigma.common.backbones.spec import BackboneError, BackboneName, parse_name
from fedsigma.common.backbones.tokenizer import LazyTokenizer, load_tokenizer


def load_backbone(name: str, *, weights: bool = True) -> Backbone:
    """Load a backbone by name: float32, eval mode, nothing trainable.

    With `weights=False` only the architecture is built, with random weights, and a bare ARCH is a name too.

    Raises:
        BackboneError: unknown, incomplete, changed, or not on this machine; the message says what to do.
    """
    parsed = parse_name(name)
    if parsed.kind == "starter":
        return load_folder(starter_folder(), name="starter", weights=weights)
    if parsed.kind == "folder":
        return load_folder(parsed.path, name=parsed.text, weights=weights)
    if not weights:
        return _architecture(parsed)
    if parsed.kind == "checkpoint":
        return _checkpoint(parsed)
    if parsed.kind == "tag" and not parsed.tag:
        raise BackboneError(describe_tags(parsed.architecture))
    return download(parsed)[0]


def _checkpoint(parsed: BackboneName) -> Backbone:
    if not parsed.path.is_file():
        raise BackboneError(f"{parsed.text}: there is no file {parsed.path.absolute()}")
    made = resolve_settings(parsed)
    model = build_model(made.model_cfg, parsed.text)
    load_weights_file(model, parsed.path, parsed.text)
    return assemble_backbone(parsed.text, made, model, sha256(parsed.path))


def _architecture(parsed: BackboneName) -> Backbone:
    made = resolve_settings(parsed) if parsed.tag or parsed.kind == "hub" else _any_recipe(parsed)
    cfg, model = made.model_cfg, build_model(made.model_cfg, parsed.text)
    return assemble(
        parsed.text,
        model,
        LazyTokenizer(lambda: load_tokenizer(cfg, model, made.text_source, parsed.text)),
        Preprocessing.from_dict({"size": get_image_size(model, parsed.text), **made.preprocess}, parsed.text),
        cfg,
        architecture=parsed.architecture,
    )


def _any_recipe(parsed: BackboneName) -> BackboneSettings:
    """The architecture with some tag's preprocessing: without weights it decides nothing."""
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
    """The model of any name without storage for its weights, for counting; fast, and needs no weights.

    Raises:
        BackboneError: unknown, or its configuration is not on this machine.
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
    """Where the bundled starter lies: beside this package, or in the installed one.

    A run's code may come from Flower's app bundle, which carries no weights; the installed package has them.

    Raises:
        BackboneError: it is nowhere.
    """
    beside = Path(__file__).resolve().parent / "starter"
    places = [beside]
    for entry in sys.path:
        root = Path(entry or ".")
        below = Path("common", "backbones", "starter")
        places += [root / "fedsigma" / below, root / below]
    for place in places:
        if (place / MANIFEST).is_file() and (place / WEIGHTS).is_file():
            return place
    raise BackboneError(
        f"the starter backbone is not installed (looked in {beside} and in the installed packages): "
        "install the fedsigma wheel, or run `python -m tools.starter.package` in a checkout"
    )
