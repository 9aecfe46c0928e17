"""Published sets as they lie on this machine: which are here, how they are opened, how they differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from fedsigma.common.data.catalog import CardError, DatasetCard, Protocol, Protocols, card, cards
from fedsigma.common.data.records import DataError, Record, Source
from fedsigma.common.data.sampling import base_and_novel
from fedsigma.common.data.sources.registry import open_source
from fedsigma.common.data.sources.verify import compare_with_card
from fedsigma.server.paper.tables import PaperTable

__all__ = ["UNPUBLISHED", "PublishedSet", "TableSets", "find_sets", "published_on"]

_MEDMNIST = "medmnist"
UNPUBLISHED = Protocol(learning_rate=0.007, weight_decay=0, epochs=100)
"""For sets that CLIP-SVD publishes no configuration of: its commonest few-shot one of biomedical sets."""


@dataclass(frozen=True, kw_only=True)
class PublishedSet:
    """One set that is on this machine.

    Fields: name; title; source and options, as a study's data section names it; classes, as they go into
    prompts, in the order of the set's label numbers; template; protocols, the published configurations;
    backbone, of the paper's study; digest, of the lists of training and test images; differs, what is
    otherwise than on its card.
    """

    name: str
    title: str
    source: str
    classes: tuple[str, ...]
    template: str
    protocols: Protocols
    backbone: str
    digest: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    differs: tuple[str, ...] = ()

    def half(self, which: str | None) -> tuple[str, ...]:
        """The classes: all, or those of the 'base' or 'novel' half."""
        return self.classes if which is None else base_and_novel(self.classes)[which == "novel"]

    def prompts(self, which: str | None = None) -> tuple[str, ...]:
        """The template filled with each class name."""
        return tuple(self.template.format(name) for name in self.half(which))

    def records(self, part: str, which: str | None = None) -> tuple[Source, list[Record]]:
        """The open source, and the records of one part, of all classes or of one half of them."""
        source, wanted = _opened(self.source, *self.options.items()), set(self.half(which))
        return source, [one for one in source.records if one.split == part and one.label in wanted]

    def publishes(self, protocol: str) -> bool:
        """Whether there is a published configuration of a protocol on this set."""
        return self.protocols.of(protocol) is not None

    def protocol(self, name: str) -> Protocol:
        """The published configuration of a protocol, or of few-shot, or what most biomedical sets have."""
        return self.protocols.of(name) or self.protocols.few_shot or UNPUBLISHED


@dataclass(frozen=True, kw_only=True)
class TableSets:
    """A table's sets on this machine.

    Fields: table; found, that of training first; missing, by name why a set is not here or cannot be read.
    """

    table: PaperTable
    found: tuple[PublishedSet, ...]
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def evaluated(self) -> tuple[PublishedSet, ...]:
        """Those that models are judged on: all but the one that every model is trained on."""
        return tuple(one for one in self.found if one.name != self.table.trained_on)

    @property
    def trained(self) -> tuple[PublishedSet, ...]:
        """Those that models are trained on."""
        return tuple(one for one in self.found if self.table.trained_on in ("", one.name))

    @property
    def averaged(self) -> list[str]:
        """The names of those in an average: with a published configuration; all, if none has one.

        The others are not in the paper's averages, and would spoil one: half of BUSI's three classes is a
        single class, of which every model is right.
        """
        published = [one.name for one in self.evaluated if one.publishes(self.table.protocol)]
        return published or [one.name for one in self.evaluated]


@lru_cache(maxsize=64)
def _opened(source: str, *options: tuple[str, Any]) -> Any:
    """A list of a million images takes seconds to read, and each cell needs it."""
    return open_source(source, **dict(options))


def find_sets(table: PaperTable, root: Path, names: Sequence[str] = ()) -> TableSets:
    """The sets of a table that are below a folder.

    Args:
        table: Its domain, and the set that training is on.
        root: Each set is in a folder as its card calls it; MedMNIST's files are there, too.
        names: Those wanted; by default all of the table's cards. `medmnist:NAME:SIZE` is one of MedMNIST's.

    Raises:
        CardError: A name is not known or not of this table, or there is no folder `root`.
    """
    if not root.is_dir():
        raise CardError(f"there is no folder {root}: name by --data the one that has the sets' folders")
    known = [one.name for one in cards().values() if one.domain == table.domain]
    wanted = list(dict.fromkeys([*([table.trained_on] if table.trained_on else []), *(names or known)]))
    found, missing = [], {}
    for name in wanted:
        if name.startswith(f"{_MEDMNIST}:"):
            folder, read = root, partial(_medmnist, name, root)
        else:
            chosen = card(name)
            if name not in known and name != table.trained_on:
                raise CardError(f"{name} is not of this table: its sets are {', '.join(known)}")
            folder = root / chosen.layout.folder
            if not folder.is_dir():
                how = f"fetch {name} {folder}" if chosen.archives else f"cards {name}"
                missing[name] = f"no folder {folder}; to get it: fedsigma data {how}"
                continue
            read = partial(_of_card, chosen, folder)
        try:
            found.append(read())
        except DataError as error:
            missing[name] = f"{folder} cannot be read: {error}"
    return TableSets(table=table, found=tuple(found), missing=missing)


def published_on(table: PaperTable) -> set[str]:
    """The names of the sets that CLIP-SVD publishes a configuration of a table's protocol for."""
    return {
        one.name
        for one in cards().values()
        if one.domain == table.domain and one.protocols.of(table.protocol) is not None
    }


def _of_card(chosen: DatasetCard, folder: Path) -> PublishedSet:
    source = f"coop:{chosen.name}:{folder.resolve()}"
    opened = _opened(source)
    return PublishedSet(
        name=chosen.name,
        title=chosen.title,
        source=source,
        classes=opened.classes,
        digest=_digest(opened),
        template=chosen.template,
        protocols=chosen.protocols,
        backbone=chosen.backbone,
        differs=tuple(compare_with_card(chosen, folder)),
    )


def _digest(source: Source) -> str:
    """Of what a set lists: its training and test images with their labels and sites, in any order."""
    lists = sorted(
        json.dumps([one.key, one.label, one.split, one.site, one.group])
        for one in source.records
        if one.split in ("train", "test")
    )
    return hashlib.sha256("\n".join(lists).encode()).hexdigest()


def _medmnist(name: str, root: Path) -> PublishedSet:
    like = card("dermamnist")  # of which only what MedMNIST's sets have in common is taken
    source, options = name, {"root": str(root.resolve())}
    opened = _opened(source, *options.items())
    return PublishedSet(
        name=name,
        title=name.removeprefix(f"{_MEDMNIST}:"),
        source=source,
        classes=opened.classes,
        digest=_digest(opened),
        template=like.template,
        protocols=Protocols(),
        backbone=like.backbone,
        options=options,
    )
