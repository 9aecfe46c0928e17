"""The towers as ONNX: onnxruntime gives what torch gives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from fedsigma.common.backbones import Backbone, load_backbone
from fedsigma.common.backbones import onnx as module
from fedsigma.common.backbones.onnx import OnnxError, export_onnx
from fedsigma.common.config.sigma import SigmaConfig
from fedsigma.common.sigma import SigmaModel

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def merged() -> Backbone:
    backbone = load_backbone("starter")
    sigma = SigmaModel.adapt(backbone.model, SigmaConfig())
    sigma.set_shift(0.05 * torch.randn(sigma.layout.size, generator=torch.Generator().manual_seed(0)))
    return replace(backbone, model=sigma.merge())


def test_both_towers_give_the_models_features_for_any_number_of_pictures(
    merged: Backbone, tmp_path: Path
) -> None:
    found = export_onnx(merged, tmp_path)
    assert set(found) == {"image", "text"} and max(found.values()) < 1e-5
    pixels = torch.randn(5, 3, merged.image_size, merged.image_size)
    session = onnxruntime.InferenceSession(str(tmp_path / "image.onnx"))
    (features,) = session.run(None, {"pixels": pixels.numpy()})
    with torch.no_grad():
        expected = torch.nn.functional.normalize(merged.model.encode_image(pixels), dim=-1)
    np.testing.assert_allclose(features, expected.numpy(), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-5)


def test_tower_that_differs_is_removed(
    merged: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = module._write

    def other(tower: torch.nn.Module, name: str, values: torch.Tensor, path: Path) -> None:
        class Wrong(torch.nn.Module):
            def forward(self, values: torch.Tensor) -> torch.Tensor:
                return torch.nn.functional.normalize(tower(values) + 0.01, dim=-1)

        write(Wrong(), name, values, path)

    monkeypatch.setattr(module, "_write", other)
    with pytest.raises(OnnxError, match="image tower of starter gives other features"):
        export_onnx(merged, tmp_path)
    assert list(tmp_path.iterdir()) == []
