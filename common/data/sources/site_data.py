"""The images of a site: the few-shot training part and the test part."""

from __future__ import annotations

import contextlib
from functools import lru_cache
from typing import TYPE_CHECKING

from fedsigma.common.config.schema import ConfigError
from fedsigma.common.config.study import DataConfig, StudyConfig
from fedsigma.common.utils.errors import FedSigmaError

if TYPE_CHECKING:
    from fedsigma.common.data.loading import Example, SiteData
    from fedsigma.common.data.records import Record, Source

__all__ = ["NoImages", "check_pictures", "load_site", "load_sites", "simulated_sites", "usable_records"]


class NoImages(FedSigmaError, ValueError):
    """A site has no image to train on."""


def usable_records(
    source: Source, *, classes: tuple[str, ...], test_share: float, on_problem: str, seed: int
) -> list[Record]:
    """Return a source's records with a class of the study, each with a split; pictures are not decoded.

    Raises:
        DataError: There are problems and on_problem is 'stop', or no record is usable.
    """
    from fedsigma.common.data.sampling import split_groups
    from fedsigma.common.data.validation import check_source

    report = check_source(source, classes=classes, pictures=False)
    return split_groups(report.require_usable(on_problem), test_share=test_share, seed=seed)


def check_pictures(data: DataConfig, classes: tuple[str, ...], seed: int) -> str:
    """Decode every picture of a simulation once; return a report of the problems, empty without any.

    Raises:
        DataError: There are problems and the data section's on_problem is 'stop', or no record is usable.
    """
    from fedsigma.common.data.validation import check_source

    report = check_source(simulated_sites(data, classes, seed)[0], classes=classes)
    report.require_usable(data.on_problem)
    return "" if report.ok else report.to_text()


@lru_cache(maxsize=2)
def simulated_sites(
    data: DataConfig, classes: tuple[str, ...], seed: int
) -> tuple[Source, dict[str, list[Record]]]:
    """Open a simulation's source and divide it: site name -> its records, in the order of the partition.

    Raises:
        DataError: The data cannot be read or divided, or have problems and on_problem is 'stop'.
    """
    from fedsigma.common.data.partition import partition
    from fedsigma.common.data.sources.registry import open_source

    source = open_source(data.source, **data.options)
    records = usable_records(
        source, classes=classes, test_share=data.test_share, on_problem=data.on_problem, seed=seed
    )
    return source, partition(records, data.sites_by, seed)


def load_sites(study: StudyConfig, *, side: int) -> dict[str, SiteData]:
    """Load the images of every site of a simulation, by name; `side` as in `load_site`.

    Raises:
        ConfigError: The study has no data section.
        NoImages, DataError: As for `load_site` and `simulated_sites`.
    """
    if study.data is None:
        raise ConfigError(f"study '{study.name}' has no data section, so its images are at its sites")
    source, parts = simulated_sites(study.data, study.classes, study.seed)
    return {
        name: load_site(
            source,
            records,
            name=name,
            classes=study.classes,
            shots=study.shots,
            seed=study.seed,
            side=side,
            on_problem=study.data.on_problem,
        )
        for name, records in parts.items()
    }


def load_site(
    source: Source,
    records: list[Record],
    *,
    name: str,
    classes: tuple[str, ...],
    shots: int,
    seed: int,
    side: int,
    on_problem: str = "stop",
    max_examples: int | None = None,
) -> SiteData:
    """Draw a site's training images, and load them and its test images.

    Args:
        source: The source of the records.
        records: The site's records, each with a split.
        name: Name of the site.
        classes: Classes of the study.
        shots: Training images of each class.
        seed: Seed of the draw.
        side: Largest length of the shorter side in pixels.
        on_problem: 'skip' drops pictures that cannot be decoded.
        max_examples: Largest number of training images, taken evenly from all classes.

    Raises:
        NoImages: The site has no training image of any class.
        DataError: A picture cannot be decoded and on_problem is 'stop'.
    """
    from fedsigma.common.data.loading import SiteData
    from fedsigma.common.data.sampling import few_shot, in_turns

    train = few_shot(records, shots=shots, classes=list(classes), seed=seed)
    if max_examples is not None and len(train) > max_examples:
        train = in_turns(train, lambda record: record.label)[:max_examples]
    if not train:
        raise NoImages(f"site '{name}' has no training image of the study's classes")
    test = [record for record in records if record.split == "test"]
    return SiteData(
        name=name,
        train=_load(source, train, classes, side, on_problem),
        test=_load(source, test, classes, side, on_problem),
    )


def _load(
    source: Source, records: list[Record], classes: tuple[str, ...], side: int, on_problem: str
) -> list[Example]:
    from fedsigma.common.data.loading import load_examples
    from fedsigma.common.data.records import PictureError

    try:
        return load_examples(source, records, classes, side=side)
    except PictureError:
        if on_problem == "stop":
            raise
    examples: list[Example] = []
    for record in records:
        with contextlib.suppress(PictureError):
            examples += load_examples(source, [record], classes, side=side)
    return examples
