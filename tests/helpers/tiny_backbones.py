"""Tiny backbones with random weights, made without the network, for tests."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fedsigma.common.backbones import Backbone, Preprocessing, assemble, build_model
from fedsigma.common.backbones.tokenizer import load_tokenizer

CLIP_CFG: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}
BIOMED_CFG: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {
        "timm_model_name": "test_vit",
        "timm_model_pretrained": False,
        "timm_pool": "",
        "timm_proj": "linear",
        "image_size": 160,
    },
    "text_cfg": {
        "hf_model_name": "acme/no-such-bert",
        "hf_tokenizer_name": "acme/no-such-bert",
        "hf_proj_type": "mlp",
        "hf_pooler_type": "cls_last_hidden_state_pooler",
        "context_length": 16,
    },
}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "of", "cell", "round", "."]
PREPROCESS = Preprocessing(
    size=32, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25), interpolation="bicubic", resize_mode="shortest"
)


def tiny_clip(seed: int = 0) -> Backbone:
    """Open_clip's own transformers in both towers."""
    torch.manual_seed(seed)
    cfg = copy.deepcopy(CLIP_CFG)
    model = build_model(cfg)
    return assemble(
        "tiny", model, load_tokenizer(cfg, model, "", "tiny"), PREPROCESS, cfg, architecture="tiny"
    )


def bert_folder(folder: Path, words: list[str] | None = None) -> Path:
    """The settings and the vocabulary of a very small BERT."""
    from transformers import BertConfig

    folder.mkdir(parents=True, exist_ok=True)
    config = BertConfig(
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    (folder / "vocab.txt").write_text("\n".join(words or WORDS))
    return folder


def tiny_biomed(bert: Path, seed: int = 0) -> Backbone:
    """BiomedCLIP's shape: a timm image tower and a Hugging Face BERT from a local folder."""
    torch.manual_seed(seed)
    cfg = copy.deepcopy(BIOMED_CFG)
    cfg["text_cfg"]["hf_model_name"] = cfg["text_cfg"]["hf_tokenizer_name"] = str(bert)
    model = build_model(cfg)
    return assemble(
        "biomed", model, load_tokenizer(cfg, model, bert, "biomed"), replace(PREPROCESS, size=160), cfg
    )


def features(backbone: Backbone) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of fixed pictures and of two texts."""
    pictures = torch.rand(
        2, 3, backbone.image_size, backbone.image_size, generator=torch.Generator().manual_seed(1)
    )
    with torch.no_grad():
        return backbone.model.encode_image(pictures), backbone.model.encode_text(
            backbone.tokenizer(["a photo of a cell.", "a round cell"])
        )
