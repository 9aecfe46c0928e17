"""Backbones from the internet, and their way into a folder: `fetch` and `convert`.

Only safetensors files are downloaded. A torch file can hold code; `convert` is the one place that reads
such a file, with the unpickler that makes tensors and nothing else.
"""

from __future__ import annotations

import os
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME
from open_clip.transform import PreprocessCfg
from torch import Tensor, nn

from fedsigma.common.backbones.build import (
    Backbone,
    Preprocessing,
    assemble,
    build_model,
    check_model_cfg,
    get_image_size,
    load_weights,
    load_weights_file,
)
from fedsigma.common.backbones.bundle import CONFIG, load_folder, read_json, save_backbone, use_local_files
from fedsigma.common.backbones.spec import (
    BackboneError,
    BackboneName,
    architecture_and_tag,
    parse_name,
)
from fedsigma.common.backbones.tokenizer import load_tokenizer

# Older versions run code hidden in a torch file in spite of weights_only (CVE-2025-32434).
SAFE_TORCH = (2, 6)
_PREPROCESS = ("mean", "std", "interpolation", "resize_mode")


@dataclass(frozen=True, kw_only=True)
class BackboneSettings:
    """All of a backbone but its weights. `text_source`: a folder, or the hub name of the tokenizer."""

    model_cfg: dict[str, Any]
    preprocess: dict[str, Any]
    text_source: Path | str
    architecture: str
    notes: tuple[str, ...] = ()


def resolve_settings(name: BackboneName) -> BackboneSettings:
    """The recipe that a name stands for; the hub is asked only for `hf-hub:` names.

    Raises:
        BackboneError: the preprocessing is not known for certain.
    """
    if name.kind in ("hub", "folder"):
        if name.kind == "hub":
            values = read_json(hub_file(name.hub, CONFIG, name.text), name.text)
        else:
            values = read_json(name.path / CONFIG, name.text)
        cfg = check_model_cfg(values.get("model_cfg"), name.text)
        if name.kind == "folder":
            use_local_files(cfg, name.path, name.text)
        preprocess, notes = _completed(values.get("preprocess_cfg"), name.text)
        source: Path | str = (
            name.path if name.kind == "folder" else str(cfg["text_cfg"].get("hf_tokenizer_name"))
        )
        return BackboneSettings(
            model_cfg=cfg, preprocess=preprocess, text_source=source, architecture=_describe(cfg), notes=notes
        )
    cfg = check_model_cfg(open_clip.get_model_config(name.architecture), name.text)
    preprocess = _of_tags(name, cfg)
    return BackboneSettings(
        model_cfg=cfg,
        preprocess=preprocess,
        text_source=str(cfg["text_cfg"].get("hf_tokenizer_name")),
        architecture=name.architecture,
    )


