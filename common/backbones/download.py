"""Download and conversion of backbones.

Only safetensors files are downloaded. A torch file can hold code; only `convert` reads such a file, with the
unpickler that is restricted to tensors.
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
from fedsigma.common.backbones.bundle import (
    CONFIG,
    check_free,
    load_folder,
    read_json,
    save_backbone,
    use_local_files,
)
from fedsigma.common.backbones.spec import (
    BackboneError,
    BackboneName,
    architecture_and_tag,
    parse_name,
)
from fedsigma.common.backbones.tokenizer import load_tokenizer

# Older versions run code in a torch file in spite of weights_only (CVE-2025-32434).
SAFE_TORCH = (2, 6)
_PREPROCESS = ("mean", "std", "interpolation", "resize_mode")


@dataclass(frozen=True, kw_only=True)
class BackboneSettings:
    """All settings of a backbone, without its weights.

    Attributes:
        model_cfg: open_clip's configuration of the model.
        preprocess: open_clip's `preprocess_cfg`, without the size.
        text_source: folder or hub name of the tokenizer.
        architecture: open_clip's name of the architecture, or a description.
        notes: remarks on assumed settings.
    """

    model_cfg: dict[str, Any]
    preprocess: dict[str, Any]
    text_source: Path | str
    architecture: str
    notes: tuple[str, ...] = ()


def resolve_settings(name: BackboneName) -> BackboneSettings:
    """The settings of a named backbone; only `hf-hub:` names need the hub.

    Raises:
        BackboneError: the preprocessing is not certain.
    """
    where = name.text
    if name.kind not in ("hub", "folder"):
        cfg = check_model_cfg(open_clip.get_model_config(name.architecture), where)
        return BackboneSettings(
            preprocess=_preprocess_of_tags(name, cfg),
            model_cfg=cfg,
            text_source=str(cfg["text_cfg"].get("hf_tokenizer_name")),
            architecture=name.architecture,
        )
    path = name.path / CONFIG if name.kind == "folder" else hub_file(name.hub, CONFIG, where)
    values = read_json(path, where)
    cfg = check_model_cfg(values.get("model_cfg"), where)
    source: Path | str = str(cfg["text_cfg"].get("hf_tokenizer_name"))
    if name.kind == "folder":
        use_local_files(cfg, name.path, where)
        source = name.path
    preprocess = {k: v for k, v in (values.get("preprocess_cfg") or {}).items() if v is not None}
    missing = [key for key in ("mean", "std") if key not in preprocess]
    if missing:
        raise BackboneError(
            f"{where}: its {CONFIG} gives no {' and '.join(missing)} for images; none is assumed"
        )
    # open_clip itself uses these defaults for such a folder.
    defaults = {k: v for k, v in asdict(PreprocessCfg()).items() if k in ("interpolation", "resize_mode")}
    image = cfg["vision_cfg"].get("timm_model_name") or "open_clip image tower"
    text = Path(str(cfg["text_cfg"].get("hf_model_name") or "open_clip text tower")).name
    return BackboneSettings(
        model_cfg=cfg,
        preprocess={**defaults, **preprocess},
        text_source=source,
        architecture=f"{image} + {text}",
        notes=tuple(
            f"{key}: {value}, open_clip's default; the source gives none"
            for key, value in defaults.items()
            if key not in preprocess
        ),
    )


def _preprocess_of_tags(name: BackboneName, cfg: dict[str, Any]) -> dict[str, Any]:
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
        listed = ", ".join(open_clip.list_pretrained_tags_by_model(arch)) or "none"
        raise BackboneError(
            f"{name.text}: the preprocessing of {arch} depends on how it was trained; name a tag that was "
            f"trained the same way, as {arch}/TAG (tags: {listed})"
        )
    return next(iter(options.values()))


def assemble_backbone(name: str, settings: BackboneSettings, model: nn.Module, digest: str = "") -> Backbone:
    """A backbone from its settings and its model, with weights."""
    preprocess = Preprocessing.from_dict({"size": get_image_size(model, name), **settings.preprocess}, name)
    cfg, architecture = settings.model_cfg, settings.architecture
    with explain_download_errors(name):
        tokenizer = load_tokenizer(cfg, model, settings.text_source, name)
    return assemble(name, model, tokenizer, preprocess, cfg, architecture=architecture, digest=digest)


def download(name: BackboneName) -> tuple[Backbone, BackboneSettings, str]:
    """Load an ARCH/TAG or hf-hub backbone, from the download cache if possible; also return its revision.

    Raises:
        BackboneError: it has no tag, is not reachable, or is published only as a torch file.
    """
    if name.kind == "tag" and not name.tag:
        raise BackboneError(_describe_tags(name.architecture))
    settings = resolve_settings(name)
    hub, file = (name.hub, HF_SAFE_WEIGHTS_NAME) if name.kind == "hub" else find_weights_file(name)
    path = hub_file(hub, file, name.text)
    with explain_download_errors(name.text):
        model = build_model(settings.model_cfg, name.text)
    load_weights_file(model, path, name.text)
    # The cache stores a file in snapshots/<revision>/.
    revision = path.parent.name if path.parent.parent.name == "snapshots" else ""
    return assemble_backbone(name.text, settings, model), settings, f"{hub}@{revision}" if revision else hub


def find_weights_file(name: BackboneName) -> tuple[str, str]:
    """Hub name and safetensors file of a pretrained tag; one that is not on the hub is a BackboneError."""
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
    """The path of a hub repository's file in the cache, downloaded if needed.

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
            convert = f"`fedsigma backbone convert FILE {where} DIR`"
            hint = "" if file == CONFIG else f"; if it holds a torch file, download it and run {convert}"
            raise BackboneError(f"{where}: {hub} on the hub has no {file}{hint}") from error


