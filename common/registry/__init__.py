"""The registry of finished models: each is a version with a signed manifest. Needs no torch to be read."""

from fedsigma.common.registry.manifest import Manifest, ModelError, Signer, SiteRow, method_rows
from fedsigma.common.registry.store import ModelRegistry, Version, registry_folder

__all__ = [
    "Manifest",
    "ModelError",
    "ModelRegistry",
    "Signer",
    "SiteRow",
    "Version",
    "method_rows",
    "registry_folder",
]
