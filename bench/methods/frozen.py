"""A task whose image tower stays as it came: what it makes of a batch is computed once in a process.

All methods of a study with one seed see the same augmented batches, and so does every learning rate of a
search. Only what stands behind the tower differs.
"""

from __future__ import annotations

from collections import OrderedDict
from hashlib import blake2b

import torch
from torch import Tensor

from fedsigma.common.training.classifier import ClipClassifier
from fedsigma.common.training.prompts import l2_normalize

__all__ = ["FrozenImages"]

MOST = 8192
"""Batches that are remembered; one of 16 features of 256 values takes 16 KiB."""
_Key = tuple[str, bool, bytes]
_known: OrderedDict[_Key, Tensor] = OrderedDict()


class FrozenImages(ClipClassifier):
    """A `ClipClassifier` that caches the image tower's output by backbone digest and pixels.

    A backbone without a digest (one that came from no file) is not remembered.
    """

    def image_features(self, images: Tensor) -> Tensor:
        """As `Task.image_features`."""
        return l2_normalize(self.encoded(images))

    def encoded(self, images: Tensor) -> Tensor:
        """What the image tower gives (n, embedding) for uint8 pictures (n, 3, size, size), float32."""
        digest = self.backbone.digest
        if not digest:
            return self._encode(images)
        rounded = torch.is_autocast_enabled(self.device.type)
        key = (digest, rounded, blake2b(images.cpu().contiguous().numpy().tobytes()).digest())
        if key not in _known:
            _known[key] = self._encode(images)
            if len(_known) > MOST:
                _known.popitem(last=False)
        return _known[key]

    def _encode(self, images: Tensor) -> Tensor:
        x = (images.to(self.device).float() / 255 - self._mean) / self._std
        with torch.no_grad():
            return self._model.encode_image(x).float()
