"""Cards of published data sets: those of FedSigma and those of the folder $FEDSIGMA_CARDS."""

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
"""Instead of class names: the names are in the files of the set."""
DOMAINS = ("biomedical", "natural", "shift")
LAYOUTS = ("split", "lists", "imagenet", "wordnet", "numbered")


class CardError(ConfigError):
    """A data set card is missing or invalid, or its files cannot be fetched."""


@settings
class Protocol:
    """Published configuration of CLIP-SVD on a set in one protocol.

    Common to all: ViT-B/16, batches of 32, AdamW (0.9, 0.999), a cosine schedule to 1e-6, all layers and
    parts of both towers.

    Attributes:
        learning_rate: Learning rate.
        weight_decay: Weight decay.
        epochs: Length of training, where iterations_per_shot is None.
        iterations_per_shot: Length of training divided by the number of shots.
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
    """Published configurations of a set; None where there is none.

    Attributes:
        few_shot: Few-shot classification.
        base_to_novel: Base to novel classes.
        cross_dataset: Transfer to other sets.
        domain_generalization: Transfer to other domains.
    """

    section: ClassVar[str] = "protocols"

    few_shot: Protocol | None = None
    base_to_novel: Protocol | None = None
    cross_dataset: Protocol | None = None
    domain_generalization: Protocol | None = None

    def of(self, name: str) -> Protocol | None:
        """Return the configuration of a protocol."""
        protocol: Protocol | None = getattr(self, name)
        return protocol


@settings
class Images:
    """Number of images in each part of the official split; 0 for a part that does not exist.

    Attributes:
        train: Training images.
        val: Validation images.
        test: Test images.
    """

    section: ClassVar[str] = "images"

    train: int = 0
    val: int = 0
    test: int = 0

    def __post_init__(self) -> None:
        for name in ("train", "val", "test"):
            check_number(f"images.{name}", getattr(self, name), low=0)


@settings
class Layout:
    """Layout of the folder of a set.

    Attributes:
        kind: `split` (a file in the CoOp format), `lists` (FGVC-Aircraft's text files), `imagenet` (train and
            val folders named by WordNet ids), `wordnet` (one level of such folders) or `numbered` (folders
            0, 1, 2, ... in the order of the ids).
        folder: Usual name of the folder.
        images: Folder below it that paths start from; empty for the folder itself.
        split: The split file, for the kind `split`.
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
    """A public file of a set.

    Attributes:
        url: Address of the file.
        sha256: SHA-256 checksum, hexadecimal; empty if not published.
        md5: MD5 checksum, hexadecimal; empty if not published.
        stated_by: Publisher of the checksum; empty without one.
        size: Size in bytes; 0 if unknown.
        take: Folder in the archive to extract; empty for all.
        inner: Archive inside the archive, which is extracted in its place.
        unpack: Whether to extract the file.
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
        """Name of the file: the last part of the address."""
        return urlsplit(self.url).path.rpartition("/")[2]


@settings
class DatasetCard:
    """Card of a published data set.

    Attributes:
        name: Name in commands.
        title: Name in papers.
        domain: One of DOMAINS.
        backbone: Backbone of the paper's study.
        classes: Class names for prompts, or FROM_DISK.
        class_count: Number of classes.
        template: Prompt template.
        page: Web page of the set.
        licence: Licence as published, or 'unknown'.
        layout: Layout of its folder.
        images: Sizes of the official split.
        first_path: First training path of the split file; empty if unknown.
        protocols: Published configurations.
        archives: Files that `fedsigma data fetch` downloads.
        by_hand: Files to download by hand.
        note: Remarks.
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
        """The class names on the card; empty if they are in the files of the set."""
        return () if isinstance(self.classes, str) else self.classes


def prompt_of(name: str) -> str:
    """Return a class name for a prompt: underscores become spaces."""
    return " ".join(name.replace("_", " ").split())


def same_name(name: str) -> str:
    """Normalize the name of a class or folder: case, blanks, '_' and '-' do not count."""
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


def cards() -> dict[str, DatasetCard]:
    """Return all cards by name, sorted by domain and name.

    Raises:
        ConfigError: A card is invalid, or two cards have the same name.
    """
    return _read_all(os.environ.get("FEDSIGMA_CARDS", ""))[0]


@lru_cache(maxsize=2)
def _read_all(folder: str) -> tuple[dict[str, DatasetCard], dict[str, str]]:
    """Read the cards and their YAML, by name, with those of a further folder if it is not empty."""
    by_name: dict[str, DatasetCard] = {}
    texts: dict[str, str] = {}
    for item in _card_files(folder):
        text, where = item.read_text("utf-8"), f"card '{item.name.removesuffix('.yaml')}'"
        loaded = build(DatasetCard, read_yaml(text, where=where), where=where)
        if item.name != f"{loaded.name}.yaml":
            raise CardError(f"{where}: name is '{loaded.name}', expected the name of its file")
        if loaded.name in by_name:
            raise CardError(f"{where} of {folder}: FedSigma has a card of this name, choose another")
        by_name[loaded.name], texts[loaded.name] = loaded, text
    order = sorted(by_name, key=lambda name: (DOMAINS.index(by_name[name].domain), name))
    return {name: by_name[name] for name in order}, texts


def _card_files(folder: str) -> list[Traversable]:
    folders: list[Traversable] = [files("fedsigma.configs") / "datasets"]
    if folder:
        folders.append(Path(folder).expanduser())
        if not folders[-1].is_dir():
            raise CardError(f"$FEDSIGMA_CARDS is '{folder}', which is not a folder")
    return [item for parent in folders for item in parent.iterdir() if item.name.endswith(".yaml")]


def card(name: str) -> DatasetCard:
    """Return the card of a data set.

    Raises:
        CardError: There is no such card.
    """
    if name not in cards():
        raise CardError(f"there is no card '{name}'{did_you_mean(name.lower(), cards())}")
    return cards()[name]


def card_text(name: str) -> str:
    """Return the YAML of a card; raises as `card`."""
    return _read_all(os.environ.get("FEDSIGMA_CARDS", ""))[1][card(name).name]
