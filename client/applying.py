"""Using a finished study at a site: put its shift on the backbone, judge pictures, export the model."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsigma.common.artefact import SavedSigma, load_shift
from fedsigma.common.config import StudyConfig

if TYPE_CHECKING:
    from torch import Tensor

    from fedsigma.common.backbones import Backbone
    from fedsigma.common.data import Example, Record, Source
    from fedsigma.common.sigma import SigmaModel
    from fedsigma.common.training import Task

__all__ = [
    "ApplyError",
    "Restored",
    "decoded",
    "export",
    "labelled",
    "list_pictures",
    "predict",
    "restore",
    "to_judge",
]


class ApplyError(ValueError):
    """A sigma shift that does not belong to this backbone, or pictures that cannot be judged."""


@dataclass(frozen=True, kw_only=True)
class Restored:
    """A study's result, put back on its backbone.

    own_round: the round after which the site's own values on top are; None without such values.
    """

    saved: SavedSigma
    study: StudyConfig
    backbone: Backbone
    sigma: SigmaModel
    own_round: int | None = None


def restore(path: Path, backbone: str | None = None, personal: Path | None = None) -> Restored:
    """Load a sigma file (or a run folder), its backbone, and set the shift, having compared fingerprints.

    Args:
        path: of the sigma file or run folder.
        backbone: where the same backbone lies on this machine, if the study's own name does not fit here.
        personal: a site's file of its own values for this study; without it the pretrained ones are in place.

    Raises:
        ApplyError: the backbone is not the one that the shift was trained on, or personal values are given to
            a study that has none.
        PersonalError: the file of personal values does not belong to this study.
    """
    from fedsigma.common.backbones import load_backbone
    from fedsigma.common.sigma import Fingerprint, Selection, SigmaModel

    saved = load_shift(path)
    study = StudyConfig.from_yaml(saved.study_yaml, where=f"the study in {path}")
    loaded = load_backbone(backbone or study.backbone)
    selection = Selection(towers=study.sigma.towers, layers=study.sigma.layers, parts=study.sigma.parts)
    sigma = SigmaModel.adapt(loaded.model, selection)
    problem = Fingerprint.from_json(saved.fingerprint_json).compare(sigma.fingerprint)
    if problem is None and saved.shift.numel() != sigma.layout.size:
        problem = f"it has {saved.shift.numel()} values, this layout {sigma.layout.size}"
    if problem:
        raise ApplyError(
            f"the sigma shift in {path} was not trained on {loaded.name}: {problem}. The study's backbone is "
            f"{study.backbone!r}; name where it lies here with --backbone"
        )
    shift, own_round = saved.shift, None
    if personal is not None:
        shift, own_round = _with_personal(saved, study, sigma, personal)
    sigma.set_shift(shift)
    return Restored(saved=saved, study=study, backbone=loaded, sigma=sigma, own_round=own_round)


def _with_personal(
    saved: SavedSigma, study: StudyConfig, sigma: SigmaModel, file: Path
) -> tuple[Tensor, int]:
    """The shared values with a site's own, as a whole shift, and the round after which those are."""
    import torch

    from fedsigma.client.personal import read_personal
    from fedsigma.common.learner import split_of

    if study.personal is None:
        raise ApplyError(f"study '{study.name}' keeps nothing at the sites: leave --personal out")
    split = split_of(sigma, study.personal)
    last, _, own = read_personal(file, split, sigma.fingerprint, study=study.name, run=saved.run)
    return torch.from_numpy(split.scatter(split.gather(saved.shift.numpy()), own)), last


def list_pictures(folder: Path) -> list[str]:
    """The picture files in a folder and below it, as paths inside it, sorted; hidden ones are left out.

    Raises:
        ApplyError: no folder, or no picture in it.
    """
    from fedsigma.common.data.folder import SUFFIXES

    if not folder.is_dir():
        raise ApplyError(f"there is no folder {folder}")
    found = []
    for base, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        here = Path(base).relative_to(folder)
        found += [
            (here / n).as_posix()
            for n in names
            if not n.startswith(".") and Path(n).suffix.lower() in SUFFIXES
        ]
    if not found:
        raise ApplyError(f"no picture in {folder}: expected files ending in {', '.join(sorted(SUFFIXES))}")
    return sorted(found)


