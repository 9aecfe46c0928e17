"""DICOM pictures with one frame each, in class folders or by a CSV manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fedsigma.common.data.records import DataError, PictureError, PictureSource, UnsupportedPicture
from fedsigma.common.data.sources.csv_manifest import read_manifest
from fedsigma.common.data.sources.folder import walk_classes
from fedsigma.common.data.sources.registry import register_source

if TYPE_CHECKING:
    from pydicom import Dataset

__all__ = ["DicomFile", "apply_window", "is_dicom", "open_dicom", "render"]

_SUFFIXES = frozenset({".dcm", ".dicom", ".ima", ""})
_PATIENT = ["PatientID", "IssuerOfPatientID"]


@register_source("dicom")
def open_dicom(
    path: Path,
    *,
    window: list[float] | None = None,
    group_by_folder: bool = False,
    columns: Mapping[str, str] | None = None,
) -> PictureSource:
    """Open DICOM files by a CSV manifest or in class folders.

    Without a group in the manifest, the patient is the group: a SHA-256 digest of the patient identifier,
    kept in memory only. It is the same at every start, so that the split into train and test is too.

    Args:
        path: A CSV manifest (path, label, and optionally split, group, site), or a folder as for `folder`.
        window: Center and width of the window in rescaled units (Hounsfield units for CT); None for each
            file's own window.
        group_by_folder: Whether a folder below the class folder is the group, instead of the patient.
        columns: Other names of the manifest's columns.

    Raises:
        DataError: pydicom is not installed, the window is invalid, or there are no DICOM files.
    """
    _pydicom()
    if window is not None and (len(window) != 2 or not window[1] > 0):
        raise DataError(
            f"the option window is {window!r}, expected a center and a width above 0, as [40, 400]"
        )
    root = path if path.is_dir() else path.parent
    if path.is_dir():
        records, problems = walk_classes(path, is_dicom, group_by_folder)
        if not records:
            raise DataError(f"the folder {path} has no DICOM files in class folders: expected CLASS/file.dcm")
    else:
        records, problems = read_manifest(path, columns)
    records = [r if r.group else replace(r, group=_patient(root / r.key)) for r in records]
    limits = None if window is None else (float(window[0]), float(window[1]))
    return PictureSource(records, lambda key: _read(root / key, key, limits), problems)


def _pydicom() -> Any:
    try:
        import pydicom
    except ImportError as error:
        raise DataError("reading DICOM needs pydicom: pip install fedsigma[dicom]") from error
    return pydicom


def is_dicom(file: Path) -> bool:
    """Whether a file is DICOM by its suffix or, where it has none, by its first bytes."""
    if file.suffix.lower() not in _SUFFIXES or file.name == "DICOMDIR" or not file.is_file():
        return False
    if file.suffix:
        return True
    with file.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def _patient(file: Path) -> str | None:
    """Return the digest of a file's patient identifier; None without one, or if the file is unreadable."""
    pydicom = _pydicom()
    try:
        header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=_PATIENT)
        parts = [str(header.get(tag) or "").strip() for tag in _PATIENT]
    except (pydicom.errors.InvalidDicomError, OSError, ValueError, TypeError, KeyError, EOFError):
        return None  # validation reports the file when it decodes the picture
    if not parts[0]:
        return None
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class DicomFile:
    """A DICOM file whose frames are decoded one at a time.

    Attributes:
        key: Name of the file in errors.
        series: SeriesInstanceUID, or empty.
        frames: Number of frames, at least 1.
        dataset: The dataset.
    """

    key: str
    series: str
    frames: int
    dataset: Dataset

    @classmethod
    def read(cls, file: Path | BinaryIO, key: str) -> DicomFile:
        """Read a file without decoding its frames.

        Raises:
            DataError: pydicom is not installed.
            PictureError: The file is not DICOM, or damaged.
        """
        try:
            with _name_file_in_errors(key):
                dataset = _pydicom().dcmread(file)
                series, frames = dataset.get("SeriesInstanceUID"), int(dataset.get("NumberOfFrames") or 1)
        except DataError:
            raise
        except (OSError, ValueError, EOFError, LookupError, OverflowError, RecursionError) as error:
            raise PictureError(f"{key}: {error or type(error).__name__}") from error
        if frames < 1:
            raise PictureError(f"{key}: NumberOfFrames is {frames}, expected at least 1")
        return cls(key=key, series=str(series or ""), frames=frames, dataset=dataset)

    def image(self, frame: int = 0) -> Image.Image:
        """Render one frame, counted from 0; raises PictureError as `render`, or for a damaged frame."""
        with _name_file_in_errors(self.key):
            if self.frames == 1:
                return render(self.dataset)
            return render(_of_frame(self.dataset, frame), frame=frame)


@contextmanager
def _name_file_in_errors(key: str) -> Iterator[None]:
    """Convert the errors of pydicom to PictureError and add the name of the file."""
    pydicom = _pydicom()
    try:
        yield
    except PictureError as error:
        raise type(error)(f"{key}: {error}") from error
    except pydicom.errors.InvalidDicomError as error:
        raise PictureError(f"{key}: not a DICOM file") from error
    except (AttributeError, NotImplementedError, TypeError) as error:
        raise PictureError(f"{key}: {error}") from error


