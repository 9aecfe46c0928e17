"""Class prompts through the text tower, cut to the longest prompt of the study where that is exact."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from fedsigma.common.backbones import Backbone
from fedsigma.common.utils.errors import InputError


def l2_normalize(features: Tensor) -> Tensor:
    """Features (n, width) in float32, divided by their lengths (n, 1).

    Where a length is zero or overflows the result is not a number. torch's normalize gives zeros there, and
    those would hide that a model has diverged: its last layer norm turns endless activations into zeros.
    """
    x = features.float()
    norm = x.norm(dim=-1, keepdim=True)
    return x / norm.masked_fill(norm.isinf(), float("nan"))


def _text_tower(model: nn.Module) -> Any:
    """The module that holds the text tower's mask and positions (open_clip's CLIP holds them itself)."""
    return getattr(model, "text", model)


def _causal_to_end_of_text(tower: Any) -> bool:
    """Whether no feature depends on what follows the end of the text.

    True for a causal tower pooled at the end-of-text token. False for towers that look both ways or pool
    at the last position, such as SigLIP's: there padding is part of the text.
    """
    pool = getattr(tower, "text_pool_type", getattr(tower, "pool_type", None))
    plain = getattr(tower, "cls_emb", None) is None
    return plain and pool == "argmax" and isinstance(getattr(tower, "attn_mask", None), Tensor)


def _length(tower: Any, tokens: Tensor) -> int:
    if _causal_to_end_of_text(tower):
        return int(tokens.argmax(-1).max()) + 1
    config = getattr(tower, "config", None)
    pad = getattr(config, "pad_token_id", None)
    if pad is not None and getattr(tower, "transformer", None) is not None:  # HFTextEncoder masks padding
        used = (tokens != pad).any(0).nonzero()
        return int(used.max()) + 1 if len(used) else tokens.shape[1]
    return tokens.shape[1]


@contextmanager
def _shortened(tower: Any, length: int) -> Iterator[None]:
    """Let open_clip's own text code run on `length` positions; everything is put back afterwards."""
    mask, positions = getattr(tower, "attn_mask", None), getattr(tower, "positional_embedding", None)
    if not isinstance(mask, Tensor) or not isinstance(positions, nn.Parameter) or length == mask.shape[0]:
        yield
        return
    try:
        tower.attn_mask = mask[:length, :length]
        # A view shares storage: no copy, and training other parameters is not disturbed.
        tower.positional_embedding = nn.Parameter(positions.data[:length], requires_grad=False)
        yield
    finally:
        tower.attn_mask, tower.positional_embedding = mask, positions


class PromptEncoder:
    """The prompts of a study, tokenised once.

    Args:
        backbone: whose tokenizer and text tower are used.
        prompts: one a class.
        cut: leave positions out that no feature depends on.

    Raises:
        ValueError: no prompt, or one longer than the text tower's context.
    """

    def __init__(self, backbone: Backbone, prompts: Sequence[str], *, cut: bool = True) -> None:
        if not prompts:
            raise InputError("no prompt: a study needs at least one class")
        self._model: Any = backbone.model
        tower = _text_tower(backbone.model)
        tokens = backbone.tokenizer(list(prompts))
        self.length = _length(tower, tokens) if cut else tokens.shape[1]
        self.tokens = tokens[:, : self.length].contiguous()

    def features(self, copies: int | None = None) -> Tensor:
        """Unit text features (classes, embedding), with gradients to the shift if they are enabled.

        With `copies` the prompts go through the tower so many times (copies, classes, embedding): where each
        example needs a gradient of its own, it needs prompts of its own.
        """
        device = next(self._model.parameters()).device
        tokens = self.tokens.repeat(copies or 1, 1).to(device)
        with _shortened(_text_tower(self._model), self.length):
            found = l2_normalize(self._model.encode_text(tokens))
        return found if copies is None else found.view(copies, len(self.tokens), -1)
