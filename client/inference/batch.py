"""Predicts a folder of images and DICOM files with a loaded model, and writes a CSV."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
    """One preprocessed image: a file, or one frame of a DICOM file.

    Attributes:
        file: Path of the file in the folder.
        index: Number of the frame, from 0.
        series: SeriesInstanceUID; empty without one.
        image: The image, uint8 of shape (3, image_size, image_size).
    """

    file: str
    index: int
    series: str
    image: Tensor


def list_images(folder: Path) -> list[str]:
    """Return the images and DICOM files of a folder tree as sorted relative paths, without hidden ones.

    Raises:
        ModelLoadError: The folder does not exist, or has no image.
    """
    if not folder.is_dir():
        raise ModelLoadError(f"{folder} is not a folder")
    images = []
    for base, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        here = Path(base)
        images += [
            (here / n).relative_to(folder).as_posix()
            for n in names
            if not n.startswith(".") and (_has_image_suffix(n) or is_dicom(here / n))
        ]
    if not images:
        raise ModelLoadError(
            f"no image in {folder}: expected DICOM files, or files ending in {', '.join(sorted(SUFFIXES))}"
        )
    return sorted(images)


def _has_image_suffix(name: str) -> bool:
    return Path(name).suffix.lower() in SUFFIXES


def read_frames(
    model: LoadedModel, folder: Path, names: Sequence[str], unreadable: list[str]
) -> Iterator[Frame]:
    """Yield the preprocessed frames of the named files.

    For a file with an unreadable frame, one line is added to `unreadable`, and none of its frames is yielded.

    Raises:
        DataError: There are DICOM files, and pydicom is not installed.
    """
    for name in names:
        try:
            frames = list(_read_file(model, folder, name))
        except PictureError as error:
            unreadable.append(str(error))
        else:
            yield from frames


def _read_file(model: LoadedModel, folder: Path, name: str) -> Iterator[Frame]:
    slices = None if _has_image_suffix(name) else DicomFile.read(folder / name, name)

    def load(frame: int) -> Image.Image:
        return slices.image(frame) if slices else Image.open(folder / name)

    for frame in range(slices.frames if slices else 1):
        source = PictureSource([], lambda _, f=frame: load(f))  # type: ignore[misc]
        image = preprocess(model.backbone, source.image(Record(key=name)))
        yield Frame(file=name, index=frame, series=slices.series if slices else "", image=image)


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
    """Predict all image and DICOM files of a folder and write a CSV, see `write_csv`.

    Args:
        model: The model.
        folder: The folder, read with its subfolders.
        out: The CSV file, written as a whole at the end.
        batch_size: Images in one batch.
        progress: Show a progress bar.
        temperature: Temperature of the probabilities, from a calibration; 1 for none.
        abstain_below: Probability below which the prediction is empty.
        by_series: Write one row a DICOM series, with the mean over its images, instead of one row a file.

    Returns:
        One line for each file that could not be read.

    Raises:
        ModelLoadError: No image can be predicted.
        DataError: There are DICOM files, and pydicom is not installed.
    """
    predictor = Predictor(model, temperature=temperature, abstain_below=abstain_below)
    names, unreadable = list_images(folder), list[str]()
    batch: list[Frame] = []
    # First frame, number of frames and sum of probabilities of each file or series.
    sums: dict[tuple[str, str], tuple[Frame, int, Tensor]] = {}

    def flush() -> None:
        if not batch:
            return
        probabilities = predictor.probabilities(torch.stack([frame.image for frame in batch]))
        for frame, row in zip(batch, probabilities, strict=True):
            key = ("series", frame.series) if by_series and frame.series else ("file", frame.file)
            first, images, total = sums.get(key, (frame, 0, torch.zeros(len(row))))
            sums[key] = first, images + 1, total + row
        batch.clear()

    with model.sigma.inference_mode():
        for name in track(names, "predicting", disable=not progress):
            for frame in read_frames(model, folder, [name], unreadable):
                batch.append(frame)
                if len(batch) == batch_size:
                    flush()
        flush()
    predictions = []
    for first, images, total in sums.values():
        mean = tuple((total / images).tolist())
        predictions.append(
            Prediction(
                file=first.file,
                probabilities=mean,
                prediction=predictor.choose_class(mean),
                images=images,
                series=first.series if by_series else "",
            )
        )
    if not predictions:
        raise ModelLoadError(f"none of the {len(names)} images in {folder} can be read: {unreadable[0]}")
    write_csv(out, predictor.classes, predictions, by_series=by_series)
    return unreadable


def write_csv(
    path: Path, classes: Sequence[str], predictions: Sequence[Prediction], *, by_series: bool = False
) -> None:
    """Write predictions as a CSV with file, prediction (empty: abstained), and a probability a class.

    With `by_series`, the columns series and images (their number) follow the file.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    extra = ["series", "images"] if by_series else []
    writer.writerow(["file", *extra, "prediction", *(f"probability_{name}" for name in classes)])
    for row in predictions:
        numbers = [f"{p:.6f}" for p in row.probabilities]
        group = [row.series, row.images] if by_series else []
        writer.writerow([row.file, *group, row.prediction or "", *numbers])
    write_atomic(path, text.getvalue().encode())
