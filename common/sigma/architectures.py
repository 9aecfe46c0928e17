"""The table of supported layer types: where a layer's q, k, v, o and mlp matrices are.

A layer is a module of one of these types. Layers are numbered within their tower in the order of the model.
Pooling heads, projections and convolutions are not adapted, as in CLIP-SVD (Koleilat, Rivaz and Xiao, TMLR
2026). To support another layer type, add a row.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from fedsigma.common.config.sigma import SigmaConfig
from fedsigma.common.sigma.layout import Entry, Layout, LayoutError


@dataclass(frozen=True)
class WeightSpec:
    """Where one matrix of a layer is.

    Attributes:
        part: `q`, `k`, `v`, `o` or `mlp`.
        path: the parameter's name within the layer.
        block: which of the parameter's row blocks the matrix is, from 0.
        blocks: number of equal row blocks of the parameter.
    """

    part: str
    path: str
    block: int = 0
    blocks: int = 1


def _packed(path: str) -> tuple[WeightSpec, ...]:
    """Query, key and value matrices stacked in one parameter."""
    return tuple(WeightSpec(part, path, i, 3) for i, part in enumerate(("q", "k", "v")))


def _separate(q: str, k: str, v: str) -> tuple[WeightSpec, ...]:
    """Query, key and value as three parameters."""
    return (WeightSpec("q", q), WeightSpec("k", k), WeightSpec("v", v))


def _outputs(o: str, *mlp: str) -> tuple[WeightSpec, ...]:
    """The output projection and the dense layers of the mlp."""
    return (WeightSpec("o", o), *(WeightSpec("mlp", path) for path in mlp))


@dataclass(frozen=True)
class LayerSpec:
    """One supported layer type.

    Attributes:
        name: for messages.
        module: import path of the module that has the type.
        type_name: name of the type in that module.
        weights: where the layer's matrices are.
        optional: paths of weights that a layer may lack: one timm type has packed or separate projections,
            and
            plain or gated MLPs.
    """

    name: str
    module: str
    type_name: str
    weights: tuple[WeightSpec, ...]
    optional: frozenset[str] = frozenset()

    def module_type(self) -> type[nn.Module] | None:
        """The module type, or None if its library is missing or has no such type in this version."""
        try:
            return getattr(importlib.import_module(self.module), self.type_name, None)
        except ImportError:
            return None


_CLIP_MLP = _outputs("attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
_TIMM_MLP = _outputs("attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")
_EVA_SEPARATE = _separate("attn.q_proj.weight", "attn.k_proj.weight", "attn.v_proj.weight")
_EVA_GATED = (WeightSpec("mlp", "mlp.fc1_g.weight"), WeightSpec("mlp", "mlp.fc1_x.weight"))
_BERT = (
    *_separate("attention.self.query.weight", "attention.self.key.weight", "attention.self.value.weight"),
    *_outputs("attention.output.dense.weight", "intermediate.dense.weight", "output.dense.weight"),
)
_EVA = (*_packed("attn.qkv.weight"), *_EVA_SEPARATE, *_TIMM_MLP, *_EVA_GATED)
_EVA_OPTIONAL = frozenset(
    {"attn.qkv.weight", "mlp.fc1.weight", *(s.path for s in _EVA_SEPARATE + _EVA_GATED)}
)

LAYER_SPECS: tuple[LayerSpec, ...] = (
    LayerSpec(
        "open_clip transformer",
        "open_clip.transformer",
        "ResidualAttentionBlock",
        (*_packed("attn.in_proj_weight"), *_CLIP_MLP),
    ),
    LayerSpec(
        "open_clip transformer, scaled attention",
        "open_clip.transformer",
        "CustomResidualAttentionBlock",
        (*_packed("attn.in_proj_weight"), *_CLIP_MLP),
    ),
    LayerSpec(
        "timm ViT (also SigLIP)",
        "timm.models.vision_transformer",
        "Block",
        (*_packed("attn.qkv.weight"), *_TIMM_MLP),
    ),
    LayerSpec("XCiT", "timm.models.xcit", "XCABlock", (*_packed("attn.qkv.weight"), *_TIMM_MLP)),
    LayerSpec(
        "XCiT, class attention",
        "timm.models.xcit",
        "ClassAttentionBlock",
        (*_separate("attn.q.weight", "attn.k.weight", "attn.v.weight"), *_TIMM_MLP),
    ),
    LayerSpec("EVA", "timm.models.eva", "EvaBlock", _EVA, _EVA_OPTIONAL),
    LayerSpec("EVA, norm after", "timm.models.eva", "EvaBlockPostNorm", _EVA, _EVA_OPTIONAL),
    LayerSpec("BERT (BiomedCLIP)", "transformers.models.bert.modeling_bert", "BertLayer", _BERT),
    LayerSpec("RoBERTa", "transformers.models.roberta.modeling_roberta", "RobertaLayer", _BERT),
    LayerSpec(
        "FastViT attention (MobileCLIP)",
        "timm.models.fastvit",
        "AttentionBlock",
        (*_packed("token_mixer.qkv.weight"), WeightSpec("o", "token_mixer.proj.weight")),
    ),
    LayerSpec(
        "attention pooling (ResNet)",
        "open_clip.modified_resnet",
        "AttentionPool2d",
        (*_separate("q_proj.weight", "k_proj.weight", "v_proj.weight"), WeightSpec("o", "c_proj.weight")),
    ),
)


def _tower(name: str) -> str:
    return "image" if name.split(".", 1)[0] == "visual" else "text"


def _parameter(module: nn.Module, path: str) -> Tensor | None:
    owner_path, _, name = path.rpartition(".")
    try:
        value = getattr(module.get_submodule(owner_path), name, None)
    except AttributeError:
        return None
    return value if isinstance(value, Tensor) and value.ndim == 2 else None


def find_layers(model: nn.Module) -> Iterator[tuple[str, str, int, LayerSpec]]:
    """Yield every layer of a supported type: module name, tower, number within the tower, type."""
    table = [(module_type, spec) for spec in LAYER_SPECS if (module_type := spec.module_type()) is not None]
    count = {"image": 0, "text": 0}
    for name, module in model.named_modules():
        for module_type, spec in table:
            if isinstance(module, module_type):
                tower = _tower(name)
                yield name, tower, count[tower], spec
                count[tower] += 1
                break


def _matrices(
    layer: nn.Module, spec: LayerSpec, parts: tuple[str, ...]
) -> Iterator[tuple[WeightSpec, tuple[int, int], int]]:
    """Yield a layer's matrices of these parts, with their rows in the parameter and their ranks."""
    for weight in spec.weights:
        value = _parameter(layer, weight.path)
        if value is None:
            if weight.path in spec.optional:
                continue
            raise LayoutError(
                f"a layer of type {spec.name!r} has no matrix {weight.path!r}: this version of {spec.module}"
                " is not supported; please report it with the model's name"
            )
        if weight.part in parts:
            height = value.shape[0] // weight.blocks
            rows = (weight.block * height, (weight.block + 1) * height)
            yield weight, rows, min(height, value.shape[1])


