"""The model card of a version: description, results, intended use and limits, in Markdown."""

from __future__ import annotations

from fedsigma.common.registry.manifest import Manifest

__all__ = ["write_card"]

_WORDS = {
    "zero_shot": "zero-shot, before training",
    "local_only": "each site alone",
    "pooled": "pooled: all images in one place",
    "shared_only": "federated, without personal values",
    "federated": "federated: this model",
}
_SHOWN = ("balanced_accuracy", "auroc", "f1", "ece")

_USE = """\
## Intended use

Research on images like those that the sites trained on: the classes above, from the same kind of instrument
and preparation. The model predicts one of the classes above for any image.

**It is not a medical device.** It must not be used to diagnose or treat, and no prediction may be reported
to a patient as a finding.

## Limits

- Evaluated on the sites' own test images, a few of each class. Accuracy on other hospitals' images may be
  much lower; evaluate a version on local images before use, even in research.
- Probabilities are not calibrated. The calibration error (ECE) above states how far confidence is from
  accuracy.
- Images of other classes are not detected.
- {private}
- Adapted from a pretrained model, whose biases remain: see the card of `{backbone}`.
"""


def write_card(manifest: Manifest, *, study: str, private: str) -> str:
    """Return the card of a version in Markdown.

    Args:
        manifest: Manifest of the version.
        study: Resolved study, YAML.
        private: Statement of the differential privacy guarantee; empty without one.
    """
    lines = [
        f"# {manifest.name}",
        "",
        f"A sigma shift for `{manifest.backbone}`: {manifest.origin}, after round {manifest.rounds}.",
        "",
        "| | |",
        "|---|---|",
        f"| classes | {', '.join(manifest.classes)} |",
        f"| sites | {_sites(manifest)} |",
        f"| backbone's weights | `{manifest.weights[:16]}…` |",
        f"| layout | `{manifest.layout[:16]}…` |",
        "",
    ]
    lines += _results(manifest)
    bound = private or (
        "Training was not differentially private: the model may reveal whether a known image was"
        " used in training."
    )
    lines.append(_USE.format(private=bound, backbone=manifest.backbone))
    return "\n".join([*lines, "## The study", "", "```yaml", study.rstrip(), "```", ""])


def _sites(manifest: Manifest) -> str:
    named = sorted(row.name for row in manifest.sites if row.name)
    others = len(manifest.sites) - len(named)
    shown = [*named, *([f"{others} not named"] if others else [])]
    return f"{len(manifest.sites)}: {', '.join(shown)}" if shown else "not reported"


def _results(manifest: Manifest) -> list[str]:
    if not manifest.results:
        return ["This version has not been evaluated.", ""]
    lines = ["## Results", "", "Over all sites' test images:", ""]
    lines += [f"| | accuracy | {' | '.join(name.replace('_', ' ') for name in _SHOWN)} |"]
    lines += ["|---|" + "---|" * (1 + len(_SHOWN))]
    for method, row in manifest.results.items():
        values = [row.get("accuracy"), *(row.get("metrics", {}).get(name) for name in _SHOWN)]
        cells = " | ".join("" if value is None else f"{100 * value:.1f} %" for value in values)
        lines.append(f"| {_WORDS.get(method, method)} | {cells} |")
    accuracies = sorted(row.accuracy for row in manifest.sites if row.accuracy is not None)
    if len(accuracies) > 1:
        lines += [
            "",
            f"Accuracy by site: lowest {100 * accuracies[0]:.1f} %, highest {100 * accuracies[-1]:.1f} %.",
        ]
    return [*lines, ""]
