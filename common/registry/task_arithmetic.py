"""Sums of shifts: scale one, go part of the way from the pretrained model, merge several.

A weight is linear in its shift, W(d) = W0 + U diag(d) V^T, so a sum of shifts of one basis is the same sum of
changes of the weights: sum_i c_i d_i gives W0 + sum_i c_i (W(d_i) - W0). That is task arithmetic (Ilharco et
al., Editing Models with Task Arithmetic, 2023), in the coordinates that the studies trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fedsigma.common.registry.manifest import ModelError
from fedsigma.common.registry.publish import add_version, draft_manifest
from fedsigma.common.registry.shift_file import SavedShift, load_shift, to_bytes
from fedsigma.common.registry.store import ModelRegistry, Version

__all__ = ["combine", "publish_combination"]


def combine(terms: Sequence[tuple[SavedShift, float]]) -> SavedShift:
    """Return the sum of shifts times their factors, with the study, layout and fingerprint of the first.

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


def publish_combination(
    registry: ModelRegistry, name: str, terms: Sequence[tuple[Version, float]]
) -> Version:
    """Publish a sum of versions times their factors. It has not been evaluated, so it has no results.

    Raises:
        ModelError: As `combine`, or the name is invalid, or a version has personal values at its sites.
    """
    references = tuple(version.manifest.reference for version, _ in terms)
    loaded = [(load_shift(version.path), factor) for version, factor in terms]
    for reference, (saved, _) in zip(references, loaded, strict=True):
        if saved.run:
            raise ModelError(
                f"{reference} is the shared part of a model with personal values at its sites:"
                " it cannot be combined with other versions"
            )
    total = combine(loaded)
    origin = " + ".join(f"{term[1]:g} {reference}" for term, reference in zip(terms, references, strict=True))
    draft = draft_manifest(total, origin=f"computed as {origin}")
    return add_version(
        registry, replace(draft, name=name, parents=references), to_bytes(total), total.study_yaml
    )
