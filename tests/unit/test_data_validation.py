"""The check names every problem in one report, and keeps what can be used."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from fedsigma.common.data.records import DataError, PictureSource, Record
from fedsigma.common.data.sources.registry import open_source
from fedsigma.common.data.validation import KINDS, ValidationReport, check_source


def site(folder: Path) -> Path:
    """Write a manifest with one problem of nearly every kind."""
    for number in range(12):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(folder / f"{number}.png")
    (folder / "torn.png").write_bytes((folder / "0.png").read_bytes()[:40])
    Image.new("RGB", (4, 4), (1, 0, 0)).save(folder / "copy.png")
    rows = [
        "path,label,split,group",
        "0.png,cat,train,p0",
        "1.png,cat,test,p1",
        "2.png,dog,train,p2",
        "3.png,dog,test,p2",
        "4.png,Cat,train,p4",
        "5.png,,train,p5",
        "torn.png,cat,train,",
        "gone.png,dog,train,",
        "6.png,dog,train,p6",
        "6.png,dog,train,p6",
        "7.png,dog,later,",
        ",dog,train,",
        "8.png,dog,train,p8,more",
        "copy.png,cat,train,p9",
    ]
    (folder / "m.csv").write_text("\n".join(rows))
    return folder / "m.csv"


def test_one_report_names_everything(tmp_path: Path) -> None:
    source = open_source(f"csv:{site(tmp_path)}")
    seen: list[tuple[int, int]] = []
    report = check_source(source, classes=["cat", "dog", "bird"], progress=lambda i, n: seen.append((i, n)))
    assert not report.ok
    assert report.counts() == {
        "unreadable row": 1,
        "missing file": 2,
        "corrupt picture": 1,
        "unknown label": 2,
        "unknown split": 1,
        "listed twice": 1,
        "identical pictures": 1,
        "group in two splits": 1,
        "empty class": 1,
    }
    assert {r.key for r in report.usable} == {"0.png", "1.png", "3.png", "6.png"}
    assert seen[-1] == (8, 8) and report.total == 14
    text = report.to_text()
    for name in ("torn.png", "gone.png", "did you mean 'cat'?", "has no label", "p2", "bird", "row 12"):
        assert name in text, name
    assert "4 of 14 records can be used; 11 problems found." in text
    assert not any(str(tmp_path) in str(problem) for problem in report.problems)


def test_counts_name_no_file_or_patient(tmp_path: Path) -> None:
    counts = check_source(open_source(f"csv:{site(tmp_path)}"), classes=["cat", "dog"]).counts()
    assert set(counts) <= set(KINDS)


def test_policy(tmp_path: Path) -> None:
    report = check_source(open_source(f"csv:{site(tmp_path)}"), classes=["cat", "dog"])
    assert {r.key for r in report.require_usable("skip")} == {"0.png", "1.png", "3.png", "6.png"}
    with pytest.raises(DataError, match=r"(?s)on_problem: skip.*torn\.png"):
        report.require_usable("stop")
    with pytest.raises(DataError, match="on_problem is 'ignore'"):
        report.require_usable("ignore")
    empty = ValidationReport((), (), 0, ("cat",))
    with pytest.raises(DataError, match="no picture can be used"):
        empty.require_usable("skip")


def blank(records: list[Record]) -> PictureSource:
    shades = {record.key: number for number, record in enumerate(records)}
    return PictureSource(records, lambda key: Image.new("L", (3, 3), shades[key]))


def test_valid_source_passes() -> None:
    records = [Record(key=f"{c}{s}", label=c, split=s) for c in "ab" for s in ("train", "test")]
    report = check_source(blank(records), classes=["a", "b"])
    assert report.ok and report.usable == tuple(records) and report.require_usable("stop") == records
    assert "no problems found" in report.to_text()
    assert check_source(blank(records)).classes == ("a", "b")


def test_empty_parts() -> None:
    only = [Record(key=str(i), label="a", split="train") for i in range(3)]
    assert [p.where for p in check_source(blank(only), classes=["a"]).problems] == ["test"]
    one = [Record(key=str(i), label="a", group="p") for i in range(3)]
    assert check_source(blank(one), classes=["a"]).counts() == {"empty split": 1}
    late = [Record(key="0", label="a", split="train"), Record(key="1", label="b", split="test")]
    assert [str(p) for p in check_source(blank(late), classes=["a", "b"]).problems] == [
        "empty class: b: has no picture to train on"
    ]


def test_identical_pictures_with_two_labels_are_left_out() -> None:
    records = [Record(key="0", label="a"), Record(key="1", label="b"), Record(key="2", label="a")]
    source = PictureSource(records, lambda key: Image.new("L", (2, 2), 9 if key in "01" else 1))
    report = check_source(source, classes=["a", "b"])
    assert [r.key for r in report.usable] == ["2"]
    assert report.counts() == {"identical pictures": 1, "empty class": 1}


def test_long_lists_are_cut() -> None:
    records = [Record(key=f"[red]{i}", label="x") for i in range(40)] + [Record(key="k", label="a")]
    report = check_source(blank(records), classes=["a"])
    text = report.to_text(rows=3)
    assert text.count("expected one of a") == 3 and "... and 37 more" in text and "unknown label (40)" in text
    assert "[red]0: label is 'x'" in text


def test_without_decoding() -> None:
    source = PictureSource([Record(key="k", label="a")], lambda _: pytest.fail("decoded"))
    assert check_source(source, classes=["a"], pictures=False).ok
