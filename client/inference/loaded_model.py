"""Loads a trained shift onto its backbone, prepares its evaluation, and exports the merged model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fedsigma.common.config.study import StudyConfig
from fedsigma.common.registry.shift_file import SavedShift, load_shift
from fedsigma.common.utils.errors import FedSigmaError

if TYPE_CHECKING:
    from torch import Tensor

    from fedsigma.common.backbones import Backbone
    from fedsigma.common.data.loading import Example
    from fedsigma.common.data.records import Source
    from fedsigma.common.sigma import SigmaModel
    from fedsigma.common.training.classifier import ClipClassifier

__all__ = [
    "LoadedModel",
    "ModelLoadError",
    "export",
    "load_model",
    "prepare_evaluation",
    "resolve_model_path",
]


class ModelLoadError(FedSigmaError, ValueError):
    """The sigma shift does not belong to the backbone, or the images cannot be predicted."""


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A trained shift on its backbone.

    Attributes:
        saved: The shift file.
        study: The study that trained it.
        backbone: The backbone.
        sigma: The adapted model with the shift set.
        personal_round: Round of the site's personal values; None without them.
    """

    saved: SavedShift
    study: StudyConfig
    backbone: Backbone
    sigma: SigmaModel
    personal_round: int | None = None


def resolve_model_path(name: Path) -> Path:
    """Return the path of a model, given as a path or as NAME@N or NAME@LABEL of the registry.

    Raises:
        ModelError: The registry has no such version, or its files were changed.
    """
    if "@" not in name.name or name.parent != Path() or name.exists():
        return name
    from fedsigma.common.registry import ModelRegistry, registry_folder
    from fedsigma.common.utils.files import runs_folder

    return ModelRegistry(registry_folder(runs_folder())).find(name.name).path


def load_model(path: Path, backbone: str | None = None, personal: Path | None = None) -> LoadedModel:
    """Load a shift onto its backbone after comparing fingerprints.

    Args:
        path: Sigma file, run folder or version of the registry; see `resolve_model_path`.
        backbone: The backbone on this machine, where it differs from the study's name of it.
        personal: A site's file of personal values for this study; None for the pretrained values.

    Raises:
        ModelLoadError: The shift was trained on another backbone, or the study has no personal values.
        PersonalError: The file of personal values does not belong to this study.
    """
    from fedsigma.common.backbones import load_backbone
    from fedsigma.common.sigma import Fingerprint, SigmaModel

    saved = load_shift(resolve_model_path(path))
    study = StudyConfig.from_yaml(saved.study_yaml, where=f"the study in {path}")
    loaded = load_backbone(backbone or study.backbone)
    sigma = SigmaModel.adapt(loaded.model, study.sigma)
    problem = Fingerprint.from_json(saved.fingerprint_json).describe_mismatch(sigma.fingerprint)
    if problem is None and saved.shift.numel() != sigma.layout.size:
        problem = f"it has {saved.shift.numel()} values, expected {sigma.layout.size}"
    if problem:
        raise ModelLoadError(
            f"the sigma shift in {path} was not trained on {loaded.name}: {problem}. The study's backbone is "
            f"{study.backbone!r}; name its path on this machine with --backbone"
        )
    shift, own_round = saved.shift, None
    if personal is not None:
        shift, own_round = _with_personal(saved, study, sigma, personal)
    sigma.set_shift(shift)
    return LoadedModel(saved=saved, study=study, backbone=loaded, sigma=sigma, personal_round=own_round)


def _with_personal(
    saved: SavedShift, study: StudyConfig, sigma: SigmaModel, file: Path
) -> tuple[Tensor, int]:
    """Combine the shared values with a site's personal values; return the shift and their round."""
    import torch

    from fedsigma.client.site.personal_state import read_personal_values
    from fedsigma.common.training.trainer import make_partition

    if study.personal is None:
        raise ModelLoadError(f"study '{study.name}' has no personal values: omit --personal")
    partition = make_partition(sigma, study.personal)
    last, _, personal = read_personal_values(
        file, partition, sigma.fingerprint, study=study.name, run=saved.run
    )
    shift = partition.combine(partition.shared_values(saved.shift.numpy()), personal)
    return torch.from_numpy(shift), last


def prepare_evaluation(model: LoadedModel, source: Source) -> tuple[ClipClassifier, list[Example]]:
    """Return the classifier, and the decoded images of a source that have one of the study's classes.

    Raises:
        PictureError: An image cannot be decoded.
    """
    from fedsigma.common.data.loading import load_examples
    from fedsigma.common.training.classifier import ClipClassifier

    records = [record for record in source.records if record.label in model.study.classes]
    side = model.backbone.image_size * 3 // 2
    examples = load_examples(source, records, list(model.study.classes), side=side)
    return ClipClassifier(model.backbone, model.sigma, list(model.study.prompts)), examples


def export(model: LoadedModel, folder: Path, *, onnx: bool = False) -> Path:
    """Write the merged model as a plain open_clip folder, with `onnx` also its towers as ONNX files.

    Raises:
        BackboneError: The folder is not empty.
        OnnxError: A tower cannot be exported to ONNX, or its features differ.
    """
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
