"""DICOM: brightness as a viewer shows it, patients kept together, what is not read refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsigma.common.data.records import DataError, PictureError, UnsupportedPicture
from fedsigma.common.data.sampling import split_groups
from fedsigma.common.data.sources.registry import open_source
from fedsigma.common.data.validation import check_source

pydicom = pytest.importorskip("pydicom")
from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402
from pydicom.sequence import Sequence  # noqa: E402
from pydicom.uid import ExplicitVRLittleEndian, generate_uid  # noqa: E402

from fedsigma.common.data.sources.dicom import render  # noqa: E402

RAMP = np.array([[0, 100], [200, 400]], np.int16)


def make(
    pixels: np.ndarray = RAMP, colours: str = "MONOCHROME2", patient: str = "MUSTER^1", **tags: Any
) -> Dataset:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset.PatientID = patient
    dataset.Rows, dataset.Columns = pixels.shape[:2]
    dataset.SamplesPerPixel = 3 if pixels.ndim == 3 else 1
    if pixels.ndim == 3:
        dataset.PlanarConfiguration = 0
    dataset.PhotometricInterpretation = colours
    dataset.BitsAllocated = dataset.BitsStored = 8 * pixels.dtype.itemsize
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    dataset.PixelData = pixels.tobytes()
    for name, value in tags.items():
        setattr(dataset, name, value)
    return dataset


def grey(dataset: Dataset, window: tuple[float, float] | None = None) -> list[list[int]]:
    shown = np.asarray(render(dataset, window))
    assert (shown[..., 0] == shown[..., 2]).all()
    return shown[..., 0].tolist()


def flat(rows: list[list[int]]) -> list[int]:
    return [value for row in rows for value in row]


def test_without_a_window_least_to_greatest() -> None:
    assert grey(make()) == [[0, 64], [128, 255]]
    assert grey(make(np.full((2, 2), 5, np.int16))) == [[0, 0], [0, 0]]


def test_monochrome1_is_inverted() -> None:
    assert grey(make(colours="MONOCHROME1")) == [[255, 191], [128, 0]]


def test_padding_is_background() -> None:
    pixels = np.array([[-2000, 100], [200, 300]], np.int16)
    tags = {"PixelPaddingValue": -2000}
    assert grey(make(pixels, **tags)) == [[0, 0], [128, 255]]
    assert grey(make(pixels, "MONOCHROME1", **tags)) == [[0, 255], [128, 0]]


def test_window_after_rescale() -> None:
    # Stored 0..400 is -1000..-600 in rescaled units; the window shows -950 to -750.
    tags = {"RescaleSlope": 1, "RescaleIntercept": -1000, "WindowCenter": -850, "WindowWidth": 200}
    assert grey(make(VOILUTFunction="LINEAR_EXACT", **tags)) == [[0, 64], [191, 255]]
    # LINEAR, the default, is (x - (c - 0.5)) / (w - 1) + 0.5: DICOM PS3.3 C.11.2.1.2.1.
    expected = [round(255 * min(max((x - 1000 + 850.5) / 199 + 0.5, 0), 1)) for x in (0, 100, 200, 400)]
    assert flat(grey(make(**tags))) == expected
    sigmoid = [round(255 / (1 + np.exp(-4 * (x - 1000 + 850) / 200))) for x in (0, 100, 200, 400)]
    assert flat(grey(make(VOILUTFunction="SIGMOID", **tags))) == sigmoid
    assert grey(make(**tags), (-800, 400)) == [[0, 64], [128, 255]]
    several = {**tags, "WindowCenter": [-850, 0], "WindowWidth": [200, 1]}
    assert flat(grey(make(**several))) == expected


def test_matches_pydicom_windowing() -> None:
    pixels = np.random.default_rng(0).integers(0, 4096, (16, 16)).astype(np.uint16)
    dataset = make(pixels, WindowCenter=1800, WindowWidth=900, BitsStored=12, HighBit=11)
    theirs = pydicom.pixels.apply_windowing(pixels, dataset) / 4095 * 255
    assert np.abs(np.array(grey(dataset)) - theirs).max() <= 0.51


def test_voi_table() -> None:
    table = Dataset()
    table.LUTDescriptor = [4, 0, 8]
    table.LUTData = [255, 10, 20, 30]
    dataset = make(np.array([[0, 1], [2, 3]], np.uint16), VOILUTSequence=Sequence([table]))
    assert grey(dataset) == [[255, 10], [20, 30]]


def test_colours() -> None:
    red = np.array([[[250, 10, 20], [0, 0, 0]]], np.uint8)
    assert np.asarray(render(make(red, "RGB"))).tolist() == red.tolist()
    # Y, Cb, Cr of a pure grey and of a red.
    ybr = np.array([[[128, 128, 128], [76, 85, 255]]], np.uint8)
    shown = np.asarray(render(make(ybr, "YBR_FULL"))).astype(int)
    assert np.abs(shown - [[[128, 128, 128], [254, 0, 0]]]).max() <= 2


def test_refusals() -> None:
    with pytest.raises(UnsupportedPicture, match="has 2 frames: export"):
        render(make(np.zeros((2, 2), np.uint8), NumberOfFrames=2))
    with pytest.raises(UnsupportedPicture, match="'HSV'"):
        render(make(np.zeros((2, 2, 3), np.uint8), "HSV"))
    empty = make()
    del empty.PixelData
    with pytest.raises(UnsupportedPicture, match="no PixelData"):
        render(empty)


def save(dataset: Dataset, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)


def test_folder_groups_by_patient(tmp_path: Path) -> None:
    for number in range(6):
        save(make(RAMP + number, patient=f"PAT-{number // 2}"), tmp_path / "ab"[number % 2] / f"{number}.dcm")
    save(make(patient=""), tmp_path / "a" / "IM0001")
    (tmp_path / "a" / "README").write_text("not DICOM")
    source = open_source(f"dicom:{tmp_path}")
    assert [r.key for r in source.records if not r.group] == ["a/IM0001"]
    groups = {r.group for r in source.records if r.group}
    assert len(groups) == 3 and not any("PAT" in group for group in groups)
    # The same at every start: a split must not change between rounds.
    assert open_source(f"dicom:{tmp_path}").records == source.records
    for seed in range(5):
        done = split_groups(source.records, test_share=0.5, seed=seed)
        assert all(len({r.split for r in done if r.group == group}) == 1 for group in groups)
    assert source.image(source.records[0]).size == (2, 2)


def test_manifest_and_report(tmp_path: Path) -> None:
    save(make(), tmp_path / "1.dcm")
    save(make(RAMP + 1, NumberOfFrames=3), tmp_path / "many.dcm")
    (tmp_path / "junk.dcm").write_bytes(b"x" * 300)
    (tmp_path / "torn.dcm").write_bytes((tmp_path / "1.dcm").read_bytes()[:-5])
    rows = [
        "path,label,group",
        "1.dcm,a,lesion-9",
        "many.dcm,a,",
        "junk.dcm,a,",
        "torn.dcm,a,",
        "gone.dcm,a,",
    ]
    (tmp_path / "m.csv").write_text("\n".join(rows))
    source = open_source("dicom:m.csv", base=tmp_path, window=[200, 400])
    assert source.records[0].group == "lesion-9"
    report = check_source(source, classes=["a"])
    assert report.counts() == {"missing file": 1, "corrupt picture": 2, "unsupported picture": 1}
    assert [r.key for r in report.usable] == ["1.dcm"]
    with pytest.raises(PictureError, match=r"junk\.dcm: not a DICOM file"):
        source.image(source.records[2])
    with pytest.raises(DataError, match="expected a center and a width"):
        open_source("dicom:m.csv", base=tmp_path, window=[40])
