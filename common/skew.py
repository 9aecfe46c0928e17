"""Correcting a site's loss for the classes that it has few images of, or none."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["logit_offsets"]


def logit_offsets(labels: Tensor, *, classes: int, strength: float) -> Tensor:
    """What is added to the logits in training: `strength` times the log of each class's share.

    The cross-entropy then asks of a site's model what its classes look like and not how often they come, so
    that a site which lacks a class does not unlearn it (Menon et al. 2021, arXiv:2007.07314, eq. 10, with the
    sites' own shares as in Zhang et al. 2022, arXiv:2209.00189). One image is added to each class before
    shares are taken, for a class without images would be left out of the loss altogether.

    Shapes: labels (n,), class numbers; the result (classes,), float32. Equal shares give equal offsets, which
    change nothing.
    """
    counts = torch.bincount(labels, minlength=classes).double() + 1
    return (strength * (counts / counts.sum()).log()).float()
