"""The words that settings, messages and computations share; needs no torch, so that all may read them."""

from __future__ import annotations

TOWERS = ("image", "text")
"""The two halves of a CLIP."""

ALL_SITES = "all sites"
"""Site name and status of the row of metrics over all sites' test images; no site may have this name."""

PARTS = ("q", "k", "v", "o", "mlp")
"""The parts of a layer whose matrices are adapted."""

THIRDS = ("all", "bottom", "middle", "top")
"""Layers of a tower by name; the bottom is nearest the input."""

AUGMENTATIONS = ("paper", "gentle", "microscopy", "none")
"""What training may do to a picture; see `training` for what each does."""

OPTIMISERS = ("adamw", "sgd")
"""How a site steps along its gradients in a round."""

PRECISIONS = ("auto", "float32", "bfloat16")
"""What the forward pass computes in."""

METRICS = ("accuracy", "balanced_accuracy", "auroc", "f1", "ece")
"""The scalar metrics of an evaluation; a site tells these and no others."""

CODECS = ("exact", "half", "int8", "small")
"""How a sigma shift is coded on the wire, from 32 bits a value to less than 3; see `codec`."""

PRIVACY_LEVELS = ("none", "image", "group", "site")
"""Whose presence differential privacy hides; see `privacy`."""