def _read(file: Path, key: str, window: tuple[float, float] | None) -> Image.Image:
    with _name_file_in_errors(key):
        return render(_pydicom().dcmread(file), window)


def _of_frame(dataset: Dataset, frame: int) -> Dataset:
    """Return a dataset with one frame's rescaling and window at the top level.

    Enhanced CT and MR store them in functional groups, shared or per frame.
    """
    from pydicom import Dataset

    view = Dataset()
    view.update(dataset)
    view.file_meta = dataset.file_meta
    view.set_original_encoding(*dataset.original_encoding)
    per_frame = dataset.get("PerFrameFunctionalGroupsSequence") or []
    for group in [*(dataset.get("SharedFunctionalGroupsSequence") or []), *per_frame[frame : frame + 1]]:
        for name in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
            for values in group.get(name) or []:
                view.update(values)
    return view


def render(
    dataset: Dataset, window: tuple[float, float] | None = None, *, frame: int | None = None
) -> Image.Image:
    """Render a DICOM picture, or one of several frames, as RGB.

    Grey values are rescaled (slope and intercept, or the modality's table), windowed (the file's first
    window or VOI table, else from minimum to maximum without padding) and, for MONOCHROME1, inverted. YBR and
    palette colours become RGB.

    Raises:
        UnsupportedPicture: There are several frames and `frame` is None, the photometric interpretation is
            unknown, or the compression needs a decoder that is not installed.
    """
    from pydicom.pixels.processing import apply_color_lut
    from pydicom.pixels.utils import pixel_array

    frames = int(dataset.get("NumberOfFrames") or 1)
    if frames > 1 and frame is None:
        raise UnsupportedPicture(f"has {frames} frames: export the wanted frame as a file of its own")
    if "PixelData" not in dataset:
        raise UnsupportedPicture("holds no picture (no PixelData)")
    try:
        pixels = pixel_array(dataset, index=frame)
    except (RuntimeError, NotImplementedError) as error:
        syntax = getattr(dataset.file_meta.get("TransferSyntaxUID"), "name", "unknown")
        raise UnsupportedPicture(
            f"cannot be decoded ({syntax}): pip install pylibjpeg[all], or save it uncompressed"
        ) from error
    colours = str(dataset.PhotometricInterpretation)
    if colours in ("MONOCHROME1", "MONOCHROME2"):
        grey = apply_window(pixels, dataset, window)
        if colours == "MONOCHROME1":
            grey = 1 - grey
        return Image.fromarray((grey * 255).round().astype(np.uint8)).convert("RGB")
    if colours == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, dataset)
    elif colours not in ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT"):
        raise UnsupportedPicture(f"has the photometric interpretation {colours!r}, which is not read")
    if pixels.dtype != np.uint8:
        bits = 16 if colours == "PALETTE COLOR" else int(dataset.BitsStored)
        pixels = (pixels.astype(np.float64) * (255 / (2**bits - 1))).round().clip(0, 255).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(pixels[..., :3]))


def apply_window(
    pixels: NDArray[Any], dataset: Dataset, window: tuple[float, float] | None = None
) -> NDArray[np.float64]:
    """Rescale and window grey values of shape (rows, columns) to 0 to 1."""
    from pydicom.pixels.processing import apply_modality_lut, apply_voi

    values = np.asarray(apply_modality_lut(pixels, dataset), np.float64)
    tables = dataset.get("VOILUTSequence")
    function = str(dataset.get("VOILUTFunction") or "LINEAR")
    if window is None and tables:
        shown = np.asarray(apply_voi(apply_modality_lut(pixels, dataset), dataset), np.float64)
        return np.asarray(np.clip(shown / (2 ** int(tables[0].LUTDescriptor[2]) - 1), 0, 1))
    if window is not None:
        (center, width), function = window, "LINEAR_EXACT"
    elif dataset.get("WindowCenter") is not None and dataset.get("WindowWidth") is not None:
        center, width = _first(dataset.WindowCenter), _first(dataset.WindowWidth)
    else:
        return _stretch(values, pixels, dataset)
    # The three functions of DICOM PS3.3 C.11.2.1.2, scaled to 0 to 1.
    if function == "SIGMOID":
        return np.asarray(1 / (1 + np.exp(np.clip(-4 * (values - center) / width, -700, 700))))
    if function == "LINEAR":
        center, width = center - 0.5, max(width - 1, 1e-9)
    return np.clip((values - center) / width + 0.5, 0, 1)


def _first(value: Any) -> float:
    return float(value[0] if isinstance(value, list | tuple) or hasattr(value, "append") else value)


def _stretch(values: NDArray[np.float64], pixels: NDArray[Any], dataset: Dataset) -> NDArray[np.float64]:
    """Stretch from minimum to maximum without padding; padding becomes the background."""
    real = np.ones(values.shape, bool)
    padding = dataset.get("PixelPaddingValue")
    if padding is not None:
        end = dataset.get("PixelPaddingRangeLimit", padding)
        real = (pixels < min(padding, end)) | (pixels > max(padding, end))
    if not real.any():
        return np.zeros_like(values)
    low, high = float(values[real].min()), float(values[real].max())
    shown = np.clip((values - low) / (high - low), 0, 1) if high > low else np.zeros_like(values)
    inverted = str(dataset.PhotometricInterpretation) == "MONOCHROME1"
    return np.where(real, shown, 1.0 if inverted else 0.0)
