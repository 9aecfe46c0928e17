"""The method: adapt a CLIP model by its singular values alone (CLIP-SVD: Koleilat et al., TMLR 2026)."""

from fedsigma.common.sigma.architectures import LAYER_SPECS, LayerSpec, WeightSpec, find_layout
from fedsigma.common.sigma.autograd import PerSampleUnsupported
from fedsigma.common.sigma.basis import Basis, BasisError, Fingerprint, cached_basis
from fedsigma.common.sigma.layout import Entry, Layout, LayoutError
from fedsigma.common.sigma.model import SigmaModel, default_cache_dir
from fedsigma.common.sigma.partition import ParameterPartition
from fedsigma.common.sigma.per_sample import PerSampleGradients

__all__ = [
    "LAYER_SPECS",
    "Basis",
    "BasisError",
    "Entry",
    "Fingerprint",
    "LayerSpec",
    "Layout",
    "LayoutError",
    "ParameterPartition",
    "PerSampleGradients",
    "PerSampleUnsupported",
    "SigmaModel",
    "WeightSpec",
    "cached_basis",
    "default_cache_dir",
    "find_layout",
]
