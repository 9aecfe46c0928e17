"""Words shared by settings, messages and computations."""

from __future__ import annotations

TOWERS = ("image", "text")
"""The two encoders of a CLIP model."""

ALL_SITES = "all sites"
"""Site name and status of the row of metrics over all sites' test images; no site may have this name."""

PARTS = ("q", "k", "v", "o", "mlp")
"""Parts of a layer whose matrices can be adapted."""

THIRDS = ("all", "bottom", "middle", "top")
"""Layers of a tower by name; the bottom is nearest the input."""

AUGMENTATIONS = ("paper", "gentle", "microscopy", "none")
"""Augmentations of training images; see `common.training.augment`."""

OPTIMISERS = ("adamw", "sgd")
"""Optimisers of a site in a round."""

PRECISIONS = ("auto", "float32", "bfloat16")
"""Number formats of the forward pass."""

METRICS = ("accuracy", "balanced_accuracy", "auroc", "f1", "ece")
"""Scalar metrics of an evaluation, the only ones that a site reports."""

CODECS = ("exact", "half", "int8", "small")
"""Encodings of an update, from 32 bits a value to less than 3; see `common.wire.codec`."""

PRIVACY_LEVELS = ("none", "image", "group", "site")
"""Whose presence differential privacy hides, from the weakest to the strongest."""
