"""The card of one published data set, and the table of those that come with FedSigma."""

from __future__ import annotations

import os
import re
from dataclasses import field
from functools import lru_cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import ClassVar
from urllib.parse import urlsplit

from fedsigma.common.config.fields import ListOf
from fedsigma.common.config.schema import (
    ConfigError,
    build,
    check_choice,
    check_number,
    check_printable,
    did_you_mean,
    read_yaml,
    settings,
)

__all__ = [
    "FROM_DISK",
    "Archive",
    "CardError",
    "DatasetCard",
    "Images",
    "Layout",
    "Protocol",
    "Protocols",
    "card",
    "card_text",
    "cards",
    "prompt_of",
    "same_name",
]

FROM_DISK = "from_split"
"""In place of class names: they are in the set's own files."""
DOMAINS = ("biomedical", "natural", "shift")
LAYOUTS = ("split", "lists", "imagenet", "wordnet", "numbered")


class CardError(ConfigError):
    """There is no such data set, or it cannot be had or used as asked."""


@settings
class Protocol:
    """How CLIP-SVD was trained on this set in one protocol, as its published configuration says.

    Lengths: iterations_per_shot times the number of shots where it is given, else epochs. Common to all:
    ViT-B/16, batches of 32, AdamW (0.9, 0.999), a cosine schedule to 1e-6, all layers and parts of both
    towers.
    """

    section: ClassVar[str] = "protocols"

    learning_rate: float
    weight_decay: float
    epochs: int
    iterations_per_shot: int | None = None

    def __post_init__(self) -> None:
        check_number("learning_rate", self.learning_rate, low=1e-9, high=10)
        check_number("weight_decay", self.weight_decay, low=0, high=100)
        check_number("epochs", self.epochs, low=1, high=10_000)
        if self.iterations_per_shot is not None:
            check_number("iterations_per_shot", self.iterations_per_shot, low=1, high=1_000_000)


@settings
class Protocols:
    """The published configurations of this set, by protocol; None where there is none."""

    section: ClassVar[str] = "protocols"

    few_shot: Protocol | None = None
    base_to_novel: Protocol | None = None
    cross_dataset: Protocol | None = None
    domain_generalization: Protocol | None = None

    def of(self, name: str) -> Protocol | None:
        """The configuration of the protocol of this name."""
        found: Protocol | None = getattr(self, name)
        return found


@settings
class Images:
    """Number of images in each part of the official split; 0 where the set has no such part."""

    section: ClassVar[str] = "images"

    train: int = 0
    val: int = 0
    test: int = 0

    def __post_init__(self) -> None:
        for name in ("train", "val", "test"):
            check_number(f"images.{name}", getattr(self, name), low=0)


@settings
class Layout:
    """What a folder of this set holds.

    Fields: kind, how it is read: `split` by a file of the CoOp form, `lists` by FGVC-Aircraft's text files,
    `imagenet` by train and val folders named by WordNet ids, `wordnet` by one level of such folders,
    `numbered` by folders 0, 1, 2, ... in the order of those ids; folder, how the field calls the folder;
    images, the folder below it that paths start from ('' for the folder itself); split, the split file.
    """

    section: ClassVar[str] = "layout"

    kind: str
    folder: str
    images: str = ""
    split: str = ""

    def __post_init__(self) -> None:
        check_choice("layout.kind", self.kind, LAYOUTS)
        if (self.kind == "split") != bool(self.split):
            raise CardError(
                f"layout.split is '{self.split}', expected a name if the kind is split, else none"
            )


@settings
class Archive:
    """A public file of a set and its checksum, if somebody states one.

    Fields: url; sha256 or md5, in hexadecimal, and stated_by, who states it (both empty: nobody is known to);
    size in bytes, 0 if not known; take, the folder in the archive whose content is wanted ('' for all);
    inner, an archive in the archive that is unpacked in its place; unpack, false for a file to keep as it is.
    """

    section: ClassVar[str] = "archives"

    url: str
    sha256: str = ""
    md5: str = ""
    stated_by: str = ""
    size: int = 0
    take: str = ""
    inner: str = ""
    unpack: bool = True

    def __post_init__(self) -> None:
        if urlsplit(self.url).scheme not in ("http", "https") or not self.name:
            raise CardError(f"archives.url is '{self.url}', expected http(s)://HOST/.../FILE")
        for name, length in (("sha256", 64), ("md5", 32)):
            if not re.fullmatch(rf"[0-9a-f]{{{length}}}|", getattr(self, name)):
                raise CardError(
                    f"archives.{name} is '{getattr(self, name)}', expected {length} digits 0-9a-f"
                )
        if bool(self.sha256 or self.md5) != bool(self.stated_by):
            raise CardError(f"archives: {self.name} needs both a checksum and stated_by, or neither")

    @property
    def name(self) -> str:
        """The file's own name: the last part of the address."""
        return urlsplit(self.url).path.rpartition("/")[2]


