"""Which regions of a picture drove its judgement, before and after the adaptation.

Integrated gradients (Sundararajan, Taly and Yan, Axiomatic Attribution for Deep Networks, 2017), by captum:
the gradient of the class's lead over the others, f(x) = z_c - mean of the other logits, is integrated along
the straight line from the picture's own mean colour to the picture. A pixel's relevance is what it adds to f;
all together add up to f(picture) - f(mean colour).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F

from fedsigma.client.inference.batch import list_pictures, views
from fedsigma.client.inference.loaded_model import LoadedModel, ModelLoadError
from fedsigma.common.training.prompts import PromptEncoder, l2_normalize

__all__ = ["Relevance", "draw", "relevance", "relevance_of", "write_maps"]

STEPS, CELLS = 32, 28


@dataclass(frozen=True)
class Relevance:
    """One picture's maps for the class that the adapted model names.

    Fields: picture, uint8 (side, side, 3), as the model sees it; predicted, the class; probability, of it by
    the adapted model, and pretrained, by the pretrained one; after and before, float (CELLS, CELLS): what
    each cell adds to the class's lead, in logits.
    """

    picture: NDArray[np.uint8]
    predicted: str
    probability: float
    pretrained: float
    after: NDArray[np.float32]
    before: NDArray[np.float32]


def relevance(lead: Callable[[Tensor], Tensor], picture: Tensor, *, steps: int = STEPS) -> Tensor:
    """What each pixel adds to `lead`, summed over the colours.

    Args:
        lead: of pictures (n, 3, height, width), float 0 to 255, one number each.
        picture: uint8 (3, height, width).
        steps: of the integral.

    Shapes: the result is (height, width).

    Raises:
        ApplyError: captum is not installed.
    """
    try:
        from captum.attr import IntegratedGradients
    except ImportError:
        raise ModelLoadError("captum is not installed: pip install 'fedsigma[explain]'") from None
    pixels = picture.float()[None]
    baseline = pixels.mean(dim=(2, 3), keepdim=True).expand_as(pixels)
    found: Tensor = IntegratedGradients(lead).attribute(
        pixels, baselines=baseline, n_steps=steps, internal_batch_size=8
    )
    return found[0].sum(0).detach()


def relevance_of(restored: LoadedModel, pictures: Iterable[Tensor]) -> Iterator[Relevance]:
    """The maps of pictures by the adapted model and, for the same class, by the pretrained one.

    Shapes: pictures, each uint8 (3, side, side) as the model sees it.
    """
    shift = restored.sigma.get_shift().clone()
    zero = torch.zeros_like(shift)
    texts = [_text_features(restored, d) for d in (shift, zero)]
    for picture in pictures:
        restored.sigma.set_shift(shift)
        with torch.no_grad():
            logits = _logits(restored, texts[0], picture.float()[None])[0]
        best = int(logits.argmax())
        after = relevance(lambda x, c=best: _lead(_logits(restored, texts[0], x), c), picture)  # type: ignore[misc]
        restored.sigma.set_shift(zero)
        with torch.no_grad():
            was = _logits(restored, texts[1], picture.float()[None])[0]
        before = relevance(lambda x, c=best: _lead(_logits(restored, texts[1], x), c), picture)  # type: ignore[misc]
        restored.sigma.set_shift(shift)
        yield Relevance(
            picture=picture.permute(1, 2, 0).numpy(),
            predicted=restored.study.classes[best],
            probability=float(logits.softmax(0)[best]),
            pretrained=float(was.softmax(0)[best]),
            after=_cells(after),
            before=_cells(before),
        )


def draw(found: Relevance, path: Path, *, title: str = "") -> None:
    """Write a PNG: the picture, the pretrained model's map and the adapted one's, on one scale."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    most = max(float(np.abs(found.before).max()), float(np.abs(found.after).max()), 1e-9)
    axes: Any = figure.subplots(1, 3)
    heads = (
        title or "the picture",
        f"zero-shot: {found.predicted} {100 * found.pretrained:.0f} %",
        f"adapted: {found.predicted} {100 * found.probability:.0f} %",
    )
    side = found.picture.shape[0]
    for axis, head, cells in zip(axes, heads, (None, found.before, found.after), strict=True):
        axis.set_title(head, fontsize=10)
        axis.set_axis_off()
        grey = found.picture if cells is None else found.picture.mean(axis=2)
        axis.imshow(grey, cmap="gray", alpha=1.0 if cells is None else 0.6)
        if cells is not None:
            drawn = axis.imshow(
                cells,
                cmap="RdBu_r",
                vmin=-most,
                vmax=most,
                alpha=0.6,
                extent=(0, side, side, 0),
                interpolation="bilinear",
            )
    bar = figure.colorbar(drawn, ax=list(axes), shrink=0.8)
    bar.set_label(f"adds to '{found.predicted}', logits", fontsize=8)
    figure.savefig(path, dpi=110)


def write_maps(restored: LoadedModel, folder: Path, out: Path, *, most: int) -> int:
    """Draw the maps of the first pictures of a folder that can be read, of several frames the first.

    Returns how many were drawn.

    Raises:
        ApplyError: there is no picture, or captum is not installed.
    """
    names = list_pictures(folder)[:most]
    out.mkdir(parents=True, exist_ok=True)
    first = [view for view in views(restored, folder, names, []) if not view.frame]
    maps = track(relevance_of(restored, (view.image for view in first)), "drawing maps", total=len(first))
    for view, found in zip(first, maps, strict=True):
        draw(found, out / (view.file.replace("/", "__") + ".png"), title=view.file)
    return len(first)


def _logits(restored: LoadedModel, text: Tensor, pixels: Tensor) -> Tensor:
    backbone = restored.backbone
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (backbone.mean, backbone.std))
    model: Any = backbone.model
    features = l2_normalize(model.encode_image((pixels / 255 - mean) / std))
    return backbone.logit_scale * features @ text.T


def _lead(logits: Tensor, best: int) -> Tensor:
    others = (logits.sum(1) - logits[:, best]) / (logits.shape[1] - 1)
    return logits[:, best] - others


def _text_features(restored: LoadedModel, shift: Tensor) -> Tensor:
    restored.sigma.set_shift(shift)
    with torch.no_grad():
        return PromptEncoder(restored.backbone, list(restored.study.prompts)).features()


def _cells(pixels: Tensor) -> NDArray[np.float32]:
    """Sums over cells, so that all of them still add up to the same."""
    area = pixels.numel() / CELLS**2
    pooled = F.adaptive_avg_pool2d(pixels[None, None], CELLS)[0, 0] * area
    return pooled.numpy().astype(np.float32)
