"""Attribution maps: which regions of an image support its predicted class, before and after adaptation.

Integrated gradients (Sundararajan, Taly and Yan, Axiomatic Attribution for Deep Networks, 2017), by captum:
the gradient of the class margin, f(x) = z_c - mean of the other logits, is integrated along the straight line
from the image's mean colour to the image. A pixel's attribution is its contribution to f; the sum over pixels
is f(image) - f(mean colour).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F

from fedsigma.client.inference.batch import list_images, read_frames
from fedsigma.client.inference.loaded_model import LoadedModel, ModelLoadError
from fedsigma.common.training.prompts import PromptEncoder, l2_normalize

__all__ = ["Attribution", "attribute_images", "integrated_gradients", "plot_attribution", "write_maps"]

STEPS, CELLS = 32, 28


@dataclass(frozen=True)
class Attribution:
    """The attribution maps of one image for the class that the adapted model predicts.

    Attributes:
        image: The image as the model sees it, uint8 of shape (side, side, 3).
        predicted: The class that the adapted model predicts.
        probability: Probability of that class by the adapted model.
        pretrained_probability: Probability of that class by the pretrained model.
        after: Contribution of each cell to the adapted model's class margin, in logits, float32 of shape
            (CELLS, CELLS).
        before: The same by the pretrained model.
    """

    image: NDArray[np.uint8]
    predicted: str
    probability: float
    pretrained_probability: float
    after: NDArray[np.float32]
    before: NDArray[np.float32]


def integrated_gradients(score: Callable[[Tensor], Tensor], image: Tensor, *, steps: int = STEPS) -> Tensor:
    """Compute the contribution of each pixel to a score, summed over the colours.

    Args:
        score: Maps images of shape (n, 3, height, width), float from 0 to 255, to shape (n,).
        image: The image, uint8 of shape (3, height, width).
        steps: Steps of the integral.

    Returns:
        Contributions of shape (height, width).

    Raises:
        ModelLoadError: captum is not installed.
    """
    try:
        from captum.attr import IntegratedGradients
    except ImportError:
        raise ModelLoadError("captum is not installed: pip install 'fedsigma[explain]'") from None
    pixels = image.float()[None]
    baseline = pixels.mean(dim=(2, 3), keepdim=True).expand_as(pixels)
    gradients: Tensor = IntegratedGradients(score).attribute(
        pixels, baselines=baseline, n_steps=steps, internal_batch_size=8
    )
    return gradients[0].sum(0).detach()


def attribute_images(model: LoadedModel, images: Iterable[Tensor]) -> Iterator[Attribution]:
    """Yield the attribution of each image, as the model sees it, by the adapted and the pretrained model."""
    shift = model.sigma.get_shift().clone()
    zero = torch.zeros_like(shift)
    adapted_text, pretrained_text = (_text_features(model, values) for values in (shift, zero))
    for image in images:
        model.sigma.set_shift(shift)
        with torch.no_grad():
            adapted = _logits(model, adapted_text, image.float()[None])[0]
        best = int(adapted.argmax())
        after = integrated_gradients(partial(_class_margin, model, adapted_text, best), image)
        model.sigma.set_shift(zero)
        with torch.no_grad():
            pretrained = _logits(model, pretrained_text, image.float()[None])[0]
        before = integrated_gradients(partial(_class_margin, model, pretrained_text, best), image)
        model.sigma.set_shift(shift)
        yield Attribution(
            image=image.permute(1, 2, 0).numpy(),
            predicted=model.study.classes[best],
            probability=float(adapted.softmax(0)[best]),
            pretrained_probability=float(pretrained.softmax(0)[best]),
            after=_sum_cells(after),
            before=_sum_cells(before),
        )


def plot_attribution(attribution: Attribution, path: Path, *, title: str = "") -> None:
    """Write a PNG of the image, the pretrained model's map and the adapted model's map, on one scale."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    before, after = attribution.before, attribution.after
    limit = max(float(np.abs(before).max()), float(np.abs(after).max()), 1e-9)
    all_axes: Any = figure.subplots(1, 3)
    titles = (
        title or "image",
        f"zero-shot: {attribution.predicted} {100 * attribution.pretrained_probability:.0f} %",
        f"adapted: {attribution.predicted} {100 * attribution.probability:.0f} %",
    )
    side = attribution.image.shape[0]
    for axes, text, cells in zip(all_axes, titles, (None, before, after), strict=True):
        axes.set_title(text, fontsize=10)
        axes.set_axis_off()
        background = attribution.image if cells is None else attribution.image.mean(axis=2)
        axes.imshow(background, cmap="gray", alpha=1.0 if cells is None else 0.6)
        if cells is not None:
            overlay = axes.imshow(
                cells,
                cmap="RdBu_r",
                vmin=-limit,
                vmax=limit,
                alpha=0.6,
                extent=(0, side, side, 0),
                interpolation="bilinear",
            )
    bar = figure.colorbar(overlay, ax=list(all_axes), shrink=0.8)
    bar.set_label(f"contribution to '{attribution.predicted}', logits", fontsize=8)
    figure.savefig(path, dpi=110)


def write_maps(model: LoadedModel, folder: Path, out: Path, *, limit: int) -> int:
    """Write the maps of at most `limit` images of a folder, by their first frames; return the number of maps.

    Raises:
        ModelLoadError: The folder has no image, or captum is not installed.
    """
    names = list_images(folder)[:limit]
    out.mkdir(parents=True, exist_ok=True)
    frames = [frame for frame in read_frames(model, folder, names, []) if not frame.index]
    attributions = attribute_images(model, (frame.image for frame in frames))
    shown = track(attributions, "writing maps", total=len(frames))
    for frame, attribution in zip(frames, shown, strict=True):
        plot_attribution(attribution, out / (frame.file.replace("/", "__") + ".png"), title=frame.file)
    return len(frames)


def _logits(model: LoadedModel, text: Tensor, pixels: Tensor) -> Tensor:
    backbone = model.backbone
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (backbone.mean, backbone.std))
    clip: Any = backbone.model
    features = l2_normalize(clip.encode_image((pixels / 255 - mean) / std))
    return backbone.logit_scale * features @ text.T


def _class_margin(model: LoadedModel, text: Tensor, label: int, pixels: Tensor) -> Tensor:
    logits = _logits(model, text, pixels)
    others = (logits.sum(1) - logits[:, label]) / (logits.shape[1] - 1)
    return logits[:, label] - others


def _text_features(model: LoadedModel, shift: Tensor) -> Tensor:
    model.sigma.set_shift(shift)
    with torch.no_grad():
        return PromptEncoder(model.backbone, list(model.study.prompts)).features()


def _sum_cells(pixels: Tensor) -> NDArray[np.float32]:
    """Sum pixels over a grid of cells; the total stays the same."""
    means = F.adaptive_avg_pool2d(pixels[None, None], CELLS)[0, 0]
    return (means * (pixels.numel() / CELLS**2)).numpy().astype(np.float32)
