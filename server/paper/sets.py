"""Published sets as they lie on this machine: which are here, how they are opened, how they differ."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, overload

from torch import Tensor

from fedsigma.common.cards import CardError, DatasetCard, Protocol, Protocols, card, cards
from fedsigma.common.data import Record, Source, halves, load_examples, open_source
from fedsigma.common.data.medmnist import SIZES
from fedsigma.server.paper.tables import PaperTable

if TYPE_CHECKING:
    from fedsigma.common.data import Example

__all__ = ["LazyExamples", "PublishedSet", "find_sets", "open_set"]

_MEDMNIST = "medmnist"
# MedMNIST has no configurations of CLIP-SVD's but those of the two sets that its paper took from it.
_AS_DERMAMNIST = "dermamnist"


@dataclass(frozen=True, kw_only=True)
class PublishedSet:
    """One set that is on this machine.

    Fields: name; title; source, how a study's data section names it; classes, as they go into prompts, in the
    order of the set's label numbers; template; protocols, the published configurations; differs, what is
    otherwise than on its card.
    """

    name: str
    title: str
    source: str
    classes: tuple[str, ...]
    template: str
    protocols: Protocols
    backbone: str
    differs: tuple[str, ...] = ()

    def half(self, which: str | None) -> tuple[str, ...]:
        """The classes: all, or those of the 'base' or 'novel' half."""
        return self.classes if which is None else halves(self.classes)[which == "novel"]

    def prompts(self, which: str | None = None) -> tuple[str, ...]:
        """The template filled with each class name."""
        return tuple(self.template.format(name) for name in self.half(which))

    def protocol(self, name: str) -> Protocol:
        """The published configuration of a protocol, or of few-shot where there is none for it.

        Raises:
            CardError: the card has neither.
        """
        found: Protocol | None = getattr(self.protocols, name) or self.protocols.few_shot
        if found is None:
            raise CardError(f"the card of {self.title} has no configuration for {name}: choose another set")
        return found


def find_sets(
    table: PaperTable, root: Path, names: Sequence[str] = ()
) -> tuple[list[PublishedSet], dict[str, str]]:
    """The sets of a table that are below a folder.

    Args:
        table: its domain, and the set that training is on.
        root: each set is in a folder as its card calls it; MedMNIST's files are there, too.
        names: those wanted; by default all of the table. `medmnist:NAME:SIZE` is one that the package has.

    Returns:
        The sets that are here, that of training first, and the reason by name for each that is not.

    Raises:
        CardError: a name is not known or not of this table.
    """
    known = {one.name: one for one in cards().values() if one.domain == table.domain}
    wanted = list(names) or list(known)
    if table.trained_on:
        wanted = [table.trained_on, *(name for name in wanted if name != table.trained_on)]
    found, missing = [], {}
    for name in wanted:
        if name not in known and name != table.trained_on and not name.startswith(f"{_MEDMNIST}:"):
            card(name)  # names the nearest one if there is none
            raise CardError(f"{name} is not of this table: its sets are {', '.join(known)}")
        if name.startswith(f"{_MEDMNIST}:"):
            found.append(_medmnist(name, root))
            continue
        folder = root / card(name).layout.folder
        if not folder.is_dir():
            missing[name] = f"there is no folder {folder}: fedsigma data fetch {name} {folder}"
        else:
            found.append(open_set(card(name), folder))
    return found, missing


def open_set(chosen: DatasetCard, folder: Path) -> PublishedSet:
    """One set of a card.

    Raises:
        DataError: the folder cannot be read as that set.
    """
    from fedsigma.common.cards.checking import differences

    source = f"coop:{chosen.name}:{folder.resolve()}"
    return PublishedSet(
        name=chosen.name,
        title=chosen.title,
        source=source,
        classes=_source(source, (), None).classes,
        template=chosen.template,
        protocols=chosen.protocols,
        backbone=chosen.backbone,
        differs=tuple(differences(chosen, folder)),
    )


def _medmnist(name: str, root: Path) -> PublishedSet:
    _, _, place = name.partition(":")
    short, _, size = place.partition(":")
    size = size or str(SIZES[0])
    source, like = f"{_MEDMNIST}:{short}:{size}", card(_AS_DERMAMNIST)
    opened = open_source(source, root=str(root))
    assert hasattr(opened, "classes")
    return PublishedSet(
        name=name,
        title=f"{short}, {size} pixels",
        source=source,
        classes=opened.classes,
        template=like.template,
        protocols=like.protocols,
        backbone=like.backbone,
    )