@contextmanager
def explain_download_errors(where: str) -> Iterator[None]:
    """Raise a BackboneError with the next step instead of an OSError."""
    try:
        yield
    except OSError as error:
        raise BackboneError(
            f"{where} is not on this machine and cannot be downloaded ({type(error).__name__}): on a "
            f"connected machine run `fedsigma backbone fetch {where} DIR`, copy DIR here, "
            "and use local-dir:DIR"
        ) from error


def _reachable() -> None:
    """Fail at once if the hub's name does not resolve; its own client retries for half a minute."""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        raise ConnectionError("HF_HUB_OFFLINE is set")
    if urllib.request.getproxies():
        return
    host = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
    socket.getaddrinfo(host, 443)


def fetch(name: str, folder: Path) -> Backbone:
    """Write a backbone to one folder, for sites without internet, and load it from there.

    Args:
        name: ARCH/TAG, hf-hub:org/name, or local-dir:DIR for a folder that open_clip wrote.
        folder: a new or empty folder.

    Raises:
        BackboneError: it is not reachable, or incomplete.
    """
    parsed = parse_name(name)
    check_free(folder)
    if parsed.kind in ("tag", "hub"):
        backbone, settings, revision = download(parsed)
        save_backbone(backbone, folder, source=name, revision=revision, notes=settings.notes)
    elif parsed.kind == "folder":
        settings = resolve_settings(parsed)
        model = build_model(settings.model_cfg, name)
        load_weights_file(model, _find_weights(parsed.path), name)
        backbone = assemble_backbone(name, settings, model)
        save_backbone(backbone, folder, source="an open_clip folder", notes=settings.notes)
    else:
        raise BackboneError(
            f"{name} is on this machine already: fetch takes ARCH/TAG, hf-hub:org/name or local-dir:DIR"
        )
    return load_folder(folder)


def convert(torch_file: Path, architecture: str, folder: Path) -> Backbone:
    """Convert a torch file to a folder.

    Args:
        torch_file: the file.
        architecture: ARCH, ARCH/TAG, hf-hub:org/name or local-dir:DIR.
        folder: a new or empty folder.

    Raises:
        BackboneError: the file holds more than tensors, does not fit, or this torch is too old.
    """
    check_free(folder)
    state = _read_torch_file(Path(torch_file))
    if ":" in architecture:
        parsed = parse_name(architecture)
    else:
        arch, tag = architecture_and_tag(architecture)
        parsed = BackboneName(text=architecture, kind="tag", architecture=arch, tag=tag)
    if parsed.kind not in ("tag", "hub", "folder"):
        raise BackboneError(
            f"{architecture!r} names no architecture: use ARCH, ARCH/TAG, hf-hub:org/name or local-dir:DIR"
        )
    settings = resolve_settings(parsed)
    with explain_download_errors(architecture):
        model = build_model(settings.model_cfg, architecture)
    load_weights(model, state, str(torch_file))
    backbone = replace(assemble_backbone(architecture, settings, model), name=Path(torch_file).stem)
    save_backbone(backbone, folder, source=f"{Path(torch_file).name} as {architecture}", notes=settings.notes)
    return load_folder(folder)


def _read_torch_file(path: Path) -> dict[str, Tensor]:
    """The tensors of a torch file, loaded so that no code in it can run."""
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
        nested = (state.get(key) for key in ("state_dict", "model", "module"))
        state = next((values for values in nested if isinstance(values, dict)), state)
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise BackboneError(f"{path} holds no state dict: expected names and tensors")
    if all(k.startswith("module.") for k in state):
        state = {k.removeprefix("module."): v for k, v in state.items()}
    return {k: v for k, v in state.items() if k not in ("input_resolution", "context_length", "vocab_size")}


def _describe_tags(architecture: str) -> str:
    """The message for an architecture without a tag."""
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if not tags:
        return f"{architecture} has no published weights: use local-dir:PATH"
    listed = ", ".join(f"{architecture}/{t}" for t in tags)
    return f"backbone {architecture!r} names an architecture without weights: choose one of {listed}"


def _find_weights(folder: Path) -> Path:
    for name in (HF_SAFE_WEIGHTS_NAME, "open_clip_pytorch_model.safetensors", "model.safetensors"):
        if (folder / name).is_file():
            return folder / name
    torch_files = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
    hint = f"; convert {torch_files[0]} with `fedsigma backbone convert`" if torch_files else ""
    raise BackboneError(f"{folder} holds no {HF_SAFE_WEIGHTS_NAME}{hint}")
