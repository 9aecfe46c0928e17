"""Small stand-ins for published data sets: folders and split files as their cards say, tiny pictures."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path, PurePosixPath

from PIL import Image

from fedsigma.common.data.catalog.card import DatasetCard, Images

PARTS = ("train", "val", "test")


def tiny_picture() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (3, 2), (9, 8, 7)).save(stream, "PNG")
    return stream.getvalue()


PICTURE = tiny_picture()


def stand_in(chosen: DatasetCard, folder: Path, *, train: int = 1) -> DatasetCard:
    """Write one picture of each class and part into a folder; return the card with the sizes of that.

    train: how many there are of each class for training, where the set has a split file.
    """
    root = folder / chosen.layout.images
    root.mkdir(parents=True, exist_ok=True)
    make = {
        "split": _split,
        "lists": _lists,
        "imagenet": _imagenet,
        "wordnet": _wordnet,
        "numbered": _numbered,
    }[chosen.layout.kind]
    make(chosen, folder, root)
    parts = {name: chosen.class_count for name in PARTS if getattr(chosen.images, name)}
    if chosen.layout.kind == "split" and train > 1:
        _more(chosen, folder, root, train)
        parts["train"] *= train
    return replace(chosen, images=Images(**parts))


def names_of(chosen: DatasetCard) -> list[str]:
    return list(chosen.class_names) or [f"kind_{number:03d}" for number in range(chosen.class_count)]


def write(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(PICTURE)


def _split(chosen: DatasetCard, folder: Path, root: Path) -> None:
    """Class names are written with underscores, as in the official files; the first path is the card's."""
    content: dict[str, list[tuple[str, int, str]]] = {part: [] for part in PARTS}
    suffix = PurePosixPath(chosen.first_path or "x.jpg").suffix
    for number, name in enumerate(names_of(chosen)):
        written = name.replace(" ", "_")
        for part in PARTS:
            content[part].append((f"{written}/{part} ({number}){suffix}", number, written))
    if chosen.first_path:
        _, number, written = content["train"][0]
        content["train"][0] = (chosen.first_path, number, written)
    for rows in content.values():
        for path, _, _ in rows:
            write(root / path)
    (folder / chosen.layout.split).write_text(json.dumps(content))


def _more(chosen: DatasetCard, folder: Path, root: Path, train: int) -> None:
    file = folder / chosen.layout.split
    content = json.loads(file.read_text())
    for path, number, written in list(content["train"]):
        for copy in range(1, train):
            further = PurePosixPath(path).with_stem(f"{PurePosixPath(path).stem} {copy}").as_posix()
            content["train"].append((further, number, written))
            write(root / further)
    file.write_text(json.dumps(content))


def _lists(chosen: DatasetCard, folder: Path, root: Path) -> None:
    names = [f"{name}/F-{number}" for number, name in enumerate(names_of(chosen))]
    (folder / "variants.txt").write_text("\n".join(names) + "\n")
    for place, part in enumerate(PARTS):
        ids = {f"{place}{number:06d}": name for number, name in enumerate(names)}
        for one in ids:
            write(root / f"{one}.jpg")
        lines = [f"{one} {name}" for one, name in ids.items()]
        (folder / f"images_variant_{part}.txt").write_text("\n".join(lines) + "\n")


def wordnet_ids(count: int = 1000) -> list[str]:
    return [f"n{1_440_764 + 7 * number:08d}" for number in range(count)]


def class_names_file(folder: Path) -> None:
    lines = [f"{one} word {number}" for number, one in enumerate(wordnet_ids())]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "classnames.txt").write_text("\n".join(lines) + "\n")


def _imagenet(chosen: DatasetCard, folder: Path, root: Path) -> None:
    class_names_file(folder)
    for one in wordnet_ids(chosen.class_count):
        write(root / "train" / one / f"{one}_1.JPEG")
        write(root / "val" / one / "ILSVRC2012_val_1.JPEG")


def _wordnet(chosen: DatasetCard, folder: Path, root: Path) -> None:
    class_names_file(folder)
    for one in wordnet_ids()[:: 1000 // chosen.class_count]:
        write(root / one / "a picture.jpg")
    (root / "README.txt").write_text("not a class")


def _numbered(chosen: DatasetCard, folder: Path, root: Path) -> None:
    class_names_file(folder)
    for number in range(chosen.class_count):
        write(root / str(number) / "0af3.jpeg")
