"""The adapter: W(d) = W0 + U diag(d) V^T on a model's own modules, by `torch.nn.utils.parametrize`.

W0 = U diag(s0) V^T is frozen and only the shift d of the singular values is trained (CLIP-SVD: Koleilat,
Rivaz and Xiao, TMLR 2026). A shift of zeros is the pretrained model, bit for bit.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fedsigma.common.config.sigma import SigmaConfig
from fedsigma.common.sigma.architectures import find_layout
from fedsigma.common.sigma.basis import Basis, ProgressCallback, cached_basis
from fedsigma.common.sigma.layout import Entry, LayoutError
from fedsigma.common.sigma.parametrization import SigmaParametrization
from fedsigma.common.sigma.per_sample import PerSampleGradients


def default_cache_dir() -> Path:
    """The folder of cached bases: $FEDSIGMA_CACHE, or else `bases` in the user's cache directory."""
    if chosen := os.environ.get("FEDSIGMA_CACHE"):
        return Path(chosen)
    import platformdirs

    return Path(platformdirs.user_cache_dir("fedsigma")) / "bases"


class SigmaModel(nn.Module):
    """An open_clip model whose only trainable parameter is the flat sigma shift.

    Args:
        model: a plain model, which is adapted in place and frozen.
        basis: the basis of this model.

    Attributes:
        model: the adapted model; its forward code is unchanged.
        shift: the one trainable parameter, shape (layout.size,), float32.
        layout: the adapted matrices, and where their values are in the shift.
        fingerprint: of the backbone and its basis.
        basis: the frozen singular vectors, memory-mapped if they come from the cache.
    """

    def __init__(self, model: nn.Module, basis: Basis) -> None:
        super().__init__()
        self.model, self.basis = model.requires_grad_(False), basis
        self.layout, self.fingerprint = basis.layout, basis.fingerprint
        self.training = model.training
        device = next(model.parameters()).device
        self.shift = nn.Parameter(torch.zeros(self.layout.size, device=device))
        by_weight: dict[str, list[Entry]] = defaultdict(list)
        for entry in self.layout.entries:
            by_weight[entry.weight].append(entry)
        self._names: list[str] = []
        self._adapted: list[tuple[nn.Module, SigmaParametrization]] = []
        for weight, entries in by_weight.items():
            path, _, name = weight.rpartition(".")
            module = model.get_submodule(path)
            parametrization = SigmaParametrization(entries, basis, self.shift).to(device)
            parametrize.register_parametrization(module, name, parametrization, unsafe=True)
            self._names.append(name)
            self._adapted.append((module, parametrization))

    @classmethod
    def adapt(
        cls,
        model: nn.Module,
        selection: SigmaConfig | None = None,
        *,
        cache_dir: Path | None = None,
        progress: ProgressCallback | None = None,
    ) -> SigmaModel:
        """Adapt a plain open_clip model in place.

        Args:
            model: loaded by open_clip, float32.
            selection: which weights to adapt; all by default.
            cache_dir: the folder of cached bases; `default_cache_dir()` by default.
            progress: called after each decomposed matrix, if the basis must be computed.

        Raises:
            LayoutError: no weight of the model matches the selection, or the model is adapted already.
            BasisError: the cached basis is damaged.
        """
        if any(parametrize.is_parametrized(m) for m in model.modules()):
            raise LayoutError(
                "this model is adapted already: load the backbone again, or merge the shift first"
            )
        layout = find_layout(model, selection)
        return cls(model, cached_basis(model, layout, cache_dir or default_cache_dir(), progress=progress))

    def forward(self, *args: Any, **options: Any) -> Any:
        """The adapted model's own output."""
        return self.model(*args, **options)

    def get_shift(self) -> Tensor:
        """A copy of the shift, shape (layout.size,), float32, on the CPU."""
        return self.shift.detach().to("cpu", torch.float32).clone()

    def set_shift(self, shift: Tensor) -> None:
        """Replace the shift by one of shape (layout.size,), on any device.

        Raises:
            LayoutError: the shape is wrong, or a value is not finite.
        """
        if shift.shape != self.shift.shape:
            raise LayoutError(
                f"the shift has shape {tuple(shift.shape)}, expected ({self.layout.size},): "
                "it belongs to another backbone or selection"
            )
        if not torch.isfinite(shift).all():
            raise LayoutError("the shift has a value that is not finite: it cannot be applied")
        with torch.no_grad():
            self.shift.copy_(shift)

    @contextmanager
    def inference_mode(self) -> Iterator[nn.Module]:
        """Disable gradients and compute each adapted weight once for all forward passes in the block."""
        with torch.no_grad(), parametrize.cached():
            yield self.model

    @contextmanager
    def accumulate_gradients(self) -> Iterator[nn.Module]:
        """Compute each adapted weight once for all forward and backward passes in the block.

        Gradients accumulate on the adapted weights and are added to the shift's gradient at the end of the
        block. So a batch can go through the model in parts, without all activations in memory at once, and
        the gradient is that of the whole batch. If the block raises, the shift's gradient is unchanged.

        Linear layers whose factored form is cheaper use it in the block; their outputs differ by rounding.
        """
        for module, parametrization in self._adapted:
            parametrization.start_accumulating(module)
        try:
            yield self.model
        finally:
            pairs = [
                pair
                for module, parametrization in self._adapted
                for pair in parametrization.stop_accumulating(module)
            ]
        if pairs:
            torch.autograd.backward([value for value, _ in pairs], [grad for _, grad in pairs])

    @contextmanager
    def per_sample_gradients(self) -> Iterator[PerSampleGradients]:
        """Compute the shift's gradient of each example in the block, see `PerSampleGradients`.

        The gradient of `shift` itself is unchanged.
        """
        gradients = PerSampleGradients(self._adapted, self.shift)
        try:
            yield gradients
        finally:
            gradients.end()

    def merge(self) -> nn.Module:
        """Add the shift to the weights and return the plain model. The adapter is then removed."""
        return self._remove(keep_shift=True)

    def unload(self) -> nn.Module:
        """Remove the adapter and return the plain model with its pretrained weights."""
        return self._remove(keep_shift=False)

    def _remove(self, *, keep_shift: bool) -> nn.Module:
        with torch.no_grad():
            for (module, _), name in zip(self._adapted, self._names, strict=True):
                parametrize.remove_parametrizations(module, name, leave_parametrized=keep_shift)
        self._names, self._adapted = [], []
        return self.model
