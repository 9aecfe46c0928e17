"""The table of weight families: which matrices of a layer are q, k, v, o and mlp.

A row names a module type and says where its matrices are. A layer is a module of such a type; layers
are numbered within their tower in the order of the model. Pooling heads, projections and convolutions
stay as they are, as in CLIP-SVD. A new family is a new row.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from fedsigma.common.config.sigma import SigmaConfig
from fedsigma.common.sigma.layout import Entry, Layout, LayoutError


@dataclass(frozen=True)
class WeightSpec:
    """A matrix of a layer: `block` number of `blocks` equal row blocks of the parameter at `path`."""

    part: str
    path: str
    block: int = 0
    blocks: int = 1


def _packed(path: str) -> tuple[WeightSpec, ...]:
    """Query, key and value stacked in one parameter."""
    return tuple(WeightSpec(part, path, i, 3) for i, part in enumerate(("q", "k", "v")))


def _separate(q: str, k: str, v: str) -> tuple[WeightSpec, ...]:
    """Query, key and value as three parameters."""
    return (WeightSpec("q", q), WeightSpec("k", k), WeightSpec("v", v))


def _outputs(o: str, *mlp: str) -> tuple[WeightSpec, ...]:
    """The output projection and the dense layers of the mlp."""
    return (WeightSpec("o", o), *(WeightSpec("mlp", path) for path in mlp))


@dataclass(frozen=True)
class LayerSpec:
    """One row: a module type by its import path, and its slots.

    Slots whose parameter a given layer lacks are left out, provided `optional` names their path: one
    timm type serves packed and separate projections, plain and gated mlps.
    """

    name: str
    module: str
    type_name: str
    weights: tuple[WeightSpec, ...]
    optional: frozenset[str] = frozenset()

    def module_type(self) -> type[nn.Module] | None:
        """The module type, or None where its library is not installed or is another version."""
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
    """Every layer of a known family: module name, tower, number within the tower, family."""
    table = [(kind, family) for family in LAYER_SPECS if (kind := family.module_type()) is not None]
    count = {"image": 0, "text": 0}
    for name, module in model.named_modules():
        for kind, family in table:
            if isinstance(module, kind):
                tower = _tower(name)
                yield name, tower, count[tower], family
                count[tower] += 1
                break


def _entries(
    module: nn.Module, family: LayerSpec, wanted: Callable[[str], bool]
) -> Iterator[tuple[WeightSpec, tuple[int, int], int]]:
    for slot in family.weights:
        weight = _parameter(module, slot.path)
        if weight is None:
            if slot.path in family.optional:
                continue
            raise LayoutError(
                f"a layer of family {family.name!r} has no matrix {slot.path!r}: this version of "
                f"{family.module} is not known here; please report it with the model's name"
            )
        if wanted(slot.part):
            height = weight.shape[0] // slot.blocks
            rows = (slot.block * height, (slot.block + 1) * height)
            yield slot, rows, min(height, weight.shape[1])


def find_layout(model: nn.Module, selection: SigmaConfig | None = None) -> Layout:
    """The layout of an open_clip model under a selection (default: everything).

    Raises:
        LayoutError: the model has no layer of a known family, or the selection fits none of them.
    """
    selection = selection or SigmaConfig()
    found = list(find_layers(model))
    if not found:
        known = ", ".join(f.name for f in LAYER_SPECS)
        raise LayoutError(f"{type(model).__name__} has no layer of a known family; known: {known}")
    depth = {tower: sum(t == tower for _, t, _, _ in found) for tower in ("image", "text")}
    if not isinstance(selection.layers, str):
        deepest = max(depth[t] for t in selection.towers)
        if max(selection.layers) >= deepest:
            raise LayoutError(
                f"layer {max(selection.layers)} asked for, the deepest tower has {deepest} (0 on)"
            )
    entries: list[Entry] = []
    offset = 0
    for name, tower, number, family in found:
        if tower not in selection.towers or not selection.picks(number, depth[tower]):
            continue
        module = model.get_submodule(name)
        for slot, rows, size in _entries(module, family, lambda part: part in selection.parts):
            weight = f"{name}.{slot.path}"
            entries.append(Entry(weight, slot.part, tower, number, offset, size, rows))
            offset += size
    return Layout(tuple(entries))