def find_layout(model: nn.Module, selection: SigmaConfig | None = None) -> Layout:
    """Find the matrices of an open_clip model that a selection adapts.

    Args:
        model: a plain or adapted open_clip model; on the meta device, too.
        selection: which weights to adapt; all by default.

    Returns:
        The layout, in the order of the model.

    Raises:
        LayoutError: the model has no layer of a supported type, or the selection matches none of them.
    """
    selection = selection or SigmaConfig()
    layers = list(find_layers(model))
    if not layers:
        supported = ", ".join(spec.name for spec in LAYER_SPECS)
        raise LayoutError(f"{type(model).__name__} has no layer of a supported type; supported: {supported}")
    depth = {tower: sum(t == tower for _, t, _, _ in layers) for tower in ("image", "text")}
    if not isinstance(selection.layers, str):
        deepest = max(depth[tower] for tower in selection.towers)
        if max(selection.layers) >= deepest:
            raise LayoutError(
                f"layer {max(selection.layers)} is selected, but the deepest tower has {deepest} layers,"
                " counted from 0"
            )
    entries: list[Entry] = []
    offset = 0
    for name, tower, number, spec in layers:
        if tower not in selection.towers or not selection.picks(number, depth[tower]):
            continue
        for weight, rows, rank in _matrices(model.get_submodule(name), spec, selection.parts):
            entries.append(Entry(f"{name}.{weight.path}", weight.part, tower, number, offset, rank, rows))
            offset += rank
    return Layout(tuple(entries))
