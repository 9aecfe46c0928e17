"""MedMNIST sets from files of the package's form, made here."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from fedsigma.cli.main import main
from fedsigma.common.data.records import DataError
from fedsigma.common.data.sampling import few_shot
from fedsigma.common.data.sources.medmnist import SIZES, medmnist_archive
from fedsigma.common.data.sources.registry import open_source
from tests.helpers.medmnist_files import npz

runner = CliRunner()


@pytest.mark.parametrize("size", SIZES)
def test_every_size(size: int, tmp_path: Path) -> None:
    npz(tmp_path, "octmnist", size, classes=4, colours=False)
    source = open_source(f"medmnist:octmnist:{size}", root=str(tmp_path))
    assert source.classes == ("choroidal neovascularization", "diabetic macular edema", "drusen", "normal")  # type: ignore[attr-defined]
    assert [sum(r.split == part for r in source.records) for part in ("train", "val", "test")] == [12, 6, 9]
    record = next(r for r in source.records if r.key == "test/000007")
    assert record.label == "normal"
    picture = source.image(record)
    assert picture.size == (size, size) and picture.mode == "RGB" and picture.getpixel((0, 0)) == (107,) * 3
    assert len(few_shot(source.records, shots=2, classes=["drusen"], seed=1)) == 2


def test_the_small_size_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".medmnist").mkdir()
    npz(tmp_path / ".medmnist", "bloodmnist", 28, classes=8)
    monkeypatch.setenv("HOME", str(tmp_path))
    source = open_source("medmnist:bloodmnist")
    assert source.image(source.records[3]).getpixel((5, 5)) == (3, 3, 3)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("medmnist", "write medmnist:NAME:SIZE"),
        ("medmnist:bloodmist", "no set 'bloodmist': did you mean 'bloodmnist'"),
        ("medmnist:chestmnist", "several labels a picture"),
        ("medmnist:organmnist3d", "has volumes"),
        ("medmnist:bloodmnist:32", "no pictures of 32 pixels: the sizes are 28, 64, 128, 224"),
        ("medmnist:bloodmnist:big", "'big', expected a whole number"),
        ("medmnist:bloodmnist:64", "run fedsigma data fetch medmnist:bloodmnist:64"),
    ],
)
def test_unreadable_sources(spec: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=says):
        open_source(spec, root=str(tmp_path))


def test_a_damaged_file(tmp_path: Path) -> None:
    def opened() -> None:
        source = open_source("medmnist:bloodmnist", root=str(tmp_path))
        source.image(source.records[0])

    for changes, says in (
        ({"val_labels": np.full((6, 1), 8, np.uint8)}, "val_labels are not one of 8 labels"),
        ({"val_labels": np.zeros((6, 2), np.uint8)}, "val_labels are not one of 8 labels"),
        ({"val_labels": np.array([{}])}, "val_labels cannot be read"),  # a pickle, which is not loaded
        ({"train_images": np.zeros((12, 28, 27), np.uint8)}, "train_images are uint8"),
        ({"train_images": np.zeros((12, 28, 28))}, "train_images are float64"),
    ):
        npz(tmp_path, "bloodmnist", 28, classes=8, **changes)
        with pytest.raises(DataError, match=says):
            opened()
    file = npz(tmp_path, "bloodmnist", 28, classes=8)
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(DataError, match="or damaged: train_labels cannot be read"):
        opened()


def test_its_archive_and_checksum_are_the_package_s(tmp_path: Path) -> None:
    one = medmnist_archive("octmnist", 64)
    assert one.name == "octmnist_64.npz" and one.md5 == "e229e9440236b774d9f0dfef9d07bdaf" and not one.unpack
    result = runner.invoke(main, ["data", "fetch", "medmnist:octmnist:64", str(tmp_path)], input="n\n")
    assert "octmnist_64.npz" in result.stdout and "checksum stated by the package medmnist" in result.stdout
    assert "Licence: CC BY 4.0. Page: https://medmnist.com/" in result.stdout
    result = runner.invoke(main, ["data", "fetch", "medmnist:octmnist:64:1", str(tmp_path)])
    assert result.exit_code == 3 and "write medmnist:NAME or" in " ".join(result.stderr.split())


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "medmnist", None)
    with pytest.raises(DataError, match=r"pip install 'fedsigma\[medmnist\]'"):
        open_source("medmnist:bloodmnist")