@settings
class DatasetCard:
    """One published data set.

    Fields: name, by which commands call it; title, as papers write it; domain, one of DOMAINS; backbone, of
    the paper's study; classes, the names that go into prompts, or FROM_DISK; class_count; template; page,
    where to get it; licence, as its publisher states it, or 'unknown'; layout; images, the sizes of the
    parts; first_path, the first of the split file's training part, '' if not known; protocols; archives,
    which `fedsigma data fetch` gets; by_hand, what is to be put into the folder by hand; note.
    """

    section: ClassVar[str] = ""

    name: str
    title: str
    domain: str
    backbone: str
    classes: str | ListOf[str]
    class_count: int
    template: str
    page: str
    licence: str
    layout: Layout
    images: Images
    first_path: str = ""
    protocols: Protocols = field(default_factory=Protocols)
    archives: ListOf[Archive] = ()
    by_hand: ListOf[str] = ()
    note: str = ""

    def __post_init__(self) -> None:
        for key in ("name", "title", "backbone", "template", "page", "licence"):
            check_printable(key, getattr(self, key))
        check_choice("domain", self.domain, DOMAINS)
        check_number("class_count", self.class_count, low=2)
        if self.template.count("{}") != 1:
            raise CardError(f"template is '{self.template}', expected one {{}} where the class name goes")
        if isinstance(self.classes, str):
            check_choice("classes", self.classes, (FROM_DISK,))
        elif len({same_name(name) for name in self.classes}) != self.class_count:
            raise CardError(
                f"classes has {len(self.classes)} names, expected {self.class_count} different ones"
            )

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names as prompts that the card has; empty where they are read from the set's own files."""
        return () if isinstance(self.classes, str) else self.classes


def prompt_of(name: str) -> str:
    """A class name as it goes into a prompt: a split file's underscores become spaces."""
    return " ".join(name.replace("_", " ").split())


def same_name(name: str) -> str:
    """What is left of a name of a class or folder where case, blanks, '_' and '-' do not count."""
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


def cards() -> dict[str, DatasetCard]:
    """The cards that come with FedSigma and those of the folder $FEDSIGMA_CARDS, by name.

    They are sorted by domain and name.

    Raises:
        ConfigError: a card does not read, or two have one name.
    """
    return _read_all(os.environ.get("FEDSIGMA_CARDS", ""))[0]


@lru_cache(maxsize=2)
def _read_all(own: str) -> tuple[dict[str, DatasetCard], dict[str, str]]:
    """Cards, and their YAML, by name. own: a folder of further cards, or ''."""
    found: dict[str, DatasetCard] = {}
    texts: dict[str, str] = {}
    for item in _files(own):
        text, where = item.read_text("utf-8"), f"card '{item.name.removesuffix('.yaml')}'"
        read = build(DatasetCard, read_yaml(text, where=where), where=where)
        if item.name != f"{read.name}.yaml":
            raise CardError(f"{where}: name is '{read.name}', expected that of its file")
        if read.name in found:
            raise CardError(f"{where} of {own}: FedSigma has a card of this name, choose another")
        found[read.name], texts[read.name] = read, text
    order = sorted(found, key=lambda name: (DOMAINS.index(found[name].domain), name))
    return {name: found[name] for name in order}, texts


def _files(own: str) -> list[Traversable]:
    folders: list[Traversable] = [files("fedsigma.configs") / "datasets"]
    if own:
        folders.append(Path(own).expanduser())
        if not folders[-1].is_dir():
            raise CardError(f"$FEDSIGMA_CARDS is '{own}', which is no folder")
    return [item for folder in folders for item in folder.iterdir() if item.name.endswith(".yaml")]


def card(name: str) -> DatasetCard:
    """The card of a data set.

    Raises:
        CardError: there is none; the nearest name is named.
    """
    known = cards()
    if name not in known:
        raise CardError(f"there is no card '{name}'{did_you_mean(name.lower(), known)}")
    return known[name]


def card_text(name: str) -> str:
    """The YAML of a card.

    Raises:
        CardError: as `card`.
    """
    return _read_all(os.environ.get("FEDSIGMA_CARDS", ""))[1][card(name).name]
