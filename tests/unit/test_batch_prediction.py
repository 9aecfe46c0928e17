"""Predictions of folders with DICOM: a row a file or a series, frames and slices averaged."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from fedsigma.cli.main import main
from fedsigma.client.inference.batch import list_images
from fedsigma.client.inference.loaded_model import ModelLoadError, resolve_model_path
from tests.helpers.finished_run import CLASSES, make_run

pydicom = pytest.importorskip("pydicom")
from pydicom.dataset import Dataset  # noqa: E402

from fedsigma.common.data.sources.dicom import DicomFile  # noqa: E402
from tests.unit.test_data_dicom import make  # noqa: E402

# The processor may compute in bfloat16, whose sums depend on the size of the batch.
ROUNDING = 1e-3


def noise(seed: int, side: int = 40) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 4000, (side, side)).astype(np.uint16)


def frames_of(*pixels: np.ndarray, **tags: Any) -> Dataset:
    dataset = make(pixels[0], **tags)
    dataset.PixelData = b"".join(one.tobytes() for one in pixels)
    dataset.NumberOfFrames = len(pixels)
    return dataset


def save(dataset: Dataset, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two series, of two slices and of one; a DICOM file of no series; a picture."""
    path = tmp_path / "in"
    save(make(noise(0), SeriesInstanceUID="1.2.3"), path / "a" / "1.dcm")
    save(make(noise(1), SeriesInstanceUID="1.2.4"), path / "a" / "2.dcm")
    save(make(noise(2), SeriesInstanceUID="1.2.3"), path / "b" / "IM0001")
    save(make(noise(3)), path / "c.dcm")
    Image.fromarray(np.random.default_rng(4).integers(0, 255, (40, 40, 3)).astype(np.uint8)).save(
        path / "d.png"
    )
    return path


def predicted(run: Path, folder: Path, *options: str, code: int = 0) -> list[dict[str, str]]:
    out = folder.parent / "out.csv"
    done = CliRunner().invoke(main, ["predict", str(run), str(folder), "--out", str(out), *options])
    assert done.exit_code == code, done.output
    return list(csv.DictReader(out.open()))


def numbers(row: dict[str, str]) -> np.ndarray:
    return np.array([float(row[f"probability_{name}"]) for name in CLASSES])


def test_each_file_is_a_row(run: Path, folder: Path) -> None:
    (folder / "notes").write_text("no picture, no suffix")
    rows = predicted(run, folder, "--batch-size", "2")
    assert [row["file"] for row in rows] == ["a/1.dcm", "a/2.dcm", "b/IM0001", "c.dcm", "d.png"]
    assert "series" not in rows[0]
    assert all(np.isclose(numbers(row).sum(), 1, atol=1e-5) for row in rows)


def test_a_series_is_the_mean_of_its_slices(run: Path, folder: Path) -> None:
    alone = {row["file"]: numbers(row) for row in predicted(run, folder)}
    rows = {row["file"]: row for row in predicted(run, folder, "--series", "--batch-size", "1")}
    assert list(rows) == ["a/1.dcm", "a/2.dcm", "c.dcm", "d.png"]
    assert [row["series"] for row in rows.values()] == ["1.2.3", "1.2.4", "", ""]
    assert [row["images"] for row in rows.values()] == ["2", "1", "1", "1"]
    mean = (alone["a/1.dcm"] + alone["b/IM0001"]) / 2
    assert not np.allclose(alone["a/1.dcm"], alone["b/IM0001"], atol=5e-3)
    np.testing.assert_allclose(numbers(rows["a/1.dcm"]), mean, atol=ROUNDING)
    best = CLASSES[int(mean.argmax())]
    assert rows["a/1.dcm"]["prediction"] == best
    careful = predicted(run, folder, "--series", "--abstain-below", str(mean.max() + 1e-2))
    assert careful[0]["prediction"] == ""


