"""Building an open_clip model from its configuration, and filling it from safetensors."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
    """How a picture becomes the model's input: resized to `size` pixels, then normalised by mean and std."""

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    resize_mode: str = "shortest"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str) -> Preprocessing:
        """Check a `preprocess_cfg`; nothing that decides the input's values is guessed.

        Raises:
            BackboneError: a key is missing or its value cannot be right.
        """
        missing = [key for key in ("size", "mean", "std", "interpolation") if values.get(key) is None]
        if missing:
            raise BackboneError(
                f"{where}: preprocess_cfg lacks {', '.join(missing)}; the wrong preprocessing ruins a model "
                "quietly, so none is assumed: take the values from the model's authors"
            )
        mean, std = (_triple(values[key], f"{where}: preprocess_cfg.{key}") for key in ("mean", "std"))
        if min(std) <= 0:
            raise BackboneError(f"{where}: preprocess_cfg.std is {list(std)}, expected numbers above 0")
        mode = values.get("resize_mode") or "shortest"
        for key, value, known in (
            ("interpolation", values["interpolation"], INTERPOLATIONS),
            ("resize_mode", mode, RESIZE_MODES),
        ):
            if value not in known:
                raise BackboneError(
                    f"{where}: preprocess_cfg.{key} is {value!r}, expected {' or '.join(known)}"
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
        return {
            "size": self.size,
            "mode": "RGB",
            "mean": list(self.mean),
            "std": list(self.std),
            "interpolation": self.interpolation,
            "resize_mode": self.resize_mode,
        }


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """A CLIP model ready for use: float32, eval mode, nothing trainable.

    Shapes: model.encode_image takes (n, 3, image_size, image_size) normalised by mean and std;
    tokenizer returns (n, context length) token numbers. `logit_scale` is already exponentiated.
    `digest` is the SHA-256 of the weights file, or empty where there is none.
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
    """Put the parts together, and check that the preprocessing fits the model.

    Raises:
        BackboneError: the picture size of the preprocessing is not the model's.
    """
    model = model.float().eval().requires_grad_(False)  # first: the size is tried with a float32 picture
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
        BackboneError: not a model_cfg, or one that would fetch weights, run code, or guess its tokenizer.
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
    """The same model without storage for its weights: for counting, in a moment and at any size."""
    with torch.device("meta"):
        return build_model(model_cfg, where)


def load_weights(model: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Load a state dict in open_clip's or a known third form; every weight must match in name and shape.

    Unlike open_clip's own loader this never interpolates a positional embedding: a checkpoint of another
    picture size or context length is an error.

    Raises:
        BackboneError: weights are missing, unknown, or of another shape.
    """
    state = convert_state_dict(model, state)
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    own = model.state_dict()
    for scalar in ("logit_scale", "logit_bias"):
        if scalar in state and scalar in own and state[scalar].numel() == own[scalar].numel() == 1:
            state[scalar] = state[scalar].reshape(own[scalar].shape)
    # Transformers before 4.31 stored this constant.
    if "text.transformer.embeddings.position_ids" not in own:
        state.pop("text.transformer.embeddings.position_ids", None)
    for kind, keys in (("lack", own.keys() - state.keys()), ("hold unknown", state.keys() - own.keys())):
        if keys:
            names = ", ".join(sorted(keys)[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
            raise BackboneError(f"{where}: the weights {kind} {names}: they are of another architecture")
    wrong = [k for k, v in state.items() if k in own and own[k].shape != v.shape]
    if wrong:
        key = next((k for k in wrong if "pos" in k), wrong[0])
        hint = "another picture size or context length" if "pos" in key else "another architecture"
        raise BackboneError(
            f"{where}: {key} has shape {tuple(state[key].shape)}, the configuration expects "
            f"{tuple(own[key].shape)}: the weights are of {hint}"
        )
    broken = [k for k, v in state.items() if v.is_floating_point() and not bool(torch.isfinite(v).all())]
    if broken:
        raise BackboneError(f"{where}: {broken[0]} holds values that are not finite: the file is damaged")
    # Taken, not copied: what is mapped from a file stays so, and processes on one machine share it.
    model.load_state_dict(state, assign=True)


def load_weights_file(model: nn.Module, path: Path, where: str) -> None:
    """`fill` from a safetensors file, memory-mapped: float32 weights are shared between processes.

    Writing to a weight copies its pages. The file must not be changed in place while a model uses it.

    Raises:
        BackboneError: the file is not safetensors, or does not fit.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise BackboneError(f"{where}: {path} cannot be read as safetensors ({error})") from error
    load_weights(model, state, where)


def get_image_size(model: nn.Module, where: str) -> int:
    """The side of the pictures that a model takes.

    Raises:
        BackboneError: they are not square, or configuration and image tower disagree.
    """
    visual: Any = model.visual
    side = parse_square_size(visual.image_size, f"{where}: the model's image size")
    # open_clip does not hand vision_cfg.image_size to timm, whose own fixed size decides.
    trunk: Any = getattr(visual, "trunk", None)
    fixed = getattr(getattr(trunk, "patch_embed", None), "img_size", None)
    own = side if fixed is None else parse_square_size(fixed, f"{where}: the image tower's own size")
    if own != side and not _takes(trunk, side):
        raise BackboneError(
            f"{where}: vision_cfg.image_size is {side}, but its timm image tower takes {own} pixels"
        )
    return side


def _takes(trunk: nn.Module, side: int) -> bool:
    """Whether a timm tower takes pictures of another size than its own without stretching weights.

    Towers that compute their positions do, such as XCiT; learned positions would be interpolated.
    """
    if isinstance(getattr(trunk, "pos_embed", None), nn.Parameter):
        return False
    # In training mode the trial would move the running statistics of batch norms.
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
    """One number for a square size given as a number or a pair.

    Raises:
        BackboneError: not square, or not a positive whole number.
    """
    pair = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
    if (
        len(pair) != 2
        or pair[0] != pair[1]
        or isinstance(pair[0], bool)
        or int(pair[0]) != pair[0]
        or pair[0] < 1
    ):
        raise BackboneError(f"{what} is {size!r}, expected one positive number (square pictures only)")
    return int(pair[0])


def _triple(value: Any, what: str) -> tuple[float, float, float]:
    good = isinstance(value, (list, tuple)) and len(value) == 3
    if not good or not all(isinstance(v, (int, float)) and math.isfinite(v) for v in value):
        raise BackboneError(f"{what} is {value!r}, expected three numbers")
    return float(value[0]), float(value[1]), float(value[2])
