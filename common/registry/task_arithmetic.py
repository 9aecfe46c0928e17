"""Sums of shifts: scale one, go part of the way from the pretrained model, merge several.

A weight is linear in its shift, W(d) = W0 + U diag(d) V^T, so a sum of shifts of one basis is the same sum of
changes of the weights: sum_i c_i d_i gives W0 + sum_i c_i (W(d_i) - W0). That is task arithmetic (Ilharco et
al., Editing Models with Task Arithmetic, 2023), in the coordinates that the studies trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fedsigma.common.registry.manifest import Manifest, ModelError
from fedsigma.common.registry.publish import add_version, draft_manifest, load_version
from fedsigma.common.registry.shift_file import SavedShift, to_bytes
from fedsigma.common.registry.store import ModelRegistry, Version

__all__ = ["WeightedVersion", "combine", "describe_terms", "publish_combination"]


@dataclass(frozen=True)
class WeightedVersion:
    """A version and its factor in a weighted sum.

    Attributes:
        version: Version of a model.
        factor: Factor of its shift.
    """

    version: Version
    factor: float


def combine(terms: Sequence[tuple[SavedShift, float]]) -> SavedShift:
    """Return the weighted sum of shifts, with the first one's study, layout and fingerprint.

    Args:
        terms: Shifts with their factors.

    Raises:
        ModelError: There are no terms, or they differ in backbone, layout or basis.
    """
    from fedsigma.common.sigma import Fingerprint

    if not terms:
        raise ModelError("there are no versions to combine: name at least one")
    first = terms[0][0]
    mark = Fingerprint.from_json(first.fingerprint_json)
    total = first.shift.double() * terms[0][1]
    for saved, factor in terms[1:]:
        difference = mark.describe_mismatch(Fingerprint.from_json(saved.fingerprint_json))
        if difference or saved.layout_json != first.layout_json:
            raise ModelError(
                f"shifts of different bases cannot be added: {difference or 'their layouts differ'}"
            )
        total = total + saved.shift.double() * factor
    return replace(first, shift=total.float(), run="")


def describe_terms(terms: Sequence[WeightedVersion]) -> str:
    """Format a weighted sum: `0.5 a@1 + 0.5 b@2`."""
    return " + ".join(f"{term.factor:g} {term.version.manifest.reference}" for term in terms)


def publish_combination(registry: ModelRegistry, name: str, terms: Sequence[WeightedVersion]) -> Version:
    """Publish a weighted sum as a new version. It has not been evaluated, so it has no results.

    Args:
        registry: Registry to add the version to.
        name: Name of the new model.
        terms: Versions and their factors.

    Raises:
        ModelError: As `combine`, or the name is invalid, or a version has personal values at its sites.
    """
    loaded = [(load_version(term.version), term.factor) for term in terms]
    for term, (saved, _) in zip(terms, loaded, strict=True):
        if saved.run:
            raise ModelError(
                f"{term.version.manifest.reference} is the shared part of a model with personal values at its"
                " sites: it cannot be combined with other versions"
            )
    total = combine(loaded)
    draft: Manifest = replace(
        draft_manifest(total, origin=f"computed as {describe_terms(terms)}"),
        name=name,
        parents=tuple(term.version.manifest.reference for term in terms),
    )
    return add_version(registry, draft, to_bytes(total), total.study_yaml)
