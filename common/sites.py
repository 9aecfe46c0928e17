"""From a data section to the images of one site: the few-shot training part and the test part."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import TYPE_CHECKING

from fedsigma.common.config import DataConfig
from fedsigma.common.reading import build

if TYPE_CHECKING:
    from fedsigma.common.data import Record, SiteData, Source

__all__ = ["NoImages", "load_site", "simulated_sites", "usable_records"]


class NoImages(ValueError):
    """A site has no image to train on."""


def usable_records(source: Source, data: DataConfig, *, classes: tuple[str, ...], seed: int) -> list[Record]:
    """Return a source's records with a class of the study, each in the train or the test part."""
    from fedsigma.common.data import split_groups

    wanted = [record for record in source.records if record.label in classes]
    return list(split_groups(wanted, test_share=data.test_share, seed=seed))


@lru_cache(maxsize=2)
def simulated_sites(
    data_json: str, classes: tuple[str, ...], seed: int
) -> tuple[Source, dict[str, list[Record]]]:
    """Open a simulation's source and divide it: site name -> its records, in the order of the partition.

    Args:
        data_json: the study's data section as JSON (text, so that equal sections share the cache).
        classes: the classes of the study; images of others are left out.
        seed: the study's seed.
    """
    from fedsigma.common.data import open_source, partition

    data = build(DataConfig, json.loads(data_json), where="the data section")
    source = open_source(data.source, **data.options)
    records = usable_records(source, data, classes=classes, seed=seed)
    return source, dict(partition(records, data.sites_by, seed))


def load_site(
    source: Source,
    records: list[Record],
    *,
    name: str,
    classes: tuple[str, ...],
    shots: int,
    seed: int,
    side: int,
    max_examples: int | None = None,
) -> SiteData:
    """Draw a site's few training images and load them and its test images.

    Units: side in pixels.

    Raises:
        NoImages: the site has no training image of any class.
    """
    from fedsigma.common.data import SiteData, few_shot, load_examples

    chosen = few_shot(records, shots=shots, classes=list(classes), seed=seed)[:max_examples]
    if not chosen:
        raise NoImages(f"site '{name}' has no training image of the study's classes")
    test = [record for record in records if record.split == "test"]
    return SiteData(
        name=name,
        train=load_examples(source, chosen, list(classes), side=side),
        test=load_examples(source, test, list(classes), side=side),
    )
