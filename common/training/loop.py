"""Local training and evaluation: plain functions of tensors, with nothing of the federation in them."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2

from fedsigma.common.backbones import Backbone
from fedsigma.common.config.constants import AUGMENTATIONS, OPTIMISERS, PRECISIONS
from fedsigma.common.config.training import TrainingConfig
from fedsigma.common.sigma import SigmaModel
from fedsigma.common.training.attention import Project, attention, packed
from fedsigma.common.training.metrics import Predictions
from fedsigma.common.training.prompts import PromptEncoder, l2_normalize
from fedsigma.common.utils.errors import FedSigmaError

Augment = Callable[[Tensor], Tensor]


class TrainingError(FedSigmaError, RuntimeError):
    """Training that cannot go on; the message says why and what to do."""


class Example(Protocol):
    """A decoded picture, uint8 (3, height, width), and its class number."""

    @property
    def image(self) -> Tensor:
        """The picture."""
        ...

    @property
    def label(self) -> int:
        """The class number."""
        ...


@dataclass(frozen=True)
class TrainResult:
    """Mean cross-entropy over the steps, steps made, examples at hand."""

    loss: float
    steps: int
    examples: int


def _crop(size: int, least: float) -> v2.Transform:
    return v2.RandomResizedCrop(
        size, (least, 1.0), interpolation=v2.InterpolationMode.BICUBIC, antialias=True
    )


def _paper(size: int) -> Augment:
    """CLIP-SVD's: random resized crop of 8 to 100% of the area, horizontal flip."""
    return v2.Compose([_crop(size, 0.08), v2.RandomHorizontalFlip()])


def _gentle(size: int) -> Augment:
    """Crops that keep most of the picture: for findings that fill it."""
    return v2.Compose([_crop(size, 0.6), v2.RandomHorizontalFlip()])


def _microscopy(size: int) -> Augment:
    """Any orientation, and the changes of light and stain between laboratories."""
    turns = [v2.RandomHorizontalFlip(), v2.RandomVerticalFlip(), v2.Lambda(_quarter_turn)]
    return v2.Compose([_crop(size, 0.5), *turns, v2.Lambda(_restain)])


def _restain(image: Tensor) -> Tensor:
    """Mix the channels a little, and change brightness and contrast.

    One matrix product; torchvision's jitter of the hue costs ten times as much, a fifth of a step.
    """
    mix = torch.eye(3) + 0.07 * torch.randn(3, 3)
    mix = mix / mix.sum(1, keepdim=True) * (1 + 0.06 * torch.randn(3, 1))
    contrast, brightness = 1 + 0.15 * torch.randn(()), 20 * torch.randn(())
    mixed = mix.to(image.device) @ image.flatten(1).float()
    mean = mixed.mean()
    return ((mixed - mean) * contrast + mean + brightness).clamp(0, 255).to(torch.uint8).view_as(image)


def _quarter_turn(image: Tensor) -> Tensor:
    return image.rot90(int(torch.randint(4, ())), (-2, -1))


_AUGMENTERS: tuple[Callable[[int], Augment] | None, ...] = (_paper, _gentle, _microscopy, None)
_OPTIMISERS: dict[str, Callable[..., torch.optim.Optimizer]] = dict(
    zip(OPTIMISERS, (torch.optim.AdamW, torch.optim.SGD), strict=True)
)
AUGMENTERS = dict(zip(AUGMENTATIONS, _AUGMENTERS, strict=True))


def resize_image(image: Tensor, backbone: Backbone) -> Tensor:
    """Resize a uint8 picture (3, height, width) to (3, size, size) as the backbone's makers do."""
    size, mode = backbone.image_size, backbone.resize_mode
    how = v2.InterpolationMode(backbone.interpolation)
    if mode == "squash":
        return v2.functional.resize(image, [size, size], interpolation=how, antialias=True)
    side = min(image.shape[1:]) if mode == "shortest" else max(image.shape[1:])
    shape = [max(1, round(n * size / side)) for n in image.shape[1:]]
    resized = v2.functional.resize(image, shape, interpolation=how, antialias=True)
    return v2.functional.center_crop(resized, [size, size])


def computes_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 matrices natively; elsewhere it is several times slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    if device.type != "cpu":
        return False
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in checks)


def _wants_bfloat16(precision: str, device: torch.device) -> bool:
    if precision not in PRECISIONS:
        raise TrainingError(f"unknown precision {precision!r}: use one of {', '.join(PRECISIONS)}")
    return precision == "bfloat16" or (precision == "auto" and computes_bfloat16(device))


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """The context for a forward pass in the asked precision.

    Raises:
        TrainingError: an unknown precision.
    """
    wanted = _wants_bfloat16(precision, device)
    return torch.autocast(device.type, dtype=torch.bfloat16) if wanted else nullcontext()