def _completed(preprocess: Any, where: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Fill what open_clip itself fills for such a folder, and say so; mean and std must be given."""
    given = {k: v for k, v in (preprocess or {}).items() if v is not None}
    missing = [key for key in ("mean", "std") if key not in given]
    if missing:
        raise BackboneError(
            f"{where}: its {CONFIG} gives no {' and '.join(missing)} for pictures; none is assumed"
        )
    defaults = {k: v for k, v in asdict(PreprocessCfg()).items() if k in ("interpolation", "resize_mode")}
    notes = tuple(
        f"{k}: {v}, open_clip's default; the source gives none" for k, v in defaults.items() if k not in given
    )
    return {**defaults, **given}, notes


def _of_tags(name: BackboneName, cfg: dict[str, Any]) -> dict[str, Any]:
    """The preprocessing of a tag, or of an architecture whose tags all agree; sets a tag's quick_gelu."""
    arch = name.architecture
    if name.tag:
        tag = open_clip.get_pretrained_cfg(arch, name.tag)
        # open_clip only warns when a tag was trained with QuickGELU and the architecture's file lacks it.
        if tag.get("quick_gelu"):
            cfg["quick_gelu"] = True
        return {k: tag[k] for k in _PREPROCESS}
    tags = [open_clip.get_pretrained_cfg(arch, t) for t in open_clip.list_pretrained_tags_by_model(arch)]
    options = {tuple(str(t[k]) for k in _PREPROCESS): {k: t[k] for k in _PREPROCESS} for t in tags}
    if len(options) != 1:
        known = ", ".join(open_clip.list_pretrained_tags_by_model(arch)) or "none"
        raise BackboneError(
            f"{name.text}: the preprocessing of {arch} depends on how it was trained; name a tag that was "
            f"trained the same way, as {arch}/TAG (tags: {known})"
        )
    return next(iter(options.values()))


def assemble_backbone(name: str, made: BackboneSettings, model: nn.Module, digest: str = "") -> Backbone:
    """A backbone from a recipe and its filled model."""
    preprocess = Preprocessing.from_dict({"size": get_image_size(model, name), **made.preprocess}, name)
    with explain_download_errors(name):
        tokenizer = load_tokenizer(made.model_cfg, model, made.text_source, name)
    return assemble(
        name, model, tokenizer, preprocess, made.model_cfg, architecture=made.architecture, digest=digest
    )


def download(name: BackboneName) -> tuple[Backbone, BackboneSettings, str]:
    """Load an ARCH/TAG or hf-hub backbone, from the download cache where it is there; also its revision.

    Raises:
        BackboneError: not reachable, or published only as a torch file.
    """
    made = resolve_settings(name)
    if name.kind == "hub":
        hub, file = name.hub, HF_SAFE_WEIGHTS_NAME
    else:
        hub, file = find_weights_file(name)
    path = hub_file(hub, file, name.text)
    with explain_download_errors(name.text):
        model = build_model(made.model_cfg, name.text)
    load_weights_file(model, path, name.text)
    # The cache keeps a file below snapshots/<revision>/.
    revision = path.parent.name if path.parent.parent.name == "snapshots" else ""
    return assemble_backbone(name.text, made, model), made, f"{hub}@{revision}" if revision else hub


def find_weights_file(name: BackboneName) -> tuple[str, str]:
    """Hub name and safetensors file of a pretrained tag.

    Raises:
        BackboneError: the tag has no place on the hub.
    """
    tag = open_clip.get_pretrained_cfg(name.architecture, name.tag)
    hub, _, file = str(tag.get("hf_hub") or "").rpartition("/")
    if not hub:
        raise BackboneError(
            f"{name.text} is published only as a torch file ({tag.get('url')}): download it and run "
            f"`fedsigma backbone convert FILE {name.text} DIR`"
        )
    if file in ("", HF_WEIGHTS_NAME):
        return hub, HF_SAFE_WEIGHTS_NAME
    return hub, str(Path(file).with_suffix(".safetensors"))


def hub_file(hub: str, file: str, where: str) -> Path:
    """One file of a hub repository: the cached copy where there is one, else downloaded.

    Raises:
        BackboneError: offline, or the repository has no such file.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(hf_hub_download(hub, file, local_files_only=True))
    except LocalEntryNotFoundError:
        pass
    with explain_download_errors(where):
        _reachable()
        try:
            return Path(hf_hub_download(hub, file))
        except LocalEntryNotFoundError:
            raise
        except (EntryNotFoundError, RepositoryNotFoundError) as error:
            hint = (
                ""
                if file == CONFIG
                else (
                    "; if it holds a torch file, download that and run "
                    f"`fedsigma backbone convert FILE {where} DIR`"
                )
            )
            raise BackboneError(f"{where}: {hub} on the hub has no {file}{hint}") from error


@contextmanager
def explain_download_errors(where: str) -> Iterator[None]:
    """Turn failures to reach the internet into advice.

    Raises:
        BackboneError: instead of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise BackboneError(
            f"{where} is not on this machine and cannot be downloaded ({type(error).__name__}): on a "
            f"connected machine run `fedsigma backbone fetch {where} DIR`, bring DIR here, "
            "and use local-dir:DIR"
        ) from error


def _reachable() -> None:
    """Fail at once where the hub's name does not resolve; its own client would retry for half a minute."""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        raise ConnectionError("HF_HUB_OFFLINE is set")
    if urllib.request.getproxies():
        return
    host = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
    socket.getaddrinfo(host, 443)


def fetch(name: str, folder: Path) -> Backbone:
    """Bring a backbone into one folder for sites without internet; returns it as such a site will load it.

    `local-dir:DIR` adopts an open_clip folder that FedSigma did not write.

    Raises:
        BackboneError: it cannot be had, or is not complete.
    """
    parsed = parse_name(name)
    _check_free(folder)
    if parsed.kind == "tag" and not parsed.tag:
        raise BackboneError(describe_tags(parsed.architecture))
    if parsed.kind in ("tag", "hub"):
        backbone, made, revision = download(parsed)
        save_backbone(backbone, folder, source=name, revision=revision, notes=made.notes)
    elif parsed.kind == "folder":
        made = resolve_settings(parsed)
        model = build_model(made.model_cfg, name)
        load_weights_file(model, _only_weights(parsed.path), name)
        backbone = assemble_backbone(name, made, model)
        save_backbone(backbone, folder, source="an open_clip folder", notes=made.notes)
    else:
        raise BackboneError(
            f"{name} is on this machine already: fetch takes ARCH/TAG, hf-hub:org/name or local-dir:DIR"
        )
    return load_folder(folder)


def convert(torch_file: Path, architecture: str, folder: Path) -> Backbone:
    """Turn a torch file into a folder. `architecture`: ARCH, ARCH/TAG, hf-hub:org/name or local-dir:DIR.

    Raises:
        BackboneError: the file holds more than tensors, does not fit, or this torch is too old for it.
    """
    _check_free(folder)
    state = read_torch_file(Path(torch_file))
    if ":" in architecture:
        parsed = parse_name(architecture)
    else:
        arch, tag = architecture_and_tag(architecture)
        parsed = BackboneName(text=architecture, kind="tag", architecture=arch, tag=tag)
    if parsed.kind not in ("tag", "hub", "folder"):
        raise BackboneError(
            f"{architecture!r} names no architecture: use ARCH, ARCH/TAG, hf-hub:org/name or local-dir:DIR"
        )
    made = resolve_settings(parsed)
    with explain_download_errors(architecture):
        model = build_model(made.model_cfg, architecture)
    load_weights(model, state, str(torch_file))
    backbone = replace(assemble_backbone(architecture, made, model), name=Path(torch_file).stem)
    save_backbone(backbone, folder, source=f"{Path(torch_file).name} as {architecture}", notes=made.notes)
    return load_folder(folder)


def read_torch_file(path: Path) -> dict[str, Tensor]:
    """The tensors of a torch file, read so that no code in it can run.

    Raises:
        BackboneError: not a plain checkpoint of tensors, or this torch is too old.
    """
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < SAFE_TORCH:
        raise BackboneError(
            f"converting needs torch 2.6 or newer, this is {torch.__version__}: older ones are not safe"
        )
    if not path.is_file():
        raise BackboneError(f"there is no file {path}")
    if path.suffix == ".safetensors":
        raise BackboneError(f"{path} is a safetensors file already: use checkpoint:ARCH:{path}")
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise BackboneError(
            f"{path} was refused: it is not a plain checkpoint of tensors ({type(error).__name__}). "
            "A TorchScript archive or a whole pickled model is never loaded; ask for its state dict"
        ) from error
    if isinstance(state, dict):
        for nested in ("state_dict", "model", "module"):
            if isinstance(state.get(nested), dict):
                state = state[nested]
                break
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise BackboneError(f"{path} holds no state dict: expected a table of names and tensors")
    if all(k.startswith("module.") for k in state):
        state = {k.removeprefix("module."): v for k, v in state.items()}
    return {k: v for k, v in state.items() if k not in ("input_resolution", "context_length", "vocab_size")}


def describe_tags(architecture: str) -> str:
    """The sentence for an architecture named without a tag."""
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if not tags:
        return f"{architecture} has no published weights: use local-dir:PATH"
    listed = ", ".join(f"{architecture}/{t}" for t in tags)
    return f"backbone {architecture!r} names an architecture without weights: choose one of {listed}"


def _only_weights(folder: Path) -> Path:
    for name in (HF_SAFE_WEIGHTS_NAME, "open_clip_pytorch_model.safetensors", "model.safetensors"):
        if (folder / name).is_file():
            return folder / name
    torch_files = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
    hint = f"; turn {torch_files[0]} into one with `fedsigma backbone convert`" if torch_files else ""
    raise BackboneError(f"{folder} holds no {HF_SAFE_WEIGHTS_NAME}{hint}")


def _check_free(folder: Path) -> None:
    """Fail before a long download rather than after it."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BackboneError(f"{folder} exists and is not an empty folder: choose another name")


def _describe(cfg: dict[str, Any]) -> str:
    image = cfg["vision_cfg"].get("timm_model_name") or "open_clip image tower"
    text = Path(str(cfg["text_cfg"].get("hf_model_name") or "open_clip text tower")).name
    return f"{image} + {text}"
