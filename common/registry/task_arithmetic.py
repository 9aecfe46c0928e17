"""Sums of shifts: scale one, go part of the way from the pretrained model, merge several.

A weight is linear in its shift, W(d) = W0 + U diag(d) V^T, so a sum of shifts of one basis is the same sum of
changes of the weights: sum_i c_i d_i gives W0 + sum_i c_i (W(d_i) - W0). That is task arithmetic (Ilharco et
al., Editing Models with Task Arithmetic, 2023), in the coordinates that the studies trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fedsigma.common.registry.manifest import Manifest, ModelError
from fedsigma.common.registry.publish import draft_of, load, put
from fedsigma.common.registry.shift_file import SavedShift, to_bytes
from fedsigma.common.registry.store import ModelRegistry, Version

__all__ = ["WeightedVersion", "combine", "describe_terms", "publish_combination"]


@dataclass(frozen=True)
class WeightedVersion:
    """A version and its factor in a sum."""

    version: Version
    factor: float


def combine(terms: Sequence[tuple[SavedShift, float]]) -> SavedShift:
    """The sum of shifts, each with its factor. What stands beside the shift is the first one's.

    Raises:
        ModelError: there is none, or two are not of one backbone, layout and basis.
    """
    from fedsigma.common.sigma import Fingerprint

    if not terms:
        raise ModelError("there is nothing to combine: name at least one version")
    first = terms[0][0]
    mark = Fingerprint.from_json(first.fingerprint_json)
    total = first.shift.double() * terms[0][1]
    for saved, factor in terms[1:]:
        difference = mark.describe_mismatch(Fingerprint.from_json(saved.fingerprint_json))
        if difference or saved.layout_json != first.layout_json:
            raise ModelError(f"shifts of different bases have no sum: {difference or 'their layouts differ'}")
        total = total + saved.shift.double() * factor
    return replace(first, shift=total.float(), run="")


def describe_terms(terms: Sequence[WeightedVersion]) -> str:
    """The sum in words: `0.5 a@1 + 0.5 b@2`."""
    return " + ".join(f"{term.factor:g} {term.version.manifest.reference}" for term in terms)


def publish_combination(shelf: ModelRegistry, name: str, terms: Sequence[WeightedVersion]) -> Version:
    """Make a version of a sum; it has not been judged, so it has no results.

    Raises:
        ModelError: as `combine`, or the name does not do, or a version has personal values at its sites.
    """
    loaded = [(load(term.version), term.factor) for term in terms]
    for term, (saved, _) in zip(terms, loaded, strict=True):
        if saved.run:
            raise ModelError(
                f"{term.version.manifest.reference} is the shared part of a model whose other part is at the"
                " sites: a sum of it belongs to nobody's own part"
            )
    total = combine(loaded)
    draft: Manifest = replace(
        draft_of(total, made=f"made as {describe_terms(terms)}"),
        name=name,
        parents=tuple(term.version.manifest.reference for term in terms),
    )
    return put(shelf, draft, to_bytes(total), total.study_yaml)
