"""Class prompts through the text tower, cut to the longest prompt of the study where that is exact."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from fedsigma.common.backbones import Backbone
from fedsigma.common.utils.errors import InputError


def l2_normalize(features: Tensor) -> Tensor:
    """Scale features (n, width) to length 1, in float32.

    Where a length is zero or overflows the result is nan. torch's normalize gives zeros there, which would
    hide that a model has diverged: its last layer norm turns infinite activations into zeros.
    """
    x = features.float()
    norm: Tensor = x.norm(dim=-1, keepdim=True)
    return x / norm.masked_fill(norm.isinf(), float("nan"))


def _text_tower(model: nn.Module) -> Any:
    """The module that has the text tower's mask and positions; in open_clip's CLIP the model itself."""
    return getattr(model, "text", model)


def _length(tower: Any, tokens: Tensor) -> int:
    """The number of positions that features depend on."""
    pool = getattr(tower, "text_pool_type", getattr(tower, "pool_type", None))
    causal = getattr(tower, "cls_emb", None) is None and isinstance(getattr(tower, "attn_mask", None), Tensor)
    if causal and pool == "argmax":  # unlike SigLIP's towers, where padding is part of the text
        return int(tokens.argmax(-1).max()) + 1
    pad = getattr(getattr(tower, "config", None), "pad_token_id", None)
    if pad is not None and getattr(tower, "transformer", None) is not None:  # HFTextEncoder masks padding
        used = (tokens != pad).any(0).nonzero()
        return int(used.max()) + 1 if len(used) else tokens.shape[1]
    return tokens.shape[1]


@contextmanager
def _shorten(tower: Any, length: int) -> Iterator[None]:
    """Run open_clip's text code on `length` positions in the block."""
    mask, positions = getattr(tower, "attn_mask", None), getattr(tower, "positional_embedding", None)
    if not isinstance(mask, Tensor) or not isinstance(positions, nn.Parameter) or length == mask.shape[0]:
        yield
        return
    try:
        tower.attn_mask = mask[:length, :length]
        # A view: it shares the storage.
        tower.positional_embedding = nn.Parameter(positions.data[:length], requires_grad=False)
        yield
    finally:
        tower.attn_mask, tower.positional_embedding = mask, positions


class PromptEncoder:
    """Encodes the prompts of a study, which are tokenised once.

    Args:
        backbone: its tokenizer and text tower are used.
        prompts: one for each class.
        cut: leave out positions that no feature depends on.

    Attributes:
        length: number of positions that are encoded.
        tokens: the prompts' tokens, shape (classes, length).

    Raises:
        InputError: there is no prompt.
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
        """Text features of length 1 (classes, embedding), with gradients to the shift if they are enabled.

        With `copies`, the features of so many copies of the prompts (copies, classes, embedding), for
        per-sample gradients.
        """
        device = next(self._model.parameters()).device
        tokens = self.tokens.repeat(copies or 1, 1).to(device)
        with _shorten(_text_tower(self._model), self.length):
            features = l2_normalize(self._model.encode_text(tokens))
        return features if copies is None else features.view(copies, len(self.tokens), -1)
