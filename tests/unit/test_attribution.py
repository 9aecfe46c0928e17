"""Relevance maps: they add up, and lie where a model looks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fedsigma.client.inference.attribution import (
    Attribution,
    _sum_cells,
    attribute_images,
    integrated_gradients,
    plot_attribution,
)
from fedsigma.client.inference.loaded_model import LoadedModel
from fedsigma.common.backbones import load_backbone
from fedsigma.common.config.sigma import SigmaConfig
from fedsigma.common.config.study import StudyConfig
from fedsigma.common.registry.shift_file import SavedShift
from fedsigma.common.sigma import SigmaModel

STUDY = "name: s\nbackbone: starter\nclasses: [neutrophil, lymphocyte, monocyte]\n"


def textured(seed: int = 0, side: int = 56) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, side, side), generator=generator, dtype=torch.uint8)


def test_attribution_map_is_localized_and_sums_to_the_score() -> None:
    def lead(pixels: Tensor) -> Tensor:
        corner = pixels[:, :, 28:, :28] / 255
        return (corner**2).sum(dim=(1, 2, 3)) + corner.mean(dim=(1, 2, 3)) ** 3

    picture = textured()
    found = integrated_gradients(lead, picture, steps=64)
    outside = found.clone()
    outside[28:, :28] = 0
    assert outside.abs().max() == 0 and found.abs().max() > 0
    flat = picture.float()[None].mean(dim=(2, 3), keepdim=True).expand(1, 3, 56, 56)
    expected = lead(picture.float()[None]) - lead(flat)
    torch.testing.assert_close(found.sum()[None], expected, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(_sum_cells(found).sum(), found.sum(), rtol=1e-4)


@pytest.fixture(scope="module")
def restored() -> LoadedModel:
    backbone = load_backbone("starter")
    sigma = SigmaModel.adapt(backbone.model, SigmaConfig())
    shift = 0.1 * torch.randn(sigma.layout.size, generator=torch.Generator().manual_seed(0))
    sigma.set_shift(shift)
    saved = SavedShift(
        shift=shift,
        layout_json=sigma.layout.to_json(),
        fingerprint_json=sigma.fingerprint.to_json(),
        study_yaml=STUDY,
        round=1,
    )
    return LoadedModel(saved=saved, study=StudyConfig.from_yaml(STUDY), backbone=backbone, sigma=sigma)


def test_both_models_maps_of_a_picture_add_up_to_each_models_lead(
    restored: LoadedModel, tmp_path: Path
) -> None:
    side = restored.backbone.image_size
    picture = textured(1, side)
    (found,) = attribute_images(restored, [picture])
    assert found.predicted in restored.study.classes and 0 < found.probability < 1
    torch.testing.assert_close(restored.sigma.get_shift(), restored.saved.shift)
    assert not np.allclose(found.before, found.after)
    # The probabilities are each model's own: a softmax of three, of which one is the class.
    assert found.probability > 1 / 3
    plot_attribution(found, tmp_path / "map.png", title="one.png")
    with Image.open(tmp_path / "map.png") as drawn:
        assert drawn.size[0] > 900


def test_a_model_that_was_not_changed_has_one_map(restored: LoadedModel) -> None:
    restored.sigma.set_shift(torch.zeros_like(restored.saved.shift))
    (found,) = attribute_images(restored, [textured(2, restored.backbone.image_size)])
    restored.sigma.set_shift(restored.saved.shift)
    np.testing.assert_array_equal(found.before, found.after)
    assert isinstance(found, Attribution) and found.probability == found.pretrained_probability
