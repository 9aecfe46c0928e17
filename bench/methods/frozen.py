"""A classifier whose image tower is frozen, so that each batch's features are computed once in a process.

All methods of a study with one seed have the same augmented batches, as have all learning rates of a search.
Only the head behind the tower differs.
"""

from __future__ import annotations

from collections import OrderedDict
from hashlib import blake2b

import torch
from torch import Tensor

from fedsigma.common.training.classifier import ClipClassifier
from fedsigma.common.training.prompts import l2_normalize

MAX_BATCHES = 8192
"""Batches in the cache; one of 16 features of 256 values takes 16 KiB."""
_Key = tuple[str, bool, bytes]
_features: OrderedDict[_Key, Tensor] = OrderedDict()


class FrozenImages(ClipClassifier):
    """A `ClipClassifier` that caches the image tower's output by backbone digest and pixels.

    Features of a backbone without a digest (not loaded from a file) are not cached.
    """

    def image_features(self, images: Tensor) -> Tensor:
        """See `ClipClassifier.image_features`."""
        return l2_normalize(self.encoded(images))

    def encoded(self, images: Tensor) -> Tensor:
        """Return the image tower's output (n, embedding), float32, for uint8 images (n, 3, size, size)."""
        digest = self.backbone.digest
        if not digest:
            return self._encode(images)
        rounded = torch.is_autocast_enabled(self.device.type)
        key = (digest, rounded, blake2b(images.cpu().contiguous().numpy().tobytes()).digest())
        if key not in _features:
            _features[key] = self._encode(images)
            if len(_features) > MAX_BATCHES:
                _features.popitem(last=False)
        return _features[key]

    def _encode(self, images: Tensor) -> Tensor:
        x = (images.to(self.device).float() / 255 - self._mean) / self._std
        with torch.no_grad():
            return self._model.encode_image(x).float()
