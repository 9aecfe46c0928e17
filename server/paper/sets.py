"""Published sets on this machine: which exist, how they are opened, how they differ from their cards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from fedsigma.common.data.catalog.card import CardError, DatasetCard, Protocol, Protocols, card, cards
from fedsigma.common.data.records import DataError, Record, Source
from fedsigma.common.data.sampling import base_and_novel
from fedsigma.common.data.sources.registry import open_source
from fedsigma.common.data.sources.verify import compare_with_card
from fedsigma.server.paper.tables import PaperTable

__all__ = ["UNPUBLISHED", "PublishedSet", "TableSets", "find_sets", "published_on"]

_MEDMNIST = "medmnist"
UNPUBLISHED = Protocol(learning_rate=0.007, weight_decay=0, epochs=100)
"""For sets without a published configuration: the commonest few-shot one of biomedical sets."""


@dataclass(frozen=True, kw_only=True)
class PublishedSet:
    """One set on this machine.

    Attributes:
        name: Name of the set.
        source: Source, as in a study's data section.
        classes: Class names for prompts, in the order of the set's labels.
        template: Prompt template.
        protocols: Published configurations.
        backbone: Backbone of the paper's study.
        digest: Digest of the lists of training and test images.
        options: Options of the source.
        differences: Differences from the set's card.
    """

    name: str
    source: str
    classes: tuple[str, ...]
    template: str
    protocols: Protocols
    backbone: str
    digest: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    differences: tuple[str, ...] = ()

    def half(self, half: str | None) -> tuple[str, ...]:
        """Return the classes of the `base` or `novel` half; None for all."""
        return self.classes if half is None else base_and_novel(self.classes)[half == "novel"]

    def prompts(self, half: str | None) -> tuple[str, ...]:
        """Return the prompt of each class of a half."""
        return tuple(self.template.format(name) for name in self.half(half))

    def records(self, part: str, half: str | None) -> tuple[Source, list[Record]]:
        """Return the open source, and the records of a part with the classes of a half."""
        source, classes = _open_cached(self.source, *self.options.items()), set(self.half(half))
        return source, [r for r in source.records if r.split == part and r.label in classes]

    def has_protocol(self, protocol: str) -> bool:
        """Return whether a configuration of this protocol is published."""
        return self.protocols.of(protocol) is not None

    def protocol(self, name: str) -> Protocol:
        """Return the published configuration of a protocol, of few-shot, or `UNPUBLISHED`."""
        return self.protocols.of(name) or self.protocols.few_shot or UNPUBLISHED


@dataclass(frozen=True, kw_only=True)
class TableSets:
    """A table's sets on this machine.

    Attributes:
        table: The table.
        found: Sets, the one that models are trained on first.
        missing: Reasons by name of the sets that are missing or cannot be read.
    """

    table: PaperTable
    found: tuple[PublishedSet, ...]
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def evaluated(self) -> tuple[PublishedSet, ...]:
        """Sets that models are evaluated on, without the one that every model is trained on."""
        return tuple(s for s in self.found if s.name != self.table.trained_on)

    @property
    def trained(self) -> tuple[PublishedSet, ...]:
        """Sets that models are trained on."""
        return tuple(s for s in self.found if self.table.trained_on in ("", s.name))

    @property
    def averaged(self) -> list[str]:
        """Names of the sets in averages: those with a published configuration, or all if none has one.

        The others are not in the paper's averages and would distort them: half of BUSI's three classes is a
        single class, on which every model has accuracy 1.
        """
        published = [s.name for s in self.evaluated if s.has_protocol(self.table.protocol)]
        return published or [s.name for s in self.evaluated]


@lru_cache(maxsize=64)
def _open_cached(source: str, *options: tuple[str, Any]) -> Any:
    """Open a source once, since reading a list of a million images takes seconds and each cell needs it."""
    return open_source(source, **dict(options))


def find_sets(table: PaperTable, root: Path, names: Sequence[str] = ()) -> TableSets:
    """Find the sets of a table below a folder.

    Args:
        table: The table.
        root: Folder with the folder of each set, named as on its card, and MedMNIST's files.
        names: Sets to find, also `medmnist:NAME:SIZE`; by default all of the table's cards.

    Raises:
        CardError: A name is unknown or not of this table, or `root` does not exist.
    """
    if not root.is_dir():
        raise CardError(f"there is no folder {root}: name by --data the one that has the sets' folders")
    table_names = [c.name for c in cards().values() if c.domain == table.domain]
    first = (table.trained_on,) if table.trained_on else ()
    found, missing = [], {}
    for name in dict.fromkeys((*first, *(names or table_names))):
        folder = root
        try:
            if name.startswith(f"{_MEDMNIST}:"):
                # Without a card: template and backbone are the same for all of MedMNIST's sets.
                opened = _open_set(card("dermamnist"), name, {"root": str(root.resolve())})
                found.append(replace(opened, name=name, protocols=Protocols()))
                continue
            chosen = card(name)
            if name not in table_names and name != table.trained_on:
                raise CardError(f"{name} is not of this table: its sets are {', '.join(table_names)}")
            folder = root / chosen.layout.folder
            if not folder.is_dir():
                how = f"fetch {name} {folder}" if chosen.archives else f"cards {name}"
                missing[name] = f"no folder {folder}; to get it: fedsigma data {how}"
                continue
            opened = _open_set(chosen, f"coop:{name}:{folder.resolve()}", {})
            found.append(replace(opened, differences=tuple(compare_with_card(chosen, folder))))
        except DataError as error:
            missing[name] = f"{folder} cannot be read: {error}"
    return TableSets(table=table, found=tuple(found), missing=missing)


def published_on(table: PaperTable) -> set[str]:
    """Return the names of the sets with a published configuration of a table's protocol."""
    return {
        c.name
        for c in cards().values()
        if c.domain == table.domain and c.protocols.of(table.protocol) is not None
    }


def _open_set(like: DatasetCard, source: str, options: dict[str, Any]) -> PublishedSet:
    opened = _open_cached(source, *options.items())
    return PublishedSet(
        name=like.name,
        source=source,
        classes=opened.classes,
        template=like.template,
        protocols=like.protocols,
        backbone=like.backbone,
        digest=_digest(opened),
        options=options,
    )


def _digest(source: Source) -> str:
    """Return the digest of the training and test images with their labels and sites, in any order."""
    lines = sorted(
        json.dumps([r.key, r.label, r.split, r.site, r.group])
        for r in source.records
        if r.split in ("train", "test")
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
