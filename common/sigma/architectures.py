"""The table of supported layer types: where a layer's q, k, v, o and mlp matrices are.

A layer is a module of one of these types. Layers are numbered within their tower in the order of the model.
Pooling heads, projections and convolutions are not adapted, as in CLIP-SVD (Koleilat, Rivaz and Xiao, TMLR
2026). To support another layer type, add a row.
"""

from __future__ import annotations

import pkgutil
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from operator import attrgetter

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
        type_path: module and name of the type.
        weights: where the layer's matrices are.
        optional: paths of weights that a layer may lack: one timm type has packed or separate projections,
            and plain or gated MLPs.
    """

    name: str
    type_path: str
    weights: tuple[WeightSpec, ...]
    optional: frozenset[str] = frozenset()


_CLIP = (
    *_packed("attn.in_proj_weight"),
    *_outputs("attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"),
)
_TIMM_MLP = _outputs("attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")
_TIMM = (*_packed("attn.qkv.weight"), *_TIMM_MLP)
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
    LayerSpec("open_clip transformer", "open_clip.transformer:ResidualAttentionBlock", _CLIP),
    LayerSpec(
        "open_clip transformer, scaled attention", "open_clip.transformer:CustomResidualAttentionBlock", _CLIP
    ),
    LayerSpec("timm ViT (also SigLIP)", "timm.models.vision_transformer:Block", _TIMM),
    LayerSpec("XCiT", "timm.models.xcit:XCABlock", _TIMM),
    LayerSpec(
        "XCiT, class attention",
        "timm.models.xcit:ClassAttentionBlock",
        (*_separate("attn.q.weight", "attn.k.weight", "attn.v.weight"), *_TIMM_MLP),
    ),
    LayerSpec("EVA", "timm.models.eva:EvaBlock", _EVA, _EVA_OPTIONAL),
    LayerSpec("EVA, norm after", "timm.models.eva:EvaBlockPostNorm", _EVA, _EVA_OPTIONAL),
    LayerSpec("BERT (BiomedCLIP)", "transformers.models.bert.modeling_bert:BertLayer", _BERT),
    LayerSpec("RoBERTa", "transformers.models.roberta.modeling_roberta:RobertaLayer", _BERT),
    LayerSpec(
        "FastViT attention (MobileCLIP)",
        "timm.models.fastvit:AttentionBlock",
        (*_packed("token_mixer.qkv.weight"), WeightSpec("o", "token_mixer.proj.weight")),
    ),
    LayerSpec(
        "attention pooling (ResNet)",
        "open_clip.modified_resnet:AttentionPool2d",
        (*_separate("q_proj.weight", "k_proj.weight", "v_proj.weight"), WeightSpec("o", "c_proj.weight")),
    ),
)


def _find_layers(model: nn.Module) -> Iterator[tuple[str, str, int, LayerSpec]]:
    """Yield every layer of a supported type: module name, tower, number within the tower, type."""
    types: list[tuple[type[nn.Module], LayerSpec]] = []
    for spec in LAYER_SPECS:
        with suppress(ImportError, AttributeError):  # the library is missing, or has no such type
            types.append((pkgutil.resolve_name(spec.type_path), spec))
    count: Counter[str] = Counter()
    for name, module in model.named_modules():
        spec_of_module = next((spec for layer_type, spec in types if isinstance(module, layer_type)), None)
        if spec_of_module is not None:
            tower = "image" if name.split(".", 1)[0] == "visual" else "text"
            yield name, tower, count[tower], spec_of_module
            count[tower] += 1


def _find_matrix(layer: nn.Module, path: str) -> Tensor | None:
    try:
        value = attrgetter(path)(layer)
    except AttributeError:
        return None
    return value if isinstance(value, Tensor) and value.ndim == 2 else None


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
    layers = list(_find_layers(model))
    if not layers:
        supported = ", ".join(spec.name for spec in LAYER_SPECS)
        raise LayoutError(f"{type(model).__name__} has no layer of a supported type; supported: {supported}")
    depth = Counter(tower for _, tower, _, _ in layers)
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
        for weight in spec.weights:
            matrix = _find_matrix(model.get_submodule(name), weight.path)
            if matrix is None and weight.path not in spec.optional:
                raise LayoutError(
                    f"a layer of type {spec.name!r} has no matrix {weight.path!r}: this version"
                    f" of {spec.type_path.split('.')[0]} is not supported; please report it with the model's"
                    " name"
                )
            if matrix is None or weight.part not in selection.parts:
                continue
            height = matrix.shape[0] // weight.blocks
            rows = (weight.block * height, (weight.block + 1) * height)
            rank = min(height, matrix.shape[1])
            entries.append(Entry(f"{name}.{weight.path}", weight.part, tower, number, offset, rank, rows))
            offset += rank
    return Layout(tuple(entries))
