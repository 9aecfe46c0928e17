"""Tiny models with random weights, in the shapes of real ones, for tests that need no file."""

from __future__ import annotations

import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP
from torch import nn


def tiny_clip(seed: int = 0) -> CLIP:
    """An open_clip model of two layers a tower: 32 px pictures, 16 tokens, words 0..63."""
    torch.manual_seed(seed)
    vision = CLIPVisionCfg(image_size=32, layers=2, width=48, patch_size=16, head_width=16)
    text = CLIPTextCfg(context_length=16, vocab_size=64, width=32, heads=2, layers=3)
    return CLIP(embed_dim=24, vision_cfg=vision, text_cfg=text).eval().requires_grad_(False)


def timm_clip(name: str = "test_vit", seed: int = 0) -> CustomTextCLIP:
    """A timm image tower beside open_clip's text tower."""
    torch.manual_seed(seed)
    vision = CLIPVisionCfg(timm_model_name=name, image_size=160, timm_pool="", timm_proj="linear")
    text = CLIPTextCfg(context_length=16, vocab_size=64, width=32, heads=2, layers=1)
    return CustomTextCLIP(embed_dim=24, vision_cfg=vision, text_cfg=text).eval().requires_grad_(False)


def pictures(count: int = 3, size: int = 32, seed: int = 0) -> torch.Tensor:
    """Random normalised pictures (count, 3, size, size)."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def words(count: int = 4, seed: int = 0) -> torch.Tensor:
    """Random token numbers (count, 16); the largest, last, is the end of the text."""
    tokens = torch.randint(1, 60, (count, 16), generator=torch.Generator().manual_seed(seed))
    tokens[:, -1] = 63
    return tokens


def outputs(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Image and text features."""
    size = model.visual.image_size
    side = size[0] if isinstance(size, tuple) else size
    return model.encode_image(pictures(size=side)), model.encode_text(words())
