"""Building an open_clip model from its configuration, and filling it from safetensors."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict
from torch import Tensor, nn

from fedsigma.common.backbones.spec import BackboneError

Tokenizer = Callable[[list[str]], Tensor]
INTERPOLATIONS = ("bicubic", "bilinear")
RESIZE_MODES = ("shortest", "longest", "squash")


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How an image becomes the model's input.

    Attributes:
        size: side of the input, in pixels.
        mean: subtracted from each channel.
        std: divides each channel.
        interpolation: of resizing.
        resize_mode: which side is resized to `size`: the shortest, the longest, or both (squash).
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    resize_mode: str = "shortest"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str) -> Preprocessing:
        """Check a `preprocess_cfg`.

        Raises:
            BackboneError: a key is missing or its value is invalid.
        """
        missing = [key for key in ("size", "mean", "std", "interpolation") if values.get(key) is None]
        if missing:
            raise BackboneError(
                f"{where}: preprocess_cfg lacks {', '.join(missing)}; no default is assumed, since wrong"
                " values silently ruin a model: take them from the model's authors"
            )
        mean, std = (_triple(values[key], f"{where}: preprocess_cfg.{key}") for key in ("mean", "std"))
        if min(std) <= 0:
            raise BackboneError(f"{where}: preprocess_cfg.std is {list(std)}, expected numbers above 0")
        mode = values.get("resize_mode") or "shortest"
        for key, value, choices in (
            ("interpolation", values["interpolation"], INTERPOLATIONS),
            ("resize_mode", mode, RESIZE_MODES),
        ):
            if value not in choices:
                raise BackboneError(
                    f"{where}: preprocess_cfg.{key} is {value!r}, expected {' or '.join(choices)}"
                )
        return cls(
            size=parse_square_size(values["size"], f"{where}: preprocess_cfg.size"),
            mean=mean,
            std=std,
            interpolation=str(values["interpolation"]),
            resize_mode=str(mode),
        )

    def to_dict(self) -> dict[str, Any]:
        """The `preprocess_cfg` of an open_clip folder."""
        return {"size": self.size, "mode": "RGB", **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """A CLIP model ready for use.

    Attributes:
        name: the backbone's name.
        model: float32, in eval mode, frozen; encode_image takes (n, 3, image_size, image_size).
        tokenizer: maps texts to tokens (n, context length).
        image_size: side of the model's input, in pixels.
        mean: see `Preprocessing`.
        std: see `Preprocessing`.
        interpolation: see `Preprocessing`.
        logit_scale: factor of cosine similarities, exponentiated.
        resize_mode: see `Preprocessing`.
        architecture: open_clip's name of the architecture.
        digest: SHA-256 of the weights file, or empty without one.
        model_cfg: open_clip's configuration of the model.
    """

    name: str
    model: nn.Module
    tokenizer: Tokenizer
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    logit_scale: float
    resize_mode: str = "shortest"
    architecture: str = ""
    digest: str = ""
    model_cfg: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def preprocessing(self) -> Preprocessing:
        """The preprocessing as one value."""
        return Preprocessing(
            size=self.image_size,
            mean=self.mean,
            std=self.std,
            interpolation=self.interpolation,
            resize_mode=self.resize_mode,
        )


def assemble(
    name: str,
    model: nn.Module,
    tokenizer: Tokenizer,
    preprocessing: Preprocessing,
    model_cfg: dict[str, Any],
    *,
    architecture: str = "",
    digest: str = "",
) -> Backbone:
    """Assemble a backbone, and check that the preprocessing fits the model.

    Raises:
        BackboneError: the preprocessing's size is not the model's.
    """
    model = model.float().eval().requires_grad_(False)  # first: get_image_size tries a float32 image
    size = get_image_size(model, name)
    if preprocessing.size != size:
        raise BackboneError(
            f"{name}: preprocess_cfg.size is {preprocessing.size}, but the model takes {size} pixels: "
            "the preprocessing belongs to another model"
        )
    open_clip.model.set_model_preprocess_cfg(model, preprocessing.to_dict())
    scale: Any = model.logit_scale
    return Backbone(
        name=name,
        model=model,
        tokenizer=tokenizer,
        image_size=size,
        mean=preprocessing.mean,
        std=preprocessing.std,
        interpolation=preprocessing.interpolation,
        logit_scale=float(scale.exp().max()),
        resize_mode=preprocessing.resize_mode,
        architecture=architecture,
        digest=digest,
        model_cfg=model_cfg,
    )


def check_model_cfg(model_cfg: Any, where: str) -> dict[str, Any]:
    """A copy of a `model_cfg` that is safe to build.

    Raises:
        BackboneError: it is not a model_cfg, or it would fetch weights, run code, or lacks its tokenizer.
    """
    cfg = copy.deepcopy(model_cfg)
    parts = ("embed_dim", "vision_cfg", "text_cfg")
    if not isinstance(cfg, dict) or any(p not in cfg for p in parts):
        raise BackboneError(f"{where}: model_cfg must hold {', '.join(parts)}, as open_clip writes it")
    vision, text = cfg["vision_cfg"], cfg["text_cfg"]
    if not isinstance(vision, dict) or not isinstance(text, dict):
        raise BackboneError(f"{where}: vision_cfg and text_cfg must be tables of settings")
    if ":" in str(vision.get("timm_model_name") or ""):
        raise BackboneError(
            f"{where}: timm_model_name {vision['timm_model_name']!r} would be fetched; "
            "name a timm architecture"
        )
    if "trust_remote_code" in (text.get("tokenizer_kwargs") or {}):
        raise BackboneError(f"{where}: tokenizer_kwargs asks to run code that comes with the files; refused")
    if text.get("hf_model_name") and not text.get("hf_tokenizer_name"):
        raise BackboneError(
            f"{where}: text_cfg has hf_model_name but no hf_tokenizer_name, so its tokenizer is unknown"
        )
    if vision.get("timm_model_name"):
        vision["timm_model_pretrained"] = False
    if text.get("hf_model_name"):
        text["hf_model_pretrained"] = False
    return cfg


def build_model(model_cfg: Mapping[str, Any], where: str = "backbone") -> nn.Module:
    """An open_clip model with random weights, chosen as `open_clip.create_model` chooses its class.

    Raises:
        BackboneError: open_clip cannot build this configuration.
    """
    cfg = check_model_cfg(dict(model_cfg), where)
    custom = bool(cfg.pop("custom_text", False)) or bool(cfg["text_cfg"].get("hf_model_name"))
    if custom:
        cls: type[nn.Module] = open_clip.CoCa if "multimodal_cfg" in cfg else open_clip.CustomTextCLIP
    else:
        cls = open_clip.CLIP
    try:
        return cls(**cfg)
    except (TypeError, KeyError, RuntimeError, AssertionError) as error:
        raise BackboneError(
            f"{where}: open_clip {open_clip.__version__} cannot build its model_cfg ({error}): "
            "is it made by a newer open_clip, or does it need `pip install 'fedsigma[biomedclip]'`?"
        ) from error


def build_meta_model(model_cfg: Mapping[str, Any], where: str = "backbone") -> nn.Module:
    """As `build_model`, without storage for the weights: fast at any size, for counting."""
    with torch.device("meta"):
        return build_model(model_cfg, where)


def load_weights(model: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Load a state dict in one of open_clip's forms; every weight must match in name and shape.

    Unlike open_clip's own loader this never interpolates a positional embedding.

    Raises:
        BackboneError: weights are missing, unknown, or of another shape.
    """
    state = convert_state_dict(model, state)
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    expected = model.state_dict()
    for scalar in {"logit_scale", "logit_bias"} & state.keys() & expected.keys():
        if state[scalar].numel() == expected[scalar].numel() == 1:
            state[scalar] = state[scalar].reshape(expected[scalar].shape)
    # Transformers before 4.31 stored this constant.
    if "text.transformer.embeddings.position_ids" not in expected:
        state.pop("text.transformer.embeddings.position_ids", None)
    missing, unknown = expected.keys() - state.keys(), state.keys() - expected.keys()
    for kind, keys in (("lack", missing), ("hold unknown", unknown)):
        if keys:
            names = ", ".join(sorted(keys)[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
            raise BackboneError(f"{where}: the weights {kind} {names}: they are of another architecture")
    wrong = [k for k, v in state.items() if expected[k].shape != v.shape]
    if wrong:
        key = next((k for k in wrong if "pos" in k), wrong[0])
        hint = "another picture size or context length" if "pos" in key else "another architecture"
        raise BackboneError(
            f"{where}: {key} has shape {tuple(state[key].shape)}, the configuration expects "
            f"{tuple(expected[key].shape)}: the weights are of {hint}"
        )
    broken = [k for k, v in state.items() if v.is_floating_point() and not bool(torch.isfinite(v).all())]
    if broken:
        raise BackboneError(f"{where}: {broken[0]} holds values that are not finite: the file is damaged")
    # Assigned, not copied: weights that are mapped from a file stay so, and processes share them.
    model.load_state_dict(state, assign=True)


def load_weights_file(model: nn.Module, path: Path, where: str) -> None:
    """`load_weights` from a safetensors file, memory-mapped: processes share float32 weights.

    Writing to a weight copies its pages. The file must not be changed in place while a model uses it.

    Raises:
        BackboneError: the file is not safetensors, or its weights do not match.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise BackboneError(f"{where}: {path} cannot be read as safetensors ({error})") from error
    load_weights(model, state, where)


def get_image_size(model: nn.Module, where: str) -> int:
    """The side of a model's input images, in pixels.

    Raises:
        BackboneError: they are not square, or configuration and image tower disagree.
    """
    visual: Any = model.visual
    side = parse_square_size(visual.image_size, f"{where}: the model's image size")
    # open_clip does not pass vision_cfg.image_size to timm, whose own fixed size decides.
    trunk: Any = getattr(visual, "trunk", None)
    fixed = getattr(getattr(trunk, "patch_embed", None), "img_size", None)
    tower_side = side if fixed is None else parse_square_size(fixed, f"{where}: the image tower's own size")
    if tower_side != side and not _accepts_size(trunk, side):
        raise BackboneError(
            f"{where}: vision_cfg.image_size is {side}, but its timm image tower takes {tower_side} pixels"
        )
    return side


def _accepts_size(trunk: nn.Module, side: int) -> bool:
    """Whether a timm tower accepts another image size without interpolation of weights, such as XCiT."""
    if isinstance(getattr(trunk, "pos_embed", None), nn.Parameter):
        return False
    # In training mode this would change the running statistics of batch norms.
    was_training = trunk.training
    trunk.eval()
    try:
        with torch.no_grad():
            trunk(torch.zeros(1, 3, side, side))
    except (AssertionError, RuntimeError):
        return False
    finally:
        trunk.train(was_training)
    return True


def parse_square_size(size: Any, what: str) -> int:
    """The side of a square size that is a number or a pair of equal numbers, else BackboneError."""
    side, *others = size if isinstance(size, (list, tuple)) and len(size) == 2 else (size, size)
    if others != [side] or type(side) not in (int, float) or side != int(side) or side < 1:
        raise BackboneError(f"{what} is {size!r}, expected one positive number (square images only)")
    return int(side)


def _triple(value: Any, what: str) -> tuple[float, float, float]:
    is_triple = isinstance(value, (list, tuple)) and len(value) == 3
    if not is_triple or not all(isinstance(v, (int, float)) and math.isfinite(v) for v in value):
        raise BackboneError(f"{what} is {value!r}, expected three numbers")
    return float(value[0]), float(value[1]), float(value[2])
