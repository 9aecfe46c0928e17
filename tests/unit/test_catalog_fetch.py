"""Fetching a published set from a local web server: resumed, checked, unpacked, or refused whole."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import stat
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from fedsigma.cli.main import main
from fedsigma.common.data.catalog import download as downloading
from fedsigma.common.data.catalog import extract
from fedsigma.common.data.catalog.card import Archive, CardError, card, cards
from fedsigma.common.data.catalog.download import DownloadError, download
from fedsigma.common.data.catalog.extract import ArchiveError, ExtractionLimits, extract_archive
from fedsigma.common.data.catalog.fetch import RECORD, DigestError, fetch_archive, read_record

runner = CliRunner()


class Shelf:
    """What the web server has, how it behaves, and what it was asked for."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.cut = 0  # break the connection after so many bytes of a body
        self.tags = True
        self.ranges: list[str | None] = []
        self.url = ""

    def put(self, name: str, content: bytes) -> Archive:
        self.files[f"/{name}"] = content
        return Archive(url=f"{self.url}/{name}")


@pytest.fixture
def shelf(monkeypatch: pytest.MonkeyPatch) -> Iterator[Shelf]:
    found = Shelf()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = found.files.get(self.path.partition("?")[0])
            wanted = self.headers.get("Range")
            found.ranges.append(wanted)
            if content is None:
                self.send_error(404)
                return
            tag = f'"{hashlib.sha256(content).hexdigest()[:12]}"'
            start = 0
            if wanted and self.headers.get("If-Range", "") in ("", tag):
                start = int(wanted.removeprefix("bytes=").removesuffix("-"))
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            else:
                self.send_response(200)
            if found.tags:
                self.send_header("ETag", tag)
            body = content[start:]
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: found.cut] if found.cut else body)

        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.url = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield found
    server.shutdown()
    server.server_close()


