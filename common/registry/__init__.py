"""Registry of finished models: versions with signed manifests. Reading a manifest does not import torch."""

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
