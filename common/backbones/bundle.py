"""A backbone as one folder: weights, configuration, tokenizer and preprocessing, with a manifest of digests.

The folder is open_clip's own `local-dir:` form plus `fedsigma_backbone.json`. It is written on a connected
machine and copied to a site, where every file is checked against the manifest before use.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file

from fedsigma.common.backbones.build import (
    Backbone,
    Preprocessing,
    Tokenizer,
    assemble,
    build_model,
    check_model_cfg,
    load_weights_file,
)
from fedsigma.common.backbones.spec import BackboneError
from fedsigma.common.backbones.tokenizer import PROBE, load_tokenizer

CONFIG = "open_clip_config.json"
WEIGHTS = "open_clip_model.safetensors"
MANIFEST = "fedsigma_backbone.json"
FORMAT = "fedsigma-backbone-1"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of `fedsigma_backbone.json`.

    Attributes:
        name: the backbone's name.
        architecture: open_clip's name of the architecture.
        source: where the backbone came from.
        revision: the source's revision.
        open_clip: version of open_clip that wrote the folder.
        dtype: number format of the weights.
        notes: remarks on assumed settings.
        files: SHA-256 of each file.
        format: format of the manifest.
    """

    name: str
    architecture: str
    source: str
    revision: str = ""
    open_clip: str = ""
    dtype: str = ""
    notes: tuple[str, ...] = ()
    files: dict[str, str] = field(default_factory=dict)
    format: str = FORMAT

    def write(self, folder: Path) -> None:
        """Write the manifest, as the last file: a folder without it is incomplete."""
        (folder / MANIFEST).write_text(json.dumps(asdict(self), indent=2) + "\n", "utf-8")

    @classmethod
    def read(cls, folder: Path, where: str) -> Manifest:
        """Read a folder's manifest; a missing or damaged one is a BackboneError."""
        if not (folder / MANIFEST).is_file():
            raise BackboneError(
                f"{where}: {folder} holds no {MANIFEST}, so its files cannot be checked: write the folder "
                f"with `fedsigma backbone fetch` (from an open_clip folder: "
                f"`fedsigma backbone fetch local-dir:{folder} NEW_DIR`)"
            )
        values = read_json(folder / MANIFEST, where)
        try:
            manifest = cls(**{**values, "notes": tuple(values.get("notes", ()))})
        except TypeError as error:
            raise BackboneError(f"{where}: {MANIFEST} is damaged or of a newer version ({error})") from error
        if manifest.format != FORMAT or not isinstance(manifest.files, dict):
            raise BackboneError(f"{where}: {MANIFEST} has format {manifest.format!r}, expected {FORMAT!r}")
        return manifest


def load_folder(folder: Path, *, name: str = "", weights: bool = True) -> Backbone:
    """Check every file of a backbone folder, and load it.

    Raises:
        BackboneError: a file is missing, changed or added; the tokenizer or preprocessing is incomplete;
            or the weights do not fit the configuration.
    """
    where = name or f"local-dir:{folder}"
    if not folder.is_dir():
        raise BackboneError(f"{where}: there is no folder {folder.absolute()}")
    manifest = Manifest.read(folder, where)
    _verify_files(folder, manifest, where)
    model_cfg, preprocessing = read_config(folder, where)
    model = build_model(model_cfg, where)
    tokenizer: Tokenizer = lambda texts: load_tokenizer(model_cfg, model, folder, where)(texts)  # noqa: E731
    if weights:
        load_weights_file(model, folder / WEIGHTS, where)
        tokenizer = load_tokenizer(model_cfg, model, folder, where)
    architecture, digest = manifest.architecture, manifest.files[WEIGHTS] if weights else ""
    return assemble(
        where, model, tokenizer, preprocessing, model_cfg, architecture=architecture, digest=digest
    )


def _verify_files(folder: Path, manifest: Manifest, where: str) -> None:
    """Compare every file with the manifest; a missing, changed or added one is a BackboneError."""
    again = "copy the folder again, or fetch it again with `fedsigma backbone fetch`"
    if WEIGHTS not in manifest.files or CONFIG not in manifest.files:
        raise BackboneError(f"{where}: {MANIFEST} does not list {WEIGHTS} and {CONFIG}: {again}")
    for file, digest in manifest.files.items():
        path = folder / file
        if Path(file).name != file or not path.is_file():
            raise BackboneError(f"{where}: {file} is missing from {folder}: {again}")
        actual = sha256(path)
        if actual != digest:
            raise BackboneError(
                f"{where}: {file} was changed (its SHA-256 begins {actual[:12]}, the manifest has "
                f"{digest[:12]}): {again}"
            )
    for path in sorted(folder.iterdir()):
        harmless = path.name == MANIFEST or path.suffix == ".md" or path.name.startswith((".", "LICENSE"))
        if path.name not in manifest.files and not harmless:
            raise BackboneError(f"{where}: {path.name} is not in {MANIFEST}: remove it, or {again}")