def zipped(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return stream.getvalue()


def tarred(files: dict[str, bytes], *others: tarfile.TarInfo) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for member in others:
            archive.addfile(member)
    return stream.getvalue()


def everything(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


NOISE = b"".join(hashlib.sha256(bytes([i % 251, i // 251])).digest() for i in range(20_000))


# --- downloading --------------------------------------------------------------------------------------


def test_interrupted_download_is_resumed(shelf: Shelf, tmp_path: Path) -> None:
    one = shelf.put("a.bin", NOISE)
    target = tmp_path / "a.bin"
    shelf.cut = 200_000
    seen: list[tuple[int, int]] = []
    with pytest.raises(DownloadError, match="run it again to resume"):
        download(one.url, target, progress=lambda *now: seen.append(now))
    assert not target.exists() and seen[-1] == (200_000, len(NOISE))
    shelf.cut = 0
    download(one.url, target, size=len(NOISE), progress=lambda *now: seen.append(now))
    assert target.read_bytes() == NOISE
    assert shelf.ranges == [None, "bytes=200000-"]
    assert seen[-1] == (len(NOISE), len(NOISE))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin"]


@pytest.mark.parametrize("tags", [True, False])
def test_two_versions_of_a_file_are_never_joined(shelf: Shelf, tmp_path: Path, tags: bool) -> None:
    shelf.tags = tags
    one = shelf.put("a.bin", NOISE)
    shelf.cut = 1000
    with pytest.raises(DownloadError):
        download(one.url, tmp_path / "a.bin")
    shelf.cut = 0
    shelf.put("a.bin", NOISE[::-1])
    download(one.url, tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == NOISE[::-1]


def test_unavailable_backbones(shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = shelf.put("a.bin", b"abc")
    with pytest.raises(DownloadError, match=r"404 Not Found: try again, or see the set's page"):
        download(f"{shelf.url}/none", tmp_path / "x")
    with pytest.raises(DownloadError, match="has 3 bytes, expected 4: the file was changed"):
        download(one.url, tmp_path / "x", size=4)
    with pytest.raises(DownloadError, match="was not reached"):
        download("http://127.0.0.1:9/a", tmp_path / "x")
    monkeypatch.setattr(downloading, "_SPARE", 2**62)
    with pytest.raises(DownloadError, match="has room for 0"):
        download(one.url, tmp_path / "x")
    assert everything(tmp_path) == {}


# --- fetching -----------------------------------------------------------------------------------------


def test_fetch_checks_and_unpacks(shelf: Shelf, tmp_path: Path) -> None:
    content = zipped({"top/images/a.png": b"1", "top/list.txt": b"2", "other/b": b"3"})
    plain = shelf.put("set.zip", content)
    sha, md5 = hashlib.sha256(content).hexdigest(), hashlib.md5(content).hexdigest()
    one = replace(plain, sha256=sha, md5=md5, stated_by="its authors", size=len(content), take="top")
    came = fetch_archive(one, tmp_path / "set")
    assert came.checked_by == "its authors" and came.content == ("images", "list.txt") and came.sha256 == sha
    files = everything(tmp_path / "set")
    assert json.loads(files.pop(RECORD))["set.zip"]["url"] == one.url
    assert files == {"images/a.png": b"1", "list.txt": b"2"}
    # What is there is not asked for again.
    shelf.files.clear()
    assert fetch_archive(one, tmp_path / "set") == came
    assert len(shelf.ranges) == 1


@pytest.mark.parametrize("kind", ["sha256", "md5"])
def test_a_changed_file_is_removed(shelf: Shelf, tmp_path: Path, kind: str) -> None:
    content = zipped({"a.png": b"1"})
    digest = hashlib.new(kind, content + b"x").hexdigest()
    one = replace(shelf.put("set.zip", content), **{kind: digest}, stated_by="its authors")
    with pytest.raises(DigestError, match=f"came with {kind} .* its authors states {digest}: it was removed"):
        fetch_archive(one, tmp_path)
    assert everything(tmp_path) == {}


def test_without_a_checksum_the_first_download_counts(shelf: Shelf, tmp_path: Path) -> None:
    one = shelf.put("labels.mat", b"first")
    one = replace(one, unpack=False)
    came = fetch_archive(one, tmp_path)
    assert came.checked_by == "" and came.sha256 == hashlib.sha256(b"first").hexdigest()
    assert (tmp_path / "labels.mat").read_bytes() == b"first"
    # What was taken away is fetched anew, and must be what it was.
    (tmp_path / "labels.mat").unlink()
    shelf.put("labels.mat", b"second")
    with pytest.raises(DigestError, match=r"fetched.json \(of the first download; without it any will do\)"):
        fetch_archive(one, tmp_path)
    assert not (tmp_path / "labels.mat").exists()
    shelf.put("labels.mat", b"first")
    assert fetch_archive(one, tmp_path) == came
    (tmp_path / RECORD).unlink()
    (tmp_path / "labels.mat").write_bytes(b"mine")
    with pytest.raises(CardError, match=r"labels\.mat exists already: move it away"):
        fetch_archive(one, tmp_path)
    assert (tmp_path / "labels.mat").read_bytes() == b"mine"
    (tmp_path / RECORD).write_text("{")
    with pytest.raises(CardError, match=r"fetched.json is damaged"):
        read_record(tmp_path)


def test_download_survives_a_failed_extraction(shelf: Shelf, tmp_path: Path) -> None:
    one = shelf.put("set.zip", zipped({"images/a.png": b"1"}))
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "mine.png").write_bytes(b"2")
    with pytest.raises(ArchiveError, match=r"images exists already.*move it away"):
        fetch_archive(one, tmp_path)
    assert (tmp_path / "images" / "mine.png").read_bytes() == b"2"
    (tmp_path / "images").rename(tmp_path / "old")
    assert fetch_archive(one, tmp_path).content == ("images",)
    assert (tmp_path / "images" / "a.png").read_bytes() == b"1"
    assert len(shelf.ranges) == 1


def test_download_survives_a_full_disk(shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    one = shelf.put("set.zip", zipped({"images/a.png": b"1"}))
    with monkeypatch.context() as changed, pytest.raises(ArchiveError, match="No space left"):
        changed.setattr(extract, "_copy", full)
        fetch_archive(one, tmp_path)
    assert fetch_archive(one, tmp_path).content == ("images",) and len(shelf.ranges) == 1


def test_html_page_instead_of_an_archive_leaves_nothing_behind(shelf: Shelf, tmp_path: Path) -> None:
    one = shelf.put("set.zip", b"<html>Please log in</html>")
    with pytest.raises(ArchiveError, match="not a zip or tar archive"):
        fetch_archive(one, tmp_path)
    assert everything(tmp_path) == {}
    shelf.put("set.zip", zipped({"images/a.png": b"1"}))
    assert fetch_archive(one, tmp_path).content == ("images",)


# --- unpacking ----------------------------------------------------------------------------------------


def link(kind: bytes) -> tarfile.TarInfo:
    member = tarfile.TarInfo("images/link")
    member.type, member.linkname = kind, "/etc/passwd"
    return member


def zip_link() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        member = zipfile.ZipInfo("link")
        member.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(member, "/etc/passwd")
    return stream.getvalue()


def encrypted() -> bytes:
    content = bytearray(zipped({"a": b"1"}))
    central = content.rindex(b"PK\x01\x02")
    content[central + 8] |= 1
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (zipped({"a.png": b"1", "../b.png": b"2"}), "refused: the path '../b.png'"),
        (zipped({"a.png": b"1", "/tmp/b.png": b"2"}), "refused: the path '/tmp/b.png'"),
        (zipped({"a.png": b"1", "x\\..\\..\\b": b"2"}), "refused: the path"),
        (tarred({"a.png": b"1", "x/../../b.png": b"2"}), "refused: the path"),
        (tarred({"a.png": b"1"}, link(tarfile.SYMTYPE)), "is a link or no plain file"),
        (tarred({"a.png": b"1"}, link(tarfile.LNKTYPE)), "is a link or no plain file"),
        (tarred({"a.png": b"1"}, link(tarfile.CHRTYPE)), "is a link or no plain file"),
        (tarred({"a.png": b"1"}, link(tarfile.FIFOTYPE)), "is a link or no plain file"),
        (zip_link(), "is a link or no plain file"),
        (encrypted(), "is encrypted"),
        (zipped({"a.png": b"1", "./a.png": b"2"}), "cannot be unpacked"),
        (zipped({"a": b"1", "a/b": b"2"}), "cannot be unpacked"),
        (zipped({"a": b"1" * 9000})[:-30], "is not a zip or tar archive|cannot be unpacked"),
        (tarred({"a": NOISE})[:9000], "cannot be unpacked"),
        (b"neither", "is not a zip or tar archive"),
        (zipped({}), "holds no file"),
    ],
    ids=range(16),  # archives have the time in them, and each process of the tests makes its own
)
def test_an_unsafe_archive_leaves_nothing(content: bytes, says: str, tmp_path: Path) -> None:
    archive = tmp_path / "set"
    archive.write_bytes(content)
    (tmp_path / "to").mkdir()
    with pytest.raises(ArchiveError, match=says):
        extract_archive(archive, tmp_path / "to")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["set", "to"]


def test_an_archive_that_swells_is_refused(tmp_path: Path) -> None:
    for name, content in (("a.zip", zipped({"a": bytes(2**24)})), ("a.tar", tarred({"a": bytes(2**24)}))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ArchiveError, match="far more than its own size"):
            extract_archive(tmp_path / name, tmp_path / "to", limits=ExtractionLimits(size=2**23))
        with pytest.raises(ArchiveError, match="more than 0 files"):
            extract_archive(tmp_path / name, tmp_path / "to", limits=ExtractionLimits(size=2**30, files=0))
    assert ExtractionLimits.of(tmp_path / "a.zip").size == 20 * (tmp_path / "a.zip").stat().st_size + 2**26


def test_an_archive_in_an_archive(tmp_path: Path) -> None:
    inner = tarred({"101/cat/1.jpg": b"1", "101/._x": b"0", "__MACOSX/y": b"0"})
    (tmp_path / "a.zip").write_bytes(
        zipped({"set/i.tar.gz": inner, "set/n.txt": b"2", "set/.DS_Store": b"0"})
    )
    extract_archive(tmp_path / "a.zip", tmp_path / "to", take="set", inner="i.tar.gz")
    assert everything(tmp_path / "to") == {"101/cat/1.jpg": b"1", "n.txt": b"2"}
    with pytest.raises(ArchiveError, match=r"has no j\.tar\.gz in it"):
        extract_archive(tmp_path / "a.zip", tmp_path / "to2", take="set", inner="j.tar.gz")
    with pytest.raises(ArchiveError, match="holds no file in none/"):
        extract_archive(tmp_path / "a.zip", tmp_path / "to3", take="none")


PARTS = st.lists(st.sampled_from(["..", ".", "a", "b", "/", "~", "\\", "c d"]), min_size=1, max_size=4)


@given(st.lists(PARTS.map("/".join), min_size=1, max_size=5), st.booleans())
def test_nothing_is_written_outside(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], as_tar: bool
) -> None:
    top = tmp_path_factory.mktemp("outside")
    (top / "set").write_bytes((tarred if as_tar else zipped)(dict.fromkeys(names, b"1")))
    try:
        extract_archive(top / "set", top / "deep" / "to")
    except ArchiveError:
        assert [p.name for p in top.rglob("*") if p.is_file()] == ["set"]
        return
    found = {name for name in everything(top) if name != "set"}
    assert found and all(name.startswith("deep/to/") for name in found)


# --- the command --------------------------------------------------------------------------------------


def test_the_command_asks_first(shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = shelf.put("DTD.zip", zipped({"images/a.jpg": b"1"}))
    monkeypatch.setitem(cards(), "dtd", replace(card("dtd"), archives=(one,)))
    folder = tmp_path / "dtd"
    result = runner.invoke(main, ["data", "fetch", "dtd", str(folder)], input="n\n")
    assert result.exit_code == 3 and not shelf.ranges and not folder.exists()
    assert "no published checksum" in result.stdout and "Licence: for research" in result.stdout
    assert "give --yes once the licence is read" in " ".join(result.stderr.split())
    assert runner.invoke(main, ["data", "fetch", "dtd", str(folder)]).exit_code == 3  # nobody answers
    (tmp_path / "file").write_text("")
    result = runner.invoke(main, ["data", "fetch", "dtd", str(tmp_path / "file"), "--yes"])
    assert result.exit_code == 3 and "is a file, and a set needs a folder" in " ".join(result.stderr.split())
    result = runner.invoke(main, ["data", "fetch", "dtd", str(folder), "--yes"])
    assert result.exit_code == 0, result.stderr
    said = " ".join(result.stdout.split())
    assert "no checksum to verify" in said and read_record(folder)["DTD.zip"].sha256 in said
    assert "by hand: split_zhou_DescribableTextures.json" in said
    assert (folder / "images" / "a.jpg").read_bytes() == b"1"
    shelf.files.clear()
    monkeypatch.setitem(
        cards(), "dtd", replace(card("dtd"), archives=(replace(one, sha256="0" * 64, stated_by="x"),))
    )
    result = runner.invoke(main, ["data", "fetch", "dtd", str(tmp_path / "again"), "--yes"])
    assert result.exit_code == 3 and "404" in result.stderr
    result = runner.invoke(main, ["data", "fetch", "ucf101", str(folder), "--yes"])
    assert result.exit_code == 3 and "no archive that can be fetched" in " ".join(result.stderr.split())
