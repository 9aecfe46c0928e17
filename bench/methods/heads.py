"""Methods with frozen towers: learned context, an adapter, a probe, a cache of features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.methods.frozen import FrozenImages
from bench.methods.method import FLOAT, Method, Untrained
from bench.methods.tuning import State, TensorShift
from fedsigma.common.backbones import Backbone
from fedsigma.common.training.classifier import Example, autocast
from fedsigma.common.training.prompts import PromptEncoder, l2_normalize
from fedsigma.common.training.trainer import derive_seed

CONTEXT = 16


class PromptFL(Method):
    """PromptFL (Guo et al. 2022, arXiv:2208.11625): 16 context vectors before each class's name.

    They are shared by the classes, start as CoOp's (normal, 0.02), and replace the embeddings of 16 words of
    one token each.

    Args:
        backbone: With open_clip's own text tower, which has a `token_embedding`.
        classes: Their names.
        seed: Of the initial vectors, the same at all sites.

    Raises:
        ValueError: The text tower has no such table, or a name does not fit behind the context.
    """

    def __init__(self, backbone: Backbone, classes: tuple[str, ...], *, seed: int) -> None:
        tower: Any = getattr(backbone.model, "text", backbone.model)
        table = getattr(tower, "token_embedding", None)
        if not isinstance(table, nn.Embedding):
            raise ValueError(f"{backbone.name}: its text tower has no token_embedding for the context")
        prompts = [" ".join(["x"] * CONTEXT + [name]) + "." for name in classes]
        tokens = backbone.tokenizer(prompts)
        if not bool((tokens[:, 1 : CONTEXT + 1] == tokens[0, 1]).all()) or bool((tokens[:, -1] > 0).any()):
            raise ValueError(
                f"{backbone.name}: a class's name does not fit behind {CONTEXT} words of context"
            )
        generator = torch.Generator().manual_seed(derive_seed(seed, "context"))
        context = 0.02 * torch.randn(CONTEXT, table.embedding_dim, generator=generator)
        tuning = TensorShift(backbone.model, {"context": context}, towers=["text"])
        super().__init__(FrozenImages(backbone, tuning, prompts), tuning)  # type: ignore[arg-type]
        table.register_forward_hook(self._with_context)

    def _with_context(self, module: nn.Module, args: object, embeddings: Tensor) -> Tensor:
        """Replace the embeddings (classes, length, width) after the start token by the learned context."""
        if "context" not in self._tuning.current:
            return embeddings
        context = self._tuning.current["context"].to(embeddings.dtype).expand(len(embeddings), -1, -1)
        return torch.cat([embeddings[:, :1], context, embeddings[:, CONTEXT + 1 :]], 1)


class _Head(FrozenImages):
    """A classifier with frozen towers and a head behind the image tower."""

    def __init__(self, backbone: Backbone, tuning: TensorShift, prompts: Sequence[str]) -> None:
        super().__init__(backbone, tuning, prompts)  # type: ignore[arg-type]
        self.tuning = tuning

    def _linear(self, name: str, x: Tensor) -> Tensor:
        tensors = self.tuning.current
        return F.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])


class _AttentionTask(_Head):
    def image_features(self, images: Tensor) -> Tensor:
        x = self.encoded(images)
        with torch.autocast(self.device.type, enabled=False):
            weights = self._linear("second", torch.tanh(self._linear("first", x))).softmax(-1)
            return l2_normalize(weights * x)


class FedClip(Method):
    """FedCLIP's adapter (Lu et al. 2023, arXiv:2302.13485): image features times weights computed from them.

    The weights are the softmax of two linear layers of the features' width with tanh between, in torch's own
    initialisation, the same at all sites. They are computed from the features before normalisation.
    """

    def __init__(self, backbone: Backbone, prompts: tuple[str, ...], *, seed: int) -> None:
        width = _text_features(backbone, prompts).shape[1]
        start: State = {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "adapter"))
            for name in ("first", "second"):
                layer = nn.Linear(width, width)
                start |= {f"{name}.{kind}": tensor.detach() for kind, tensor in layer.named_parameters()}
        tuning = TensorShift(backbone.model, start)
        super().__init__(_AttentionTask(backbone, tuning, prompts), tuning)


class _ProbeTask(_Head):
    def logits(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        with torch.autocast(self.device.type, enabled=False):
            return self.backbone.logit_scale * self._linear("classes", image_features)


class LinearProbe(Method):
    """A linear layer on unit image features; starts as zero-shot, with the text features as its rows."""

    def __init__(self, backbone: Backbone, prompts: tuple[str, ...]) -> None:
        rows = _text_features(backbone, prompts)
        start = {"classes.weight": rows, "classes.bias": torch.zeros(len(rows))}
        tuning = TensorShift(backbone.model, start)
        super().__init__(_ProbeTask(backbone, tuning, prompts), tuning)


def _text_features(backbone: Backbone, prompts: Sequence[str]) -> Tensor:
    with torch.no_grad():
        return PromptEncoder(backbone, prompts).features()


class _CacheTask(_Head):
    """Zero-shot logits, plus those of a cache of labelled features."""

    labels: Tensor
    alpha: float
    beta: float

    def logits(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        zero_shot = super().logits(image_features, text_features)
        with torch.autocast(self.device.type, enabled=False):
            near = (self.beta * (image_features @ self.tuning.current["keys"].T - 1)).exp()
            return zero_shot + self.alpha * near @ F.one_hot(self.labels, self.class_count).float()


class TipAdapterF(Method):
    """Tip-Adapter-F (Zhang et al. 2022, arXiv:2207.09519): a cache of training images' features and labels.

    The sites' caches are joined: each site sends a feature and a label for each of its training images, once;
    then the sites train the features and the server averages them. **A feature is information on one image of
    one patient, which leaves the site**: no sum hides it, and the product would not send it.

    Args:
        backbone: Its features are cached.
        prompts: One a class.
        alpha: Weight of the cache beside zero-shot.
        beta: How fast the weight of a cached image falls with its distance.
    """

    def __init__(self, backbone: Backbone, prompts: tuple[str, ...], *, alpha: float, beta: float) -> None:
        self._backbone, self._prompts, self._alpha, self._beta = backbone, prompts, alpha, beta
        self._width = _text_features(backbone, prompts).shape[1]

    def initial(self, sites: Mapping[str, Sequence[Example]]) -> State:
        """Return the joined cache: a feature of each training image (images, width), without augmentation."""
        examples = [example for part in sites.values() for example in part]
        plain = _Head(
            self._backbone, TensorShift(self._backbone.model, {"nothing": torch.zeros(1)}), self._prompts
        )
        with torch.no_grad(), autocast("auto", plain.device):
            batches = [examples[i : i + 64] for i in range(0, len(examples), 64)]
            keys = [plain.image_features(torch.stack([plain.resize(e) for e in batch])) for batch in batches]
        self._tuning = TensorShift(self._backbone.model, {"keys": torch.cat(keys)})
        self.task = task = _CacheTask(self._backbone, self._tuning, self._prompts)
        task.labels = torch.tensor([example.label for example in examples])
        task.alpha, task.beta = self._alpha, self._beta
        self._start = self._tuning.state()
        return self._start

    def bytes_before(self, examples: int) -> int:
        """Return the bytes of a feature and a 32-bit label an image."""
        return FLOAT * examples * (self._width + 1)


class TipAdapter(Untrained, TipAdapterF):
    """Tip-Adapter: the cache is not trained, and sent once."""