def predict(
    restored: Restored,
    folder: Path,
    out: Path,
    *,
    batch_size: int = 64,
    progress: bool = False,
    temperature: float = 1.0,
    least: float = 0.0,
) -> list[str]:
    """Judge every picture of a folder and write a CSV: file, prediction, and the probability of each class.

    The CSV appears only when it is complete. Returns one line for each file that could not be read.

    Args:
        restored: the model.
        folder: of pictures.
        out: the CSV.
        batch_size: pictures at a time.
        progress: whether to show it.
        temperature: of the probabilities, from a calibration; 1 leaves them as they are.
        least: below this probability of its first class a picture is not judged: its prediction is empty.

    Raises:
        ApplyError: there is nothing to judge.
    """
    from rich.progress import track

    from fedsigma.client.calibrating import scaled
    from fedsigma.common.training import Task, evaluate

    classes = list(restored.study.classes)
    task = Task(restored.backbone, restored.sigma, list(restored.study.prompts))
    names, unreadable = list_pictures(folder), list[str]()
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    starts = range(0, len(names), batch_size)
    try:
        with partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["file", "prediction", *(f"probability_{name}" for name in classes)])
            for start in track(starts, "judging", disable=not progress):
                pairs = list(decoded(restored, folder, names[start : start + batch_size], unreadable))
                if not pairs:
                    continue
                result = evaluate(task, [example for _, example in pairs], batch_size=batch_size)
                told = scaled(result.probabilities, temperature)
                for (name, _), row in zip(pairs, told.tolist(), strict=True):
                    best = max(range(len(classes)), key=row.__getitem__)
                    word = classes[best] if row[best] >= least else ""
                    writer.writerow([name, word, *(f"{p:.6f}" for p in row)])
        if len(unreadable) == len(names):
            raise ApplyError(f"none of the {len(names)} pictures in {folder} can be read: {unreadable[0]}")
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    return unreadable


def decoded(
    restored: Restored, folder: Path, names: list[str], unreadable: list[str]
) -> Iterator[tuple[str, Any]]:
    """Each picture that can be read, with its name; the others are added to `unreadable`, one line each."""
    from PIL import Image

    from fedsigma.common.data import PictureError, Pictures, Record, load_examples

    # The label only fills the place; decoding is that of the data sources, as in training.
    classes = list(restored.study.classes)
    records = [Record(key=name, label=classes[0]) for name in names]
    source = Pictures(records, lambda key: Image.open(folder / key))
    side = restored.backbone.image_size * 3 // 2
    for record in records:
        try:
            yield record.key, load_examples(source, [record], classes, side=side)[0]
        except PictureError as error:
            unreadable.append(str(error))


def labelled(restored: Restored, source: Source) -> list[Record]:
    """The images of a source that have one of the study's classes; others are left out."""
    return [record for record in source.records if record.label in restored.study.classes]


def to_judge(restored: Restored, source: Source, records: Sequence[Record]) -> tuple[Task, list[Example]]:
    """What evaluation takes: the model with its prompts, and the labelled images, decoded.

    Raises:
        PictureError: an image cannot be decoded.
    """
    from fedsigma.common.data import load_examples
    from fedsigma.common.training import Task

    side = restored.backbone.image_size * 3 // 2
    examples = load_examples(source, records, list(restored.study.classes), side=side)
    return Task(restored.backbone, restored.sigma, list(restored.study.prompts)), examples


def export(restored: Restored, folder: Path, *, onnx: bool = False) -> Path:
    """Write the adapted model as a plain open_clip folder, and both towers as ONNX files if wanted.

    Raises:
        BackboneError: the folder is not empty.
        OnnxError: a tower cannot be written as ONNX, or would give other features.
    """
    from dataclasses import replace

    from fedsigma.common.backbones import export_merged

    merged = replace(restored.backbone, model=restored.sigma.merge())
    study = restored.study
    notes = [
        f"study {study.name}, after round {restored.saved.round}",
        f"classes: {', '.join(study.classes)}",
        f"template: {study.template}",
    ]
    if restored.own_round is not None:
        notes.append(
            f"with one site's own values, after round {restored.own_round}: they are of its images alone, so"
            " the model belongs to that site"
        )
    written = export_merged(merged, folder, notes=notes)
    if onnx:
        from fedsigma.common.backbones.onnx import export_onnx

        export_onnx(merged, written)
    return written
