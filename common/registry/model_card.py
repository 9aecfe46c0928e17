"""The model card: what a version is, how well it does, what it is for and what it is not. Markdown."""

from __future__ import annotations

from fedsigma.common.registry.manifest import Manifest

__all__ = ["write_card"]

_WORDS = {
    "zero_shot": "zero-shot, before any training",
    "local_only": "each site alone, on its own test images",
    "pooled": "all images in one place",
    "shared_only": "federated, without sites' own values",
    "federated": "federated: this model",
}
_SHOWN = ("balanced_accuracy", "auroc", "f1", "ece")

_USE = """\
## Intended use

Research on images like those that the sites trained on: the classes above, from the same kind of instrument
and preparation. The model tells which of the named classes a picture is nearest to. It names one of them for
any picture.

**It is not a medical device.** It must not be used to diagnose or treat, and no result of it may be told to a
patient as a finding.

## Limits

- Judged on the sites' own test images, a few of each class. Other hospitals' images may be judged much
  worse; a version should be judged on local images before it is relied on, even in research.
- Probabilities are the model's own. The calibration error above says how far they are from how often it is
  right.
- Pictures of none of the classes are not noticed.
- {private}
- Adapted from a general model, whose own biases remain: see the card of `{backbone}`.
"""


def write_card(manifest: Manifest, *, study: str, private: str) -> str:
    """Write the card.

    Args:
        manifest: of the version.
        study: as resolved, YAML.
        private: what differential privacy bounds, in words; empty for nothing.

    Returns:
        Markdown.
    """
    lines = [
        f"# {manifest.name}",
        "",
        f"A sigma shift for `{manifest.backbone}`: {manifest.made}, after round {manifest.rounds}.",
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
        "Training was not differentially private: that the model betrays whether a known image was trained on"
        " cannot be excluded."
    )
    lines.append(_USE.format(private=bound, backbone=manifest.backbone))
    return "\n".join([*lines, "## The study", "", "```yaml", study.rstrip(), "```", ""])


def _sites(manifest: Manifest) -> str:
    named = sorted(row.name for row in manifest.sites if row.name)
    others = len(manifest.sites) - len(named)
    words = [*named, *([f"{others} not named"] if others else [])]
    return f"{len(manifest.sites)}: {', '.join(words)}" if words else "not told"


def _results(manifest: Manifest) -> list[str]:
    if not manifest.results:
        return ["It has not been judged.", ""]
    lines = ["## How well it does", "", "Over all sites' test images:", ""]
    lines += [f"| | accuracy | {' | '.join(name.replace('_', ' ') for name in _SHOWN)} |"]
    lines += ["|---|" + "---|" * (1 + len(_SHOWN))]
    for method, row in manifest.results.items():
        values = [row.get("accuracy"), *(row.get("metrics", {}).get(name) for name in _SHOWN)]
        told = " | ".join("" if value is None else f"{100 * value:.1f} %" for value in values)
        lines.append(f"| {_WORDS.get(method, method)} | {told} |")
    accuracies = sorted(row.accuracy for row in manifest.sites if row.accuracy is not None)
    if len(accuracies) > 1:
        lines += [
            "",
            f"The site judged worst has {100 * accuracies[0]:.1f} %, the best {100 * accuracies[-1]:.1f} %.",
        ]
    return [*lines, ""]