def test_frames_of_one_file_are_its_slices(run: Path, tmp_path: Path) -> None:
    window = {"WindowCenter": 2000, "WindowWidth": 4000}
    save(frames_of(noise(0), noise(1), **window), tmp_path / "many" / "x.dcm")
    for number in (0, 1):
        save(make(noise(number), **window), tmp_path / "single" / f"{number}.dcm")
    (row,) = predicted(run, tmp_path / "many")
    alone = [numbers(one) for one in predicted(run, tmp_path / "single")]
    np.testing.assert_allclose(numbers(row), np.mean(alone, axis=0), atol=ROUNDING)


def test_a_frame_is_shown_by_its_own_window() -> None:
    def group(server: int) -> Dataset:
        values, one = Dataset(), Dataset()
        values.WindowCenter, values.WindowWidth = server, 100
        one.FrameVOILUTSequence = pydicom.Sequence([values])
        return one

    rescale, shared = Dataset(), Dataset()
    rescale.RescaleSlope, rescale.RescaleIntercept, rescale.RescaleType = 1, -1000, "HU"
    shared.PixelValueTransformationSequence = pydicom.Sequence([rescale])
    pixels = np.array([[900, 1000, 1100]], np.int16)
    dataset = frames_of(pixels, pixels, VOILUTFunction="LINEAR_EXACT")
    dataset.SharedFunctionalGroupsSequence = pydicom.Sequence([shared])
    dataset.PerFrameFunctionalGroupsSequence = pydicom.Sequence([group(0), group(100)])
    slices = DicomFile(key="x", series="", frames=2, dataset=dataset)
    assert np.asarray(slices.image(0))[0, :, 0].tolist() == [0, 128, 255]
    assert np.asarray(slices.image(1))[0, :, 0].tolist() == [0, 0, 128]


def test_unreadable_files_are_named_and_the_rest_is_predicted(run: Path, folder: Path) -> None:
    whole = predicted(run, folder, "--series")
    (folder / "a" / "broken.dcm").write_bytes((folder / "a" / "1.dcm").read_bytes()[:700])
    short = frames_of(noise(0), noise(1), SeriesInstanceUID="1.2.3")
    short.PixelData = short.PixelData[:-100]
    save(short, folder / "a" / "short.dcm")
    odd = make(noise(0), SeriesInstanceUID="1.2.3", NumberOfFrames=-2)
    save(odd, folder / "a" / "odd.dcm")
    out = folder.parent / "out.csv"
    done = CliRunner().invoke(main, ["predict", str(run), str(folder), "--out", str(out), "--series"])
    assert done.exit_code == 4
    for name in ("broken", "short", "odd"):
        assert f"Could not read a/{name}.dcm" in done.output
    assert list(csv.DictReader(out.open())) == whole


def test_without_pydicom_the_extra_is_named(run: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydicom", None)
    done = CliRunner().invoke(main, ["predict", str(run), str(folder), "--out", str(folder / "x.csv")])
    assert done.exit_code == 3 and "pip install fedsigma[dicom]" in done.output


def test_only_pictures_and_dicom_are_listed(folder: Path, tmp_path: Path) -> None:
    (folder / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM")
    (folder / ".hidden.dcm").write_bytes(b"x")
    assert list_images(folder) == ["a/1.dcm", "a/2.dcm", "b/IM0001", "c.dcm", "d.png"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelLoadError, match="expected DICOM files, or files ending in"):
        list_images(tmp_path / "empty")


def test_a_version_of_the_registry_is_found_by_its_name(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedsigma.common.registry import Manifest, ModelRegistry

    monkeypatch.setenv("FEDSIGMA_MODELS", str(tmp_path / "models"))
    draft = Manifest(
        name="cells",
        version=0,
        created="",
        origin="trained",
        backbone="starter",
        weights="",
        layout="",
        study="",
        classes=CLASSES,
        rounds=2,
    )
    content = (run / "sigma.safetensors").read_bytes()
    version = ModelRegistry(tmp_path / "models").add(draft, {"sigma.safetensors": content})
    assert resolve_model_path(Path("cells@1")) == version.path
    assert resolve_model_path(run) == run and resolve_model_path(Path("a@b/c")) == Path("a@b/c")
    done = CliRunner().invoke(main, ["predict", "cells@2", ".", "--out", str(tmp_path / "x.csv")])
    assert done.exit_code == 3 and "has no version '2'" in done.output