def training_attention(
    model: nn.Module, precision: str, device: torch.device, project: Project = packed
) -> AbstractContextManager[object]:
    """The context in which a model's attention is trained by what is faster (`bench/attention.py`)."""
    slow_kernel = device.type == "cpu" and _wants_bfloat16(precision, device)
    if not slow_kernel and project is packed:
        return nullcontext()
    return attention(model, products=slow_kernel, project=project)


class ClipClassifier:
    """A backbone with its adapter and the prompts of a study: what training and evaluation need.

    Args:
        backbone: loaded by `load_backbone`; `sigma` wraps its model.
        sigma: the adapter on that model.
        prompts: one a class, in the order of the labels.
        device: a GPU if there is one, by default.
        micro_batch: images that go through the model at once in training, which bounds its memory; by default
            the whole batch on a GPU, and on a processor as many as its cache is good for.
    """

    def __init__(
        self,
        backbone: Backbone,
        sigma: SigmaModel,
        prompts: Sequence[str],
        *,
        device: torch.device | str | None = None,
        micro_batch: int | None = None,
    ) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.backbone, self.sigma = backbone, sigma.to(self.device)
        self._model: Any = backbone.model
        self.prompts = PromptEncoder(backbone, prompts)
        self.size = backbone.image_size
        self.micro_batch = micro_batch or self._default_micro_batch()
        self._mean = torch.tensor(backbone.mean, device=self.device).view(3, 1, 1)
        self._std = torch.tensor(backbone.std, device=self.device).view(3, 1, 1)
        adapted = {entry.tower for entry in sigma.layout.entries}
        self._image_frozen, self._text_frozen = "image" not in adapted, "text" not in adapted
        self._text: Tensor | None = None
        self.separable: dict[str, bool] = {}
        """By precision, whether examples' gradients can be told apart in one pass; filled by `private`."""

    def _default_micro_batch(self) -> int:
        # Measured by bench/step.py --sweep on ViT-B/16 at 224 pixels: eight or sixteen images are fastest;
        # with fewer the matrix products are small, with more the activations of a layer leave the cache.
        return sys.maxsize if self.device.type != "cpu" else max(1, 8 * 224**2 // self.size**2)

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.prompts.tokens)

    def text_features(self, copies: int | None = None) -> Tensor:
        """Unit text features (classes, embedding); computed once if the text tower is frozen.

        With `copies`, and a text tower that is not frozen: (copies, classes, embedding), see `PromptEncoder`.
        """
        if not self._text_frozen:
            return self.prompts.features(copies)
        if self._text is None:
            with torch.no_grad():
                self._text = self.prompts.features()
        return self._text

    def image_features(self, images: Tensor) -> Tensor:
        """Unit image features (n, embedding) of uint8 pictures (n, 3, size, size)."""
        x = (images.to(self.device).float() / 255 - self._mean) / self._std
        grad = torch.no_grad() if self._image_frozen else nullcontext()
        with grad:
            return l2_normalize(self._model.encode_image(x))

    def fitted(self, example: Example) -> Tensor:
        """The picture as evaluation sees it, uint8 (3, size, size)."""
        return resize_image(example.image, self.backbone)

    def logits(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """Cosine similarities times the backbone's logit scale (n, classes), in float32.

        Also under autocast: bfloat16 would round a logit of 25 to eighths and make classes equal.
        """
        with torch.autocast(self.device.type, enabled=False):
            return self.backbone.logit_scale * image_features @ text_features.T

    def own_logits(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """As `logits`, of each image and its own text features (n, classes, embedding)."""
        with torch.autocast(self.device.type, enabled=False):
            return self.backbone.logit_scale * (image_features[:, None] * text_features).sum(-1)


def augmenter(task: ClipClassifier, recipe: TrainingConfig) -> Augment:
    """What training does to a picture (3, height, width) before the model sees it (3, size, size).

    Raises:
        TrainingError: the recipe names an augmentation that is not known.
    """
    if recipe.augment not in AUGMENTATIONS:
        raise TrainingError(f"unknown augmentation {recipe.augment!r}: use one of {', '.join(AUGMENTATIONS)}")
    build = AUGMENTERS[recipe.augment]
    return build(task.size) if build else partial(resize_image, backbone=task.backbone)


def endless_batches(count: int, size: int, seed: int) -> Iterator[list[int]]:
    """Endless epochs in new orders; the last batch of an epoch may be smaller."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator).tolist()
        for start in range(0, count, size):
            yield order[start : start + size]


def accumulate_gradient(
    task: ClipClassifier, images: Tensor, labels: Tensor, *, precision: str = "auto"
) -> float:
    """Add the gradient of a batch's mean cross-entropy to that of the task's shift.

    The images go through the model `task.micro_batch` at a time, the prompts once: the gradient is that of
    the whole batch, but the activations of one part only are held.

    Args:
        task: whose shift is trained.
        images: uint8 (n, 3, size, size), n > 0.
        labels: class numbers (n,).
        precision: "auto", "float32" or "bfloat16".

    Returns:
        The mean cross-entropy over the batch; it may be infinite or not a number.
    """
    total = 0.0
    with task.sigma.accumulating(), training_attention(task.backbone.model, precision, task.device):
        with autocast(precision, task.device):
            text = task.text_features()
        leaf = text.detach().requires_grad_(text.requires_grad)
        for part, truth in zip(images.split(task.micro_batch), labels.split(task.micro_batch), strict=True):
            with autocast(precision, task.device):
                logits = task.logits(task.image_features(part), leaf)
            loss = F.cross_entropy(logits, truth.to(task.device)) * (len(part) / len(images))
            loss.backward()
            total += loss.item()
        if leaf.grad is not None:
            text.backward(leaf.grad)
    return total


Gradient = Callable[[], float]
"""Adds the gradient of one step to that of the task's shift, and returns the step's loss."""


def batch_gradient(
    task: ClipClassifier, examples: Sequence[Example], recipe: TrainingConfig, *, seed: int
) -> Gradient:
    """The gradient of one batch after another: of epochs in new orders, augmented by torch's generator.

    Its calls raise:
        TrainingError: the loss is not finite.
    """
    augment = augmenter(task, recipe)
    labels = torch.tensor([e.label for e in examples])
    batches = endless_batches(len(examples), recipe.batch_size, seed)

    def gradient() -> float:
        chosen = next(batches)
        images = torch.stack([augment(examples[i].image) for i in chosen])
        value = accumulate_gradient(task, images, labels[chosen], precision=recipe.precision)
        if not math.isfinite(value):
            raise TrainingError(
                f"the loss is {value}: lower the learning rate (now {recipe.learning_rate}) or set precision"
                " to float32"
            )
        return value

    return gradient


def train(
    task: ClipClassifier,
    examples: Sequence[Example],
    recipe: TrainingConfig,
    *,
    first_step: int = 0,
    steps: int,
    total_steps: int,
    seed: int,
    progress: bool = False,
    gradient: Gradient | None = None,
) -> TrainResult:
    """Train the task's shift in place: the recipe's optimiser on the cross-entropy of cosine similarities.

    Args:
        task: holds the shift to start from.
        examples: at least one; some classes may be missing.
        recipe: optimiser settings.
        first_step: number of this call's first step within the study, for the schedule.
        steps: steps to make.
        total_steps: of the whole study.
        seed: of batches and augmentation; the same seed and first step give the same result.
        progress: show a bar.
        gradient: of one step; `batch_gradient` by default.

    Raises:
        TrainingError: no example, an unknown augmentation, or a loss that is not finite.
    """
    if not examples:
        raise TrainingError("no training example: the site has no labelled image of the study's classes")
    if gradient is None:
        gradient = batch_gradient(task, examples, recipe, seed=seed + first_step)
    shift, start = task.sigma.shift, task.sigma.shift.detach().clone()
    kind = _OPTIMISERS[recipe.optimiser]
    optimiser = kind([shift], lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    total = 0.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + first_step)
        for step in track(range(steps), "training", disable=not progress):
            for group in optimiser.param_groups:
                group["lr"] = recipe.learning_rate_at(first_step + step, total_steps)
            optimiser.zero_grad(set_to_none=True)
            total += gradient()
            if recipe.proximal:
                (0.5 * recipe.proximal * (shift - start).square().sum()).backward()
            optimiser.step()
    return TrainResult(total / max(1, steps), steps, len(examples))


def evaluate(
    task: ClipClassifier,
    examples: Sequence[Example],
    *,
    batch_size: int = 64,
    precision: str = "auto",
    progress: bool = False,
) -> Predictions:
    """Class probabilities of every example under the task's shift.

    Raises:
        TrainingError: a probability is not a number, as where the shift has diverged.
    """
    labels = torch.tensor([e.label for e in examples], dtype=torch.long)
    parts = []
    with task.sigma.frozen(), autocast(precision, task.device):
        text = task.text_features()
        for start in track(range(0, len(examples), batch_size), "evaluating", disable=not progress):
            images = torch.stack([task.fitted(e) for e in examples[start : start + batch_size]])
            logits = task.logits(task.image_features(images), text)
            parts.append(logits.softmax(1).cpu())
    probabilities = torch.cat(parts) if parts else torch.zeros(0, task.classes)
    if not probabilities.isfinite().all():
        largest = task.sigma.shift.detach().abs().max().item()
        raise TrainingError(
            f"no finite probability comes out: the shift has diverged (largest value {largest:.3g}); "
            "train again with a lower learning rate or set precision to float32"
        )
    return Predictions(probabilities, labels)
