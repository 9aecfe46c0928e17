"""Judging a folder of pictures and DICOM files with a finished model, into a CSV."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from rich.progress import track
from torch import Tensor

from fedsigma.client.inference.loaded_model import LoadedModel, ModelLoadError
from fedsigma.client.inference.predictor import Prediction, Predictor, preprocess
from fedsigma.common.data.records import PictureError, PictureSource, Record
from fedsigma.common.data.sources.dicom import DicomFile, is_dicom
from fedsigma.common.data.sources.folder import SUFFIXES
from fedsigma.common.utils.files import write_atomic

__all__ = ["Frame", "list_images", "predict_folder", "read_frames", "write_csv"]


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One picture as the model sees it: all of a file, or one frame of a DICOM file.

    Fields: file, its path in the folder; frame, counted from 0; series, the SeriesInstanceUID or empty;
    image, uint8 (3, image_size, image_size).
    """

    file: str
    index: int
    series: str
    image: Tensor


def list_images(folder: Path) -> list[str]:
    """The picture and DICOM files in a folder and below it, as paths inside it, sorted; no hidden ones.

    Raises:
        ApplyError: no folder, or no picture in it.
    """
    if not folder.is_dir():
        raise ModelLoadError(f"there is no folder {folder}")
    found = []
    for base, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        here = Path(base)
        found += [
            (here / n).relative_to(folder).as_posix()
            for n in names
            if not n.startswith(".") and (_has_image_suffix(n) or is_dicom(here / n))
        ]
    if not found:
        raise ModelLoadError(
            f"no picture in {folder}: expected DICOM, or files ending in {', '.join(sorted(SUFFIXES))}"
        )
    return sorted(found)


def _has_image_suffix(name: str) -> bool:
    return Path(name).suffix.lower() in SUFFIXES


def read_frames(
    model: LoadedModel, folder: Path, names: Sequence[str], unreadable: list[str]
) -> Iterator[Frame]:
    """The pictures that can be read, frame by frame; the others are added to `unreadable`, one line each.

    A file of which one frame cannot be read is left out as a whole.

    Raises:
        DataError: there is DICOM, and pydicom is not installed.
    """
    for name in names:
        try:
            found = list(_read_file(model, folder, name))
        except PictureError as error:
            unreadable.append(str(error))
        else:
            yield from found


def _read_file(restored: LoadedModel, folder: Path, name: str) -> Iterator[Frame]:
    slices = None if _has_image_suffix(name) else DicomFile.read(folder / name, name)

    def opened(frame: int) -> Image.Image:
        return slices.image(frame) if slices else Image.open(folder / name)

    for frame in range(slices.frames if slices else 1):
        source = PictureSource([], lambda _, f=frame: opened(f))  # type: ignore[misc]
        image = preprocess(restored.backbone, source.image(Record(key=name)))
        yield Frame(file=name, index=frame, series=slices.series if slices else "", image=image)


class _MeanProbabilities:
    """Sums of the probabilities of what is judged together."""

    def __init__(self, *, by_series: bool) -> None:
        self._by_series = by_series
        self._found: dict[tuple[str, str], tuple[Frame, int, Tensor]] = {}

    def add(self, view: Frame, probabilities: Tensor) -> None:
        key = ("series", view.series) if self._by_series and view.series else ("file", view.file)
        first, images, total = self._found.get(key, (view, 0, torch.zeros(len(probabilities))))
        self._found[key] = first, images + 1, total + probabilities

    def predictions(self, judge: Predictor) -> list[Prediction]:
        found = []
        for first, images, total in self._found.values():
            mean = tuple((total / images).tolist())
            one = Prediction(
                file=first.file, probabilities=mean, prediction=judge.choose_class(mean), images=images
            )
            found.append(replace(one, series=first.series) if self._by_series else one)
        return found


def predict_folder(
    model: LoadedModel,
    folder: Path,
    out: Path,
    *,
    batch_size: int = 64,
    progress: bool = False,
    temperature: float = 1.0,
    abstain_below: float = 0.0,
    by_series: bool = False,
) -> list[str]:
    """Judge every picture and DICOM file of a folder and write a CSV, see `write_csv`.

    Returns one line for each file that could not be read.

    Args:
        restored: the model.
        folder: of pictures.
        out: the CSV, which appears only when it is complete.
        batch_size: pictures at a time.
        progress: whether to show it.
        temperature: of the probabilities, from a calibration; 1 leaves them as they are.
        least: below this probability of its first class a picture is not judged: its prediction is empty.
        by_series: one row for each DICOM series, with the mean of its images' probabilities, in place of one
            for each file with the mean of its frames'.

    Raises:
        ApplyError: there is nothing to judge.
        DataError: there is DICOM, and pydicom is not installed.
    """
    judge = Predictor(model, temperature=temperature, abstain_below=abstain_below)
    names, unreadable, means = list_images(folder), list[str](), _MeanProbabilities(by_series=by_series)
    batch: list[Frame] = []

    def flush() -> None:
        if batch:
            found = judge.probabilities(torch.stack([view.image for view in batch]))
            for view, row in zip(batch, found, strict=True):
                means.add(view, row)
            batch.clear()

    with model.sigma.inference_mode():
        for name in track(names, "judging", disable=not progress):
            for view in read_frames(model, folder, [name], unreadable):
                batch.append(view)
                if len(batch) == batch_size:
                    flush()
        flush()
    found = means.predictions(judge)
    if not found:
        raise ModelLoadError(f"none of the {len(names)} pictures in {folder} can be read: {unreadable[0]}")
    write_csv(out, judge.classes, found, by_series=by_series)
    return unreadable


def write_csv(
    path: Path, classes: Sequence[str], predictions: Sequence[Prediction], *, by_series: bool = False
) -> None:
    """Write predictions as a table: file, prediction (empty: abstained), and a probability for each class.

    By series, the columns series and images (how many were judged) follow the file, the series' first.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    extra = ["series", "images"] if by_series else []
    writer.writerow(["file", *extra, "prediction", *(f"probability_{name}" for name in classes)])
    for one in predictions:
        numbers = [f"{p:.6f}" for p in one.probabilities]
        group = [one.series, one.images] if by_series else []
        writer.writerow([one.file, *group, one.prediction or "", *numbers])
    write_atomic(path, text.getvalue().encode())
