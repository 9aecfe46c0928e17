"""Using a finished study at a site: find its model, put its shift on the backbone, export it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedsigma.common.config.study import StudyConfig
from fedsigma.common.registry.shift_file import SavedShift, load_shift
from fedsigma.common.utils.errors import FedSigmaError

if TYPE_CHECKING:
    from torch import Tensor

    from fedsigma.common.backbones import Backbone
    from fedsigma.common.data.loading import Example
    from fedsigma.common.data.records import Record, Source
    from fedsigma.common.sigma import SigmaModel
    from fedsigma.common.training.classifier import ClipClassifier

__all__ = [
    "LoadedModel",
    "ModelLoadError",
    "export",
    "load_model",
    "prepare_evaluation",
    "resolve_model_path",
    "select_labelled",
]


class ModelLoadError(FedSigmaError, ValueError):
    """A sigma shift that does not belong to this backbone, or pictures that cannot be judged."""


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A study's result, put back on its backbone.

    own_round: the round after which the site's own values on top are; None without such values.
    """

    saved: SavedShift
    study: StudyConfig
    backbone: Backbone
    sigma: SigmaModel
    personal_round: int | None = None


def resolve_model_path(name: Path) -> Path:
    """Where a model lies that is named as in the registry, NAME@N or NAME@LABEL; a path stays what it is.

    Raises:
        ModelError: the registry has no such version, or it was changed.
    """
    if "@" not in name.name or name.parent != Path() or name.exists():
        return name
    from fedsigma.common.registry import ModelRegistry, registry_folder
    from fedsigma.common.utils.files import runs_folder

    return ModelRegistry(registry_folder(runs_folder())).find(name.name).path


def load_model(path: Path, backbone: str | None = None, personal: Path | None = None) -> LoadedModel:
    """Load a sigma file (or a run folder), its backbone, and set the shift, having compared fingerprints.

    Args:
        path: of the sigma file or run folder, or a version of the registry, see `located`.
        backbone: where the same backbone lies on this machine, if the study's own name does not fit here.
        personal: a site's file of its own values for this study; without it the pretrained ones are in place.

    Raises:
        ApplyError: the backbone is not the one that the shift was trained on, or personal values are given to
            a study that has none.
        PersonalError: the file of personal values does not belong to this study.
    """
    from fedsigma.common.backbones import load_backbone
    from fedsigma.common.sigma import Fingerprint, SigmaModel

    saved = load_shift(resolve_model_path(path))
    study = StudyConfig.from_yaml(saved.study_yaml, where=f"the study in {path}")
    loaded = load_backbone(backbone or study.backbone)
    sigma = SigmaModel.adapt(loaded.model, study.sigma)
    problem = Fingerprint.from_json(saved.fingerprint_json).describe_mismatch(sigma.fingerprint)
    if problem is None and saved.shift.numel() != sigma.layout.size:
        problem = f"it has {saved.shift.numel()} values, this layout {sigma.layout.size}"
    if problem:
        raise ModelLoadError(
            f"the sigma shift in {path} was not trained on {loaded.name}: {problem}. The study's backbone is "
            f"{study.backbone!r}; name where it lies here with --backbone"
        )
    shift, own_round = saved.shift, None
    if personal is not None:
        shift, own_round = _with_personal(saved, study, sigma, personal)
    sigma.set_shift(shift)
    return LoadedModel(saved=saved, study=study, backbone=loaded, sigma=sigma, personal_round=own_round)


def _with_personal(
    saved: SavedShift, study: StudyConfig, sigma: SigmaModel, file: Path
) -> tuple[Tensor, int]:
    """The shared values with a site's own, as a whole shift, and the round after which those are."""
    import torch

    from fedsigma.client.site.personal_state import read_personal_values
    from fedsigma.common.training.trainer import make_partition

    if study.personal is None:
        raise ModelLoadError(f"study '{study.name}' keeps nothing at the sites: leave --personal out")
    split = make_partition(sigma, study.personal)
    last, _, own = read_personal_values(file, split, sigma.fingerprint, study=study.name, run=saved.run)
    return torch.from_numpy(split.combine(split.shared_values(saved.shift.numpy()), own)), last


def select_labelled(model: LoadedModel, source: Source) -> list[Record]:
    """The images of a source that have one of the study's classes; others are left out."""
    return [record for record in source.records if record.label in model.study.classes]


def prepare_evaluation(
    model: LoadedModel, source: Source, records: Sequence[Record]
) -> tuple[ClipClassifier, list[Example]]:
    """What evaluation takes: the model with its prompts, and the labelled images, decoded.

    Raises:
        PictureError: an image cannot be decoded.
    """
    from fedsigma.common.data.loading import load_examples
    from fedsigma.common.training.classifier import ClipClassifier

    side = model.backbone.image_size * 3 // 2
    examples = load_examples(source, records, list(model.study.classes), side=side)
    return ClipClassifier(model.backbone, model.sigma, list(model.study.prompts)), examples


def export(model: LoadedModel, folder: Path, *, onnx: bool = False) -> Path:
    """Write the adapted model as a plain open_clip folder, and both towers as ONNX files if wanted.

    Raises:
        BackboneError: the folder is not empty.
        OnnxError: a tower cannot be written as ONNX, or would give other features.
    """
    from dataclasses import replace

    from fedsigma.common.backbones import export_merged

    merged = replace(model.backbone, model=model.sigma.merge())
    study = model.study
    notes = [
        f"study {study.name}, after round {model.saved.round}",
        f"classes: {', '.join(study.classes)}",
        f"template: {study.template}",
    ]
    if model.personal_round is not None:
        notes.append(
            f"with one site's personal values, after round {model.personal_round}: they come from its images"
            " alone, so the model belongs to that site"
        )
    written = export_merged(merged, folder, notes=notes)
    if onnx:
        from fedsigma.common.backbones.onnx import export_onnx

        export_onnx(merged, written)
    return written
