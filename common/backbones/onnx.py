"""Export of both towers as ONNX files, each compared with torch.

Their features have length 1, so that `logit_scale` times the products of both are the logits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedsigma.common.backbones.build import Backbone
from fedsigma.common.utils.errors import FedSigmaError

__all__ = ["OnnxError", "export_onnx"]

TOLERANCE = 1e-3
_OPSET = 18


class OnnxError(FedSigmaError, RuntimeError):
    """A tower cannot be written as ONNX, or its file gives other features."""


class _Tower(nn.Module):
    def __init__(self, model: nn.Module, method: str) -> None:
        super().__init__()
        self.model, self.method = model, method

    def forward(self, values: Tensor) -> Tensor:
        """Features of length 1 (n, width)."""
        features: Tensor = getattr(self.model, self.method)(values)
        length: Tensor = features.norm(dim=-1, keepdim=True)
        return features / length


def export_onnx(backbone: Backbone, folder: Path) -> dict[str, float]:
    """Write `image.onnx` and `text.onnx`.

    Inputs: `pixels` (n, 3, side, side) float32, normalised by the model's mean and std; `tokens` (n, context)
    int64. Outputs: `features` (n, width) float32 of length 1, for any n.

    Args:
        backbone: a merged model on the CPU.
        folder: an existing folder.

    Returns:
        By tower, the largest difference from torch.

    Raises:
        OnnxError: the packages `onnx` and `onnxruntime` are missing, or a difference is above 1e-3.
    """
    try:
        import onnx  # noqa: F401 - torch writes with it
        import onnxruntime
    except ImportError as error:
        raise OnnxError(f"{error.name} is not installed: pip install 'fedsigma[onnx]'") from None
    random = torch.Generator().manual_seed(0)
    side = backbone.image_size
    texts = ["a photo of a cell", "dermoscopy of a mole, with its border", "x"]
    inputs = {
        "image": ("encode_image", "pixels", torch.randn(3, 3, side, side, generator=random)),
        "text": ("encode_text", "tokens", backbone.tokenizer(texts).to(torch.int64)),
    }
    errors = {}
    for tower, (method, name, values) in inputs.items():
        path = folder / f"{tower}.onnx"
        _write(_Tower(backbone.model, method).eval(), name, values[:2], path)
        with torch.no_grad():
            expected = _Tower(backbone.model, method)(values).numpy()
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        features: Any = session.run(None, {name: values.numpy()})[0]
        errors[tower] = float(np.abs(features - expected).max())
        if features.shape != expected.shape or not errors[tower] <= TOLERANCE:
            path.unlink()
            raise OnnxError(
                f"the {tower} tower of {backbone.name} gives other features as ONNX: they differ by"
                f" {errors[tower]:.2g}, at most {TOLERANCE:g} is allowed"
            )
    return errors


def _write(tower: nn.Module, name: str, values: Tensor, path: Path) -> None:
    try:
        torch.onnx.export(
            tower,
            (values,),
            str(path),
            input_names=[name],
            output_names=["features"],
            dynamic_axes={name: {0: "n"}, "features": {0: "n"}},
            opset_version=_OPSET,
            dynamo=False,
        )
    except Exception as error:
        path.unlink(missing_ok=True)
        raise OnnxError(f"torch cannot write this tower as ONNX: {error}") from error