def read_config(folder: Path, where: str) -> tuple[dict[str, Any], Preprocessing]:
    """The model and preprocessing settings of a folder; missing or incomplete ones are a BackboneError."""
    values = read_json(folder / CONFIG, where)
    if not isinstance(values.get("preprocess_cfg"), dict):
        raise BackboneError(
            f"{where}: {CONFIG} has no preprocess_cfg; none is assumed: fetch the backbone again"
        )
    preprocessing = Preprocessing.from_dict(values["preprocess_cfg"], where)
    model_cfg = check_model_cfg(values.get("model_cfg"), where)
    return use_local_files(model_cfg, folder, where), preprocessing


def use_local_files(model_cfg: dict[str, Any], folder: Path, where: str) -> dict[str, Any]:
    """Replace the Hugging Face names of a configuration by the folder's path, in place.

    Raises:
        BackboneError: the text tower's own settings (config.json) are missing.
    """
    text = model_cfg["text_cfg"]
    if text.get("hf_model_name"):
        if not (folder / "config.json").is_file():
            raise BackboneError(f"{where}: config.json, the text tower's settings, is missing from {folder}")
        text["hf_model_name"] = str(folder.absolute())
    if text.get("hf_tokenizer_name"):
        text["hf_tokenizer_name"] = str(folder.absolute())
    return model_cfg


def save_backbone(
    backbone: Backbone,
    folder: Path,
    *,
    source: str,
    revision: str = "",
    dtype: torch.dtype = torch.float32,
    notes: Iterable[str] = (),
    text_path: str = ".",
) -> Path:
    """Write a backbone as a folder that `local-dir:` loads.

    Args:
        backbone: a plain model, without an adapter.
        folder: a new or empty folder.
        source: where the backbone came from, for the manifest.
        revision: the source's revision, for the manifest.
        dtype: number format of the weights.
        notes: remarks for the manifest.
        text_path: where open_clip itself looks for a Hugging Face text tower's settings; FedSigma always
            uses the folder.

    Raises:
        BackboneError: the folder is not empty, or the model has a sigma shift.
    """
    state = backbone.model.state_dict()
    if any("parametrizations" in key for key in state):
        raise BackboneError(f"{backbone.name}: the model has a sigma shift: merge it before saving")
    check_free(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Cloned, because safetensors refuses tensors that share memory.
    tensors = {
        k: (v.to(dtype) if v.is_floating_point() else v).detach().clone().contiguous()
        for k, v in state.items()
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod(0o644)  # safetensors writes for the owner alone; a container's user must read
    model_cfg = check_model_cfg(backbone.model_cfg, backbone.name)
    _write_text_files(backbone, model_cfg, folder, text_path)
    config = {"model_cfg": model_cfg, "preprocess_cfg": backbone.preprocessing.to_dict()}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    Manifest(
        name=backbone.name,
        architecture=backbone.architecture,
        source=source,
        revision=revision,
        open_clip=open_clip.__version__,
        dtype=str(dtype).removeprefix("torch."),
        notes=tuple(notes),
        files={p.name: sha256(p) for p in sorted(folder.iterdir())},
    ).write(folder)
    return folder


def check_free(folder: Path) -> None:
    """Refuse a path that exists, unless it is an empty folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BackboneError(f"{folder} exists and is not an empty folder: choose another name")


def _write_text_files(backbone: Backbone, model_cfg: dict[str, Any], folder: Path, text_path: str) -> None:
    text = model_cfg["text_cfg"]
    if text.get("hf_model_name"):
        tower: Any = backbone.model.text
        settings = tower.config.to_dict()
        for private in ("_name_or_path", "auto_map"):
            settings.pop(private, None)
        (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
        text["hf_model_name"] = text_path
    if text.get("hf_tokenizer_name"):
        save = getattr(backbone.tokenizer, "save_pretrained", None)
        if save is None:
            raise BackboneError(f"{backbone.name}: its tokenizer cannot be written to a folder")
        save(folder)
        text["hf_tokenizer_name"] = text_path
        again = load_tokenizer(model_cfg, backbone.model, folder, backbone.name)
        if not torch.equal(again([PROBE]), backbone.tokenizer([PROBE])):
            raise BackboneError(f"{backbone.name}: its tokenizer gives other tokens once written to {folder}")


def export_merged(backbone: Backbone, folder: Path, *, notes: Iterable[str] = ()) -> Path:
    """Write a backbone whose model `SigmaModel.merge` returned; raises as `save_backbone`.

    `open_clip.create_model_and_transforms('local-dir:PATH')` loads it too, as long as it is not moved.
    """
    source = f"a sigma shift merged into {backbone.name}"
    return save_backbone(backbone, folder, source=source, notes=notes, text_path=str(folder.absolute()))


def read_json(path: Path, where: str) -> dict[str, Any]:
    """Read a JSON object; a missing or other file is a BackboneError."""
    try:
        values = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise BackboneError(f"{where}: {path} cannot be read ({error})") from error
    if not isinstance(values, dict):
        raise BackboneError(f"{where}: {path} must hold a JSON object, it holds {type(values).__name__}")
    return values


def sha256(path: Path) -> str:
    """The SHA-256 of a file, 64 hexadecimal characters."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
