"""Data sources: folder, CSV manifest, parquet; what they list, decode and refuse."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fedsigma.common.data.loading import load_examples
from fedsigma.common.data.records import DataError, MissingPicture, PictureError, Record, to_rgb
from fedsigma.common.data.sources.registry import known_sources, open_source, register_source


def picture(path: Path, colour: tuple[int, int, int] = (10, 20, 30), size: tuple[int, int] = (6, 4)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def encoded(colour: tuple[int, int, int]) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (5, 5), colour).save(stream, "PNG")
    return stream.getvalue()


def test_registry_refuses_unknown_and_duplicate() -> None:
    assert {"folder", "csv", "parquet", "dicom", "demo"} <= set(known_sources())
    with pytest.raises(DataError, match=r"'zip:x'.*coop, csv, demo, dicom, folder, medmnist, parquet"):
        open_source("zip:x")
    with pytest.raises(DataError, match="'csv' is registered already"):
        register_source("csv")(lambda: None)  # type: ignore[arg-type,return-value]


def test_spec_errors_name_value_and_next_step(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"needs a location: write csv:PATH"):
        open_source("csv")
    with pytest.raises(DataError, match=r"does not exist: searched .*none\.csv"):
        open_source("csv:none.csv", base=tmp_path)
    picture(tmp_path / "a" / "1.png")
    with pytest.raises(
        DataError, match=r"no option 'colour': known are group_by_folder, half, labels, parts"
    ):
        open_source("folder:.", base=tmp_path, colour=1)
    with pytest.raises(DataError, match="expected options such as demo:seed=1"):
        open_source("demo:seed")
    with pytest.raises(DataError, match="no option 'sede'"):
        open_source("demo:sede=1")


def test_folder_by_class(tmp_path: Path) -> None:
    picture(tmp_path / "b" / "2.PNG", (1, 2, 3))
    picture(tmp_path / "a" / "1.jpg")
    picture(tmp_path / "a" / "patient7" / "x.png")
    picture(tmp_path / "a" / "._1.png")
    picture(tmp_path / "loose.png")
    (tmp_path / "a" / "notes.txt").write_text("no picture")
    source = open_source(f"folder:{tmp_path}")
    assert [(r.key, r.label, r.group, r.split) for r in source.records] == [
        ("a/1.jpg", "a", None, None),
        ("a/patient7/x.png", "a", "patient7", None),
        ("b/2.PNG", "b", None, None),
    ]
    assert [p.where for p in source.problems] == ["loose.png"]
    image = source.image(source.records[2])
    assert image.mode == "RGB" and image.getpixel((0, 0)) == (1, 2, 3)
    assert open_source(f"folder:{tmp_path}", group_by_folder=False).records[1].group is None


def test_folder_by_split(tmp_path: Path) -> None:
    picture(tmp_path / "train" / "a" / "1.png")
    picture(tmp_path / "Test" / "a" / "2.png")
    picture(tmp_path / "val" / "b" / "3.png")
    picture(tmp_path / "val" / "4.png")
    source = open_source(f"folder:{tmp_path}")
    assert {(r.label, r.split) for r in source.records} == {("a", "train"), ("a", "test"), ("b", "val")}
    assert [p.where for p in source.problems] == ["val/4.png"]


def test_folder_without_pictures(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(DataError, match="no pictures in class folders"):
        open_source(f"folder:{tmp_path}")


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_manifest(tmp_path: Path, delimiter: str, mark: str) -> None:
    picture(tmp_path / "pictures" / "1.png", (7, 8, 9))
    rows = [
        ["path", "label", "split", "group", "site"],
        ["pictures/1.png", "benign", "Training", "p1", "north"],
        ["pictures/2.png", "", "", "", ""],
        ["", "benign", "", "", ""],
        ["3.png", "benign", "maybe", "", ""],
        ["4.png", "benign", "", "", "", "more"],
    ]
    text = mark + "\n".join(delimiter.join(row) for row in rows)
    (tmp_path / "all.csv").write_text(text, encoding="utf-8")
    source = open_source("csv:all.csv", base=tmp_path)
    assert source.records == [
        Record(key="pictures/1.png", label="benign", split="train", group="p1", site="north"),
        Record(key="pictures/2.png"),
    ]
    assert [p.kind for p in source.problems] == ["missing file", "unknown split", "unreadable row"]
    assert "row 4" in source.problems[0].where
    assert source.image(source.records[0]).getpixel((0, 0)) == (7, 8, 9)
    with pytest.raises(MissingPicture, match=r"2\.png: no such file"):
        source.image(source.records[1])


def test_manifest_columns_and_labels(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("file,dx\n1.png,nv\n2.png,mel\n")
    with pytest.raises(DataError, match=r"lacks the column 'path', has file, dx"):
        open_source("csv:m.csv", base=tmp_path)
    names = {"path": "file", "label": "dx"}
    source = open_source("csv:m.csv", base=tmp_path, columns=names, labels={"nv": "naevus"})
    assert [r.label for r in source.records] == ["naevus", "mel"]
    with pytest.raises(DataError, match="names 'lesion': known are path, label"):
        open_source("csv:m.csv", base=tmp_path, columns={"lesion": "x"})
    (tmp_path / "latin.csv").write_bytes("path,label\n1.png,größe\n".encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        open_source("csv:latin.csv", base=tmp_path)


def write_parquet(path: Path, as_struct: bool, rows: int = 7, group_size: int = 3) -> None:
    pictures = [encoded((i, 0, 0)) for i in range(rows)]
    images = [{"bytes": p, "path": None} for p in pictures] if as_struct else pictures
    table = pa.table({"image": images, "label": [i % 2 for i in range(rows)], "site": ["n", "s"] * 3 + ["n"]})
    names = {"info": {"features": {"label": {"names": ["cat", "dog"]}}}}
    table = table.replace_schema_metadata({"huggingface": json.dumps(names)} if as_struct else {})
    pq.write_table(table, path, row_group_size=group_size)


@pytest.mark.parametrize("as_struct", [True, False])
def test_parquet(tmp_path: Path, as_struct: bool) -> None:
    write_parquet(tmp_path / "x.parquet", as_struct)
    for place in ("x.parquet", "."):
        source = open_source(f"parquet:{place}", base=tmp_path)
        assert [r.label for r in source.records[:2]] == (["cat", "dog"] if as_struct else ["0", "1"])
        assert [r.site for r in source.records[:2]] == ["n", "s"]
        for i in (6, 0, 3, 5):  # across row groups, in any order
            assert source.image(source.records[i]).getpixel((0, 0)) == (i, 0, 0)


def test_parquet_reads_no_picture_at_opening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "x.parquet", True)
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("a picture was decoded at opening"))
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda *_: pytest.fail("pictures were read"))
    assert len(open_source(f"parquet:{tmp_path}").records) == 7


def test_parquet_refusals(tmp_path: Path) -> None:
    (tmp_path / "bad.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(DataError, match="cannot be read as parquet"):
        open_source("parquet:bad.parquet", base=tmp_path)
    pq.write_table(pa.table({"image": ["a.png"], "label": ["x"]}), tmp_path / "text.parquet")
    with pytest.raises(DataError, match="holds string, expected bytes"):
        open_source("parquet:text.parquet", base=tmp_path)
    pq.write_table(pa.table({"picture": [b"1"]}), tmp_path / "no.parquet")
    with pytest.raises(DataError, match=r"no column 'image': it has picture"):
        open_source("parquet:no.parquet", base=tmp_path)
    picture(tmp_path / "beside.png", (3, 3, 3))
    cells = [
        {"bytes": None, "path": "beside.png"},
        {"bytes": b"", "path": None},
        {"bytes": b"junk", "path": None},
    ]
    pq.write_table(pa.table({"image": cells, "label": ["x"] * 3}), tmp_path / "path.parquet")
    source = open_source("parquet:path.parquet", base=tmp_path)
    assert source.image(source.records[0]).getpixel((0, 0)) == (3, 3, 3)
    with pytest.raises(MissingPicture):
        source.image(source.records[1])
    with pytest.raises(PictureError, match="not a picture"):
        source.image(source.records[2])


def test_any_mode_becomes_upright_rgb() -> None:
    deep = Image.fromarray(np.array([[1000, 3000], [2000, 1000]], np.uint16))
    assert np.asarray(to_rgb(deep))[..., 0].tolist() == [[0, 255], [128, 0]]
    flat = Image.fromarray(np.full((2, 2), 7, np.uint16))
    assert np.asarray(to_rgb(flat)).max() == 0
    clear = Image.new("RGBA", (1, 1), (255, 0, 0, 0))
    assert to_rgb(clear).getpixel((0, 0)) == (255, 255, 255)
    turned = Image.new("RGB", (4, 2))
    turned.getexif()[0x0112] = 6
    stream = io.BytesIO()
    turned.save(stream, "JPEG", exif=turned.getexif())
    assert to_rgb(Image.open(stream)).size == (2, 4)
    for mode in ("L", "P", "CMYK", "1", "LA", "YCbCr"):
        assert to_rgb(Image.new(mode, (2, 2))).mode == "RGB"


def test_truncated_picture_is_a_picture_error(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    file = tmp_path / "a" / "1.jpg"
    file.parent.mkdir()
    Image.fromarray(noise).save(file)
    file.write_bytes(file.read_bytes()[:500])
    source = open_source(f"folder:{tmp_path}")
    with pytest.raises(PictureError, match=r"a/1\.jpg"):
        source.image(source.records[0])


def test_load_examples(tmp_path: Path) -> None:
    picture(tmp_path / "b" / "large.png", (200, 0, 0), (80, 40))
    picture(tmp_path / "a" / "small.png", (0, 100, 0), (8, 5))
    source = open_source(f"folder:{tmp_path}")
    records = [source.records[1], source.records[0]]
    large, small = load_examples(source, records, ["b", "a"], side=20)
    assert (large.label, small.label) == (0, 1)
    assert large.image.shape == (3, 20, 40) and small.image.shape == (3, 5, 8)
    assert str(large.image.dtype) == "torch.uint8" and large.image.is_contiguous()
    assert large.image[:, 3, 3].tolist() == [200, 0, 0]
    with pytest.raises(DataError, match="label 'a' is none of b"):
        load_examples(source, records, ["b"], side=20)
