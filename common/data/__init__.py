"""Pictures of a site or a simulation: sources, checks, splits, few-shot draws, partitions and decoding."""

# Importing a module registers its source.
from fedsigma.common.data.loading import Example, SiteData, load_examples
from fedsigma.common.data.partition import partition
from fedsigma.common.data.records import (
    DataError,
    MissingPicture,
    PictureError,
    Pictures,
    Problem,
    Record,
    SiteRow,
    Source,
    UnsupportedPicture,
    site_table,
)
from fedsigma.common.data.sampling import few_shot, halves, split_groups
from fedsigma.common.data.sources.csv_manifest import open_manifest
from fedsigma.common.data.sources.dicom import open_dicom
from fedsigma.common.data.sources.folder import open_folder
from fedsigma.common.data.sources.medmnist import open_medmnist
from fedsigma.common.data.sources.parquet import open_parquet
from fedsigma.common.data.sources.published import open_coop
from fedsigma.common.data.sources.registry import known_sources, open_source, register_source
from fedsigma.common.data.synthetic.blood_smears import open_demo
from fedsigma.common.data.validation import KINDS, Report, check

__all__ = [
    "KINDS",
    "DataError",
    "Example",
    "MissingPicture",
    "PictureError",
    "Pictures",
    "Problem",
    "Record",
    "Report",
    "SiteData",
    "SiteRow",
    "Source",
    "UnsupportedPicture",
    "check",
    "few_shot",
    "halves",
    "known_sources",
    "load_examples",
    "open_coop",
    "open_demo",
    "open_dicom",
    "open_folder",
    "open_manifest",
    "open_medmnist",
    "open_parquet",
    "open_source",
    "partition",
    "register_source",
    "site_table",
    "split_groups",
]
